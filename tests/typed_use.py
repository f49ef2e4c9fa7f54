"""What a type checker says of code that uses flexivid: checked by `make lint`, and not run."""

from collections.abc import Mapping
from typing import assert_type

from diffusers import DiffusionPipeline

import flexivid


def use(pipe: DiffusionPipeline) -> None:
    flexivid.enable(pipe, budget=0.5, adapter="someone/adapter", revision="main")
    flexivid.enable(pipe, budget="half")  # type: ignore[arg-type]
    flexivid.enable(pipe, buget=0.5)  # type: ignore[call-arg]
    assert_type(flexivid.plan(pipe, 81, 480, 832, 50, 512), flexivid.Schedule)
    assert_type(flexivid.costs(pipe, 81, 480, 832, 512), Mapping[str, int])
    assert_type(flexivid.summary(pipe), flexivid.Summary)
    assert_type(flexivid.summary(pipe).ratio, float)
    with flexivid.observe(pipe, flexivid.Observer()) as observer:
        assert_type(observer, flexivid.Observer)
    flexivid.disable(pipe)
    flexivid.nothing()  # type: ignore[attr-defined]
