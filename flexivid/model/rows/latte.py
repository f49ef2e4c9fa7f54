"""Latte (arXiv 2401.03048), and the image models of the FlexiDiT paper, clips of one frame."""

from dataclasses import replace

import torch
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed

from flexivid.model.family import Family
from flexivid.model.rows.common import ONE_TIMESTEP, example_tensors
from flexivid.patches import positions
from flexivid.patches.folding import Folding


def _sincos_embedding(module: PatchEmbed, stock, folding: Folding, latents: torch.Tensor) -> torch.Tensor:
    """Adds the table of the base grid, which stock code makes for the grid that it sees."""
    table, (_, *grid) = module.pos_embed, folding.grid
    of_grid = table
    if grid != [module.height, module.width]:
        scale = {"base_size": module.base_size, "interpolation_scale": module.interpolation_scale}
        of_grid = get_2d_sincos_pos_embed(table.shape[-1], grid, **scale, device=latents.device, output_type="pt")
    module.pos_embed = None
    try:
        tokens = stock(latents)
    finally:
        module.pos_embed = table
    of_one_frame = torch.zeros(1), *folding.centres[1:]
    return tokens + positions.middle(of_grid.view(1, *grid, -1), of_one_frame).flatten(0, 2).to(tokens.dtype)


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
    example=lambda config, size, length: example_tensors(config, size, length, "caption_channels"),
    fps=8,
    causal=False,
    temporal=False,  # its learned table of frames has one length
    fixed_out_channels=True,
    loose="its blocks look along frames and along time in turn, on a grid that mixed tokens do not form",
)


def _dit_example(config, size, length):
    call = example_tensors(config, size, length, None)
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
    loose=ONE_TIMESTEP,
)


def _pixart_example(config, size, length):
    call = example_tensors(config, size, length, "caption_channels", mask=True)
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
