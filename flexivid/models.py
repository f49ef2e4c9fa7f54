"""What is supported, and what patch sizes cost on published models: docs/models.md, and `python -m flexivid models`.

Everything is counted on the meta device from the models' public configurations; no weights are read.
"""

from collections.abc import Iterator

import diffusers
import torch

from flexivid.model.families import FAMILIES, family_of
from flexivid.model.family import patch_size_of
from flexivid.model.flexible import FlexTransformer
from flexivid.patches.folding import Size3
from flexivid.patches.sizes import format_patch_size
from flexivid.published_sizes import PUBLISHED, Published
from flexivid.sampling.budget import least_budget
from flexivid.sampling.flops import FlopCounter
from flexivid.support import FEATURES, HEAD, LEFT_OUT, SUPPORT


def weak_patch_sizes(base: Size3, temporal: bool) -> list[str]:
    """Twice as large in space, in time, in both; where frames cannot be joined, twice and four times in space."""
    t, h, w = base
    sizes = (
        [(t, 2 * h, 2 * w), (2 * t, h, w), (2 * t, 2 * h, 2 * w)]
        if temporal
        else [(t, 2 * h, 2 * w), (t, 4 * h, 4 * w)]
    )
    return [format_patch_size(size) for size in sizes]


def costs_of(model: Published) -> dict[str, int]:
    """FLOPs of one forward of one clip by patch size, the model's own last."""
    with torch.device("meta"):
        transformer = getattr(diffusers, model.transformer_class)(**model.config)
    family = family_of(transformer)
    weak = weak_patch_sizes(patch_size_of(transformer.config), family.temporal)
    counter = FlopCounter(FlexTransformer(transformer, weak, "snr"))
    call = family.example(transformer.config, model.latents, model.text_length)
    return counter.costs(call)


def family_lines() -> list[str]:
    """The support table."""
    head = ("family", "class", "prediction", "guidance", "joins frames", "mixed", *FEATURES)
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for family in FAMILIES:
        cells = (family.name, family.transformer_class, family.prediction, family.guidance)
        joined = "no" if not family.temporal else "first alone" if family.causal else "yes"
        mixed = "-" if isinstance(family.loose, str) else "yes"
        lines.append(f"| {' | '.join((*cells, joined, mixed, *SUPPORT[family.name]))} |")
    return lines


def unmixed_lines() -> Iterator[str]:
    """Why mixed patch sizes are refused, and of which families."""
    families: dict[str, list[str]] = {}
    for family in FAMILIES:
        if isinstance(family.loose, str):
            families.setdefault(family.loose, []).append(family.name)
    yield from (f"- {', '.join(names)}: {reason}." for reason, names in families.items())


def cost_line(model: Published) -> str:
    costs = costs_of(model)
    *weak, powerful = costs
    shares = [f"{name} {costs[name] / costs[powerful]:.3f}" for name in weak]
    if len(shares) == 2:
        shares.insert(1, "")
    (frames, *sides), (latent_frames, *latent_sides) = model.pixels, model.latents
    in_time = model.frames_a_latent or (round((frames - 1) / (latent_frames - 1)) if latent_frames > 1 else 1)
    in_space = (side // latent for side, latent in zip(sides, latent_sides, strict=True))
    sizes = ("x".join(map(str, size)) for size in (model.pixels, (in_time, *in_space), model.latents))
    return (
        f"| {model.name} | {' | '.join(sizes)} | {powerful} | {costs[powerful] / 1e12:.4g} | "
        f"{' | '.join(shares)} | {least_budget(costs):.3f} |"
    )


MIXED = """
## Mixed patch sizes

`1x2x2+1x4x4@0.35` in a schedule runs two patch sizes in one forward: 1x2x2 in the .35 of the blocks that have most
detail in the last x0, 1x4x4 in the others ([test_mixed](../tests/test_mixed.py)). Those families can (`mixed` above)
whose forward takes a timestep and a place for each token. SkyReels-V2 with causal blocks of frames cannot. The others
are refused:
"""
COSTS = """
## What patch sizes cost

FLOPs of one forward of one clip, counted from the models' public configurations, with padded text and flexivid's heads.
All sizes are frames x height x width, that of the VAE how much it compresses. Twice as large in space is the weak patch
size that runs if `enable` is given none; the last column is the least budget that these weak patch sizes can reach.
Motif-Video's configuration was not at hand; Cosmos is not counted yet.

| model | pixels | VAE | latents | patch | TFLOP | twice as large in space | in time | both, or 4x in space | least |
|---|---|---|---|---|---|---|---|---|---|"""


def page() -> Iterator[str]:
    """docs/models.md, line by line."""
    yield from (HEAD, *family_lines(), MIXED, *unmixed_lines(), COSTS, *map(cost_line, PUBLISHED))
    yield from ("", "## Left out", "")
    yield from (f"- {name}: {reason}." for name, reason in LEFT_OUT.items())
