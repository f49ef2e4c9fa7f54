"""Wan pipelines that differ from text-to-video in what they load or pass."""

import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from families import UNIPC, inputs, pictures, tiny, tiny_image_pipeline, tiny_pipeline
from PIL import Image
from test_family_pipelines import sample

import flexivid
from flexivid.model.flexible import FlexTransformer
from flexivid.sampling.flops import FlopCounter, flop_counter_mode
from flexivid.stock_pipelines import usual_arguments


def test_first_and_last_frame():
    """Wan2.1-FLF2V has positions for the tokens of both images, which are two rows a clip."""
    base, call = tiny_image_pipeline("wan2.1-i2v")
    components = {**base.components, "transformer": tiny("wan-i2v", pos_embed_seq_len=514)}
    pipe = WanImageToVideoPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    call |= {"last_image": Image.new("RGB", (96, 64), (40, 200, 40)), "num_inference_steps": 4}
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    beside = full.get_total_flops() - flexivid.summary(pipe).flops_full
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    planned = flexivid.plan(pipe, 9, 64, 96, 4, text_length=7)
    sample(pipe, call)
    with flop_counter_mode() as used:
        weak = sample(pipe, call)
    summary = flexivid.summary(pipe)
    assert weak.isfinite().all() and not torch.equal(weak, stock)
    assert summary.schedule == planned and summary.ratio <= 0.6
    assert summary.flops_used + beside == pytest.approx(used.get_total_flops(), rel=1e-6)


def test_several_clips_between_two_frames_are_counted_each():
    transformer = tiny("wan-i2v", pos_embed_seq_len=514)
    call = inputs(transformer, (5, 4, 6), batch=3)
    assert call["encoder_hidden_states_image"].shape[:2] == (6, 257)
    flexivid.enable(transformer, schedule="1x4x4")
    with torch.no_grad():
        assert transformer(**call, return_dict=False)[0].shape == (3, 4, 5, 4, 6)


@pytest.mark.parametrize("alone", ["transformer", "transformer_2"])
def test_one_transformer_of_two(alone):
    """Wan2.2-A14B for steps of high or of low noise alone."""
    _, call = tiny_pipeline("wan")
    call["num_inference_steps"] = 4
    loaded = {"transformer": None, "transformer_2": None} | {alone: tiny("wan")}
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(**UNIPC),
        boundary_ratio=None if alone == "transformer" else 1.0,
        **loaded,
    )
    pipe.set_progress_bar_config(disable=True)
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    planned = flexivid.plan(pipe, call["num_frames"], call["height"], call["width"], 4, text_length=7)
    weak = sample(pipe, call)
    assert weak.isfinite().all() and not torch.equal(weak, stock)
    assert flexivid.summary(pipe).schedule == planned and flexivid.summary(pipe).ratio <= 0.6
    assert usual_arguments(pipe)["fps"] == 16
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


def test_temporal_reasoning_is_refused():
    pipe, call = tiny_pipeline("chronoedit")
    flexivid.enable(pipe, budget=0.6)
    with pytest.raises(ValueError, match="from 5 latent frames to 2 midway, which cannot be planned"):
        sample(pipe, call | {"num_frames": 17, "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 3})
    with pytest.raises(ValueError, match="leave enable_temporal_reasoning out"):
        flexivid.plan(pipe, 17, 32, 48, 8, text_length=7)


def test_every_segment_of_an_animation_keeps_the_budget():
    pipe, call = tiny_pipeline("wan-animate")
    call |= {"segment_frame_length": 9, "num_inference_steps": 4}
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, budget=0.6)
    assert not torch.equal(sample(pipe, call), stock)
    assert len(flexivid.summary(pipe).steps) == 4 and flexivid.summary(pipe).ratio <= 0.6


def test_reference_images_and_scales_of_wan_vace():
    pipe, call = tiny_pipeline("wan-vace")
    call |= {"reference_images": pictures(2, (48, 32)), "conditioning_scale": [0.5, 1.0], "num_inference_steps": 4}
    flexivid.enable(pipe, budget=0.6)
    clip = sample(pipe, call)
    assert clip.shape[2] == 7 and clip.isfinite().all()
    assert flexivid.summary(pipe).schedule == flexivid.plan(pipe, 17 + 2 * 4, 32, 48, 4, text_length=7)


def test_scales_of_wan_vace_are_for_all_clips():
    transformer = tiny("wan-vace")
    call = inputs(transformer, (5, 4, 6), batch=2)
    flex = FlexTransformer(transformer, ["1x4x4"], "snr")
    scaled = FlopCounter(flex).costs(call | {"control_hidden_states_scale": torch.ones(2)})
    assert scaled == FlopCounter(flex).costs(call)
