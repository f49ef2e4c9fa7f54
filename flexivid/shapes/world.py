"""The shapes world: captioned clips of one moving object, rendered on the fly.

Every clip shows one anti-aliased object: pattern x colour x shape x motion x background. The pattern is
the fine detail that only small patches can draw; the motion is what a video model has to get right over
time. Because the world is rendered, what a caption asks for is known exactly (see `oracle.py`).

    python -m flexivid.shapes.world --output world.png      # look at it
"""

import argparse
import itertools
import math
from dataclasses import astuple, dataclass, fields

import torch

from flexivid.files import replacing

PATTERNS = ("plain", "striped", "checked", "dotted")
COLOURS = {
    "red": (0.90, 0.10, 0.10),
    "orange": (1.00, 0.55, 0.00),
    "yellow": (0.95, 0.90, 0.10),
    "green": (0.10, 0.75, 0.20),
    "cyan": (0.10, 0.80, 0.85),
    "blue": (0.10, 0.20, 0.90),
    "purple": (0.60, 0.15, 0.75),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = tuple(f"moving {direction}" for direction in DIRECTIONS) + ("turning", "growing")
BACKGROUNDS = {"black": 0.05, "gray": 0.50, "white": 0.95}

# Never rendered for training, so that composition can be measured: (colour, shape) pairs.
HELD_OUT = {("purple", "triangle"), ("cyan", "square"), ("red", "cross")}

PATTERN_PERIOD = 6.0  # pixels; a base patch covers 8, so the pattern is detail inside one patch
DARK_TONE = 0.35  # the second colour of a pattern is the first one times this
TRAVEL = 24.0  # pixels that a moving object crosses in a clip
TURN = math.radians(128)  # that a turning object turns in a clip
GROWTH = (0.55, 1.35)  # a growing object's radius at the first and last frame, times its base radius


@dataclass(frozen=True)
class Scene:
    """What a caption says, one word or phrase a factor."""

    pattern: str
    colour: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.pattern} {self.colour} {self.shape} {self.motion} on a {self.background} background"

    @property
    def held_out(self) -> bool:
        return (self.colour, self.shape) in HELD_OUT


FACTORS = tuple(field.name for field in fields(Scene))


def all_scenes() -> list[Scene]:
    """Every scene of the world. A circle does not turn: nobody could see it."""
    scenes = (Scene(*words) for words in itertools.product(PATTERNS, COLOURS, SHAPES, MOTIONS, BACKGROUNDS))
    return [scene for scene in scenes if not (scene.shape == "circle" and scene.motion == "turning")]


def parse_caption(caption: str) -> Scene:
    """The scene of a caption written by `Scene.caption`. Raises ValueError for any other text."""
    for scene in all_scenes():
        if scene.caption == caption:
            return scene
    raise ValueError(f"not a caption of the shapes world: {caption!r}; one is {all_scenes()[0].caption!r}")


@dataclass(frozen=True)
class Layout:
    """What the caption leaves open. Lengths in units of a 64-pixel frame's pixels, angles in radians."""

    radius: float
    centre_x: float
    centre_y: float
    angle: float
    pattern_angle: float
    phase_x: float
    phase_y: float


def sample_layout(scene: Scene, generator: torch.Generator) -> Layout:
    """A random layout in which the object stays inside the 64x64 frame for the whole clip."""
    u = torch.rand(7, generator=generator).tolist()
    radius = 10 + 4 * u[0]
    reach = radius * (GROWTH[1] if scene.motion == "growing" else 1.0)
    low, high = reach + 1, 63 - reach
    centre = []
    for axis, value in enumerate(u[1:3]):
        step = DIRECTIONS.get(scene.motion.removeprefix("moving "), (0, 0))[axis] * TRAVEL
        start, stop = low + max(-step, 0), high - max(step, 0)
        centre.append(start + (stop - start) * value)
    angle = (u[3] - 0.5) * math.radians(16)
    return Layout(radius, *centre, angle, angle, u[5] * PATTERN_PERIOD, u[6] * PATTERN_PERIOD)


def fixed_layout(scene: Scene) -> Layout:
    """The layout of a committed prompt set's reference clip: one size, one speed, path centred in the frame."""
    dx, dy = DIRECTIONS.get(scene.motion.removeprefix("moving "), (0, 0))
    return Layout(12.0, 32 - dx * TRAVEL / 2, 32 - dy * TRAVEL / 2, 0.0, 0.0, 0.0, 0.0)


