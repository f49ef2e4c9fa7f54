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
    """Notes which latents of the last so many clips lie in fine blocks, by step: (clips, T, H, W) bool."""

    def __init__(self, clips: int = 1):
        self._clips = clips
        self.by_step: dict[int, torch.Tensor] = {}

    def fine_blocks(self, step, selection):
        self.by_step[step] = selection.fine_latents()[-self._clips :, 0].cpu()


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


def _grid(pipe: Pipeline, size: tuple[int, ...], name: str, fine: torch.Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Of the first branch of a step: the token that each latent lies in, (T, H, W), and its colour, (T, H, W, 3).

    size: (T, H, W) of the clip. For name and fine, see `with_grid`.
    """
    runner = enabled_runner(pipe)
    call = call_of(pipe, runner, *size, text_length=1)
    base = next(iter(runner.flexes.values())).base_patch

    def of(patch_size, colour) -> tuple[np.ndarray, np.ndarray]:
        tokens, time = tokens_of(runner.family.folding(call, multiple_of(patch_size, base), base))
        shades = np.where(time % 2 == 0, 1.0, LATER)[:, None, None, None] * colour
        return tokens, np.broadcast_to(shades, (*tokens.shape, 3)).astype(np.uint8)

    name = name.removesuffix(f"/{KEPT}")
    if fine is None:
        patch_size = parse_mode(name.split("/")[0])[0]
        return of(patch_size, FINE if patch_size == base else COARSE)
    is_fine = fine.numpy()
    small, large = of(base, FINE), of(parse_mode(parse_mixed_size(name).coarse)[0], COARSE)
    numbers = np.where(is_fine, small[0] + large[0].max() + 1, large[0])
    return numbers, np.where(is_fine[..., None], small[1], large[1])


def _with_lines(frame: np.ndarray, tokens: np.ndarray, colours: np.ndarray, thickness: int) -> np.ndarray:
    """A frame (H, W, 3) with the edges of tokens; tokens, colours: those of its latents, (h, w) and (h, w, 3)."""
    down, across = frame.shape[0] // tokens.shape[0], frame.shape[1] // tokens.shape[1]
    tokens = tokens.repeat(down, 0).repeat(across, 1)
    edge = np.zeros(tokens.shape, bool)
    for width in range(1, thickness + 1):
        edge[width:] |= tokens[width:] != tokens[:-width]
        edge[:, width:] |= tokens[:, width:] != tokens[:, :-width]
    return np.where(edge[..., None], colours.repeat(down, 0).repeat(across, 1), frame)


def with_grid(
    pipe: Pipeline,
    frames: np.ndarray,
    name: str,
    fine: torch.Tensor | None = None,
    *,
    every: int = 1,
    least_side: int = LEAST_SIDE,
    thickness: int = 1,
) -> Iterator[np.ndarray]:
    """A clip with the edges of the patches of a step's first branch: frames (H, W, 3).

    Base patches have yellow edges, larger ones blue; those of every other patch in time are darker. pipe: enabled as it
    was when it made the clip. frames: (T, H, W, 3) uint8. name: of the step, as `Stretch.name`. fine: which latents a
    mixed step had in fine blocks, (T, H, W) bool. every: as many frames one is drawn. least_side: that the clip is
    enlarged to. thickness: of an edge in pixels.
    """
    runner = enabled_runner(pipe)
    tokens, colours = _grid(pipe, frames.shape[:3], name, fine)
    stride = runner.family.compression(pipe)[0]
    # Some pipelines have latent frames before those of the clip.
    before = len(tokens) - 1 - (len(frames) - 1) // stride
    for number in range(0, len(frames), every):
        at = before + -(-number // stride)
        yield _with_lines(enlarge(frames[number : number + 1], least_side)[0], tokens[at], colours[at], thickness)


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
    """The clip once for every stretch of steps, under its name and a bar of all steps: frames (H, W, 3).

    What is drawn is that of `with_grid`. steps: of the clip's summary. chosen: what `observe` has shown it. fps: of the
    clip.
    """
    powerful, found = enabled_runner(pipe).powerful, stretches(steps)
    every, width = max(1, round(len(found) * len(frames) / (LONGEST * fps))), enlarge(frames[:1], LEAST_SIDE).shape[2]
    for stretch in found:
        bar = _bar(steps, powerful, stretch, width)
        fine = chosen.by_step[stretch.first][-1] if is_mixed_size(stretch.name) else None
        for frame in with_grid(pipe, frames, stretch.name, fine, every=every):
            yield np.concatenate([bar, labelled(frame[None], stretch.label(len(steps)))[0]])
