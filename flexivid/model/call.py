"""One call of a transformer's forward: its arguments, the latents in them, how noisy those are."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from diffusers.hooks.hooks import CacheContext
from einops import rearrange

from flexivid.diffusion import Diffusion, Level
from flexivid.model.family import Family
from flexivid.patches.folding import Size3, token_grid

# By how much a timestep that is rounded to an integer of a thousand misses a noise level, with some room.
ROUNDED = 2e-3


def parts_of(output) -> tuple[torch.Tensor, ...]:
    """What a transformer predicts, and for its streams, of whatever its forward gives."""
    return (output,) if isinstance(output, torch.Tensor) else tuple(output[:])


@dataclass
class Call:
    """What a pipeline asks of the transformer.

    given: the arguments of `forward`, by name. stock_forward: what answers them in the stock model.
    context: diffusers' name for the guidance branch, where the pipeline gives one. branch: that branch as a number, 0
    the conditional one.
    memo: what further forwards of the same sizes can use again, such as tables of positions. beside: what the last weak
    forward has predicted for the family's streams.
    """

    family: Family
    base_patch: Size3
    given: dict
    stock_forward: Callable
    context: CacheContext | None = None
    branch: int = 0
    memo: dict = field(default_factory=dict)
    beside: tuple[torch.Tensor, ...] = ()

    @cached_property
    def arguments(self) -> dict:
        """Those of `forward`, with the sizes that a pipeline may leave to coordinates."""
        return self.family.completed(self.given)

    @cached_property
    def latents(self) -> torch.Tensor:
        """(B, C, T, H, W)."""
        return self.family.latents(self.arguments)

    def latents_of(self, output: torch.Tensor) -> torch.Tensor:
        """An output of the transformer, as (B, C, T, H, W)."""
        return self.family.latents({**self.arguments, "hidden_states": output})

    def output_of(self, prediction: torch.Tensor):
        """A prediction (B, C, T, H, W), and `beside` it those of streams, as the transformer would give them."""
        packed = (self._with_given(self.family.packed(prediction)), *self.beside)
        if self.arguments.get("return_dict", True):
            return self.family.output_class(*packed)
        return packed[0] if self.family.bare_output else packed

    def _with_given(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of a prediction behind those of what is given, for which nothing is predicted: 0."""
        sequence = self.family.sequence
        given = 0 if sequence is None else sequence.given(self.arguments)
        return torch.nn.functional.pad(tokens, (0, 0, given, 0)) if given else tokens

    @property
    def timesteps(self) -> dict[str, torch.Tensor]:
        """By argument: that of the latents, and that to which a flow map takes them."""
        names = ("timestep", self.family.destination)
        found = {name: torch.as_tensor(value) for name in names if (value := self.arguments.get(name)) is not None}
        if behind := self.family.given_behind(self.arguments):
            by_frame = found["timestep"].expand(len(self.latents))[:, None].repeat(1, self.latents.shape[2])
            by_frame[:, -behind:] = 0
            found["timestep"] = rearrange(by_frame, f"b t -> {self.family.frame_timesteps}")
        return found

    def level(self, diffusion: Diffusion, sigma: float | None = None) -> Level:
        """The noise level of the latents: (B, 1, 1, 1, 1), or (B, 1, T, H, W) if tokens or frames have timesteps.

        sigma: that of flow matching where it is known, since schedulers may round the timestep; where tokens have
        timesteps of their own it is that of the noisiest.
        """
        latents, timestep = self.latents, self.timesteps["timestep"]
        if sigma is not None and timestep.ndim < 2:
            s = torch.full((len(latents), 1, 1, 1, 1), sigma, device=latents.device)
            return Level(1 - s, s, may_be_clean=sigma == 0)
        level = diffusion.level(timestep.to(latents.device, torch.float32))
        if sigma is not None:
            # Clean tokens stay so, whatever the scheduler has rounded, and all do where none is as noisy as the step.
            noisiest = level.s.max()
            s = torch.where((noisiest - sigma).abs() < ROUNDED, level.s * (sigma / noisiest), level.s)
            level = diffusion.flow_level(s)
        return Level(self.over_latents(level.alpha), self.over_latents(level.s))

    def level_at(self, diffusion: Diffusion, timestep: torch.Tensor) -> Level:
        """The noise level of latents that stand at a timestep, given as the forward takes it."""
        level = diffusion.level(timestep.to(self.latents.device, torch.float32))
        return Level(self.over_latents(level.alpha), self.over_latents(level.s))

    def over_latents(self, values: torch.Tensor) -> torch.Tensor:
        """(), (B,), (B, tokens) or those of frames -> (B, 1, 1, 1, 1) or (B, 1, T, H, W)."""
        if values.ndim < 2:
            return values.expand(len(self.latents)).view(-1, 1, 1, 1, 1)
        if self.family.frame_timesteps is not None:
            by_frame = rearrange(values, f"{self.family.frame_timesteps} -> b 1 t 1 1")
            return by_frame.expand(-1, -1, *self.latents.shape[2:])
        grid = token_grid(self.latents.shape[2:], self.base_patch)
        if values.shape[1] != math.prod(grid):
            raise ValueError(
                f"{values.shape[1]} timesteps for a clip of {'x'.join(map(str, grid))} tokens: one, or one a token; "
                f"diffusion forcing, one a frame, is not supported"
            )
        values = values.view(-1, 1, *grid)
        for axis, patch in enumerate(self.base_patch):
            values = values.repeat_interleave(patch, axis + 2)
        return values

    def by_token(self, values: torch.Tensor) -> torch.Tensor:
        """(B, 1, T', H', W') -> (B, tokens), (B, 1, 1, 1, 1) -> (B,): `over_latents` back, also of a coarse grid."""
        if values.shape[2:].numel() == 1:
            return values.flatten()
        if self.family.frame_timesteps is not None:
            return rearrange(values[:, 0, :, 0, 0], f"b t -> {self.family.frame_timesteps}")
        p_t, p_h, p_w = self.base_patch
        return values[:, 0, ::p_t, ::p_h, ::p_w].flatten(1)
