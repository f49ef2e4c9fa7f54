"""LTX-2: sound beside the video, and forwards of guidance beside the guided one."""

import pytest
import torch
from families import (
    LTX23,
    STEPS,
    TINY,
    attach,
    check_sound_is_stock,
    grid_for,
    inputs,
    sample_with_sound,
    tiny,
    tiny_image_pipeline,
    tiny_pipeline,
)
from test_families import SPACE, check_positions, check_scaling

import flexivid
from flexivid.sampling.flops import flop_counter_mode
from flexivid.sampling.schedule import KEPT


@pytest.mark.parametrize("make", [lambda: tiny_pipeline("ltx-2"), lambda: tiny_image_pipeline("ltx2-i2v")])
def test_sound_is_stock_too(make):
    check_sound_is_stock(*make(), budget=0.6)


# name: (arguments of a call, forwards of a step)
NO_MODALITY = {"modality_scale": 1.0, "audio_modality_scale": 1.0}
CALLS = {
    "all": ({}, 3),
    "no classifier-free guidance": ({"guidance_scale": 1.0, "audio_guidance_scale": 1.0}, 3),
    "perturbed alone": (NO_MODALITY, 2),
    "none": ({"stg_scale": 0.0, "audio_stg_scale": 0.0} | NO_MODALITY, 1),
}


@pytest.mark.parametrize("kind", CALLS)
def test_every_forward_of_a_step_is_counted_and_planned(kind):
    pipe, call = tiny_pipeline("ltx-2")
    more, forwards = CALLS[kind]
    call |= more
    with flop_counter_mode() as full:
        sample_with_sound(pipe, call)
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    sample_with_sound(pipe, call)
    with flop_counter_mode() as counter:
        sample_with_sound(pipe, call)
    summary = flexivid.summary(pipe)
    assert {len(step) for step in summary.steps} == {forwards}
    outside = full.get_total_flops() - summary.flops_full
    assert 0 <= outside < 0.01 * summary.flops_full  # connectors
    assert summary.flops_used + outside == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert 0.25 < summary.ratio <= 0.5
    weak = [step for step in summary.steps if step[0] != "1x1x1"]
    assert any(step[1:] == [KEPT] * (forwards - 1) for step in weak)


def test_what_other_forwards_add_can_be_kept_and_reused():
    """x0 of video and sound: at a kept step the first forward's less the difference of before, then held."""
    pipe, call = tiny_pipeline("ltx-2")
    given, outputs = [], []

    def note(module, args, kwargs, output):
        given.append(kwargs)
        outputs.append(output)

    handle = pipe.transformer.register_forward_hook(note, with_kwargs=True)
    flexivid.enable(pipe, schedule=f"1x1x1:1,1x2x2/kept:2,reused:{STEPS - 3}")
    sample_with_sound(pipe, call)
    handle.remove()

    def x0(step: int, forward: int) -> list[torch.Tensor]:
        index, sigma = 3 * step + forward, pipe.scheduler.sigmas[step]
        latents = (given[index]["hidden_states"], given[index]["audio_hidden_states"])
        return [(x - sigma * v)[-1:] for x, v in zip(latents, outputs[index], strict=True)]

    for forward in (1, 2):
        for step in (1, 2):
            now, then = (zip(x0(at, 0), x0(at, forward), strict=True) for at in (step, 0))
            for (first, own), (first_then, own_then) in zip(now, then, strict=True):
                torch.testing.assert_close(first - own, first_then - own_then, atol=1e-4, rtol=1e-3)
                assert (first_then - own_then).abs().max() > 1e-2
        for held, last in zip(x0(4, forward), x0(2, forward), strict=True):
            torch.testing.assert_close(held, last, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("per_token", [False, True])
def test_sound_is_told_its_own_noise_level(per_token):
    transformer = tiny("ltx-2")
    flex = attach(transformer, ["1x2x2"])
    flex.fix("1x2x2")
    call = inputs(transformer, grid_for(transformer, 4, 6))
    if per_token:
        call |= {"audio_timestep": call["timestep"], "timestep": torch.full((2, 5 * 4 * 6), 800.0)}
    told = {}
    of_pairs = ("av_cross_attn_video_scale_shift", "av_cross_attn_audio_scale_shift")  # told the other's level
    for name in ("time_embed", "audio_time_embed", *of_pairs):
        transformer.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: told.update({name: float(args[0].max())})
        )
    with torch.no_grad():
        transformer(**call)
    assert told["audio_time_embed"] == told["av_cross_attn_video_scale_shift"] == 800.0
    assert told["time_embed"] == told["av_cross_attn_audio_scale_shift"]  # the mean of four: sigma .4 / (.2 + .4)
    assert told["time_embed"] == pytest.approx(1000 * 0.4 / 0.6)


@pytest.mark.parametrize("check", [lambda: check_scaling("ltx-2", SPACE), lambda: check_positions("ltx-2")])
def test_the_later_configuration(check, monkeypatch):
    """LTX-2.3: rotary tables by head, gates, modulated and projected text."""
    monkeypatch.setitem(TINY, "ltx-2", (TINY["ltx-2"][0], LTX23))
    check()


def test_what_ltx2_does_not_take_is_refused():
    pipe, _ = tiny_pipeline("ltx-2")
    with pytest.raises(ValueError, match="weak-uncond needs a pipeline that calls its guidance branches apart; ltx-2"):
        flexivid.enable(pipe, budget=0.6, guidance="weak-uncond")
    transformer = tiny("ltx-2")
    attach(transformer, ["1x2x2"]).fix("1x2x2")
    call = inputs(transformer, grid_for(transformer, 4, 6))
    for name in ("video_self_attention_mask", "video_keyframes_mask"):
        with pytest.raises(ValueError, match=f"{name} names single tokens of the base patch size"):
            transformer(**call | {name: torch.ones(2, 120, 1)})
