"""The patches of a run, drawn over its clip: what each step ran at, and where mixed steps were fine."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from flexivid.patches.folding import Folding
from flexivid.patches.sizes import is_mixed_size, multiple_of, parse_mixed_size, parse_mode
from flexivid.running import call_of, enabled_runner
from flexivid.sampling.observe import Observer
from flexivid.sampling.schedule import KEPT, REUSED
from flexivid.targets import Pipeline
from flexivid.video import enlarge, labelled

FINE, COARSE, NOTHING = (255, 170, 0), (0, 190, 255), (70, 70, 70)
LATER = 0.6  # of the brightness, for every other patch in time
LEAST_SIDE = 512
BAR = 8  # pixels
LONGEST = 60.0  # seconds; of what would be longer, some frames are left out, evenly


class FineBlocks(Observer):
    """Notes which latents of the last clip lie in fine blocks, by step: (T, H, W) bool."""

    def __init__(self):
        self.by_step: dict[int, torch.Tensor] = {}

    def fine_blocks(self, step, selection):
        self.by_step[step] = selection.fine_latents()[-1, 0].cpu()


@dataclass
class Stretch:
    """Steps that show one grid: equal ones, and those after them that hold what they have predicted."""

    first: int
    name: str
    count: int = 1
    held: int = 0

    @property
    def end(self) -> int:
        """The step after the last one."""
        return self.first + self.count + self.held

    def label(self, steps: int) -> str:
        """steps: of the whole run."""
        numbers = f"step {self.end}" if self.end == self.first + 1 else f"steps {self.first + 1}-{self.end}"
        return f"{numbers} of {steps}: {self.name}" + (f", held for {self.held}" if self.held else "")


def stretches(steps: list[list[str]]) -> list[Stretch]:
    """steps: the patch sizes of each step's branches, as `Summary.steps`. A mixed step is a stretch of its own."""
    found: list[Stretch] = []
    for index, step in enumerate(steps):
        name = "/".join(dict.fromkeys(step))
        last = found[-1] if found else None
        if last is not None and set(step) == {REUSED}:
            last.held += 1
        elif last is not None and last.name == name and not last.held and not is_mixed_size(name):
            last.count += 1
        else:
            found.append(Stretch(index, name))
    return found


def _axis(sources: torch.Tensor, patch: int, length: int) -> torch.Tensor:
    """Which token each latent of an axis lies in, (length,). sources: see `Folding`."""
    tokens = torch.arange(len(sources)).floor_divide(patch)[:, None].expand_as(sources)
    # Padding is copies of the edges: the first token that holds a latent is the one that it came from.
    return torch.full((length,), len(sources)).scatter_reduce(0, sources.flatten(), tokens.flatten(), "amin")


def tokens_of(folding: Folding) -> tuple[np.ndarray, np.ndarray]:
    """The token that each latent lies in, by number (T, H, W), and the place of that token in time, (T,)."""
    t, h, w = map(_axis, folding.sources, folding.patch_size, folding.size)
    _, rows, columns = folding.coarse_grid
    return ((t[:, None, None] * rows + h[:, None]) * columns + w).numpy(), t.numpy()


def _grid(pipe: Pipeline, frames: np.ndarray, stretch: Stretch, chosen: FineBlocks) -> tuple[np.ndarray, np.ndarray]:
    """Of the first branch of a step: the token that each latent lies in, (T, H, W), and its colour, (T, H, W, 3)."""
    runner = enabled_runner(pipe)
    call = call_of(pipe, runner, *frames.shape[:3], text_length=1)
    base = next(iter(runner.flexes.values())).base_patch

    def of(patch_size, colour) -> tuple[np.ndarray, np.ndarray]:
        tokens, time = tokens_of(runner.family.folding(call, multiple_of(patch_size, base), base))
        shades = np.where(time % 2 == 0, 1.0, LATER)[:, None, None, None] * colour
        return tokens, np.broadcast_to(shades, (*tokens.shape, 3)).astype(np.uint8)

    name = stretch.name.removesuffix(f"/{KEPT}")
    if not is_mixed_size(name):
        patch_size = parse_mode(name.split("/")[0])[0]
        return of(patch_size, FINE if patch_size == base else COARSE)
    size, is_fine = parse_mixed_size(name), chosen.by_step[stretch.first].numpy()
    fine, coarse = of(base, FINE), of(parse_mode(size.coarse)[0], COARSE)
    numbers = np.where(is_fine, fine[0] + coarse[0].max() + 1, coarse[0])
    return numbers, np.where(is_fine[..., None], fine[1], coarse[1])


def _with_lines(frame: np.ndarray, tokens: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A frame (H, W, 3) with the edges of tokens; tokens, colours: those of its latents, (h, w) and (h, w, 3)."""
    down, across = frame.shape[0] // tokens.shape[0], frame.shape[1] // tokens.shape[1]
    tokens = tokens.repeat(down, 0).repeat(across, 1)
    edge = np.zeros(tokens.shape, bool)
    edge[1:] |= tokens[1:] != tokens[:-1]
    edge[:, 1:] |= tokens[:, 1:] != tokens[:, :-1]
    return np.where(edge[..., None], colours.repeat(down, 0).repeat(across, 1), frame)


def _bar(steps: list[list[str]], powerful: str, stretch: Stretch, width: int) -> np.ndarray:
    """All steps from left to right, coloured by what they ran at, the others dim: (BAR, width, 3)."""
    bar = Image.new("RGB", (width, BAR), "white")
    draw = ImageDraw.Draw(bar)
    for index, step in enumerate(steps):
        is_now = stretch.first <= index < stretch.end
        left, right = (round(place * width / len(steps)) for place in (index, index + 1))
        upper, lower = COARSE, COARSE
        if step[0] == powerful:
            upper, lower = FINE, FINE
        elif is_mixed_size(step[0]):
            upper = FINE
        elif step[0] == REUSED:
            upper = lower = NOTHING
        for top, colour in ((0, upper), (BAR // 2, lower)):
            shade = colour if is_now else tuple(round(255 - (255 - part) * 0.35) for part in colour)
            draw.rectangle((left, top, right - 2, top + BAR // 2 - 1), fill=shade)
    return np.asarray(bar)


def patches_drawn(
    pipe: Pipeline, frames: np.ndarray, steps: list[list[str]], chosen: FineBlocks, fps: float
) -> Iterator[np.ndarray]:
    """The clip once for every stretch of steps, with the edges of the patches of their first branch: frames (H, W, 3).

    Base patches have yellow edges, larger ones blue; those of every other patch in time are darker. Above are the
    stretch and a bar of all steps. pipe: enabled as it was when it made the clip. frames: (T, H, W, 3) uint8. steps: of
    its summary. chosen: what `observe` has shown it. fps: of the clip.
    """
    runner, found = enabled_runner(pipe), stretches(steps)
    every = max(1, round(len(found) * len(frames) / (LONGEST * fps)))
    stride = runner.family.compression(pipe)[0]
    large = enlarge(frames, LEAST_SIDE)
    for stretch in found:
        tokens, colours = _grid(pipe, frames, stretch, chosen)
        # Some pipelines have latent frames before those of the clip.
        before = len(tokens) - 1 - (len(frames) - 1) // stride
        bar = _bar(steps, runner.powerful, stretch, large.shape[2])
        for number in range(0, len(frames), every):
            at = before + -(-number // stride)
            lined = _with_lines(large[number], tokens[at], colours[at])
            yield np.concatenate([bar, labelled(lined[None], stretch.label(len(steps)))[0]])
