"""LTX-Video (arXiv 2501.00103)."""

import math
from itertools import pairwise

import torch

from flexivid.model.family import Family, Loose, Tables
from flexivid.model.rows.common import ATTENTION_AND_FEED_FORWARD, example_tensors, grid_of
from flexivid.patches import positions
from flexivid.patches.folding import Folding


def _ltx_rope(module, stock, folding: Folding, packed, frames, height, width, scale, coordinates) -> Tables:
    """Half of the frequencies turn by more than half a circle a token: positions are averaged, not angles."""
    if math.prod(folding.multiple) == 1:
        return stock(packed, *folding.grid, scale, coordinates)
    bases = torch.tensor([module.base_num_frames, module.base_height, module.base_width], device=packed.device)
    if coordinates is None:
        grid = module._prepare_video_coords(len(packed), *folding.grid, scale, packed.device)
        coordinates = (grid * bases).transpose(1, 2)
    by_axis = coordinates.permute(2, 0, 1).unflatten(0, folding.grid)
    centres = positions.middle(by_axis, folding.centres).flatten(0, 2).permute(1, 2, 0)
    return stock(packed, video_coords=centres)


SIZES = ("num_frames", "height", "width")


def _completed(call: dict) -> dict:
    """The call of a pipeline that passes a coordinate of each token in time, height and width instead of sizes."""
    tokens, coordinates = call["hidden_states"].shape[1], call.get("video_coords")
    completed = dict(call)
    if (timestep := torch.as_tensor(call["timestep"])).ndim > 1:  # (B, 1), (B, tokens) or (B, tokens, 1)
        completed["timestep"] = timestep.flatten(1) if timestep.shape[1] == tokens else timestep.flatten()
    frames, *sides = (call.get(name) for name in SIZES)
    told = isinstance(frames, tuple) or (frames is not None and frames * math.prod(sides) == tokens)
    if coordinates is not None and not told:
        completed |= zip(SIZES, _grid(coordinates[0].cpu()), strict=True)
    return completed


def _grid(coordinates: torch.Tensor) -> tuple[tuple[int, ...], int, int]:
    """(frames of each clip, height, width) in tokens, of coordinates (3, tokens). Raises ValueError if it is no grid.

    LTXConditionPipeline puts key frames, of the size of the clip, before it, other pipelines behind it.
    """
    times, height, width = grid_of(coordinates)
    return _clips(times), height, width


def _clips(times: list[float]) -> tuple[int, ...]:
    """Frames of each clip, from the time of every latent frame: a clip's first two are one frame of the video apart,
    the others as many as the VAE compresses into one."""

    def alike(one: float, other: float) -> bool:
        return math.isclose(one, other, rel_tol=1e-2)

    steps = [after - before for before, after in pairwise(times)]
    onward = [step for before, step in pairwise(steps) if 0 < before < step or alike(before, step)]
    if not onward:
        return (1,) * len(times)
    stride = max(reversed(onward), key=lambda step: sum(alike(step, other) for other in onward))
    if all(alike(step, stride) for step in steps):
        return (len(times),)
    clips, goes_on = [1], False
    for step, after in zip(steps, [*steps[1:], 0.0], strict=True):
        is_first = 0 < step < stride and alike(after, stride)
        goes_on = goes_on if alike(step, stride) else is_first
        clips = [*clips[:-1], clips[-1] + 1] if goes_on else [*clips, 1]
    return tuple(clips)


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
    sizes=tuple(zip("thw", SIZES, strict=True)),
    completed=_completed,
    image_by_timestep=True,
    without_last_step=("LTXI2VLongMultiPromptPipeline",),
    loose=Loose("transformer_blocks"),
)
