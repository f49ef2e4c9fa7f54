"""What rows share: positions of modules that look at latents, and tensors for counting."""

from collections.abc import Callable

import torch
from diffusers.configuration_utils import FrozenDict

from flexivid.model.family import Tables, centred_tables
from flexivid.patches.folding import Folding, Size3

# What most classes call the modules that LoRA adapts.
ATTENTION_AND_FEED_FORWARD = r"transformer_blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))"

# Why tokens of two patch sizes, at two noise levels, do not mix.
ONE_TIMESTEP = "it takes one timestep a clip, and coarse tokens are at another noise level than fine ones"


def of_latents(token_axis: int) -> Callable:
    """For a rotary module that looks at the latents' shape."""

    def centred(module, stock, folding: Folding, folded: torch.Tensor) -> Tables:
        base_latents = folded.new_empty(()).expand(1, 1, *folding.size)
        return centred_tables(stock(base_latents), folding, token_axis)

    return centred


def grid_of(coordinates: torch.Tensor) -> tuple[list[float], int, int]:
    """(time of each frame, height, width), in tokens, of coordinates (3, tokens) of frames in time, height and width.

    Raises ValueError if it is no grid.
    """
    _, y, x = coordinates

    def first_repeat(same: torch.Tensor) -> int:
        return int(same[1:].int().argmax()) + 1 if same[1:].any() else len(same)

    width = first_repeat(x == x[0])
    frame = first_repeat((x == x[0]) & (y == y[0]))
    if frame % width == 0 and len(x) % frame == 0:
        frames = coordinates.unflatten(1, (-1, frame))
        if (frames[1:] == frames[1:, :1]).all() and (frames[0] == frames[0, :, :1]).all():
            return frames[0, :, 0].tolist(), frame // width, width
    raise ValueError(
        f"the coordinates of {len(x)} tokens are no frames of one size, row by row: flexivid cannot tell which tokens "
        f"are neighbours"
    )


def section_places(own: str, *others: str) -> Callable[[dict], dict]:
    """Completes calls that name the frames of a section, (B, frames) or (frames,), and of frames beside it.

    The section's become floating numbers and the others whole ones, by which a module that makes positions of both can
    tell whose it is asked for.
    """

    def completed(call: dict) -> dict:
        whole = {name: call[name].long() for name in others if call.get(name) is not None}
        places = call.get(own)
        return call | whole | ({own: places.double()} if places is not None else {})

    return completed


def example_tensors(config: FrozenDict, size: Size3, length: int, text_dim: str | None, mask: bool = False) -> dict:
    call = {
        "hidden_states": torch.empty(1, config["in_channels"], *size, device="meta"),
        "timestep": torch.empty(1, device="meta"),
    }
    if text_dim is not None:
        call["encoder_hidden_states"] = torch.empty(1, length, config[text_dim], device="meta")
    if mask:
        call["encoder_attention_mask"] = torch.empty(1, length, dtype=torch.bool, device="meta")
    return call
