"""The table of model families, one row each.

What is really different in a family, such as where its positions come from, is a small function above its row.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from diffusers.configuration_utils import FrozenDict
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from diffusers.models.transformers.transformer_mochi import MochiRoPE

from flexivid.model.family import Family, Tables, centred_tables, patch_size_of
from flexivid.patches.folding import Folding, Size3, token_grid
from flexivid.patches.positions import middle

# What most classes call the modules that LoRA adapts.
ATTENTION_AND_FEED_FORWARD = r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"


def _of_latents(token_axis: int) -> Callable:
    """For a rotary module that looks at the latents' shape."""

    def centred(module, stock, folding: Folding, folded: torch.Tensor) -> Tables:
        base_latents = folded.new_empty(()).expand(1, 1, *folding.size)
        return centred_tables(stock(base_latents), folding, token_axis)

    return centred


def _tensors(config: FrozenDict, size: Size3, length: int, text_dim: str | None, mask: bool = False) -> dict:
    call = {
        "hidden_states": torch.empty(1, config["in_channels"], *size, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }
    if text_dim is not None:
        call["encoder_hidden_states"] = torch.empty(1, length, config[text_dim], device="meta")
    if mask:
        call["encoder_attention_mask"] = torch.empty(1, length, dtype=torch.bool, device="meta")
    return call


# Wan (arXiv 2503.20314)


def _wan_example(config, size, length):
    call = _tensors(config, size, length, "text_dim")
    if config["image_dim"] is not None:  # Wan2.1 image-to-video: the tokens of CLIP, of image and text
        call["encoder_hidden_states_image"] = torch.empty(1, 257, config["image_dim"], device="meta")
    return call


WAN = Family(
    name="wan",
    transformer_class="WanTransformer3DModel",
    embedder="patch_embedding",
    head="proj_out",
    channels_last=True,
    positions="rope",
    centred=_of_latents(token_axis=1),
    positions_of_sizes=True,
    prediction="flow",
    guidance="separate",
    lora_targets=r"blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))",
    example=_wan_example,
)
SKYREELS_V2 = replace(  # arXiv 2504.13074
    WAN, name="skyreels-v2", transformer_class="SkyReelsV2Transformer3DModel", fps=24
)


# LTX-Video (arXiv 2501.00103)


def _ltx_rope(module, stock, folding: Folding, packed, frames, height, width, scale, coordinates) -> Tables:
    """Half of the frequencies turn by more than half a circle a token: positions are averaged, not angles."""
    bases = torch.tensor([module.base_num_frames, module.base_height, module.base_width], device=packed.device)
    if coordinates is None:
        grid = module._prepare_video_coords(len(packed), *folding.grid, scale, packed.device)
        coordinates = (grid * bases).transpose(1, 2)
    by_axis = coordinates.permute(2, 0, 1).unflatten(0, folding.grid)
    centres = middle(by_axis, folding.token_sources).flatten(0, 2).permute(1, 2, 0)
    return stock(packed, video_coords=centres)


def _ltx_example(config, size, length):
    call = _tensors(config, size, length, "caption_channels", mask=True)
    return call | LTX.arguments_for(call["hidden_states"])


LTX = Family(
    name="ltx",
    transformer_class="LTXVideoTransformer3DModel",
    embedder="proj_in",
    head="proj_out",
    channels_last=True,
    positions="rope",
    centred=_ltx_rope,
    prediction="flow",
    guidance="batched",
    lora_targets=ATTENTION_AND_FEED_FORWARD,
    vae_factors=("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
    example=_ltx_example,
    fps=25,
    layout="b (t h w) c",
    sizes=(("t", "num_frames"), ("h", "height"), ("w", "width")),
    image_by_timestep=True,
)


# CogVideoX (arXiv 2408.06072)


def _cogvideox_embedding(module, stock, folding: Folding, text, latents) -> torch.Tensor:
    """CogVideoX-2B adds a sin-cos table to its tokens, 5B image-to-video a learned one."""
    flags = ("use_positional_embeddings", "use_learned_positional_embeddings")
    before = {flag: getattr(module, flag) for flag in flags}
    if not any(before.values()):
        return stock(text, latents)
    frames = (folding.size[0] - 1) * module.temporal_compression_ratio + 1
    if before["use_learned_positional_embeddings"] and frames == module.sample_frames:
        table = module.pos_embedding
    else:
        table = module._get_positional_embeddings(folding.size[1], folding.size[2], frames, device=latents.device)
    try:
        for flag in flags:
            setattr(module, flag, False)
        tokens = stock(text, latents)
    finally:
        for flag, value in before.items():
            setattr(module, flag, value)
    of_video = table[0, module.max_text_seq_length :].unflatten(0, folding.grid)
    of_video = middle(of_video, folding.token_sources).flatten(0, 2).to(tokens.dtype)
    # Text stands at no position: its part of the table is zero.
    return torch.cat([tokens[:, : text.shape[1]], tokens[:, text.shape[1] :] + of_video], 1)


def _cogvideox_example(config, size, length):
    call = _tensors(config, size, length, "text_embed_dim")
    if config["use_rotary_positional_embeddings"]:
        tokens = math.prod(token_grid(size, patch_size_of(config)))
        call["image_rotary_emb"] = (torch.empty(tokens, config["attention_head_dim"], device="meta"),) * 2
    return call | COGVIDEOX.arguments_for(call["hidden_states"])


COGVIDEOX = Family(
    name="cogvideox",
    transformer_class="CogVideoXTransformer3DModel",
    embedder="patch_embed.proj",
    head="proj_out",
    channels_last=False,
    positions="patch_embed",
    centred=_cogvideox_embedding,
    prediction="v_prediction",
    guidance="batched",
    lora_targets=ATTENTION_AND_FEED_FORWARD,
    example=_cogvideox_example,
    fps=8,
    layout="b t c h w",
    rope_argument="image_rotary_emb",
)


# HunyuanVideo (arXiv 2412.03603)


def _hunyuan_example(config, size, length):
    call = _tensors(config, size, length, "text_embed_dim", mask=True)
    call["pooled_projections"] = torch.empty(1, config["pooled_projection_dim"], device="meta")
    if config["guidance_embeds"]:
        call["guidance"] = torch.empty(1, device="meta")
    return call


HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    transformer_class="HunyuanVideoTransformer3DModel",
    embedder="x_embedder.proj",
    head="proj_out",
    channels_last=False,
    positions="rope",
    centred=_of_latents(token_axis=0),
    positions_of_sizes=True,
    prediction="flow",
    guidance="embedded",
    lora_targets=(
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))|"
        r"single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)"
    ),
    example=_hunyuan_example,
    fps=24,
)


