"""Calls of pipelines that are not as the last one: what is reported is what ran, and the budget holds."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    CogVideoXDDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    HunyuanSkyreelsImageToVideoPipeline,
)
from families import CHANNELS, STEPS, TEXT, _embeds, tiny, tiny_pipeline
from PIL import Image
from test_family_pipelines import sample

import flexivid
from flexivid.sampling.flops import flop_counter_mode


def shares(pipe, call: dict, **settings) -> tuple[float, float]:
    """The share of the stock call's FLOPs that was spent, counted, and the one that the summary says."""
    with flop_counter_mode() as full:
        sample(pipe, call)
    flexivid.enable(pipe, **settings)
    with flop_counter_mode() as used:
        sample(pipe, call)
    assert len(flexivid.summary(pipe).steps) == STEPS
    return used.get_total_flops() / full.get_total_flops(), flexivid.summary(pipe).ratio


def of_cogvideox(zero_snr: bool) -> CogVideoXDDIMScheduler:
    shift = {"snr_shift_scale": 1.0 if zero_snr else 3.0}
    return CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=zero_snr, **shift)


@pytest.mark.parametrize("change", ["replaced", "table"])
def test_a_scheduler_that_changes_after_enable_says_how_noisy_latents_are(change):
    pipe, call = tiny_pipeline("cogvideox-5b", of_cogvideox(False))
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    before = sample(pipe, call)
    if change == "replaced":
        pipe.scheduler = of_cogvideox(True)
    else:
        pipe.scheduler.alphas_cumprod = of_cogvideox(True).alphas_cumprod
    changed = sample(pipe, call)
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    assert torch.equal(sample(pipe, call), changed) and not torch.equal(changed, before)


def skyreels_image_pipeline():
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()
    pipe = HunyuanSkyreelsImageToVideoPipeline(
        **dict.fromkeys(["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"]),
        transformer=tiny("hunyuan-video", in_channels=2 * CHANNELS),
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": STEPS, "output_type": "latent"}
    call |= {"image": Image.new("RGB", (96, 64)), "true_cfg_scale": 4.0, "guidance_scale": 1.0}
    return pipe, call | _embeds(mask=True, pooled=8)


def test_two_calls_a_step_without_a_cache_context():
    pipe, call = skyreels_image_pipeline()
    with flop_counter_mode() as full:
        sample(pipe, call)
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    with flop_counter_mode() as used:
        sample(pipe, call)
    summary = flexivid.summary(pipe)
    saved = full.get_total_flops() - used.get_total_flops()  # the VAE encodes the image in both
    assert summary.ratio <= 0.5 and summary.flops_full - summary.flops_used == pytest.approx(saved, rel=0.02)
    assert len(summary.steps) == STEPS and all(len(step) == 2 and step[0] == step[1] for step in summary.steps)


def test_two_calls_a_step_are_the_same_clip_with_and_without_contexts(monkeypatch):
    pipe, call = tiny_pipeline("hunyuan-video")
    call |= {f"negative_{key}": value.flip(0) * 0.5 for key, value in call.items() if "embeds" in key}
    call |= {"negative_prompt_attention_mask": call["prompt_attention_mask"], "true_cfg_scale": 3.0}
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    with_contexts, ratio = sample(pipe, call), flexivid.summary(pipe).ratio
    monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda self, name, **more: nullcontext())
    assert torch.equal(sample(pipe, call), with_contexts) and flexivid.summary(pipe).ratio == ratio <= 0.6


ORDERS = ({"order": "interleaved"}, {"order": "weak-first"})


def guidance_until(last: int):
    """A callback that ends guidance after a step."""

    def end(pipe, index, timestep, tensors):
        if index == last:
            pipe._guidance_scale = 0.0
        return {}

    return {"callback_on_step_end": end}


@pytest.mark.parametrize("last", [pytest.param(0, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)])
@pytest.mark.parametrize("settings", [{}, *ORDERS, {"guidance": "same"}, {"guidance": "weak-uncond"}])
def test_guidance_that_a_callback_ends(last, settings):
    pipe, call = tiny_pipeline("wan")
    spent, said = shares(pipe, call | guidance_until(last), budget=0.6, **settings)
    assert said == pytest.approx(spent, abs=0.01)
    # Of steps that are already run nothing can be had back, once hardly any are left.
    assert said <= 0.6 or last == 6
    summary = flexivid.summary(pipe)
    assert [len(step) for step in summary.steps] == [2] * (last + 1) + [1] * (STEPS - last - 1)
    sample(pipe, call)  # the next call is guided again
    assert [len(step) for step in flexivid.summary(pipe).steps] == [2] * STEPS and flexivid.summary(pipe).ratio <= 0.6


def test_guidance_that_ends_under_a_schedule_leaves_its_patch_sizes():
    pipe, call = tiny_pipeline("wan")
    shares(pipe, call | guidance_until(3), schedule="1x2x2:2,1x4x4/kept:4,1x2x2:2")
    steps = flexivid.summary(pipe).steps
    assert steps == [["1x2x2"] * 2] * 2 + [["1x4x4", "kept"]] * 2 + [["1x4x4"]] * 2 + [["1x2x2"]] * 2


@pytest.mark.parametrize("settings", [{}, *ORDERS, {"guidance": "same"}])
@pytest.mark.parametrize("lengths", [(7, 120), pytest.param((120, 7), marks=pytest.mark.slow)])
def test_embeddings_of_two_lengths(lengths, settings):
    """The plan is made when the first branch is called, and made anew once the costs of the other one are known."""
    pipe, call = tiny_pipeline("wan")
    for side, length in zip(("", "negative_"), lengths, strict=True):
        call[f"{side}prompt_embeds"] = torch.randn(1, length, TEXT, generator=torch.Generator().manual_seed(1))
    spent, said = shares(pipe, call, budget=0.6, **settings)
    assert said == pytest.approx(spent, abs=0.01) and said <= 0.6


def test_a_call_of_another_size_after_one_that_failed_is_right():
    pipe, call = tiny_pipeline("wan")
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    smaller = call | {"height": 32, "num_frames": 9}
    right = sample(pipe, smaller)

    def fail(pipe, index, timestep, tensors):
        raise KeyboardInterrupt

    def fail_inside(module, args, kwargs):
        if flexivid.summary(pipe).steps[-1] == ["1x2x2"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(pipe, call | {"callback_on_step_end": fail})
    assert torch.equal(sample(pipe, smaller), right)
    handle = pipe.transformer.blocks[0].register_forward_pre_hook(fail_inside, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        sample(pipe, call)
    handle.remove()
    assert torch.equal(sample(pipe, smaller), right)
