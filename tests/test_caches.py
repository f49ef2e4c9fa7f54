"""Caches that are switched on and off around flexivid, and what a call that was aborted leaves in them."""

import functools

import pytest
import torch
from diffusers.hooks import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    TextKVCacheConfig,
    apply_first_block_cache,
    apply_mag_cache,
)
from families import tiny
from test_family_pipelines import sample
from test_surroundings import small, two_transformers
from torch import nn

import flexivid

CONFIGS = {
    "FasterCacheConfig": lambda: FasterCacheConfig(current_timestep_callback=lambda: 500, is_guidance_distilled=True),
    "MagCacheConfig": lambda: MagCacheConfig(num_inference_steps=4, mag_ratios=torch.ones(4)),
    "PyramidAttentionBroadcastConfig": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "SeaCacheConfig": SeaCacheConfig,
    "TaylorSeerCacheConfig": TaylorSeerCacheConfig,
    "TextKVCacheConfig": TextKVCacheConfig,
}


@pytest.fixture(scope="module")
def clips():
    """What the stock pipeline makes, and what flexivid does."""
    pipe, call = small()
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    return stock, sample(pipe, call)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_refused_cache_is_refused_at_once(name, clips):
    pipe, call = small()
    pipe.transformer.enable_cache(CONFIGS[name]())
    with pytest.raises(ValueError, match=f"{name} does not work with several patch sizes; FirstBlock.*disable_cache"):
        flexivid.enable(pipe, budget=0.6, order="interleaved")
    pipe.transformer.disable_cache()
    assert torch.equal(sample(pipe, call), clips[0])
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    assert torch.equal(sample(pipe, call), clips[1])


@pytest.mark.parametrize("name", CONFIGS)
def test_a_refused_cache_that_comes_later_goes_again(name, clips):
    pipe, call = small()
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    pipe.transformer.enable_cache(CONFIGS[name]())
    with pytest.raises(ValueError, match=f"{name} does not work with several patch sizes"):
        sample(pipe, call)
    pipe.transformer.disable_cache()
    assert torch.equal(sample(pipe, call), clips[1]) and flexivid.summary(pipe).ratio <= 0.6
    pipe.transformer.enable_cache(CONFIGS[name]())
    flexivid.disable(pipe)
    pipe.transformer.disable_cache()
    assert torch.equal(sample(pipe, call), clips[0])


@pytest.mark.parametrize("came", ["before", "after", "between two forwards"])
@pytest.mark.parametrize(
    ("apply", "name"),
    [
        (lambda transformer: apply_mag_cache(transformer, CONFIGS["MagCacheConfig"]()), "MagCache"),
        (lambda transformer: apply_first_block_cache(transformer, FirstBlockCacheConfig()), "enable_cache"),
    ],
)
def test_caches_that_were_not_put_on_by_enable_cache(apply, name, came):
    pipe, call = small()
    if came == "before":
        apply(pipe.transformer)
        with pytest.raises(ValueError, match=f"{name} does not work with several"):
            flexivid.enable(pipe, budget=0.6, order="interleaved")
        return
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    if came == "after":
        sample(pipe, call)
        apply(pipe.transformer)
    else:
        call["callback_on_step_end"] = lambda pipe, i, t, tensors: apply(pipe.transformer) or {}
    with pytest.raises(ValueError, match=f"{name} does not work with several"):
        sample(pipe, call)


class CacheDit:
    """What cache-dit does to a transformer: it wraps `forward`, and puts one module in the place of all blocks there.

    marked: it says so on the transformer, as cache-dit does.
    """

    def __init__(self, transformer: nn.Module, marked: bool = True):
        class Unified(nn.Module):
            def __init__(self):
                super().__init__()
                self.residual = None

            def forward(self, hidden_states, *args):
                if self.residual is None:
                    output = hidden_states
                    for block in blocks:
                        output = block(output, *args)
                    self.residual = output - hidden_states
                return hidden_states + self.residual

        self.transformer, self.forward, blocks = transformer, transformer.forward, list(transformer.blocks)
        unified = nn.ModuleList([Unified()])

        def new_forward(module, *args, **kwargs):
            stock, module.blocks = module.blocks, unified
            try:
                return self.forward(*args, **kwargs)
            finally:
                module.blocks = stock

        transformer.forward = functools.update_wrapper(functools.partial(new_forward, transformer), new_forward)
        if marked:
            transformer._original_forward, transformer._is_cached = self.forward, True

    def release(self):
        self.transformer.forward = self.forward
        vars(self.transformer).pop("_is_cached", None)


