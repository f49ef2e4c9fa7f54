"""One stock forward over tokens of two patch sizes: fine in some blocks of the clip, coarse elsewhere.

The blocks of a transformer do not care which tokens they see. Fine tokens come from the stock embedder, at their own
places, and go to the stock head; coarse ones come from a weak mode's, at the centres of what they cover, and go to its
head. Each is told its own noise level, and flexivid's LoRA adds to the coarse ones only.

What the blocks add to a base token, its residual, changes slowly from step to step: where the last powerful step has
left one for every token, coarse tokens are there for the fine ones to look at, and what is predicted of a token that is
not fine is head(norm(embed(x_t) + its residual)), at the present noise level.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from flexivid.diffusion import Diffusion, Level
from flexivid.model.averaged import Averaged
from flexivid.model.call import Call
from flexivid.model.family import Tables
from flexivid.model.stock_layer import bypassed
from flexivid.model.surroundings import context_parallel_config
from flexivid.patches.folding import Folding, Size3
from flexivid.patches.mixed import Selection, to_latents
from flexivid.patches.sizes import MixedSize

if TYPE_CHECKING:
    from flexivid.model.flexible import FlexTransformer


def check_mixing(flex: "FlexTransformer", size: MixedSize) -> None:
    """Raises ValueError where a transformer cannot run a mixed patch size."""
    if isinstance(flex.family.loose, str):
        raise ValueError(f"{flex.family.name} does not run {size}: {flex.family.loose}")
    if (flex.transformer.config.get("num_frame_per_block") or 1) > 1:
        raise ValueError(f"{flex.family.name} does not run {size} where blocks of frames are causal: tokens have none")
    if size.fine != flex.powerful or size.coarse not in flex.weak_modes:
        raise ValueError(
            f"{size} is not the model's own patch size and a weak one: {flex.powerful} and one of "
            f"{', '.join(flex.weak_modes)}"
        )
    if flex.parametrisation != "snr":
        raise ValueError(f"{size} needs coarse tokens at their own noise level, parametrisation snr, not direct")
    if flex.lora.is_merged:
        raise ValueError(f"{size} needs LoRA on some tokens and not on others: enable without merge_lora")
    if getattr(flex.transformer, "is_cache_enabled", False):
        raise ValueError(f"{size} has other tokens at every step, and a cache of diffusers knows those of the last one")
    if context_parallel_config(flex.transformer) is not None:
        raise ValueError(f"{size} does not go with context parallel, which splits the tokens of a grid")


def predict_mixed(
    flex: "FlexTransformer",
    call: Call,
    patch_size: str,
    selection: Selection,
    diffusion: Diffusion,
    level: Level,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """What a forward over a mixed sequence predicts, in the network's own terms, (B, C_out, T, H, W).

    patch_size: of the coarse tokens, one of the weak ones. selection: which tokens there are, in the folding of that
    patch size. level: of the call's latents. residual: (B, base tokens, D) of `stock_with_residual`, which gets the
    fine tokens' new ones; without it, what is predicted where blocks are coarse is x0 of the coarse grid, up-sampled,
    in which fine blocks stand as the mean of their x0. All of the model has been checked by `check_mixing`.
    """
    latents, (coarse_count, fine_count) = call.latents, selection.counts
    flex.enter(call, patch_size, selection.counts)
    averaged = Averaged.of(call, flex.mode, flex.folding, diffusion, level) if coarse_count else None
    forward = MixedForward(flex, call, selection, averaged)
    output, fresh = forward.run()
    coarse, fine = forward.latents_of(output)
    if not coarse_count:
        prediction = fine
    elif residual is not None:
        residual.scatter_(1, selection.fine[:, :, None].expand_as(fresh), fresh.to(residual.dtype))
        prediction = call.latents_of(stock_by_residual(flex, call, residual)).float()
    else:
        folding, channels = selection.folding, averaged.mean.shape[1]
        noisy, (x_0_coarse, beside) = latents[:, :channels].float(), averaged.x0(coarse, diffusion)
        if fine_count:
            x_0_fine = diffusion.x0(noisy, fine, level)
            is_fine = folding.fold(selection.fine_latents())[:, :1]
            x_0_coarse = torch.where(is_fine, folding.block_mean(x_0_fine), x_0_coarse)
        x_0 = folding.upsample(x_0_coarse) + folding.unfold(beside)
        prediction = diffusion.output(noisy, x_0, level)
    if coarse_count and fine_count:
        prediction = torch.where(selection.fine_latents(), fine, prediction)
    return prediction.to(latents.dtype)


@dataclass
class MixedForward:
    """A forward over a mixed sequence, while it runs: what the hooks on embedder, positions and head ask.

    averaged: what coarse tokens are made of, None where there are none.
    """

    flex: "FlexTransformer"
    call: Call
    selection: Selection
    averaged: Averaged | None

    def run(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output of the stock forward, and what its blocks have added to the fine tokens, (B, fine tokens, D)."""
        flex, call, (coarse, fine) = self.flex, self.call, self.selection.counts
        loose, (p_t, p_h, p_w) = flex.family.loose, flex.base_patch
        batch, channels = call.latents.shape[:2]
        # The embedder's hook looks at the call's latents: of these only the shape counts.
        column = call.latents.new_zeros(()).expand(batch, channels, p_t * (coarse + fine), p_h, p_w)
        timesteps = {name: self._of_tokens(name) for name in call.timesteps}
        changed = flex.family.arguments_for(column) | timesteps | {"return_dict": False}
        if timesteps["timestep"].ndim == 2:
            changed |= loose.timed
        flex.mixed = self
        try:
            with bypassed(flex.stock_layers), _tapped(flex.transformer, loose.blocks) as (before, after):
                output = call.stock_forward(**{**call.arguments, **changed})[0]
        finally:
            flex.mixed = None
        output = flex.family.latents({**call.arguments, **changed, "hidden_states": output}).float()
        return output, (after.seen - before.seen)[:, coarse:]

    def latents_of(self, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The column of tokens that comes out -> (B, C_head, T', H', W') of the coarse grid and (B, C_out, T, H, W)."""
        folding, channels = self.selection.folding, self.flex.mode.out_channels
        tokens = output.unflatten(2, (-1, self.flex.base_patch[0])).transpose(1, 2)  # (B, tokens, C, p_t, p_h, p_w)
        coarse, fine = self.selection.scatter(tokens)
        return to_latents(coarse, folding.coarse_grid), to_latents(fine[:, :, :channels], folding.grid)

    def _of_tokens(self, name: str) -> torch.Tensor:
        """Timesteps, (B, tokens) where there are both kinds of them, else as one kind has it."""
        given, selection = self.call.timesteps[name], self.selection
        if self.averaged is None:
            return given
        told = self.averaged.timesteps[name]
        if not selection.counts[1]:
            return told
        folding, device = selection.folding, self.call.latents.device

        def by_token(timestep: torch.Tensor, grid: Size3) -> torch.Tensor:
            timestep = timestep.to(device, torch.float32)
            timestep = timestep if timestep.ndim == 2 else timestep.reshape(-1, 1)
            return timestep.expand(-1, math.prod(grid))

        return selection.gather(by_token(told, folding.coarse_grid), by_token(given, folding.grid))

    def embed(self) -> torch.Tensor:
        """The tokens of the sequence, as the stock embedder gives its own."""
        coarse = fine = None
        if self.averaged is not None:
            folded = self.averaged.folded.to(self.call.latents.dtype)
            coarse = self.flex.mode.embed(self.flex.family.packed(folded))
        if self.selection.counts[1]:
            fine = self.flex.run_stock(0, self.call.arguments["hidden_states"])
        is_grid = (coarse if fine is None else fine).ndim == 5
        if is_grid:
            coarse, fine = (None if part is None else part.flatten(2).mT for part in (coarse, fine))
        tokens = self.selection.gather(coarse, fine)
        return tokens.mT[..., None, None] if is_grid else tokens

    def positions(self, centred: Callable[[Folding], Tables]) -> Tables:
        """Rotary tables of the sequence. centred: those of a folding's coarse tokens, (1 or B, tokens, ...)."""
        folding, (coarse_count, fine_count) = self.selection.folding, self.selection.counts
        base = self.flex.family.folding(self.call.arguments, (1, 1, 1), self.flex.base_patch)
        coarse = centred(folding) if coarse_count else (None, None)
        fine = centred(base) if fine_count else (None, None)
        return tuple(self.selection.gather(*parts) for parts in zip(coarse, fine, strict=True))

    def predict(self, tokens: torch.Tensor) -> torch.Tensor:
        """What the heads give, (B, tokens, pixels of a patch * channels): fine tokens have fewer, and zeros behind."""
        coarse_count, fine_count = self.selection.counts
        parts, mode = [], self.flex.mode
        if coarse_count:
            parts.append(mode.predict(tokens[:, :coarse_count]))
        if fine_count:
            fine = self.flex.run_stock(1, tokens[:, coarse_count:])
            if coarse_count:
                pixels = math.prod(mode.base_patch)
                missing = (parts[0].shape[-1] - fine.shape[-1]) // pixels
                by_pixel = (pixels, -1) if mode.channels_last else (-1, pixels)
                padding = (0, missing) if mode.channels_last else (0, 0, 0, missing)
                fine = nn.functional.pad(fine.unflatten(-1, by_pixel), padding).flatten(-2)
            parts.append(fine)
        return torch.cat(parts, 1)


def stock_with_residual(flex: "FlexTransformer", call: Call) -> tuple[tuple, torch.Tensor]:
    """What the stock transformer gives, and what its blocks add to every token: (B, base tokens, D)."""
    with _tapped(flex.transformer, flex.family.loose.blocks) as (before, after):
        return flex.stock(call), after.seen - before.seen


def stock_by_residual(flex: "FlexTransformer", call: Call, residual: torch.Tensor) -> torch.Tensor:
    """The output of the stock transformer if its blocks added `residual` to its tokens: its embedder and its head."""
    with _in_place_of_blocks(flex.transformer, flex.family.loose.blocks, lambda blocks: [_Adds(residual)]):
        output = flex.stock(call)
    return output[0]


class _Tap(nn.Module):
    """A block that changes nothing. seen: the tokens that came by."""

    def forward(self, hidden_states, *args, **kwargs):
        self.seen = hidden_states
        return hidden_states


class _Adds(nn.Module):
    """A block that adds what is known."""

    def __init__(self, residual: torch.Tensor):
        super().__init__()
        self._residual = residual

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + self._residual


@contextmanager
def _tapped(transformer: nn.Module, name: str) -> Iterator[tuple[_Tap, _Tap]]:
    """Within, one sees the tokens that go into the blocks, the other those that come out."""
    before, after = _Tap(), _Tap()
    with _in_place_of_blocks(transformer, name, lambda blocks: [before, *blocks, after]):
        yield before, after


@contextmanager
def _in_place_of_blocks(transformer: nn.Module, name: str, others: Callable) -> Iterator[None]:
    stock = transformer._modules[name]
    transformer._modules[name] = nn.ModuleList(others(stock))
    try:
        yield
    finally:
        transformer._modules[name] = stock
