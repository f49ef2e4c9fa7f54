"""What is supported, and what patch sizes cost on published models: docs/models.md, and `python -m flexivid models`.

Everything is counted on the meta device from the models' public configurations; no weights are read.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import diffusers
import torch

from flexivid.model.families import FAMILIES, family_of
from flexivid.model.family import patch_size_of
from flexivid.model.flexible import FlexTransformer
from flexivid.patches.folding import Size3
from flexivid.patches.sizes import format_patch_size
from flexivid.published import ARCHITECTURES
from flexivid.sampling.budget import least_budget
from flexivid.sampling.flops import FlopCounter
from flexivid.support import FEATURES, HEAD, LEFT_OUT, SUPPORT


@dataclass(frozen=True)
class Published:
    """A model that people have: its transformer's configuration, its usual size in pixels and in latents (T, H, W)."""

    name: str
    transformer_class: str
    pixels: Size3
    latents: Size3
    text_length: int
    config: dict = field(default_factory=dict)


def _transformer(hub_id: str) -> dict:
    return ARCHITECTURES[hub_id].parts["transformer"][1]


PUBLISHED = (
    Published(
        "Wan2.1-T2V-1.3B",
        "WanTransformer3DModel",
        (81, 480, 832),
        (21, 60, 104),
        512,
        _transformer("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    ),
    Published("Wan2.1-T2V-14B, Wan2.2-A14B", "WanTransformer3DModel", (81, 480, 832), (21, 60, 104), 512),
    Published("Wan2.1-T2V-14B, Wan2.2-A14B", "WanTransformer3DModel", (81, 720, 1280), (21, 90, 160), 512),
    Published(
        "Wan2.1-I2V-14B",
        "WanTransformer3DModel",
        (81, 480, 832),
        (21, 60, 104),
        512,
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    Published(
        "Wan2.2-TI2V-5B",
        "WanTransformer3DModel",
        (121, 704, 1280),
        (31, 44, 80),
        512,
        _transformer("Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    ),
    Published(
        "Wan2.1-VACE-1.3B",
        "WanVACETransformer3DModel",
        (81, 480, 832),
        (21, 60, 104),
        512,
        _transformer("Wan-AI/Wan2.1-T2V-1.3B-Diffusers") | {"vace_layers": list(range(0, 30, 2))},
    ),
    Published("Wan2.1-VACE-14B", "WanVACETransformer3DModel", (81, 480, 832), (21, 60, 104), 512),
    Published(
        "Wan2.2-Animate-14B",
        "WanAnimateTransformer3DModel",
        (77, 720, 1280),
        (21, 90, 160),
        512,
        {"added_kv_proj_dim": 5120},
    ),
    Published(
        "ChronoEdit-14B",
        "ChronoEditTransformer3DModel",
        (5, 720, 1280),
        (2, 90, 160),
        512,
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    Published(  # as diffusers' scripts/convert_anyflow_to_diffusers.py makes it: of Wan2.1's sizes
        "AnyFlow-Wan2.1-T2V-1.3B",
        "AnyFlowTransformer3DModel",
        (81, 480, 832),
        (21, 60, 104),
        512,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    Published(
        "SkyReels-V2-14B",
        "SkyReelsV2Transformer3DModel",
        (97, 544, 960),
        (25, 68, 120),
        512,
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    ),
    Published("Helios 14B, a chunk", "HeliosTransformer3DModel", (33, 384, 640), (9, 48, 80), 512),
    Published("LTX-Video 2B", "LTXVideoTransformer3DModel", (161, 512, 704), (21, 16, 22), 128),
    Published("LTX-2 19B", "LTX2VideoTransformer3DModel", (121, 512, 768), (16, 16, 24), 1024),
    Published("CogVideoX-2B", "CogVideoXTransformer3DModel", (49, 480, 720), (13, 60, 90), 226),
    Published(
        "CogVideoX-5B",
        "CogVideoXTransformer3DModel",
        (49, 480, 720),
        (13, 60, 90),
        226,
        _transformer("zai-org/CogVideoX-5b"),
    ),
    Published(
        "CogVideoX1.5-5B",
        "CogVideoXTransformer3DModel",
        (81, 768, 1360),
        (22, 96, 170),
        226,
        {
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
        },
    ),
    Published("HunyuanVideo", "HunyuanVideoTransformer3DModel", (129, 720, 1280), (33, 90, 160), 256),
    Published(
        "HunyuanVideo Framepack, a section",
        "HunyuanVideoFramepackTransformer3DModel",
        (33, 720, 1280),
        (9, 90, 160),
        256,
        {"has_image_proj": True, "has_clean_x_embedder": True},
    ),
    Published("HunyuanVideo-1.5", "HunyuanVideo15Transformer3DModel", (121, 720, 1280), (31, 45, 80), 1000),
    Published(
        "Kandinsky 5.0 Lite",
        "Kandinsky5Transformer3DModel",
        (121, 512, 768),
        (31, 64, 96),
        512,
        {
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "model_dim": 1792,
            "ff_dim": 7168,
            "visual_cond": True,
        },
    ),
    Published("Mochi 1", "MochiTransformer3DModel", (163, 480, 848), (28, 60, 106), 256),
    Published("Sana-Video 2B", "SanaVideoTransformer3DModel", (81, 480, 832), (21, 60, 104), 300),
    Published(
        "Latte-1",
        "LatteTransformer3DModel",
        (16, 512, 512),
        (16, 64, 64),
        120,
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "sample_size": 64,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 4096,
            "video_length": 16,
        },
    ),
    Published("DiT-XL/2", "DiTTransformer2DModel", (1, 256, 256), (1, 32, 32), 0, {"out_channels": 8}),
    Published(
        "PixArt-Σ XL",
        "PixArtTransformer2DModel",
        (1, 1024, 1024),
        (1, 128, 128),
        300,
        {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
    ),
)


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
    in_time = round((frames - 1) / (latent_frames - 1)) if latent_frames > 1 else 1
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
