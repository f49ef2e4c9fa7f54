"""Sizes that clips are cut to. Nothing here opens a video, so that a config can be read without a decoder."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Bucket:
    """A size that clips are cut to: frames x height x width, written as `81x480x832`."""

    frames: int
    height: int
    width: int

    @classmethod
    def parse(cls, text: str) -> "Bucket":
        """Raises ValueError for anything but three numbers above 0."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
            raise ValueError(f"a bucket is frames x height x width such as 81x480x832, not {text!r}")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"
