"""Pipelines that share a transformer: only the one that it was enabled through may call, change or report it."""

import copy
import gc

import pytest
import torch
from diffusers import WanModularPipeline, WanPipeline, WanVideoToVideoPipeline
from families import tiny_pipeline
from test_family_pipelines import sample
from test_surroundings import small, two_transformers

import flexivid
from flexivid.model.hooks import attached

SHARED = "this transformer is enabled through another pipeline that shares it; disable that one first"


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# How a second pipeline comes by a transformer, with the scheduler of the first or one of its own.
SHARING = {
    "from_pipe": lambda pipe: quiet(WanPipeline.from_pipe(pipe)),
    "from_pipe of another class": lambda pipe: quiet(WanVideoToVideoPipeline.from_pipe(pipe)),
    "components": lambda pipe: quiet(WanPipeline(**pipe.components)),
    "a scheduler of its own": lambda pipe: quiet(
        WanPipeline(**{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)})
    ),
    "a copy": copy.copy,
}


def call_of(pipe, call):
    if not isinstance(pipe, WanVideoToVideoPipeline):
        return call
    latents = torch.zeros(1, 4, 3, 4, 6)
    sizes = {"height": 32, "width": 48, "num_inference_steps": 4, "latents": latents, "output_type": "latent"}
    return sizes | {name: value for name, value in call.items() if "embeds" in name or name == "guidance_scale"}


def refused(action):
    with pytest.raises(ValueError, match=SHARED):
        action()


@pytest.mark.parametrize("called_before", [False, True])
@pytest.mark.parametrize("how", SHARING)
def test_only_the_pipeline_that_was_enabled(how, called_before):
    pipe, call = small()
    other = SHARING[how](pipe)
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    expected = sample(pipe, call) if called_before else None
    refused(lambda: sample(other, call_of(other, call)))
    refused(lambda: flexivid.enable(other, budget=0.7, order="interleaved"))
    refused(lambda: flexivid.disable(other))
    refused(lambda: flexivid.plan(other, 9, 32, 48, 4, 7))
    refused(lambda: flexivid.summary(other))
    clip = sample(pipe, call)
    assert not torch.equal(clip, stock) and (expected is None or torch.equal(clip, expected))
    assert flexivid.summary(pipe).ratio <= 0.5
    flexivid.disable(pipe)
    flexivid.disable(other)
    flexivid.enable(other, budget=0.5, order="interleaved")
    refused(lambda: sample(pipe, call))
    if isinstance(other, WanPipeline):
        assert torch.equal(sample(other, call), clip)


def test_calls_of_both_in_turn():
    """The other one is refused at its first forward; half of a call of ours goes on after it."""
    pipe, call = small()
    other = SHARING["a scheduler of its own"](pipe)
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    expected = sample(pipe, call)

    def call_the_other(pipe, i, t, tensors):
        refused(lambda: sample(other, call))
        return {}

    assert torch.equal(sample(pipe, call | {"callback_on_step_end": call_the_other}), expected)


