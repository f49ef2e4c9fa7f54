"""Cosmos: frames that are given, a mask that its forward joins to folded latents, and the pipelines before 2.5."""

import pytest
import torch
from diffusers import Cosmos2TextToImagePipeline, Cosmos2VideoToWorldPipeline, FlowMatchEulerDiscreteScheduler
from families import CHANNELS, STEPS, attach, cosmos_parts, inputs, pictures, tiny, tiny_pipeline
from test_families import SPACE, check_scaling
from test_family_pipelines import clock, sample

import flexivid
from flexivid.model.families import family_of
from flexivid.model.weak_mode import WeakMode
from flexivid.sampling.flops import flop_counter_mode


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_given_frames_are_clean(parametrisation):
    transformer = tiny("cosmos")
    flex = attach(transformer, ["2x4x4"], parametrisation)
    flex.fix("2x4x4")
    call = inputs(transformer, (5, 8, 12))
    call["condition_mask"][:, :, 0] = 1
    call["timestep"][:, :, 0] = 1e-4  # what its pipelines tell of them
    told = []
    transformer.time_embed.register_forward_pre_hook(lambda module, args: told.append(args[1]))
    with torch.no_grad():
        output = transformer(**call)[0]
    levels = told[0].view(2, 3)  # 1 | 2 3 | 4 5
    assert (levels[:, 0] == 0).all() and (levels[:, 1:] == levels[0, 1]).all()
    assert levels[0, 1] == pytest.approx(0.8) if parametrisation == "direct" else 0 < levels[0, 1] < 0.8
    assert output.shape == call["hidden_states"].shape and output.isfinite().all()
    assert parametrisation == "direct" or not output[:, :, 0].any()


def test_a_joined_channel_that_is_lost(monkeypatch):
    joined = WeakMode._with_joined

    def without(self, patches):
        patches = patches.clone()
        patches[..., -4:] = 0  # the padding mask of a patch
        return joined(self, patches)

    monkeypatch.setattr(WeakMode, "_with_joined", without)
    with pytest.raises(AssertionError):
        check_scaling("cosmos", SPACE)


def test_without_a_padding_mask():
    transformer = tiny("cosmos", concat_padding_mask=False)
    flex = attach(transformer, ["1x4x4"])
    call = inputs(transformer, (3, 8, 12))
    flex.fix("1x4x4")
    with torch.no_grad():
        assert transformer(**call)[0].isfinite().all()


def earlier_pipeline(name: str):
    """Cosmos-Predict2, whose scheduler has noise levels of EDM. Images are of one frame."""
    with_video = name == "video"
    transformer = tiny("cosmos", in_channels=CHANNELS + with_video)
    pipeline = Cosmos2VideoToWorldPipeline if with_video else Cosmos2TextToImagePipeline
    scheduler = FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    pipe = pipeline(**cosmos_parts(), transformer=transformer, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    _, call = tiny_pipeline("cosmos")
    if with_video:
        call |= {"video": pictures(5, (48, 32)), "num_frames": 9}
    else:
        del call["num_frames"]
    return pipe, call


@pytest.mark.parametrize("name", ["video", "image"])
def test_cosmos_predict2(name):
    pipe, call = earlier_pipeline(name)
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    levels = [of_timestep for _, told, of_timestep in clock(pipe, call)]
    assert levels == sorted(levels, reverse=True) and levels[0] == pytest.approx(80 / 81, abs=1e-3)
    with flop_counter_mode() as counter:
        weak = sample(pipe, call)
    assert torch.equal(sample(pipe, call), weak) and weak.isfinite().all() and not torch.equal(weak, stock)
    summary = flexivid.summary(pipe)
    assert len(summary.steps) == STEPS and summary.ratio <= 0.6
    saved = summary.flops_full - summary.flops_used
    assert full.get_total_flops() - counter.get_total_flops() == pytest.approx(saved, rel=0.01)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


def test_what_is_not_supported():
    with pytest.raises(ValueError, match="extra_pos_embed_type learnable is not supported"):
        family_of(tiny("cosmos", extra_pos_embed_type="learnable"))
    transformer = tiny("cosmos")
    attach(transformer, ["1x4x4"]).fix("1x4x4")
    with pytest.raises(ValueError, match="Cosmos-Transfer is not supported"):
        transformer(**inputs(transformer, (3, 4, 4)), block_controlnet_hidden_states=[torch.zeros(2, 12, 36)])
