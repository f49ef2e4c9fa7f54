"""A stock transformer that predicts at any of its patch sizes, through diffusers hooks and nothing else.

    latents --fold--> stock forward at the coarse noise level, with a weak embedder and head --x0--> unfold, upsample

It knows patch sizes, LoRA and folding, and nothing of steps, guidance branches or schedules: its `runner` does.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import nn

from flexivid.diffusion import Diffusion, Level
from flexivid.model import hooks
from flexivid.model.averaged import Averaged
from flexivid.model.call import Call, parts_of
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.model.lora import LoraSwitch
from flexivid.model.mixed import MixedForward
from flexivid.model.stock_layer import StockLayer, bypassed, working_dtype
from flexivid.model.weak_mode import WeakMode
from flexivid.patches.folding import Folding, folding_for
from flexivid.patches.sizes import format_patch_size, parse_mode, spatially_doubled


class Runner(Protocol):
    """Answers the forwards of a transformer by predictions at patch sizes of its choice."""

    def run(self, flex: "FlexTransformer", call: Call): ...


class FixedPatchSize:
    """The runner of a bare transformer: one patch size, the noise level read from the timestep.

    lora: of the powerful patch size, None for the stock model.
    """

    def __init__(self, patch_size: str, lora: str | None = None):
        self.patch_size, self.lora = patch_size, lora

    def run(self, flex: "FlexTransformer", call: Call):
        if self.patch_size == flex.powerful:
            return flex.stock(call) if self.lora is None else flex.adapted(call, self.lora)
        return call.output_of(flex.predict(call, self.patch_size, flex.diffusion, call.level(flex.diffusion)))


class FlexTransformer:
    """Attaches weak modes to a transformer.

    transformer: a diffusers transformer that has a row in `families`. patch_sizes: the weak ones, as `1x4x4`, and
    those that are guidance-distilled, as `1x4x4-guided`.
    Raises ValueError for an unknown transformer, a patch size that is no multiple of the base one, or one that is
    already enabled.

    guidance_scale: that guided modes were trained for.
    diffusion: what its network predicts; a VP model needs the table of its scheduler in it. mode, folding, memo: of the
    weak forward that runs, None and stale between forwards. mixed: that forward, if its tokens are of two patch sizes.
    """

    def __init__(self, transformer: nn.Module, patch_sizes: list[str], parametrisation: str):
        self.transformer = transformer
        self.family = family_of(transformer)
        self.parametrisation = parametrisation
        self.stock_layers = [StockLayer(transformer, path) for path in (self.family.embedder, self.family.head)]
        self.embedder, self.head = (stock.layer for stock in self.stock_layers)
        self.base_patch = patch_size_of(transformer.config)
        self.powerful = format_patch_size(self.base_patch)
        if self.powerful in patch_sizes:
            raise ValueError(f"{self.powerful} is the model's own patch size; modes lists the coarser ones")
        if not self.family.temporal and any(parse_mode(name)[0][0] > self.base_patch[0] for name in patch_sizes):
            example = spatially_doubled(self.base_patch)
            raise ValueError(f"patches of {self.family.name} may be larger in space only, such as {example}")
        self.weak_modes = nn.ModuleDict(
            {
                name: WeakMode(
                    name,
                    self.embedder,
                    self.head,
                    self.base_patch,
                    self.family.channels_last,
                    parametrisation,
                    self.family.embedder_channels_last,
                )
                for name in patch_sizes
            }
        ).requires_grad_(False)
        self.diffusion = Diffusion(self.family.prediction, self.family.time_scale)
        self.guidance_scale: float | None = None
        self.runner: Runner = FixedPatchSize(self.powerful)
        self.lora = LoraSwitch(transformer)
        self.mode: WeakMode | None = None
        self.folding: Folding | None = None
        self.mixed: MixedForward | None = None
        self.memo: dict = {}
        self._signature = inspect.signature(type(transformer).forward)
        hooks.attach(self)

    @property
    def patch_sizes(self) -> list[str]:
        return [*self.weak_modes, self.powerful]

    def fix(self, patch_size: str, lora: str | None = None) -> None:
        """Every forward from now on runs at one patch size. Raises ValueError if it is none of this model's.

        lora: the name of one that is active at the powerful patch size, see `adapted`.
        """
        if patch_size not in self.patch_sizes:
            raise ValueError(f"{patch_size} is not a patch size of this model: {', '.join(self.patch_sizes)}")
        self.runner = FixedPatchSize(patch_size, lora)

    def remove(self) -> list[tuple[nn.Module, ModelHook]]:
        """Takes every hook off, and gives them with their modules; LoRA is taken off by `lora.remove_lora`."""
        self.lora.switch(None)
        return hooks.unregister(self.transformer)

    def forward(self, stock_forward: Callable, context: CacheContext | None, args: tuple, kwargs: dict):
        """One forward of the transformer, which the runner answers."""
        arguments = dict(kwargs)
        if args:
            arguments = self._signature.bind(self.transformer, *args, **kwargs).arguments
            arguments.pop("self")
        if self.family.sequence is not None:
            stock_forward = partial(self._packed, stock_forward)
        call = Call(self.family, self.base_patch, arguments, stock_forward, context)
        try:
            output = self.runner.run(self, call)
        except BaseException:
            self.lora.switch(None)
            raise
        finally:
            self.mode, self.folding, self.memo = None, None, {}
        # Between forwards the model is stock, whatever happens there: fusing, saving. In training LoRA stays as it is,
        # because checkpointed blocks run once more in the backward pass; merged weights take no part in that.
        if self.lora.is_merged or not torch.is_grad_enabled():
            self.lora.switch(None)
        return output

    def _packed(self, stock_forward: Callable, **arguments):
        """The stock forward of completed arguments, at the patch size that runs."""
        folding = self.folding if self.mode is not None else None
        return stock_forward(**self.family.sequence.stock(arguments, folding))

    def stock(self, call: Call):
        """The powerful mode: what the stock transformer gives."""
        self.mode = None
        self.lora.switch(None)
        return call.stock_forward(**call.given)

    def adapted(self, call: Call, lora: str):
        """What the stock transformer gives with a LoRA of ours, such as that of the powerful patch size in few steps.

        Raises ValueError for a scale in attention_kwargs.
        """
        self.mode = None
        self._switch(call, lora)
        return call.stock_forward(**call.given)

    def run_stock(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """What the stock embedder or head gives within a weak pass, with all that the user has put around it."""
        mode, self.mode = self.mode, None
        try:
            return self.stock_layers[index].run(x)
        finally:
            self.mode = mode

    def _switch(self, call: Call, lora: str, tokens: tuple[int, int] | None = None) -> bool:
        """Makes a LoRA of ours active. Whether this is the first time in a call of a pipeline.

        tokens: see `LoraSwitch.switch`.
        """
        if self.lora.layers and _scale(call) != 1.0:
            raise ValueError("attention_kwargs scale would scale flexivid's LoRA too; use set_adapters for your own")
        anew = self not in call.memo
        self.lora.switch(lora, anew, tokens)
        call.memo[self] = True
        return anew

    def predict(self, call: Call, patch_size: str, diffusion: Diffusion, level: Level) -> torch.Tensor:
        """What a weak patch size predicts, in the network's own terms, (B, C_out, T, H, W) in the latents' precision.

        level: of the call's latents, as `Call.level` gives it. Raises ValueError for a scale in attention_kwargs.
        """
        self.enter(call, patch_size)
        if self.mode.parametrisation == "direct":
            return self._predict_direct(call, patch_size)
        return self._predict_snr(call, patch_size, diffusion, level)

    def enter(self, call: Call, patch_size: str, tokens: tuple[int, int] | None = None) -> None:
        """Makes a weak mode the one that runs. tokens: see `LoraSwitch.switch`.

        Raises ValueError for a scale in attention_kwargs.
        """
        latents, anew = call.latents, self._switch(call, patch_size, tokens)
        mode, dtype = self.weak_modes[patch_size], working_dtype(self.embedder)
        placed = mode.patch_size_embedding
        # In training its precision is that of the optimiser.
        if not placed.requires_grad and (placed.device != latents.device or placed.dtype != dtype):
            mode.to(latents.device, dtype)
        if not placed.requires_grad:
            self.mode = None  # stock layers may be asked what they do
            mode.follow(*(stock.change(_scale(call), anew) for stock in self.stock_layers))
        self.mode, self.memo = mode, call.memo
        self.folding = self.family.folding(call.arguments, mode.multiple, self.base_patch)

    def _predict_direct(self, call: Call, patch_size: str) -> torch.Tensor:
        """The folded latents at the same timestep, unfolded (FlexiDiT, arXiv 2502.20126)."""
        folding, latents, timesteps = self.folding, call.latents, call.timesteps
        for name, timestep in timesteps.items():
            if timestep.ndim > 1:
                timesteps[name] = call.by_token(folding.block_mean(call.over_latents(timestep.float())))
        output = self._network(call, patch_size, folding.fold(latents), timesteps)
        return folding.unfold(output).to(latents.dtype)

    def _predict_snr(self, call: Call, patch_size: str, diffusion: Diffusion, level: Level) -> torch.Tensor:
        """The folded latents at the noise level of their mean, x0 up-sampled, plus a residual (`diffusion`)."""
        folding, latents = self.folding, call.latents
        averaged = Averaged.of(call, self.mode, folding, diffusion, level)
        output = self._network(call, patch_size, averaged.folded, averaged.timesteps)
        x_0, residual = averaged.x0(output, diffusion)
        x_0, channels = folding.upsample(x_0) + folding.unfold(residual), averaged.mean.shape[1]
        prediction = diffusion.output(latents[:, :channels].float(), x_0[:, :channels], level)
        if x_0.shape[1] > channels:
            prediction = torch.cat([prediction, x_0[:, channels:]], 1)
        return prediction.to(latents.dtype)

    def _network(self, call: Call, patch_size: str, folded: torch.Tensor, timesteps: dict) -> torch.Tensor:
        """The stock forward over folded latents (B, M*C, T', H', W') -> (B, C_head, T', H', W') float32."""
        family = self.family
        if family.as_many_channels:
            empty = self._head_channels - folded.shape[1]
            folded = torch.nn.functional.pad(folded, (0, 0) * 3 + (0, empty))
        changed = family.arguments_for(folded.to(call.latents.dtype)) | timesteps | {"return_dict": False}
        changed |= family.levels(call.arguments, timesteps["timestep"])
        tables = call.arguments.get(family.rope_argument)
        if tables is not None:
            changed[family.rope_argument] = family.centred_argument(tables, self.folding)
        for name in family.conditions:
            if (video := call.arguments.get(name)) is not None:
                of_it = folding_for(tuple(video.shape[2:]), self.mode.multiple, self.base_patch, family.causal)
                changed[name] = of_it.block_mean(video.float()).to(video.dtype)
        with ExitStack() as around:
            around.enter_context(bypassed(self.stock_layers))
            around.enter_context(family.around(self.transformer, self.folding, call.arguments))
            if getattr(self.transformer, "is_cache_enabled", False):  # some have no caches
                around.enter_context(self._cache_of(call, patch_size))
            if family.fixed_out_channels:
                around.enter_context(self._out_channels())
            output, *beside = parts_of(call.stock_forward(**{**call.arguments, **changed}))
        call.beside = tuple(beside)
        return family.latents({**call.arguments, **changed, "hidden_states": output}).float()

    @property
    def _head_channels(self) -> int:
        """What the head of the weak mode that runs gives for every latent."""
        return self.mode.head.out_features // math.prod(self.base_patch)

    @contextmanager
    def _cache_of(self, call: Call, patch_size: str) -> Iterator[None]:
        """A cache of diffusers keeps a state per context, and every patch size has other tokens: one context each."""
        name = f"branch {call.branch} at {patch_size}"
        context = CacheContext(name) if call.context is None else replace(call.context, name=name)
        _set_cache_context(self.transformer, context)
        try:
            yield
        finally:
            _set_cache_context(self.transformer, call.context)

    @contextmanager
    def _out_channels(self) -> Iterator[None]:
        stock = self.transformer.out_channels
        self.transformer.out_channels = self._head_channels
        try:
            yield
        finally:
            self.transformer.out_channels = stock


def _scale(call: Call) -> float:
    """By which a call scales every LoRA."""
    return (call.arguments.get("attention_kwargs") or {}).get("scale", 1.0)


def compile_blocks(transformer: nn.Module) -> None:
    """Compiles the repeated blocks, for every patch, batch and text size that comes."""
    # Each is a graph of the same code, with and without gradients: more than torch allows by itself.
    torch._dynamo.config.recompile_limit = 64
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