MOTIF_VIDEO = replace(  # huggingface.co/Motif-Technologies/Motif-Video-2B
    HUNYUAN_VIDEO,
    name="motif-video",
    transformer_class="MotifVideoTransformer3DModel",
    guidance="separate",
    example=lambda config, size, length: _tensors(config, size, length, "text_embed_dim", mask=True),
)


# Mochi (github.com/genmoai/mochi)


def _mochi_rope(module: MochiRoPE, stock, folding: Folding, frequencies, frames, height, width, device, dtype):
    """Frequencies are learned, and may be too high to tell an angle from two neighbours: positions are averaged."""
    positions = module._get_positions(*folding.grid, device, dtype).unflatten(0, folding.grid)
    return module._create_rope(frequencies, middle(positions, folding.token_sources).flatten(0, 2))


@contextmanager
def _mochi_on_meta():
    """Autocast does not know the meta device, and masks have no values there: all text tokens count."""

    def create_rope(self, frequencies, positions):
        angles = torch.einsum("nd,dhf->nhf", positions, frequencies.float())
        return angles.cos(), angles.sin()

    def nonzero(mask, as_tuple=False):
        return torch.zeros(mask.numel(), mask.ndim, dtype=torch.long, device=mask.device)

    with mock.patch.object(MochiRoPE, "_create_rope", create_rope), mock.patch.object(torch, "nonzero", nonzero):
        yield


MOCHI = Family(
    name="mochi",
    transformer_class="MochiTransformer3DModel",
    embedder="patch_embed.proj",
    head="proj_out",
    channels_last=True,
    positions="rope",
    centred=_mochi_rope,
    prediction="reversed_flow",
    guidance="batched",
    lora_targets=ATTENTION_AND_FEED_FORWARD,
    vae_factors=("vae_temporal_scale_factor", "vae_spatial_scale_factor"),
    example=lambda config, size, length: _tensors(config, size, length, "text_embed_dim", mask=True),
    fps=30,
    counting=_mochi_on_meta,
)