def _signed_distance(shape: str, x: torch.Tensor, y: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """Distance in pixels to the outline, negative inside; x, y are in the object's own frame."""
    if shape == "circle":
        return torch.hypot(x, y) - 0.9 * radius
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - 0.75 * radius
    if shape == "triangle":  # equilateral, pointing up, circumradius = radius
        slanted = (math.sqrt(3) * x.abs() - y) / 2
        return torch.maximum(slanted, y) - 0.5 * radius
    arm_x = torch.maximum(x.abs() - 0.95 * radius, y.abs() - 0.32 * radius)
    arm_y = torch.maximum(y.abs() - 0.95 * radius, x.abs() - 0.32 * radius)
    return torch.minimum(arm_x, arm_y)


def _smooth_step(distance: torch.Tensor) -> torch.Tensor:
    """Coverage of a pixel whose centre lies `distance` pixels outside an edge."""
    return (0.5 - distance).clamp(0, 1)


def _dark_coverage(pattern: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """How much of a pixel the pattern's dark tone covers, in [0, 1]; x, y in pixels of the object's frame."""
    if pattern == "plain":
        return torch.zeros_like(x)
    period = PATTERN_PERIOD
    # Triangle waves: the signed distance to the nearest stripe edge, in pixels.
    wave_x = (x % period - period / 2).abs() - period / 4
    wave_y = (y % period - period / 2).abs() - period / 4
    if pattern == "striped":
        return _smooth_step(wave_x)
    if pattern == "checked":
        bright_x, bright_y = _smooth_step(wave_x), _smooth_step(wave_y)
        return bright_x * (1 - bright_y) + bright_y * (1 - bright_x)
    return _smooth_step(torch.hypot(x % period - period / 2, y % period - period / 2) - 1.75)


def render(scenes: list[Scene], layouts: list[Layout], frames: int = 17, size: int = 64) -> torch.Tensor:
    """Clips of shape (batch, 3, frames, size, size), float32 in [-1, 1]. Time always spans the whole motion."""
    grid = (torch.arange(size, dtype=torch.float32) + 0.5) * 64 / size
    time = torch.linspace(0, 1, frames) if frames > 1 else torch.zeros(1)
    clips = torch.empty(len(scenes), 3, frames, size, size)
    for clip, scene, layout in zip(clips, scenes, layouts, strict=True):
        radius, centre_x, centre_y, angle, pattern_angle, phase_x, phase_y = astuple(layout)
        dx, dy = DIRECTIONS.get(scene.motion.removeprefix("moving "), (0, 0))
        turn = (TURN * time if scene.motion == "turning" else torch.zeros(frames)).view(-1, 1, 1)
        scale = torch.ones(frames)
        if scene.motion == "growing":
            scale = GROWTH[0] + (GROWTH[1] - GROWTH[0]) * time
        x = grid.view(1, 1, -1) - centre_x - dx * TRAVEL * time.view(-1, 1, 1)
        y = grid.view(1, -1, 1) - centre_y - dy * TRAVEL * time.view(-1, 1, 1)

        def rotated(by, x=x, y=y, turn=turn):
            cos, sin = torch.cos(by + turn), torch.sin(by + turn)
            return cos * x + sin * y, cos * y - sin * x

        inside = _smooth_step(_signed_distance(scene.shape, *rotated(angle), radius * scale.view(-1, 1, 1)) * size / 64)
        pattern_x, pattern_y = rotated(pattern_angle)
        dark = _dark_coverage(scene.pattern, pattern_x + phase_x, pattern_y + phase_y)
        tone = 1 - (1 - DARK_TONE) * dark
        for channel, value in enumerate(COLOURS[scene.colour]):
            clip[channel] = inside * tone * value + (1 - inside) * BACKGROUNDS[scene.background]
    return clips * 2 - 1


def sample_clips(
    count: int, generator: torch.Generator, frames: int = 17, size: int = 64
) -> tuple[torch.Tensor, list[Scene]]:
    """Random training clips (count, 3, frames, size, size) and their scenes, without the held-out combinations."""
    seen = [scene for scene in all_scenes() if not scene.held_out]
    picks = torch.randint(len(seen), (count,), generator=generator).tolist()
    scenes = [seen[pick] for pick in picks]
    return render(scenes, [sample_layout(scene, generator) for scene in scenes], frames, size), scenes


def main() -> None:
    parser = argparse.ArgumentParser(description="Tile some random clips of the shapes world into one picture.")
    parser.add_argument("--output", default="world.png", help="a picture; %(default)s by default")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and layouts; %(default)s by default")
    arguments = parser.parse_args()
    from PIL import Image

    clips, scenes = sample_clips(12, torch.Generator().manual_seed(arguments.seed))
    rows = clips[:, :, ::4].permute(0, 3, 2, 4, 1).reshape(12 * 64, -1, 3)
    picture = Image.fromarray(((rows + 1) * 127.5).byte().numpy()).resize((rows.shape[1] * 2, 12 * 128))
    with replacing(arguments.output) as partial:
        picture.save(partial)
    print("\n".join(scene.caption for scene in scenes))


if __name__ == "__main__":
    main()
