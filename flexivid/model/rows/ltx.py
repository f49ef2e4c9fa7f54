"""LTX-Video (arXiv 2501.00103)."""

import torch

from flexivid.model.family import Family, Tables
from flexivid.model.rows.common import ATTENTION_AND_FEED_FORWARD, example_tensors
from flexivid.patches import positions
from flexivid.patches.folding import Folding


def _ltx_rope(module, stock, folding: Folding, packed, frames, height, width, scale, coordinates) -> Tables:
    """Half of the frequencies turn by more than half a circle a token: positions are averaged, not angles."""
    bases = torch.tensor([module.base_num_frames, module.base_height, module.base_width], device=packed.device)
    if coordinates is None:
        grid = module._prepare_video_coords(len(packed), *folding.grid, scale, packed.device)
        coordinates = (grid * bases).transpose(1, 2)
    by_axis = coordinates.permute(2, 0, 1).unflatten(0, folding.grid)
    centres = positions.middle(by_axis, folding.centres).flatten(0, 2).permute(1, 2, 0)
    return stock(packed, video_coords=centres)


def _ltx_example(config, size, length):
    call = example_tensors(config, size, length, "caption_channels", mask=True)
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