class TestCacheDit:
    def test_before_it_is_refused_at_once(self, clips):
        pipe, call = small()
        cache = CacheDit(pipe.transformer)
        with pytest.raises(ValueError, match="another library, such as cache-dit, .*switch the cache off: cache_dit"):
            flexivid.enable(pipe, budget=0.6, order="interleaved")
        cache.release()
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        assert torch.equal(sample(pipe, call), clips[1])

    @pytest.mark.parametrize("marked", [True, False])
    def test_after_it_is_noticed(self, marked, clips):
        pipe, call = small()
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        cache = CacheDit(pipe.transformer, marked)
        with pytest.raises(ValueError, match="cache-dit"):
            sample(pipe, call)
        cache.release()
        assert torch.equal(sample(pipe, call), clips[1]) and flexivid.summary(pipe).ratio <= 0.6

    def test_an_unmarked_one_of_before_is_noticed_by_the_call(self):
        pipe, call = small()
        CacheDit(pipe.transformer, marked=False)
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        with pytest.raises(ValueError, match="blocks of this transformer is another list than when it was enabled"):
            CacheDit(pipe.transformer, marked=False)
            sample(pipe, call)

    def test_it_goes_on_after_disable_and_brings_nothing_back(self, clips):
        pipe, call = small()
        CacheDit(pipe.transformer)
        cached = sample(pipe, call)
        pipe, call = small()
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        cache = CacheDit(pipe.transformer)
        flexivid.disable(pipe)
        assert torch.equal(sample(pipe, call), cached) and not torch.equal(cached, clips[0])
        cache.release()
        assert torch.equal(sample(pipe, call), clips[0])
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        assert torch.equal(sample(pipe, call), clips[1])

    def test_blocks_that_were_replaced_for_good(self, clips):
        """Such as by another implementation: enabled again, they are known."""
        pipe, call = small()
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        pipe.transformer.blocks = nn.ModuleList(list(pipe.transformer.blocks))
        with pytest.raises(ValueError, match="or enable again"):
            sample(pipe, call)
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        assert torch.equal(sample(pipe, call), clips[1])


def abort(pipe, call, at: str):
    """An exception in the midst of a call: in a block, or between two steps."""
    if at == "callback":

        def interrupt(pipe, i, t, tensors):
            if i == 1:
                raise KeyboardInterrupt
            return {}

        with pytest.raises(KeyboardInterrupt):
            sample(pipe, call | {"callback_on_step_end": interrupt})
        return
    forwards = 0

    def fail(*_):
        nonlocal forwards
        forwards += 1
        if forwards == int(at):
            raise torch.OutOfMemoryError("no memory")

    handle = pipe.transformer.proj_out.register_forward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        sample(pipe, call)
    handle.remove()


@pytest.mark.parametrize("at", ["1", "4", "callback"])
@pytest.mark.parametrize("cached", [False, True])
def test_an_aborted_call_leaves_nothing_behind(cached, at):
    def pipeline():
        pipe, call = small()
        if cached:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        return pipe, call

    pipe, call = pipeline()
    larger = call | {"height": 64, "num_inference_steps": 5}
    expected, expected_larger = sample(pipe, call), sample(pipe, larger)
    for sizes, clip in ((call, expected), (larger, expected_larger)):
        pipe, _ = pipeline()
        abort(pipe, call, at)
        assert torch.equal(sample(pipe, sizes), clip)
        assert flexivid.summary(pipe).ratio <= 0.6
    pipe, _ = pipeline()
    stock = sample(small()[0], call)
    abort(pipe, call, at)
    flexivid.disable(pipe)
    if not cached:
        assert torch.equal(sample(pipe, larger), sample(small()[0], larger))
        return
    assert sample(pipe, larger).isfinite().all()
    pipe.transformer.disable_cache()
    assert torch.equal(sample(pipe, call), stock)


def test_an_aborted_call_of_two_transformers():
    def pipeline():
        pipe, call = two_transformers()
        for transformer in (pipe.transformer, pipe.transformer_2):
            transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        return pipe, call

    pipe, call = pipeline()
    larger = call | {"height": 64}
    expected = sample(pipe, larger)
    pipe, _ = pipeline()

    def interrupt(pipe, i, t, tensors):
        if i == call["num_inference_steps"] - 1:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        sample(pipe, call | {"callback_on_step_end": interrupt})
    assert torch.equal(sample(pipe, larger), expected)


def test_a_bare_transformer_with_a_refused_cache():
    transformer = tiny("wan")
    transformer.enable_cache(TaylorSeerCacheConfig())
    with pytest.raises(ValueError, match="TaylorSeerCacheConfig does not work"):
        flexivid.enable(transformer, schedule="1x4x4")
