"""The judge of generated clips: which words of a shapes-world caption does a clip really show?

Nothing here is learnt. The object of a frame is the largest connected region that differs from the border's
median colour. From up to nine frames spread over the clip it reads
- background: the nearest grey of the table, within a tolerance;
- colour: the hue of the object's interior against the table, whatever its pattern darkens;
- pattern: the one whose rendering, over angles and phases, correlates best with the interior's tone, or
  plain where hardly any contrast follows it;
- shape: the template, over angles, that overlaps best with the mask scaled to unit area;
- motion: how the centroid travels, else how the area grows, else how fast the shape's template must turn.
What is not there, or is too far from every word, is None: a still object has motion None, and a clip
without an object has None for everything but its background.

    judge(clip)                  # one clip (3, T, H, W) in [-1, 1]: {"pattern": "striped", "motion": None, ...}
    adherence(clips, scenes)     # which clips show what was asked: {"pattern": tensor([True, ...]), ..., "all": ...}
"""

from collections.abc import Sequence
from functools import cache

import torch
from scipy import ndimage
from torch.nn.functional import grid_sample, interpolate, pad

from .world import BACKGROUNDS, COLOURS, FACTORS, PATTERN_PERIOD, SHAPES, Scene
from .world import _dark_coverage as dark_coverage
from .world import _signed_distance as signed_distance

# Lengths are in pixels of a 64-pixel frame; colours and tones run from 0 to 1.
FRAMES = 9  # looked at; a turning object turns 16 degrees between two of them, too little to alias
FAR_FROM_BACKGROUND = 0.13  # the dark tone of blue on black, the faintest thing rendered, is 0.27 away
CONTRAST_QUANTILE = 0.3  # of the distances in a first mask: above those of its rim, among those of its dark tone
SMALLEST_AREA = 24  # a growing triangle starts at about 40
FOUND_SHARE = 0.75  # of the frames must show an object
BACKGROUND_TOLERANCE = 0.12
HUE_COSINE = 0.95  # between an object's mean colour and the word's; orange and yellow, the closest, have 0.965
BRIGHT_ENOUGH = 0.6  # of the word's own brightness, so that brown is not orange
PATTERN_STRENGTH = 0.04  # of its contrast relative to the bright tone; above 0.16 as rendered, 0.08 after a 3x3 blur
PATTERN_CORRELATION = 0.5  # random blotches of the pattern's scale mostly stay below
SHAPE_OVERLAP = 0.75  # intersection over union
TRAVELLED = 8  # between the first and last third; a whole move makes 18
OFF_AXIS = 0.6  # at most, of that distance: a diagonal has no word
GROWN = 1.5  # area ratio between the last and first third; a whole growth makes 3.5
TURNED = 45  # degrees in a clip, out of 128
TURN_GAIN = 0.02  # in overlap over holding still, so that a shapeless blob does not seem to turn

ANGLE_STEP = 5  # degrees between templates
SHAPE_ANGLES = {"circle": ANGLE_STEP, "square": 90, "triangle": 120, "cross": 90}  # degrees until it looks the same
PATTERN_ANGLES = {"striped": 180, "checked": 90, "dotted": 90}
REACH = 20  # half the side of the window around the centroid; the largest radius is 19
GRID = 40  # side of a normalised mask, which spans two root areas


