"""Cosmos-Predict2.5, and Cosmos-Predict2 before it, which is trained alike (arXiv 2511.00062)."""

from contextlib import contextmanager
from types import SimpleNamespace
from unittest import mock

import torch
from diffusers.models.transformers import transformer_cosmos

from flexivid.model.family import Family, Tables, centred_tables
from flexivid.model.rows.common import ATTENTION_AND_FEED_FORWARD, example_tensors
from flexivid.patches.folding import Folding


def _cosmos_rope(module, stock, folding: Folding, latents: torch.Tensor, fps=None) -> Tables:
    base_latents = latents.new_empty(()).expand(1, 1, *folding.size)
    return centred_tables(stock(base_latents, fps=fps), folding, token_axis=0)


def _cosmos_completed(call: dict) -> dict:
    """With the mask of given frames as one more channel of the latents, as the forward joins it.

    Given frames are clean, whatever small timestep they are told: nothing is left to predict there.
    """
    if call.get("block_controlnet_hidden_states") is not None:
        raise ValueError(
            "Cosmos-Transfer is not supported: what its controlnet adds to blocks is of the tokens of the base patch "
            "size"
        )
    given = call.get("condition_mask")
    if given is None:
        return dict(call)
    latents, timestep = torch.cat([call["hidden_states"], given], 1), call["timestep"]
    if timestep.ndim > 1:
        timestep = timestep * (1 - given[..., :1, :1])
    return call | {"hidden_states": latents, "timestep": timestep, "condition_mask": None}


def _cosmos_example(config, size, length):
    call = example_tensors({**config, "in_channels": config["out_channels"]}, size, length, "text_embed_dim")
    if config["use_crossattn_projection"]:
        call["encoder_hidden_states"] = torch.empty(1, length, config["crossattn_proj_in_channels"], device="meta")
    if config["in_channels"] > config["out_channels"]:
        call["condition_mask"] = torch.empty(1, 1, *size, device="meta")
    frames, height, width = size
    return call | {
        "timestep": torch.empty(1, 1, frames, 1, 1, device="meta"),
        "padding_mask": torch.empty(1, 1, 8 * height, 8 * width, device="meta"),  # of pixels
    }


# What the forward takes from torchvision, for its padding mask.
RESIZE_OF_TORCH = SimpleNamespace(
    functional=SimpleNamespace(resize=lambda mask, size, interpolation: torch.nn.functional.interpolate(mask, size)),
    InterpolationMode=SimpleNamespace(NEAREST="nearest"),
)


@contextmanager
def _without_torchvision():
    """Counting does not need it."""
    with mock.patch.object(transformer_cosmos, "transforms", RESIZE_OF_TORCH, create=True):
        yield


COSMOS = Family(
    name="cosmos",
    transformer_class="CosmosTransformer3DModel",
    embedder="patch_embed.proj",
    head="proj_out",
    channels_last=True,  # its rows are p_h, p_w, p_t, channel, which is the same for patches of one frame
    positions="rope",
    centred=_cosmos_rope,
    positions_of_sizes=True,
    prediction="flow",
    # The network is told sigma itself, by frame. Cosmos-Predict2's scheduler has those of EDM, but its pipelines scale
    # what comes in and what comes out: the network sees flow matching too.
    time_scale=1.0,
    frame_timesteps="b 1 t 1 1",
    completed=_cosmos_completed,
    guidance="separate",
    lora_targets=ATTENTION_AND_FEED_FORWARD,
    example=_cosmos_example,
    counting=_without_torchvision,
    for_all_clips=("padding_mask",),
    # Cosmos 1.0, whose inputs and outputs are those of EDM, and whose learned positions are added in every block.
    unsupported=(("extra_pos_embed_type", "learnable"),),
    loose="its embedder takes whole patches, which are cut from a grid that mixed tokens do not form",
)
