"""Patch sizes and their notation: frames x height x width in latent pixels, as in `1x4x4`.

A mode of a model is a patch size, or one that is guidance-distilled: `1x4x4-guided`, whose one forward gives what both
guidance branches give together. A mixed patch size, `1x2x2+1x4x4@0.35`, is two in one forward: the fine one in a share
of the coarse one's blocks.
"""

import re
from dataclasses import dataclass

PatchSize = tuple[int, int, int]

GUIDED = "-guided"

_NOTATION = "write frames x height x width in latent pixels, for example 1x4x4"


def parse_patch_size(text: str) -> PatchSize:
    """`"1x4x4"` -> `(1, 4, 4)`: frames, height, width in latent pixels. Raises ValueError that names what is wrong."""
    numbers = text.split("x")
    if not all(re.fullmatch("[0-9]+", number) for number in numbers):
        raise ValueError(f"{text!r} is not a patch size; {_NOTATION}")
    if len(numbers) != 3:
        count = "1 number" if len(numbers) == 1 else f"{len(numbers)} numbers"
        raise ValueError(f"{text!r} is not a patch size: it has {count} instead of 3; {_NOTATION}")
    t, h, w = map(int, numbers)
    if 0 in (t, h, w):
        raise ValueError(f"{text!r} is not a patch size: each number must be at least 1; {_NOTATION}")
    return t, h, w


def parse_mode(text: str) -> tuple[PatchSize, bool]:
    """`"1x4x4-guided"` -> `((1, 4, 4), True)`: patch size, and whether it is guided. Raises ValueError likewise."""
    return parse_patch_size(text.removesuffix(GUIDED)), text.endswith(GUIDED)


def format_patch_size(patch_size: PatchSize) -> str:
    """`(1, 4, 4)` -> `"1x4x4"`, the inverse of `parse_patch_size`."""
    t, h, w = patch_size
    return f"{t}x{h}x{w}"


def spatially_doubled(base: PatchSize) -> str:
    """The weak patch size that is tried first: twice as large in space."""
    t, h, w = base
    return format_patch_size((t, 2 * h, 2 * w))


def multiple_of(patch_size: PatchSize, base: PatchSize) -> PatchSize:
    """How many base patches a patch spans: `(1, 4, 4)` over `(1, 2, 2)` -> `(1, 2, 2)`.

    Raises ValueError, with patch sizes that would do, where a number is not a positive multiple of the base's.
    """
    if any(p < b or p % b for p, b in zip(patch_size, base, strict=True)):
        t, h, w = base
        space, time, both = (format_patch_size(p) for p in ((t, 2 * h, 2 * w), (2 * t, h, w), (2 * t, 2 * h, 2 * w)))
        raise ValueError(
            f"{format_patch_size(patch_size)} is not an integer multiple of the model's own patch size "
            f"{format_patch_size(base)}; for example {space}, {time} or {both} would be"
        )
    t, h, w = (p // b for p, b in zip(patch_size, base, strict=True))
    return t, h, w


@dataclass(frozen=True)
class MixedSize:
    """Two patch sizes of one forward. share: of the blocks, each as large as a coarse patch, that are cut finely."""

    fine: str
    coarse: str
    share: float

    def __str__(self) -> str:
        return f"{self.fine}+{self.coarse}@{self.share:g}"


def is_mixed_size(name: str) -> bool:
    """Whether a name means to be a mixed patch size; `parse_mixed_size` tells whether it is one."""
    return "+" in name or "@" in name


def parse_mixed_size(text: str) -> MixedSize:
    """`"1x2x2+1x4x4@0.35"` -> its parts. Raises ValueError that names what is wrong."""
    match = re.fullmatch(r"([^+@]*)\+([^+@]*)@([^+@]*)", text.replace(" ", ""))
    if match is None:
        raise ValueError(f"{text!r} is not fine+coarse@share of blocks that are fine, such as 1x2x2+1x4x4@0.35")
    fine, coarse = (parse_patch_size(part) for part in match.groups()[:2])
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", match[3]) or not 0 < (share := float(match[3])) < 1:
        raise ValueError(
            f"{text!r}: the share of blocks that are fine is a number between 0 and 1, not {match[3]!r}; where all are "
            f"alike write {format_patch_size(coarse)} or {format_patch_size(fine)} alone"
        )
    multiple_of(coarse, fine)
    if coarse == fine:
        raise ValueError(f"{text!r} mixes a patch size with itself: write {format_patch_size(fine)}")
    return MixedSize(format_patch_size(fine), format_patch_size(coarse), share)


def format_mode(name: str) -> str:
    """A mode, or a mixed patch size, as it is written everywhere. Raises ValueError for what is neither."""
    if is_mixed_size(name):
        return str(parse_mixed_size(name))
    patch_size, guided = parse_mode(name)
    return format_patch_size(patch_size) + GUIDED * guided


def sizes_in(name: str) -> tuple[str, ...]:
    """The patch sizes of a mixed one, or the mode itself."""
    if not is_mixed_size(name):
        return (name,)
    mixed = parse_mixed_size(name)
    return mixed.fine, mixed.coarse
