"""What is made beside the video, such as sound: few tokens, which every forward that runs predicts anew.

Where none runs, what was predicted before stands for them as for the video, in x0.
"""

from collections.abc import Iterable

import torch

from flexivid.diffusion import Diffusion, Level
from flexivid.model.call import Call


def _level(call: Call, diffusion: Diffusion, sigma: float | None) -> Level:
    """sigma: of the video, which is that of streams without timesteps of their own."""
    if call.family.stream_timestep is not None:
        return diffusion.level(call.arguments[call.family.stream_timestep].float())
    return Level(torch.tensor(1 - sigma), torch.tensor(sigma), may_be_clean=sigma == 0)


def _given(call: Call) -> list[torch.Tensor]:
    """The latents of the streams that this call has: a clip may be made without sound."""
    found = (call.arguments.get(name) for name in call.family.streams)
    return [latents for latents in found if latents is not None]


def clean_streams(
    call: Call, predictions: Iterable[torch.Tensor], diffusion: Diffusion, sigma: float | None
) -> tuple[torch.Tensor, ...]:
    """x0 of the streams, (B, tokens, channels) float32 each, that predictions for them stand for."""
    pairs = zip(_given(call), predictions, strict=True)
    return tuple(diffusion.x0(x.float(), output.float(), _level(call, diffusion, sigma)) for x, output in pairs)


def predicted_streams(
    call: Call, clean: Iterable[torch.Tensor], diffusion: Diffusion, sigma: float | None
) -> tuple[torch.Tensor, ...]:
    """The inverse of `clean_streams`."""
    pairs = zip(_given(call), clean, strict=True)
    return tuple(diffusion.output(x.float(), x_0, _level(call, diffusion, sigma)).to(x.dtype) for x, x_0 in pairs)
