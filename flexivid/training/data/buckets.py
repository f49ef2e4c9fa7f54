"""Sizes that clips are cut to. Nothing here opens a video, so that a config can be read without a decoder."""

import re
from dataclasses import dataclass

import numpy as np


class BrokenClip(Exception):
    """A clip that cannot be trained on; the message says why."""


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


def frame_indices(count: int, source_fps: float, frames: int, fps: float, start: float) -> np.ndarray | None:
    """Which of `count` source frames make a clip of `frames` at `fps`, or None if they are too few.

    start: where the clip begins, 0 (at the first frame) to 1 (as late as it can).
    """
    offsets = np.arange(frames) * source_fps / fps
    spare = count - 1 - offsets[-1]
    if spare < -0.5:
        return None
    return np.minimum(np.floor(offsets + start * max(spare, 0.0) + 0.5).astype(int), count - 1)


def choose_bucket(count: int, source_fps: float, size: tuple[int, int], buckets: list[Bucket], fps: float) -> Bucket:
    """The bucket of a clip: of those that it is long enough for, the longest, and of these the nearest in its shape.

    Raises BrokenClip if it is too short for all.
    """
    fitting = [bucket for bucket in buckets if frame_indices(count, source_fps, bucket.frames, fps, 0.0) is not None]
    if not fitting:
        shortest = min(bucket.frames for bucket in buckets)
        raise BrokenClip(f"too short: {count} frames at {source_fps:.4g} a second, {shortest} at {fps:g} are needed")
    longest = max(bucket.frames for bucket in fitting)

    def stretch(bucket: Bucket) -> float:
        return abs(np.log(bucket.width / bucket.height) - np.log(size[1] / size[0]))

    return min((bucket for bucket in fitting if bucket.frames == longest), key=lambda b: (stretch(b), -b.height))
