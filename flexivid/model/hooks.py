"""How flexivid hangs onto the modules of a transformer: hooks of diffusers, kept in place whatever comes and goes."""

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import _GROUP_OFFLOADING
from diffusers.hooks.hooks import HookFunctionReference, StateManager
from torch import nn

if TYPE_CHECKING:
    from flexivid.model.flexible import FlexTransformer

HOOK_NAME = "flexivid"


class _OwnForward(HookFunctionReference):
    """Of a hook with a forward of its own. Where diffusers removes the hook inside, it would replace that forward by
    what the removed hook had called, and so pass ours by for good; what is called belongs beneath it."""

    def __setattr__(self, name: str, value) -> None:
        super().__setattr__("original_forward" if name == "forward" else name, value)


def hook_of(module: nn.Module) -> ModelHook | None:
    """flexivid's hook on a module."""
    return HookRegistry.check_if_exists_or_initialize(module).get_hook(HOOK_NAME)


def register(module: nn.Module, hook: ModelHook) -> None:
    """Hangs one of flexivid's hooks onto a module, outermost."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)
    hook.fn_ref.__class__ = _OwnForward
    hook.entry = module.forward


def unregister(transformer: nn.Module) -> list[tuple[nn.Module, ModelHook]]:
    """Takes all of flexivid's hooks off, and gives them with their modules; what was put around them since goes on."""
    taken = []
    for module in transformer.modules():
        registry = getattr(module, "_diffusers_hook", None)
        if registry is None or (hook := registry.get_hook(HOOK_NAME)) is None:
            continue
        index, beneath, outermost = registry._hook_order.index(HOOK_NAME), hook.fn_ref.original_forward, module.forward
        outer = registry._fn_refs[index + 1 : index + 2]
        forwards = [reference.forward for reference in outer]
        registry.remove_hook(HOOK_NAME, recurse=False)
        if outer and outer[0].original_forward is not None:
            outer[0].forward, outer[0].original_forward = forwards[0], beneath
        elif not outer and outermost is not hook.entry:
            # Something else than a hook, such as cache-dit, has wrapped ours: that calls on, past us.
            module.forward, stock = outermost, ModelHook()
            hook.fn_ref.__class__ = HookFunctionReference
            hook.fn_ref.forward = beneath
            hook.fn_ref.pre_forward, hook.fn_ref.post_forward = stock.pre_forward, stock.post_forward
        taken.append((module, hook))
    if taken:
        transformer._diffusers_hook.invalidate_child_registries_cache()
    return taken


class _State:
    """diffusers hands the cache context only to hooks that hold a state manager; ours keeps no other state."""

    def reset(self) -> None: ...


class RootHook(ModelHook):
    """Where a call of the transformer comes in, and its `flex` decides what to run.

    That is Python which changes from step to step, and must not be traced: it runs eagerly where the transformer is
    compiled as a whole, and the stock forward that it calls is compiled as the user has asked for.

    compiled: what `transformer.compile()` had made before; it is put back with the stock forward. wrapped: the forward
    of what `torch.compile(transformer)` has made. blocks: the lists of blocks that the transformer had when it was
    enabled.
    """

    _is_stateful = True

    def __init__(self, flex):
        super().__init__()
        self.flex = flex
        self.state_manager = StateManager(_State)
        self.compiled: Callable | None = None
        self.wrapped: Callable | None = None
        self.blocks: dict[str, nn.Module] = {}
        self._inside = False
        self._ran = False  # a stock forward, in this call

    def initialize_hook(self, module):
        self.blocks = {name: part for name, part in module.named_children() if isinstance(part, nn.ModuleList)}
        if module._compiled_call_impl is not None:
            self.compiled, module._compiled_call_impl = module._compiled_call_impl, None
        return module

    def deinitalize_hook(self, module):
        if self.compiled is not None and module._compiled_call_impl is None:
            module._compiled_call_impl = self.compiled
        return module

    def new_forward(self, module, *args, **kwargs):
        if self._inside:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self._run(module, args, kwargs)

    @torch.compiler.disable(reason="flexivid plans in Python: without fullgraph, or with compile_repeated_blocks")
    def _run(self, module, args: tuple, kwargs: dict):
        self._ran = False
        return self.flex.forward(partial(self._stock, module), self.state_manager._context, args, kwargs)

    def _stock(self, module, *args, **kwargs):
        group_offload = module._diffusers_hook.get_hook(_GROUP_OFFLOADING)
        if self._ran and group_offload is not None and group_offload.next_group is not None:
            # With streams the root, which comes once a call, loads what a forward begins with.
            group_offload.next_group.onload_()
        self._ran = True
        compiled = module._compiled_call_impl or self.compiled or self.wrapped
        if compiled is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        self._inside = True
        try:
            return compiled(*args, **kwargs)
        finally:
            self._inside = False

    def reset_state(self, module):
        self.state_manager.reset()
        return module


