"""Mochi (github.com/genmoai/mochi)."""

from contextlib import contextmanager
from unittest import mock

import torch
from diffusers.models.transformers.transformer_mochi import MochiRoPE

from flexivid.model.family import Family
from flexivid.model.rows.common import ATTENTION_AND_FEED_FORWARD, ONE_TIMESTEP, example_tensors
from flexivid.patches import positions
from flexivid.patches.folding import Folding


def _mochi_rope(module: MochiRoPE, stock, folding: Folding, frequencies, frames, height, width, device, dtype):
    """Frequencies are learned, and may be too high to tell an angle from two neighbours: positions are averaged."""
    of_tokens = module._get_positions(*folding.grid, device, dtype).unflatten(0, folding.grid)
    return module._create_rope(frequencies, positions.middle(of_tokens, folding.centres).flatten(0, 2))


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
    example=lambda config, size, length: example_tensors(config, size, length, "text_embed_dim", mask=True),
    fps=30,
    counting=_mochi_on_meta,
    loose=ONE_TIMESTEP,
)