class Wrapping(WanPipeline):
    """A pipeline whose call is that of another one, which it holds."""

    def __call__(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_pipeline_that_calls_the_enabled_one():
    pipe, call = small()
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    expected = sample(pipe, call)
    outer = Wrapping(**pipe.components)
    outer.inner = pipe
    assert torch.equal(sample(outer, call), expected)


def test_a_loop_of_the_users_own():
    pipe, call = small()
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    pipe.scheduler.set_timesteps(4)
    pipe._guidance_scale = 1.0
    latents = torch.randn(1, 4, 3, 4, 6)
    with torch.no_grad():
        for timestep in pipe.scheduler.timesteps:
            text = {"encoder_hidden_states": call["prompt_embeds"], "return_dict": False}
            noise = pipe.transformer(latents, timestep.expand(1), **text)[0]
            latents = pipe.scheduler.step(noise, timestep, latents, return_dict=False)[0]
    assert latents.isfinite().all() and flexivid.summary(pipe).ratio <= 0.5


class Modular(WanModularPipeline):
    """As far as the transformer sees: a call of something that is no DiffusionPipeline."""

    def __init__(self, transformer):
        self.transformer_of_another = transformer

    def __call__(self, **call):
        return self.transformer_of_another(**call, return_dict=False)


def test_a_modular_pipeline_that_shares_it():
    pipe, _ = small()
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    inputs = {"hidden_states": torch.randn(1, 4, 3, 4, 6), "timestep": torch.tensor([800.0])}
    refused(lambda: Modular(pipe.transformer)(**inputs, encoder_hidden_states=torch.randn(1, 7, 16)))


class TestTwoTransformers:
    def test_swapped(self):
        pipe, call = two_transformers()
        other = quiet(WanPipeline(**{**pipe.components, "boundary_ratio": 0.9}))
        other.transformer, other.transformer_2 = pipe.transformer_2, pipe.transformer
        flexivid.enable(pipe, budget=0.5, order="interleaved")
        expected = sample(pipe, call)
        refused(lambda: sample(other, call))
        refused(lambda: flexivid.disable(other))
        assert torch.equal(sample(pipe, call), expected)

    def test_one_of_them_shared(self):
        pipe, call = two_transformers()
        only_low = quiet(WanPipeline(**{**small()[0].components, "transformer": pipe.transformer_2}))
        flexivid.enable(only_low, budget=0.5, order="interleaved")
        expected = sample(only_low, call)
        refused(lambda: flexivid.enable(pipe, budget=0.5, order="interleaved"))
        assert attached(pipe.transformer) is None
        refused(lambda: sample(pipe, call))
        assert torch.equal(sample(only_low, call), expected)


class TestTheOtherPipelineIsGone:
    """Nobody could disable it any more: the ones that are left may."""

    def test_deleted(self):
        pipe, call = small()
        other = WanPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        stock = sample(pipe, call)
        flexivid.enable(pipe, budget=0.5, order="interleaved")
        expected = sample(pipe, call)
        del pipe
        gc.collect()
        with pytest.raises(ValueError, match="enabled through a pipeline that is gone: disable or enable it through"):
            sample(other, call)
        with pytest.raises(ValueError, match="enable the pipeline"):
            flexivid.summary(other)
        with pytest.raises(ValueError, match="enable the pipeline"):
            flexivid.plan(other, 9, 32, 48, 4, 7)
        flexivid.enable(other, budget=0.5, order="interleaved")
        assert torch.equal(sample(other, call), expected)
        flexivid.disable(other)
        assert torch.equal(sample(other, call), stock)

    @pytest.mark.parametrize("instead", [lambda: small()[0].transformer, lambda: None])
    def test_it_has_another_transformer_by_now(self, instead):
        pipe, call = small()
        other = WanPipeline.from_pipe(pipe)
        other.set_progress_bar_config(disable=True)
        stock = sample(pipe, call)
        flexivid.enable(pipe, budget=0.5, order="interleaved")
        pipe.transformer = instead()
        flexivid.disable(other)
        assert torch.equal(sample(other, call), stock)


class TestABareTransformer:
    def test_enabled_by_itself(self):
        """It runs at its one size in whatever pipeline; there are no steps to plan, and none to sum up."""
        pipe, call = small()
        stock = sample(pipe, call)
        flexivid.enable(pipe.transformer, schedule="1x4x4")
        assert not torch.equal(sample(pipe, call), stock)
        with pytest.raises(ValueError, match="enable the pipeline first"):
            flexivid.plan(pipe, 9, 32, 48, 4, 7)
        with pytest.raises(ValueError, match="enable the pipeline and call it first"):
            flexivid.summary(pipe)
        flexivid.disable(pipe)
        assert torch.equal(sample(pipe, call), stock)

    def test_of_an_enabled_pipeline(self):
        pipe, call = small()
        flexivid.enable(pipe, budget=0.5, order="interleaved")
        expected = sample(pipe, call)
        refused(lambda: flexivid.enable(pipe.transformer, schedule="1x4x4"))
        refused(lambda: flexivid.disable(pipe.transformer))
        assert torch.equal(sample(pipe, call), expected)


@pytest.mark.parametrize("name", ["ltx", "cogvideox-5b"])
def test_other_families(name):
    pipe, call = tiny_pipeline(name)
    other = quiet(type(pipe)(**pipe.components))
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    refused(lambda: sample(other, call | {"num_inference_steps": 2}))


def test_offloaded_by_the_other_pipeline():
    """`from_pipe` leaves the hooks of the offload on, which only the first pipeline knows the device of."""
    pipe, call = small()
    stock = sample(pipe, call)
    pipe.enable_model_cpu_offload(device="cpu")
    other = quiet(WanPipeline(**pipe.components))
    flexivid.enable(other, budget=0.5, order="interleaved")
    assert not torch.equal(sample(other, call), stock)
    flexivid.disable(other)
    assert torch.equal(sample(other, call), stock)
