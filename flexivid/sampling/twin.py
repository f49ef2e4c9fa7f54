"""A transformer without weights, whose repeated blocks are one module, and forwards of it that run each block once.

Dozens of blocks are alike, and on the meta device every operation of every one takes as long as a real small one: a
plan of LTX-2 (48 blocks, 3674 modules) took 20 CPU seconds, one of Wan2.1-1.3B 4 (docs/log.md, "What planning costs").
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


def without_weights(stock: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """A transformer of the class and configuration of `stock` on the meta device, and the blocks that it repeats.

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
        twin = twin_class.from_config(stock.config)
    return twin, [block for block, _ in made.values()]


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


@contextmanager
def each_block_once(blocks: Iterable[nn.Module], counter: FlopCounterMode) -> Iterator[Callable[[], int]]:
    """Within, a block that gets inputs like those of an earlier time gives what it gave then, and does not run.

    Yields what tells the FLOPs so far, those of blocks that did not run among them.
    """
    blocks, known, skipped = list(blocks), {}, 0

    def flops() -> int:
        return counter.get_total_flops() + skipped

    def run(block: nn.Module, *args, **kwargs):
        nonlocal skipped
        key = block, _described((args, kwargs))
        if key in known:
            skipped += known[key][1]
        else:
            before = flops()
            output = type(block).forward(block, *args, **kwargs)
            known[key] = output, flops() - before, (args, kwargs)
        return known[key][0]

    for block in blocks:
        block.forward = partial(run, block)
    try:
        yield flops
    finally:
        for block in blocks:
            del block.forward
