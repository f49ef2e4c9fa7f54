"""Allegro (arXiv 2410.15458)."""

import math

import torch

from flexivid.model.family import Family, Tables, patch_size_of
from flexivid.model.rows.common import ONE_TIMESTEP, example_tensors
from flexivid.patches.folding import Folding, Size3, token_grid
from flexivid.patches.positions import centred_rope

# As its pipeline makes them: rotary tables of time, height and width, and the row of each that a token stands at.
Rope = tuple[tuple[Tables, Tables, Tables], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


def _rows_of(grid: Size3, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The row of each axis' table that a token stands at, (1, tokens) each."""
    return torch.cartesian_prod(*(torch.arange(length, device=device) for length in grid)).T.unsqueeze(1).unbind()


def _centred_rope(rope: Rope, folding: Folding) -> Rope:
    """Tables of each axis at the centres of coarse tokens, in which these stand in order."""
    at_first, tables = torch.zeros(1), []
    for table, centres, aside in zip(rope[0], folding.centres, folding.aside, strict=True):
        of_axis = (part[:, None, None] for part in table)  # as if the other axes had one token
        centred = centred_rope(*of_axis, (centres, at_first, at_first), (aside, False, False))
        tables.append(tuple(part.flatten(0, 2) for part in centred))
    return tuple(tables), _rows_of(folding.coarse_grid, rope[1][0].device)


def _allegro_example(config, size, length):
    call = example_tensors(config, size, length, "caption_channels", mask=True)
    grid, dim = token_grid(size, patch_size_of(config)), config["attention_head_dim"] // 3
    tables = tuple((torch.empty(tokens, dim, device="meta"),) * 2 for tokens in grid)
    rows = torch.empty(1, math.prod(grid), dtype=torch.long, device="meta")
    return call | {"image_rotary_emb": (tables, (rows,) * 3)}


def _latent_frames(frames: int, stride: int) -> int:
    return math.ceil(frames / stride) if frames % 2 == 0 else math.ceil((frames - 1) / stride) + 1


ALLEGRO = Family(
    name="allegro",
    transformer_class="AllegroTransformer3DModel",
    embedder="pos_embed.proj",
    head="proj_out",
    channels_last=True,
    positions="pos_embed",
    centred=lambda module, stock, folding, latents: stock(latents),  # it adds none
    prediction="epsilon",
    guidance="batched",
    lora_targets=None,
    example=_allegro_example,
    fps=15,
    causal=False,
    latent_frames=_latent_frames,
    rope_argument="image_rotary_emb",
    centred_argument=_centred_rope,
    loose=ONE_TIMESTEP,
)