# Sana-Video (arXiv 2509.24695): linear attention, so that patch size costs what it covers and no more


SANA_VIDEO = Family(
    name="sana-video",
    transformer_class="SanaVideoTransformer3DModel",
    embedder="patch_embedding",
    head="proj_out",
    channels_last=True,
    positions="rope",
    centred=_of_latents(token_axis=1),
    positions_of_sizes=True,
    prediction="flow",
    guidance="batched",
    lora_targets=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",  # the feed-forward is a convolution
    example=lambda config, size, length: _tensors(config, size, length, "caption_channels", mask=True),
)


# Latte (arXiv 2401.03048), and the image models of the FlexiDiT paper, clips of one frame


def _sincos_embedding(module: PatchEmbed, stock, folding: Folding, latents: torch.Tensor) -> torch.Tensor:
    """Adds the table of the base grid, which stock code makes for the grid that it sees."""
    table, (_, *grid) = module.pos_embed, folding.grid
    positions = table
    if grid != [module.height, module.width]:
        scale = {"base_size": module.base_size, "interpolation_scale": module.interpolation_scale}
        positions = get_2d_sincos_pos_embed(table.shape[-1], grid, **scale, device=latents.device, output_type="pt")
    module.pos_embed = None
    try:
        tokens = stock(latents)
    finally:
        module.pos_embed = table
    of_one_frame = torch.zeros(1, 1, dtype=torch.long), *folding.token_sources[1:]
    return tokens + middle(positions.view(1, *grid, -1), of_one_frame).flatten(0, 2).to(tokens.dtype)


LATTE = Family(
    name="latte",
    transformer_class="LatteTransformer3DModel",
    embedder="pos_embed.proj",
    head="proj_out",
    channels_last=True,
    positions="pos_embed",
    centred=_sincos_embedding,
    prediction="epsilon",
    guidance="batched",
    lora_targets=None,
    vae_factors=(None, "vae_scale_factor"),
    example=lambda config, size, length: _tensors(config, size, length, "caption_channels"),
    fps=8,
    causal=False,
    temporal=False,  # its learned table of frames has one length
    fixed_out_channels=True,
)


def _dit_example(config, size, length):
    call = _tensors(config, size, length, None)
    return (
        call
        | DIT.arguments_for(call["hidden_states"])
        | {"class_labels": torch.empty(1, dtype=torch.long, device="meta")}
    )


DIT = replace(
    LATTE,
    name="dit",  # arXiv 2212.09748
    transformer_class="DiTTransformer2DModel",
    head="proj_out_2",
    vae_factors=(None, None),
    example=_dit_example,
    layout="b c (t h) w",
    sizes=(("t", 1),),
)


def _pixart_example(config, size, length):
    call = _tensors(config, size, length, "caption_channels", mask=True)
    return (
        call
        | PIXART.arguments_for(call["hidden_states"])
        | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    )


PIXART = replace(
    DIT,
    name="pixart",  # arXiv 2310.00426
    transformer_class="PixArtTransformer2DModel",
    head="proj_out",
    vae_factors=(None, "vae_scale_factor"),
    example=_pixart_example,
)


FAMILIES = (WAN, SKYREELS_V2, LTX, COGVIDEOX, HUNYUAN_VIDEO, MOTIF_VIDEO, MOCHI, SANA_VIDEO, LATTE, DIT, PIXART)


_registered: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Adds the row of a model that is not in the table (docs/own-model.md); one registered before is replaced.

    Raises ValueError for a class that flexivid itself has a row for.
    """
    if any(row.transformer_class == family.transformer_class for row in FAMILIES):
        raise ValueError(f"{family.transformer_class} has a row already; register is for classes that have none")
    _registered[family.transformer_class] = family
    return family


def family_of(transformer: torch.nn.Module) -> Family:
    """The row of a transformer. Raises ValueError, which lists what is supported."""
    name = type(transformer).__name__
    for family in (*FAMILIES, *_registered.values()):
        if family.transformer_class == name:
            if transformer.config.get("image_condition_type") == "token_replace":
                raise ValueError(f"{name} with image_condition_type token_replace is not supported: docs/models.md")
            return family
    supported = ", ".join(family.transformer_class for family in FAMILIES)
    raise ValueError(
        f"flexivid does not know the transformer {name}; it supports {supported}, and what flexivid.register adds"
    )
