"""A transformer without weights, whose repeated blocks are one module, and forwards of it that run nothing twice.

Dozens of blocks are alike, and on the meta device every operation of every one takes half a millisecond, whatever its
size (docs/log.md, "What planning costs").
"""

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

PLAIN = (type(None), bool, int, float, str, torch.dtype)


def without_weights(stock: nn.Module) -> nn.Module:
    """A transformer of the class and configuration of `stock` on the meta device, whose blocks that are alike are one.

    Classes called `...Block...` give their `__init__` one module for equal arguments; as diffusers' own do not alter
    what they have built, blocks that are one module cost what they would cost apart. The class itself, and what other
    threads build of it meanwhile, stay as they are: only this `__init__` sees other names.
    """
    cls, made = type(stock), {}
    init = inspect.unwrap(cls.__init__)
    once = {
        name: partial(_made_once, value, made)
        for name, value in init.__globals__.items()
        if "Block" in name and isinstance(value, type) and issubclass(value, nn.Module) and not issubclass(cls, value)
    }
    building = FunctionType(init.__code__, init.__globals__ | once, init.__name__, init.__defaults__, init.__closure__)
    building.__kwdefaults__ = init.__kwdefaults__
    twin_class = type(cls.__name__, (cls,), {"__init__": register_to_config(building), "__module__": cls.__module__})
    with torch.device("meta"):
        return twin_class.from_config(stock.config)


def _made_once(block: type[nn.Module], made: dict, *args, **kwargs) -> nn.Module:
    key = block, _described((args, kwargs))
    if key not in made:
        made[key] = block(*args, **kwargs), (args, kwargs)
    return made[key][0]


def _described(value):
    """What FLOPs depend on: two values that are described alike are the same, or tensors alike but for their values.

    Objects are told apart by identity, and have to be kept alive for that.
    """
    if torch.is_tensor(value):
        return tuple(value.shape), value.stride(), value.dtype, value.device
    if isinstance(value, dict):
        return dict, *((name, _described(part)) for name, part in value.items())
    if isinstance(value, (tuple, list)):
        return type(value), *map(_described, value)
    return type(value), value if isinstance(value, PLAIN) else id(value)


def without_hooks(transformer: nn.Module) -> list[nn.Module]:
    """The modules whose forward depends on nothing but its inputs and LoRA: no hook is on them, or in them."""
    hooked = [f"{name}." for name, part in transformer.named_modules() if hasattr(part, "_diffusers_hook")]
    parts = ((f"{name}." if name else "", part) for name, part in transformer.named_modules())
    return [part for name, part in parts if not any(path.startswith(name) for path in hooked)]


@contextmanager
def each_once(modules: Iterable[nn.Module], counter: FlopCounterMode, known: dict) -> Iterator[Callable[[], int]]:
    """Within, a module that gets inputs like those of an earlier time gives what it gave then, and does not run.

    known: what was given, to be kept for later. Yields what tells the FLOPs so far, those of what did not run too.
    """
    modules, skipped = list(modules), 0

    def flops() -> int:
        return counter.get_total_flops() + skipped

    def run(module: nn.Module, *args, **kwargs):
        nonlocal skipped
        key = module, _described((args, kwargs))
        if key in known:
            skipped += known[key][1]
        else:
            before = flops()
            output = type(module).forward(module, *args, **kwargs)
            known[key] = output, flops() - before, (args, kwargs)
        return known[key][0]

    for module in modules:
        module.forward = partial(run, module)
    try:
        yield flops
    finally:
        for module in modules:
            del module.forward
