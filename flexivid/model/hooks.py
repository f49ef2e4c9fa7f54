"""The hooks of diffusers through which a stock transformer runs at other patch sizes.

All bear the name "flexivid". In powerful mode those on submodules pass everything through untouched.
"""

from typing import TYPE_CHECKING

from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager
from torch import nn

from flexivid.model.lora import HOOK_NAME

if TYPE_CHECKING:
    from flexivid.model.flexible import FlexTransformer


def attach(flex: "FlexTransformer") -> None:
    """Puts the hooks of a flexible transformer on its root, its embedder, its head and what makes its positions."""
    transformer = flex.transformer
    hooks = {
        transformer: RootHook(flex),
        flex.embedder: _EmbedderHook(flex),
        flex.head: _HeadHook(flex),
        transformer.get_submodule(flex.family.positions): _PositionsHook(flex),
    }
    for module, hook in hooks.items():
        HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, HOOK_NAME)
    transformer._diffusers_hook.invalidate_child_registries_cache()


def detach(transformer: nn.Module) -> None:
    transformer._diffusers_hook.remove_hook(HOOK_NAME, recurse=True)
    transformer._diffusers_hook.invalidate_child_registries_cache()


def attached(transformer: nn.Module) -> "FlexTransformer | None":
    """What flexivid has attached to a transformer, or None."""
    hook = HookRegistry.check_if_exists_or_initialize(transformer).get_hook(HOOK_NAME)
    return hook.flex if hook is not None else None


class _State:
    """diffusers hands the cache context only to hooks that hold a state manager; ours keeps no other state."""

    def reset(self) -> None: ...


class RootHook(ModelHook):
    _is_stateful = True

    def __init__(self, flex: "FlexTransformer"):
        super().__init__()
        self.flex = flex
        self.state_manager = StateManager(_State)

    def new_forward(self, module, *args, **kwargs):
        return self.flex.forward(self.fn_ref.original_forward, self.state_manager._context, args, kwargs)

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
        return self.flex.mode.embed(folded)


class _HeadHook(_SubmoduleHook):
    def weak(self, module, tokens):
        return self.flex.mode.head(tokens)


class _PositionsHook(_SubmoduleHook):
    def weak(self, module, *args, **kwargs):
        flex, stock = self.flex, self.fn_ref.original_forward
        if not flex.family.positions_of_sizes:
            return flex.family.centred(module, stock, flex.folding, *args, **kwargs)
        key = (flex.mode.multiple, flex.folding.size, args[0].device, args[0].dtype)
        if key not in flex.memo:
            flex.memo[key] = flex.family.centred(module, stock, flex.folding, *args, **kwargs)
        return flex.memo[key]