def _turned(x: torch.Tensor, y: torch.Tensor, degrees: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Coordinates in the frame of an object at an angle, as `render` turns them."""
    cos, sin = torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))
    return cos * x + sin * y, cos * y - sin * x


@cache
def _shape_templates() -> dict[str, torch.Tensor]:
    """Per shape, its masks (angles, GRID**2), centred and scaled to unit area."""
    line, fine = (torch.arange(GRID) + 0.5) * 2 / GRID - 1, torch.linspace(-1, 1, 501)
    templates = {}
    for shape in SHAPES:
        inside = signed_distance(shape, fine, fine[:, None], torch.tensor(1.0)) < 0
        radius = (inside.float().mean() * 4).rsqrt()  # every shape's centroid is its centre already
        angles = torch.arange(0.0, SHAPE_ANGLES[shape], ANGLE_STEP).view(-1, 1, 1)
        distance = signed_distance(shape, *_turned(line, line[:, None], angles), radius) * GRID / 2
        templates[shape] = (0.5 - distance).clamp(0, 1).flatten(1)
    return templates


@cache
def _pattern_templates() -> dict[str, torch.Tensor]:
    """Per pattern but plain, its bright coverage (angles x phases, window pixels) around the centroid."""
    line, phases = torch.arange(-REACH, REACH + 1.0), torch.arange(PATTERN_PERIOD)
    templates = {}
    for pattern, period in PATTERN_ANGLES.items():
        angles = torch.arange(0.0, period, ANGLE_STEP)
        # Stripes have no second phase; a checkerboard shifted by half a period both ways is itself again.
        phases_y = {"striped": phases[:1], "checked": phases[: len(phases) // 2], "dotted": phases}[pattern]
        angle, phase_x, phase_y, y, x = torch.meshgrid(angles, phases, phases_y, line, line, indexing="ij")
        x, y = _turned(x, y, angle)
        templates[pattern] = 1 - dark_coverage(pattern, x + phase_x, y + phase_y).flatten(3).flatten(0, 2)
    return templates


def _find_object(frame: torch.Tensor, background: torch.Tensor) -> torch.Tensor | None:
    """The mask of a frame's (3, 64, 64) largest object, its holes filled, or None."""
    distance = (frame - background.view(3, 1, 1)).abs().amax(0)
    threshold = FAR_FROM_BACKGROUND
    for _ in range(2):
        regions, count = ndimage.label((distance > threshold).numpy())
        sizes = torch.bincount(torch.from_numpy(regions).flatten().long(), minlength=2)[1:]
        mask = torch.from_numpy(regions == sizes.argmax().item() + 1)
        # Something that fills the frame has no shape to judge.
        if count == 0 or not SMALLEST_AREA <= mask.sum() <= mask.numel() // 2:
            return None
        # The second time at half the object's own contrast, where its edge lies however blurred it is.
        threshold = max(FAR_FROM_BACKGROUND, distance[mask].quantile(CONTRAST_QUANTILE).item() / 2)
    return torch.from_numpy(ndimage.binary_fill_holes(mask.numpy()))


def _interior(mask: torch.Tensor) -> torch.Tensor:
    """The mask without the rim that blur mixes with the background, as far as a thin object can spare it."""
    for rim in (2, 1):
        eroded = torch.from_numpy(ndimage.binary_erosion(mask.numpy(), iterations=rim))
        if eroded.sum() >= 30:
            return eroded
    return mask


def _colour(pixels: torch.Tensor) -> str | None:
    """The colour word of interior pixels (3, n). A pattern scales a colour, so the hue decides."""
    table = torch.tensor(list(COLOURS.values()))
    cosines = torch.cosine_similarity(pixels.mean(1).view(1, 3), table)
    best = cosines.argmax()
    brightness = (table[best] @ pixels).quantile(0.9) / table[best].square().sum()
    return list(COLOURS)[best] if cosines[best] > HUE_COSINE and brightness > BRIGHT_ENOUGH else None


def _pattern(frames: torch.Tensor, interiors: torch.Tensor, centres: torch.Tensor) -> str | None:
    """The pattern word of frames (n, 3, 64, 64), given their objects' interiors and centroids (x, y)."""
    tones, windows, contrast = [], [], 0.0
    for frame, interior, (x, y) in zip(frames, interiors, centres.round().long().tolist(), strict=True):
        tone = (frame * frame[:, interior].mean(1).view(3, 1, 1)).sum(0)
        contrast += (tone[interior].std() / tone[interior].quantile(0.9)).item() / len(frames)
        tone = (tone - tone[interior].mean()) * interior
        both = pad(torch.stack([tone / tone.norm().clamp_min(1e-6), interior]), [REACH] * 4)
        tone, window = both[:, y : y + 2 * REACH + 1, x : x + 2 * REACH + 1].flatten(1)
        tones.append(tone)
        windows.append(window)
    tones, windows = torch.stack(tones, 1), torch.stack(windows, 1)
    scores = {}
    for pattern, bright in _pattern_templates().items():
        # Correlation inside each window: the tones have mean 0 and norm 1 there, the templates do not yet.
        spread = bright.square() @ windows - (bright @ windows).square() / windows.sum(0)
        scores[pattern] = ((bright @ tones) / spread.clamp_min(1e-3).sqrt()).amax(0).mean().item()
    best = max(scores, key=scores.get)
    # Only contrast that follows a pattern counts against plain; noise and shading do not.
    if contrast * scores[best] < PATTERN_STRENGTH:
        return "plain"
    return best if scores[best] > PATTERN_CORRELATION else None


def _overlaps(masks: torch.Tensor, centres: torch.Tensor, areas: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per shape, intersection over union (frames, angles) of the masks, at unit area, with its templates."""
    line = (torch.arange(GRID) + 0.5) * 2 / GRID - 1
    offsets = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    places = (centres.view(-1, 1, 1, 2) + offsets * areas.sqrt().view(-1, 1, 1, 1) + 0.5) / 32 - 1
    masks = grid_sample(masks[:, None].float(), places, align_corners=False).flatten(1)
    tables = {}
    for shape, templates in _shape_templates().items():
        common = masks @ templates.T
        tables[shape] = common / (masks.square().sum(1, keepdim=True) + templates.square().sum(1) - common)
    return tables


def _turns(overlaps: torch.Tensor, times: torch.Tensor) -> bool:
    """Whether a steady turn explains a shape's overlaps (frames, angles) better than holding still."""
    turns, starts = torch.arange(-180.0, 181, ANGLE_STEP), torch.arange(overlaps.shape[1])
    # Every start angle with every turn, at once: robust where one frame's best angle is off by a symmetry.
    steps = (starts.view(-1, 1) + (turns.view(-1, 1, 1) * times / ANGLE_STEP).round().long()) % len(starts)
    scores = overlaps[torch.arange(len(times)), steps].mean(-1).amax(1)
    fast = turns.abs() >= TURNED
    return bool(scores[fast].max() > scores[~fast].max() + TURN_GAIN)


def _motion(centres: torch.Tensor, areas: torch.Tensor, overlaps: torch.Tensor, times: torch.Tensor) -> str | None:
    """The motion word of an object's path, areas and overlaps with its shape's templates over time (0 to 1)."""
    first, last = times < 0.34, times > 0.66
    x, y = (centres[last].mean(0) - centres[first].mean(0)).tolist()
    if max(abs(x), abs(y)) >= TRAVELLED:
        if min(abs(x), abs(y)) > OFF_AXIS * max(abs(x), abs(y)):
            return None
        return "moving " + (("right" if x > 0 else "left") if abs(x) > abs(y) else ("down" if y > 0 else "up"))
    if areas[last].mean() >= GROWN * areas[first].mean():
        return "growing"
    return "turning" if _turns(overlaps, times) else None


@torch.no_grad()
def judge(clip: torch.Tensor) -> dict[str, str | None]:
    """What one clip (3, T, H, W), T >= 5 and H = W, floats in [-1, 1], shows: a word or None for every factor."""
    nothing = dict.fromkeys(FACTORS)
    picks = torch.linspace(0, clip.shape[1] - 1, min(FRAMES, clip.shape[1])).round().long()
    frames = clip.detach().float().cpu()[:, picks].transpose(0, 1).clamp(-1, 1) / 2 + 0.5
    if not frames.isfinite().all():
        return nothing
    if frames.shape[-2:] != (64, 64):
        frames = interpolate(frames, (64, 64), mode="bilinear", antialias=True)
    edges = (frames[..., :2, :], frames[..., -2:, :], frames[..., :2], frames[..., -2:])
    borders = torch.cat([edge.flatten(2) for edge in edges], -1).median(-1).values
    off = (borders.median(0).values - torch.tensor(list(BACKGROUNDS.values())).view(-1, 1)).abs().amax(1)
    background = list(BACKGROUNDS)[off.argmin()] if off.min() < BACKGROUND_TOLERANCE else None

    found = [_find_object(frame, border) for frame, border in zip(frames, borders, strict=True)]
    kept = [index for index, mask in enumerate(found) if mask is not None]
    if len(kept) < FOUND_SHARE * len(found):
        return nothing | {"background": background}
    masks, frames, times = torch.stack([found[index] for index in kept]), frames[kept], picks[kept] / picks[-1]
    areas, line = masks.sum((1, 2)).float(), torch.arange(64)
    centres = torch.stack([masks.sum(1) @ line, masks.sum(2) @ line], 1) / areas[:, None]
    large = areas.topk((len(kept) + 1) // 2).indices  # where shape, colour and pattern can best be seen
    interiors = torch.stack([_interior(masks[index]) for index in large])
    overlaps = _overlaps(masks, centres, areas)
    scores = {shape: table[large].amax(1).mean().item() for shape, table in overlaps.items()}
    shape = max(scores, key=scores.get)
    return {
        "pattern": _pattern(frames[large], interiors, centres[large]),
        "colour": _colour(frames[large].transpose(0, 1)[:, interiors]),
        "shape": shape if scores[shape] > SHAPE_OVERLAP else None,
        "motion": _motion(centres, areas, overlaps[shape], times),
        "background": background,
    }


def adherence(clips: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, torch.Tensor]:
    """Which of the clips (B, 3, T, H, W) show what was asked of them, per factor and for "all" at once."""
    pairs = [(judge(clip), vars(scene)) for clip, scene in zip(clips, scenes, strict=True)]
    hits = {factor: torch.tensor([shown[factor] == asked[factor] for shown, asked in pairs]) for factor in FACTORS}
    return hits | {"all": torch.stack(list(hits.values())).all(0)}


def adherence_shares(clips: torch.Tensor, scenes: Sequence[Scene]) -> dict[str, float]:
    """The share of clips that show what was asked, per factor and for "all", for people to read."""
    return {factor: round(hits.float().mean().item(), 3) for factor, hits in adherence(clips, scenes).items()}
