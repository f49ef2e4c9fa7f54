"""The patch grids that an arm ran at, drawn over the clips that the page of a sweep shows."""

from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline

import flexivid
from flexivid.files import write_json
from flexivid.patch_grid import FineBlocks, Stretch, stretches, with_grid
from flexivid.patches.sizes import GUIDED, is_mixed_size
from flexivid.running import enabled_runner
from flexivid.sampling.schedule import KEPT
from flexivid.video import write_mp4

THICKNESS = 2  # pixels of an edge: the page shows clips smaller than they are written
QUALITY = 23  # crf: the page holds these clips too


def grid_paths(folder: Path, arm: str, clip: str) -> tuple[Path, Path]:
    """Of one clip of a sweep, by its file name: the clip with grids, and what it shows, {"lines": [...]}."""
    path = folder / "grids" / arm / clip
    return path, path.with_suffix(".json")


def by_patch_size(steps: list[list[str]]) -> dict[str, list[Stretch]]:
    """The stretches of each patch size, in the order in which they ran first. steps: as `Summary.steps`."""
    found: dict[str, list[Stretch]] = {}
    for stretch in stretches(steps):
        found.setdefault(stretch.name, []).append(stretch)
    return found


def line(name: str, found: list[Stretch], steps: int) -> str:
    """`1x4x4: 20 of 40 steps, held for 9 more`; of a mixed size, which step is drawn. steps: of the whole run."""
    held = sum(stretch.held for stretch in found)
    drawn = f"; as at step {found[-1].first + 1}" if is_mixed_size(name) else ""
    more = f", held for {held} more" if held else ""
    return f"{name}: {sum(stretch.count for stretch in found)} of {steps} steps{more}{drawn}"


def write_grids(
    pipe: DiffusionPipeline,
    frames: np.ndarray,
    chosen: FineBlocks,
    place: int,
    paths: tuple[Path, Path],
    fps: float,
    least_side: int,
) -> None:
    """Writes a clip once for every patch size that it ran at, with the edges of its patches; a mixed one as at its last
    step. Nothing where all patches were the model's own.

    pipe: enabled, as it was when it made the clip. frames: (T, H, W, 3) uint8. chosen: what `observe` has shown it
    of the batch. place: of the clip in that. paths: as from `grid_paths`. least_side: that the clip is enlarged to.
    """
    steps = flexivid.summary(pipe).steps
    found = by_patch_size(steps)
    powerful = enabled_runner(pipe).powerful
    if {part for name in found for part in name.split("/")} <= {powerful, powerful + GUIDED, KEPT}:
        return
    clip, lines = paths
    clip.parent.mkdir(parents=True, exist_ok=True)

    def drawn():
        for name, own in found.items():
            fine = chosen.by_step[own[-1].first][place] if is_mixed_size(name) else None
            yield from with_grid(pipe, frames, name, fine, least_side=least_side, thickness=THICKNESS)

    write_mp4(drawn(), clip, fps, crf=QUALITY)
    write_json(lines, {"lines": [line(name, own, len(steps)) for name, own in found.items()]})