class _SubmoduleHook(ModelHook):
    def __init__(self, flex: "FlexTransformer"):
        super().__init__()
        self.flex = flex

    def new_forward(self, module, *args, **kwargs):
        if self.flex.mode is None:
            return self.fn_ref.original_forward(*args, **kwargs)
        return self.weak(module, *args, **kwargs)


class _EmbedderHook(_SubmoduleHook):
    def weak(self, module, folded):
        mixed, mode = self.flex.mixed, self.flex.mode
        if self.flex.family.as_many_channels:
            folded = folded[:, : mode.embedder.in_channels]
        if self.flex.family.sequence is not None:
            return self._behind_given(folded)
        return mode.embed(folded) if mixed is None else mixed.embed()

    def _behind_given(self, tokens: torch.Tensor) -> torch.Tensor:
        """Of a sequence (B, tokens, channels) the last ones are coarse; the others are the stock layer's, and have as
        many channels before empty ones."""
        mode = self.flex.mode
        count = math.prod(self.flex.folding.coarse_grid)
        given, coarse = tokens.tensor_split([tokens.shape[1] - count], 1)
        embedded = mode.embed(coarse)
        if not given.shape[1]:
            return embedded
        own = given[..., : given.shape[-1] // math.prod(mode.multiple)]
        return torch.cat([self.flex.run_stock(0, own), embedded], 1)


class _HeadHook(_SubmoduleHook):
    def weak(self, module, tokens):
        mixed = self.flex.mixed
        return self.flex.mode.predict(tokens) if mixed is None else mixed.predict(tokens)


class _PositionsHook(_SubmoduleHook):
    def weak(self, module, *args, **kwargs):
        if self.flex.mixed is None:
            return self._centred(module, self.flex.folding, args, kwargs)
        return self.flex.mixed.positions(lambda folding: self._centred(module, folding, args, kwargs))

    def _centred(self, module, folding, args: tuple, kwargs: dict):
        flex, stock = self.flex, self.fn_ref.original_forward
        if not flex.family.positions_of_sizes:
            return flex.family.centred(module, stock, folding, *args, **kwargs)
        key = (folding.multiple, folding.size, args[0].device, args[0].dtype)
        if key not in flex.memo:
            flex.memo[key] = flex.family.centred(module, stock, folding, *args, **kwargs)
        return flex.memo[key]


def attach(flex: "FlexTransformer") -> None:
    """Hangs the hooks of a flexible transformer onto its root, its embedder, its head and what makes its positions."""
    transformer = flex.transformer
    hooks = {
        transformer: RootHook(flex),
        flex.embedder: _EmbedderHook(flex),
        flex.head: _HeadHook(flex),
    }
    for path in (flex.family.positions, *flex.family.more_positions):
        hooks[transformer.get_submodule(path)] = _PositionsHook(flex)
    for module, hook in hooks.items():
        register(module, hook)
    transformer._diffusers_hook.invalidate_child_registries_cache()


def attached(transformer: nn.Module) -> "FlexTransformer | None":
    """What flexivid has attached to a transformer, or None."""
    hook = hook_of(transformer)
    return hook.flex if hook is not None else None
