"""A stock transformer that runs at any of its patch sizes, through diffusers hooks and nothing else.

Hooks named "flexivid" sit on the root, the patch embedder, the head and what makes positions. In powerful mode they
pass everything through untouched; in a weak mode the root folds the latents, calls the stock forward, and unfolds.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers.hooks import ModelHook
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from flexivid.diffusion import FLOWS, noise_level, normaliser, output_for_x0, predicted_x0, timestep_at
from flexivid.model.families import family_of
from flexivid.model.family import centred_tables, patch_size_of
from flexivid.model.hooks import RootHook, register, unregister
from flexivid.model.lora import LoraSwitch
from flexivid.model.weak_mode import WeakMode
from flexivid.patches.folding import Folding, folding_for, token_grid
from flexivid.patches.sizes import format_patch_size, parse_patch_size, spatially_doubled
from flexivid.sampling.schedule import KEPT


@dataclass(frozen=True)
class Choice:
    """What one forward is to do.

    sigma: noise level of the latents in flow matching, None to take it from the timestep, which schedulers may round;
    where tokens have timesteps of their own it is that of the noisiest. branch: which guidance branch this is.
    compare: weak patch sizes that a powerful prediction is compared with, see `_correct`. keep: a later branch of the
    same step needs this call and its prediction. mixed: the branches of this step run at two patch sizes, see `_guide`.
    kept: this branch does not run, see `_keep_guidance`; `patch_size` is that of the other one.
    """

    patch_size: str
    sigma: float | None = None
    branch: int = 0
    compare: tuple[str, ...] = ()
    keep: bool = False
    mixed: bool = False
    kept: bool = False


Policy = Callable[["FlexTransformer", dict, CacheContext | None], Choice]


class FlexTransformer:
    """Attaches weak modes to a transformer. `policy` says before every forward which patch size runs.

    transformer: a diffusers transformer that has a row in `families`. patch_sizes: the weak ones, as `1x4x4`.
    Raises ValueError for an unknown transformer, a patch size that is no multiple of the base one, or one that is
    already enabled.
    """

    def __init__(self, transformer: nn.Module, patch_sizes: list[str], parametrisation: str):
        self.transformer = transformer
        self.family = family_of(transformer)
        self.parametrisation = parametrisation
        self.embedder = transformer.get_submodule(self.family.embedder)
        self.head = transformer.get_submodule(self.family.head)
        self.base_patch = patch_size_of(transformer.config)
        self.powerful = format_patch_size(self.base_patch)
        if self.powerful in patch_sizes:
            raise ValueError(f"{self.powerful} is the model's own patch size; modes lists the coarser ones")
        if not self.family.temporal and any(parse_patch_size(name)[0] > self.base_patch[0] for name in patch_sizes):
            example = spatially_doubled(self.base_patch)
            raise ValueError(f"patches of {self.family.name} may be larger in space only, such as {example}")
        self.weak_modes = nn.ModuleDict(
            {
                name: WeakMode(
                    name, self.embedder, self.head, self.base_patch, self.family.channels_last, parametrisation
                )
                for name in patch_sizes
            }
        ).requires_grad_(False)
        # (train timesteps,) of a VP model's scheduler, without which a timestep says nothing of noise.
        self.alphas_cumprod: torch.Tensor | None = None
        self.policy: Policy = self.fixed_policy(self.powerful)
        self.mode: WeakMode | None = None
        self._folding: Folding | None = None
        self.lora = LoraSwitch(transformer)
        # Of the last powerful step, (B, C, T, H, W) each. By guidance branch and weak patch size: what the powerful x0
        # was more than the weak one. Under (1, KEPT): what the conditional x0 was more than the unconditional one.
        self.corrections: dict[tuple[int, str], torch.Tensor] = {}
        self._context: CacheContext | None = None  # of the forward that runs
        self._kept: tuple[dict, torch.Tensor] | None = None  # the conditional call of a step, and its prediction
        self._signature = inspect.signature(type(transformer).forward)
        hooks = {
            transformer: RootHook(self),
            self.embedder: _EmbedderHook(self),
            self.head: _HeadHook(self),
            transformer.get_submodule(self.family.positions): _PositionsHook(self),
        }
        for module, hook in hooks.items():
            register(module, hook)
        transformer._diffusers_hook.invalidate_child_registries_cache()

    @property
    def patch_sizes(self) -> list[str]:
        return [*self.weak_modes, self.powerful]

    def fixed_policy(self, patch_size: str) -> Policy:
        """The policy of a bare transformer: one patch size, the noise level read from the timestep."""
        if patch_size not in self.patch_sizes:
            raise ValueError(f"{patch_size} is not a patch size of this model: {', '.join(self.patch_sizes)}")
        return lambda flex, call, context: Choice(patch_size)

    def remove(self) -> list[tuple[nn.Module, ModelHook]]:
        """Takes every hook off, and gives them with their modules; LoRA is taken off by `lora.remove_lora`."""
        self.lora.switch(None)
        return unregister(self.transformer)

    def run(self, stock_forward: Callable, context: CacheContext | None, args: tuple, kwargs: dict):
        """One forward of the transformer at the patch size that the policy chooses."""
        call = self._signature.bind(self.transformer, *args, **kwargs).arguments
        call.pop("self")
        self._context = context
        try:
            choice = self.policy(self, call, context)
            if choice.patch_size == self.powerful and not choice.kept:
                self.mode = None
                self.lora.switch(None)
                output = stock_forward(*args, **kwargs)
                for patch_size in choice.compare:
                    weak = self._weak_forward(stock_forward, call, replace(choice, patch_size=patch_size))
                    correction = self._x0_difference(call, self._latents_of(call, output[0]) - weak, choice)
                    self.corrections[choice.branch, patch_size] = correction
                if choice.branch == 1 and self._kept is not None:
                    conditional, unconditional = (self._latents_of(call, o) for o in (self._kept[1], output[0]))
                    self.corrections[1, KEPT] = self._x0_difference(call, conditional - unconditional, choice)
            else:
                if choice.kept:
                    prediction = self._keep_guidance(call, choice)
                else:
                    prediction = self._weak_forward(stock_forward, call, choice)
                    if not choice.mixed:
                        prediction = self._correct(call, prediction, choice)
                    elif choice.branch == 1:
                        prediction = self._guide(stock_forward, prediction, choice)
                packed = self.family.packed(prediction)
                output = Transformer2DModelOutput(sample=packed) if call.get("return_dict", True) else (packed,)
            self._kept = (call, output[0]) if choice.keep else None
        except BaseException:
            self.lora.switch(None)
            raise
        finally:
            self.mode, self._folding = None, None
        # Between forwards the model is stock, whatever happens there: fusing, saving. In training LoRA stays as it is,
        # because checkpointed blocks run once more in the backward pass; merged weights take no part in that.
        if self.lora.is_merged or not torch.is_grad_enabled():
            self.lora.switch(None)
        return output

    def _noise_level(self, call: dict, choice: Choice) -> tuple[torch.Tensor, torch.Tensor]:
        """(alpha, s) of a call's latents, float32: (B, 1, 1, 1, 1), or (B, 1, T, H, W) if each token has a timestep."""
        family, latents = self.family, self.family.latents(call)
        timestep = torch.as_tensor(call["timestep"]).to(latents.device, torch.float32)
        alpha, s = noise_level(family.prediction, timestep, family.time_scale, self._table(latents.device))
        if choice.sigma is not None:
            # Clean tokens stay so, whatever the scheduler has rounded.
            s = s * (choice.sigma / s.max()) if timestep.ndim == 2 else torch.full_like(s, choice.sigma)
            alpha = 1 - s
        return self._over_latents(alpha, latents), self._over_latents(s, latents)

    def _table(self, device: torch.device) -> torch.Tensor | None:
        """(train timesteps,) float32, the alphas_cumprod of a VP model."""
        if self.family.prediction in FLOWS:
            return None
        if self.alphas_cumprod is None:
            raise ValueError("this model's noise levels are in its scheduler: enable its pipeline")
        return self.alphas_cumprod.to(device, torch.float32)

    def _over_latents(self, level: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """(), (B,) or (B, tokens) -> (B, 1, 1, 1, 1) or (B, 1, T, H, W)."""
        if level.ndim < 2:
            return level.expand(len(latents)).view(-1, 1, 1, 1, 1)
        grid = token_grid(latents.shape[2:], self.base_patch)
        if level.shape[1] != math.prod(grid):
            raise ValueError(
                f"{level.shape[1]} timesteps for a clip of {'x'.join(map(str, grid))} tokens: one, or one a token; "
                f"diffusion forcing, one a frame, is not supported"
            )
        level = level.view(-1, 1, *grid)
        for axis, patch in enumerate(self.base_patch):
            level = level.repeat_interleave(patch, axis + 2)
        return level

    def _latents_of(self, call: dict, output: torch.Tensor) -> torch.Tensor:
        """An output of the transformer, as (B, C, T, H, W)."""
        return self.family.latents({**call, "hidden_states": output})

    def _x0_difference(self, call: dict, difference: torch.Tensor, choice: Choice) -> torch.Tensor:
        """By how much x0 differs where outputs differ by `difference`, (B, C, T, H, W), float32."""
        # x0 is affine in the output, so that at x = 0 a difference of outputs becomes the difference of x0.
        difference = difference.float()
        level = self._noise_level(call, choice)
        return predicted_x0(self.family.prediction, torch.zeros_like(difference), difference, *level)

    def _shifted(self, call: dict, prediction: torch.Tensor, x0_difference: torch.Tensor, choice: Choice):
        """The prediction whose x0 is larger by a difference: the inverse of `_x0_difference`."""
        level = self._noise_level(call, choice)
        in_output = output_for_x0(self.family.prediction, torch.zeros_like(x0_difference), x0_difference, *level)
        return (prediction + in_output).to(prediction.dtype)

    def _correct(self, call: dict, weak: torch.Tensor, choice: Choice) -> torch.Tensor:
        """x0 = x0_weak(t) + [x0_powerful(t_k) - x0_weak(t_k)], t_k the last powerful step; before one, x0_weak alone.

        The weak prediction as control variate: it follows what changes from step to step, and the difference, which
        holds the detail that a weak patch size does not draw, changes slowly.
        """
        correction = self.corrections.get((choice.branch, choice.patch_size))
        return weak if correction is None else self._shifted(call, weak, correction, choice)

    def _keep_guidance(self, call: dict, choice: Choice) -> torch.Tensor:
        """x0_uncond = x0_cond(t) - [x0_cond(t_k) - x0_uncond(t_k)], t_k the last powerful step: no forward.

        Guidance multiplies the difference of the branches, and with it what a weak patch size gets wrong in both.
        """
        conditional = self._latents_of(call, self._kept[1])
        return self._shifted(call, conditional, -self.corrections[1, KEPT], choice)

    def _guide(self, stock_forward: Callable, weak_unconditional: torch.Tensor, choice: Choice) -> torch.Tensor:
        """The unconditional prediction of a mixed step, whose conditional one is powerful: v_c - (v_c,weak - v_u,weak).

        Guidance then multiplies the difference of two predictions of one patch size, in which what a weak mode gets
        wrong cancels. Against the powerful conditional prediction it would be multiplied by the scale at every step,
        and so would all detail that a weak mode does not draw: the latents blow up. It costs a second weak forward.
        """
        call, powerful = self._kept
        weak_conditional = self._weak_forward(stock_forward, call, replace(choice, branch=0))
        conditional = self._latents_of(call, powerful)
        return conditional + weak_unconditional - weak_conditional

    @contextmanager
    def _cache_of(self, choice: Choice) -> Iterator[None]:
        """A cache of diffusers keeps a state per context, and every patch size has other tokens: one context each."""
        if not getattr(self.transformer, "is_cache_enabled", False):  # some have no caches
            yield
            return
        name = f"branch {choice.branch} at {choice.patch_size}"
        context = CacheContext(name) if self._context is None else replace(self._context, name=name)
        _set_cache_context(self.transformer, context)
        try:
            yield
        finally:
            _set_cache_context(self.transformer, self._context)

    @contextmanager
    def _out_channels_of(self, mode: WeakMode) -> Iterator[None]:
        if not self.family.fixed_out_channels:
            yield
            return
        stock = self.transformer.out_channels
        self.transformer.out_channels = mode.head.out_features // math.prod(self.base_patch)
        try:
            yield
        finally:
            self.transformer.out_channels = stock

    def _weak_forward(self, stock_forward: Callable, call: dict, choice: Choice) -> torch.Tensor:
        """The prediction at a weak patch size, (B, C_out, T, H, W)."""
        family, latents = self.family, self.family.latents(call)
        if self.lora.layers and (call.get("attention_kwargs") or {}).get("scale", 1.0) != 1.0:
            raise ValueError("attention_kwargs scale would scale flexivid's LoRA too; use set_adapters for your own")
        self.lora.switch(choice.patch_size)
        mode = self.weak_modes[choice.patch_size]
        if not mode.patch_size_embedding.requires_grad:  # in training its precision is that of the optimiser
            mode.to(latents.device, self.embedder.bias.dtype)
        folding = folding_for(tuple(latents.shape[2:]), mode.multiple, self.base_patch, family.causal)
        self.mode, self._folding = mode, folding

        def network(folded: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            changed = family.arguments_for(folded.to(latents.dtype)) | {"timestep": timestep, "return_dict": False}
            tables = call.get(family.rope_argument)
            if tables is not None:
                changed[family.rope_argument] = centred_tables(tables, folding, token_axis=0)
            with self._cache_of(choice), self._out_channels_of(mode):
                output = stock_forward(**{**call, **changed})[0]
            return family.latents({**call, **changed, "hidden_states": output}).float()

        def by_token(level: torch.Tensor) -> torch.Tensor:
            """(B, 1, T', H', W') -> (B, coarse tokens), (B, 1, 1, 1, 1) -> (B,)."""
            if level.shape[2:].numel() == 1:
                return level.flatten()
            p_t, p_h, p_w = self.base_patch
            return level[:, 0, ::p_t, ::p_h, ::p_w].flatten(1)

        if mode.parametrisation == "direct":
            timestep = call["timestep"]
            if timestep.ndim == 2:
                timestep = by_token(folding.block_mean(self._over_latents(timestep.float(), latents)))
            return folding.unfold(network(folding.fold(latents), timestep)).to(latents.dtype)

        alpha, s = fine = self._noise_level(call, choice)
        if s.shape[2:].numel() > 1:
            alpha, s = folding.block_mean(alpha), folding.block_mean(s)
        # Condition channels carry no noise: they are averaged as they are. What a model predicts beside its latents,
        # the variance of image models, is upsampled as it is.
        channels, prediction_type = min(mode.out_channels, latents.shape[1]), family.prediction
        x_t = latents[:, :channels].float()
        kappa = folding.kappa.to(latents.device)
        typical_kappa = kappa.median()
        c = normaliser(prediction_type, alpha, s, kappa)
        by_block = folding.fold(latents.float()).unflatten(1, (-1, latents.shape[1]))
        folded = torch.cat([by_block[:, :, :channels] / c.unsqueeze(1), by_block[:, :, channels:]], dim=2).flatten(1, 2)
        # Every block has its own c; the network is told the noise level of one without padding.
        typical_c = normaliser(prediction_type, alpha, s, typical_kappa)
        level = by_token(alpha / typical_c), by_token(s * typical_kappa / typical_c)
        timestep = timestep_at(prediction_type, *level, family.time_scale, self._table(latents.device))
        coarse, beside, residual = network(folded, timestep).tensor_split([channels, mode.out_channels], dim=1)
        x_coarse = folding.block_mean(x_t) / c
        x_0_coarse = predicted_x0(prediction_type, x_coarse, coarse, alpha / c, s * kappa / c)
        x_0 = folding.upsample(torch.cat([x_0_coarse, beside], 1)) + folding.unfold(residual)
        prediction = output_for_x0(prediction_type, x_t, x_0[:, :channels], *fine)
        return torch.cat([prediction, x_0[:, channels:]], 1).to(latents.dtype)


def compile_blocks(transformer: nn.Module) -> None:
    """Compiles the repeated blocks, for every patch, batch and text size that comes."""
    # Each is a graph of the same code, with and without gradients: more than torch allows by itself.
    torch._dynamo.config.recompile_limit = 64
    transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)


class _SubmoduleHook(ModelHook):
    def __init__(self, flex: FlexTransformer):
        super().__init__()
        self.flex = flex

    def new_forward(self, module, *args, **kwargs):
        if self.flex.mode is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.weak(module, *args, **kwargs)


class _EmbedderHook(_SubmoduleHook):
    def weak(self, module, folded: torch.Tensor) -> torch.Tensor:
        return self.flex.mode.embed(folded)


class _HeadHook(_SubmoduleHook):
    def weak(self, module, tokens: torch.Tensor) -> torch.Tensor:
        return self.flex.mode.head(tokens)


class _PositionsHook(_SubmoduleHook):
    def weak(self, module, *args, **kwargs):
        return self.flex.family.centred(module, self.fn_ref.original_forward, self.flex._folding, *args, **kwargs)
