"""Helios (arXiv 2603.04379): Wan2.1, chunk after chunk of a clip, each beside tokens of the frames before it.

Those frames stay as they are, at the three patch sizes that the model has for them: only the chunk is folded.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace
from unittest import mock

import torch
from diffusers.models.transformers.transformer_helios import HeliosRotaryPosEmbed

from flexivid.model.family import centred_tables
from flexivid.model.rows.common import ONE_TIMESTEP, example_tensors, section_places
from flexivid.model.rows.wan import WAN
from flexivid.patches.folding import Folding

# Latent frames before a chunk, the farthest first, and how the forward calls them; with the near ones comes the first.
HISTORY = {"long": 16, "mid": 2, "short": 1}
PLACES = tuple(f"indices_latents_history_{name}" for name in HISTORY)
OWN_PLACES = "indices_hidden_states"


def _helios_rope(module, stock, folding: Folding, frame_indices, height, width, device) -> torch.Tensor:
    """(B, cos and sin, frames, rows, columns): of a chunk at its coarse tokens, of the frames before it as they are."""
    if not frame_indices.is_floating_point():  # see `section_places`
        return stock(frame_indices=frame_indices, height=height, width=width, device=device)
    _, rows, columns = folding.grid
    table = stock(frame_indices=frame_indices, height=rows, width=columns, device=device).flatten(2)
    centred = centred_tables(table.chunk(2, 1), folding, token_axis=2)
    return torch.cat(centred, 1).unflatten(2, folding.coarse_grid)


def _helios_completed(call: dict) -> dict:
    if call.get(OWN_PLACES) is None:
        call = call | {OWN_PLACES: torch.arange(call["hidden_states"].shape[2])[None]}
    return section_places(OWN_PLACES, *PLACES)(call)


def _helios_example(config, size, length):
    call = example_tensors(config, size, length, "text_dim")
    frames, *space = size
    counts = HISTORY | {"short": HISTORY["short"] + 1}
    first, *places = torch.arange(1 + sum(HISTORY.values()) + frames)[None].split([1, *HISTORY.values(), frames], 1)
    places[2] = torch.cat([first, places[2]], 1)
    call |= dict(zip((*PLACES, OWN_PLACES), places, strict=True))
    return call | {
        f"latents_history_{name}": torch.empty(1, config["in_channels"], count, *space, device="meta")
        for name, count in counts.items()
    }


@contextmanager
def _helios_on_meta():
    """Positions are made with it switched off, which the meta device, that has none, does not take."""
    stock = HeliosRotaryPosEmbed.get_frequency_batched

    def on_meta(*arguments):
        with mock.patch.object(torch, "autocast", lambda **_: nullcontext()):
            return stock(*arguments)

    with mock.patch.object(HeliosRotaryPosEmbed, "get_frequency_batched", on_meta):
        yield


HELIOS = replace(
    WAN,
    name="helios",
    transformer_class="HeliosTransformer3DModel",
    centred=_helios_rope,
    positions_of_sizes=False,  # it is asked by keyword, and where a chunk stands is no size
    example=_helios_example,
    fps=24,
    completed=_helios_completed,
    counting=_helios_on_meta,
    section_frames=9,
    for_all_clips=(*PLACES, OWN_PLACES),
    refused=(
        (
            "HeliosPyramidPipeline",
            "stages at lower sizes, whose noise is alike within blocks, so that a mean over blocks keeps it",
        ),
    ),
    loose=ONE_TIMESTEP,
)
