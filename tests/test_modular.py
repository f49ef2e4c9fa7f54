"""Modular pipelines of diffusers: what calls the transformer how often is for their guiders to say."""

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FlowMatchEulerDiscreteScheduler,
    LTXModularPipeline,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    TangentialClassifierFreeGuidance,
    UniPCMultistepScheduler,
    WanModularPipeline,
)
from diffusers.guiders import MagnitudeAwareGuidance
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep
from families import CHANNELS, STEPS, UNIPC, tiny, tiny_pipeline

import flexivid
from flexivid.sampling.flops import flop_counter_mode
from flexivid.sampling.schedule import KEPT

MODULAR = ("wan", "ltx")


def tiny_modular(name: str, guider=None):
    """(modular pipeline that begins at prompt embeddings and ends at latents, arguments of a call)."""
    transformer, (_, stock) = tiny(name), tiny_pipeline(name)
    if name == "wan":
        pipe, scheduler = WanModularPipeline(blocks=WanCoreDenoiseStep()), UniPCMultistepScheduler(**UNIPC)
    else:
        pipe = LTXModularPipeline(blocks=LTXCoreDenoiseStep())
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    guider = guider or ClassifierFreeGuidance(guidance_scale=3.0)
    pipe.update_components(transformer=transformer, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    names = [parameter.name for parameter in pipe.blocks.inputs]
    call = {key: value for key, value in stock.items() if key in names and key != "output_type"}
    if name == "wan":  # without a VAE it counts on latents of 16 channels
        call["latents"] = torch.randn(1, CHANNELS, 5, 8, 12, generator=torch.Generator().manual_seed(2))
    return pipe, call


@torch.no_grad()
def sample(pipe, call: dict) -> torch.Tensor:
    return pipe(**call, generator=torch.Generator().manual_seed(0), output="latents")


@pytest.mark.parametrize("name", MODULAR)
def test_budget_one_and_disable_are_the_stock_pipeline(name):
    pipe, call = tiny_modular(name)
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    for budget in (0.6, 0.35):
        flexivid.enable(pipe, budget=budget, order="interleaved")
        weak, summary = sample(pipe, call), flexivid.summary(pipe)
        assert weak.isfinite().all() and not torch.equal(weak, stock)
        assert any(KEPT in step for step in summary.steps) and summary.ratio <= budget
        planned = flexivid.plan(pipe, call["num_frames"], call["height"], call["width"], STEPS, text_length=7)
        assert summary.schedule == planned and summary.steps == [list(step) for step in planned.steps]
        with flop_counter_mode() as counter:
            assert torch.equal(sample(pipe, call), weak)
        summary = flexivid.summary(pipe)
        assert summary.flops_full == pytest.approx(full.get_total_flops(), rel=0.01)
        assert summary.flops_used == pytest.approx(counter.get_total_flops(), rel=0.01)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


GUIDERS = {
    "projected": AdaptiveProjectedGuidance,
    "tangential": TangentialClassifierFreeGuidance,
    "zero-star": ClassifierFreeZeroStarGuidance,
    "magnitude-aware": MagnitudeAwareGuidance,
}


@pytest.mark.parametrize("kind", GUIDERS)
def test_guiders_of_two_predictions(kind):
    # The norm of the magnitude-aware one is that of a matrix, which packed latents are.
    pipe, call = tiny_modular("ltx" if kind == "magnitude-aware" else "wan", GUIDERS[kind](guidance_scale=3.0))
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, budget=0.4, order="interleaved")
    assert not torch.equal(sample(pipe, call), stock)
    summary = flexivid.summary(pipe)
    assert {len(step) for step in summary.steps} == {2} and summary.ratio <= 0.4


@pytest.mark.parametrize("order", ["interleaved", "weak-first", "reuse"])
@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.5), (0.25, 0.75)])
def test_a_guider_with_start_and_stop_is_planned_as_such(start, stop, order):
    pipe, call = tiny_modular("wan", ClassifierFreeGuidance(guidance_scale=3.0, start=start, stop=stop))
    flexivid.enable(pipe, budget=0.6, order=order)
    clip, summary = sample(pipe, call), flexivid.summary(pipe)
    guided = [start * STEPS <= step < stop * STEPS for step in range(STEPS)]
    assert [len(step) for step in summary.steps] == [1 + is_guided for is_guided in guided]
    assert [step[:1] for step in summary.steps] == [list(step[:1]) for step in summary.schedule.steps]
    assert clip.isfinite().all() and 0.4 < summary.ratio <= 0.6
    reference = summary.flops_full / sum(1 + is_guided for is_guided in guided)
    assert reference == flexivid.costs(pipe, 17, 64, 96, text_length=7)["1x2x2"]
    assert flexivid.plan(pipe, 17, 64, 96, STEPS, text_length=7) == summary.schedule


def test_guidance_kept_from_before_it_began_is_refused():
    pipe, call = tiny_modular("wan", ClassifierFreeGuidance(guidance_scale=3.0, start=0.25))
    flexivid.enable(pipe, schedule="1x2x2:2,1x4x4/kept:6")
    with pytest.raises(ValueError, match="step 2 keeps the guidance of a powerful step before it, and there is none"):
        sample(pipe, call)


@pytest.mark.parametrize(
    "guider",
    [
        SkipLayerGuidance(guidance_scale=3.0, skip_layer_guidance_layers=[0]),
        PerturbedAttentionGuidance(guidance_scale=3.0, perturbed_guidance_layers=[0]),
        AutoGuidance(guidance_scale=3.0, auto_guidance_layers=[0], dropout=1.0),
    ],
    ids=lambda guider: type(guider).__name__,
)
def test_guiders_that_change_layers_are_refused(guider):
    pipe, call = tiny_modular("wan", guider)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    with pytest.raises(ValueError, match=f"{type(guider).__name__} changes layers of the transformer"):
        sample(pipe, call)


def test_a_modular_pipeline_that_shares_the_transformer_is_refused():
    pipe, call = tiny_modular("wan")
    other, _ = tiny_modular("wan")
    other.update_components(transformer=pipe.transformer)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    for action in (lambda: sample(other, call), lambda: flexivid.disable(other)):
        with pytest.raises(ValueError, match="another pipeline that shares it"):
            action()
