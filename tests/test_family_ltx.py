"""Pipelines of LTX-Video that pass a coordinate of each token instead of the sizes of the grid."""

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXEulerAncestralRFScheduler,
    LTXI2VLongMultiPromptPipeline,
    LTXLatentUpsamplePipeline,
)
from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition
from families import CHANNELS, attach, inputs, tiny, tiny_image_pipeline, with_text
from PIL import Image
from test_family_pipelines import sample

import flexivid
from flexivid.model.rows.ltx import LTX, _clips, _completed
from flexivid.patches.folding import folding_for
from flexivid.sampling.flops import flop_counter_mode

STEPS, FRAMES, HEIGHT, WIDTH = 4, 17, 32, 32
IMAGE = Image.new("RGB", (WIDTH, HEIGHT), (200, 40, 40))
VIDEO = [Image.new("RGB", (WIDTH, HEIGHT), (25 * i, 40, 40)) for i in range(9)]
KEY_FRAMES = {"conditions": [LTXVideoCondition(image=IMAGE, frame_index=i, strength=0.7) for i in (4, 8, 12)]}
CALLS = {
    "text": {},
    "first frame": {"conditions": [LTXVideoCondition(image=IMAGE, frame_index=0)]},
    "key frames": KEY_FRAMES,
    "a video from frame 4 on": {"conditions": [LTXVideoCondition(video=VIDEO, frame_index=4)]},
    "a video for the whole clip": {
        "conditions": [LTXVideoCondition(video=VIDEO, frame_index=0, strength=0.1)],
        "num_frames": 9,
        "num_inference_steps": 8,
    },
    "from latents": {"latents": torch.zeros(1, CHANNELS, 5, HEIGHT // 4, WIDTH // 4), "denoise_strength": 0.5},
}


def condition_pipeline():
    base, call = tiny_image_pipeline("ltx-i2v")
    pipe = LTXConditionPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=base.vae,
        text_encoder=None,
        tokenizer=None,
        transformer=base.transformer,
    )
    pipe.set_progress_bar_config(disable=True)
    del call["image"]
    return pipe, call | {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_inference_steps": STEPS}


def check_budgets(pipe, call: dict) -> None:
    """Stock at 1, counted FLOPs at .5, a clip at every weak step, and the stock pipeline again."""
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    beside = full.get_total_flops() - flexivid.summary(pipe).flops_full  # the VAE encodes conditions
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    sample(pipe, call)
    with flop_counter_mode() as used:
        weak = sample(pipe, call)
    summary = flexivid.summary(pipe)
    assert summary.flops_used + beside == pytest.approx(used.get_total_flops(), rel=1e-6) and summary.ratio <= 0.6
    assert weak.shape == stock.shape and weak.isfinite().all() and not torch.equal(weak, stock)
    for parametrisation in ("snr", "direct"):
        flexivid.enable(pipe, schedule="2x2x2", parametrisation=parametrisation)
        assert sample(pipe, call).isfinite().all()
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


@pytest.mark.parametrize("what", CALLS)
def test_ltx_with_conditions(what):
    pipe, call = condition_pipeline()
    check_budgets(pipe, call | CALLS[what])


def test_a_plan_is_what_a_text_call_runs():
    pipe, call = condition_pipeline()
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    planned = flexivid.plan(pipe, FRAMES, HEIGHT, WIDTH, STEPS, text_length=7)
    sample(pipe, call)
    assert flexivid.summary(pipe).schedule == planned


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_ltx_long_with_several_prompts(guidance_scale):
    """Its windows are runs of their own; tails of the window before and a reference lie behind each window."""
    base, _ = tiny_image_pipeline("ltx-i2v")
    pipe = with_text(
        LTXI2VLongMultiPromptPipeline(
            scheduler=LTXEulerAncestralRFScheduler(),
            vae=base.vae,
            text_encoder=None,
            tokenizer=None,
            transformer=base.transformer,
        )
    )
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a | b", "num_frames": FRAMES, "temporal_tile_size": 12, "temporal_overlap": 8, "seed": 3}
    call |= {"height": HEIGHT, "width": WIDTH, "cond_image": IMAGE, "output_type": "latent"}
    call |= {"guidance_scale": guidance_scale, "sigmas": [1.0, 0.9, 0.7, 0.4, 0.2, 0.0]}
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    weak, summary = sample(pipe, call), flexivid.summary(pipe)
    assert weak.isfinite().all() and not torch.equal(weak, stock)
    assert len(summary.steps) == len(summary.schedule.steps) == 5 and 0.3 < summary.ratio <= 0.6


def test_a_pipeline_without_a_transformer_is_refused():
    pipe = LTXLatentUpsamplePipeline(vae=tiny_image_pipeline("ltx-i2v")[0].vae, latent_upsampler=None)
    with pytest.raises(ValueError, match="LTXLatentUpsamplePipeline has no transformer"):
        flexivid.enable(pipe, budget=0.5, order="interleaved")


@pytest.mark.parametrize(
    ("times", "clips"),
    [
        ([0], (1,)),
        ([0, 1, 9, 17], (4,)),
        ([0, 8, 16, 24], (4,)),
        ([8, 0, 1, 9, 17], (1, 4)),
        ([8, 16, 24, 0, 1, 9, 17], (1, 1, 1, 4)),
        ([8, 100, 0, 1, 9], (1, 1, 3)),
        ([-1, 0, 1, 9, 17], (1, 4)),
        ([0, 1, 9, 17, 0, 1, 9, 17, 25, -8], (4, 5, 1)),
    ],
)
def test_clips_are_told_from_times(times, clips):
    assert _clips([time / 25 for time in times]) == clips


def with_coordinates(call: dict, times: list[int], height: int, width: int) -> dict:
    """A call that has no sizes, of latent frames at these frames of the video, one second each 25."""
    axes = torch.tensor(times) / 25, 32.0 * torch.arange(height), 32.0 * torch.arange(width)
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)[None]
    return {k: v for k, v in call.items() if k not in ("num_frames", "height", "width")} | {"video_coords": coordinates}


@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 4), (3, 1), (1, 1)])
def test_the_grid_is_told_from_coordinates(height, width):
    call = with_coordinates(inputs(tiny("ltx"), (5, height, width), 1), [16, 0, 1, 9, 17], height, width)
    completed = _completed(call)
    assert [completed[name] for name in ("num_frames", "height", "width")] == [(1, 4), height, width]
    assert LTX.latents(completed).shape == (1, CHANNELS, 5, height, width)


def test_what_is_no_grid_is_refused():
    call = with_coordinates(inputs(tiny("ltx"), (5, 3, 4), 1), [16, 0, 1, 9, 17], 3, 4)
    call["video_coords"] = call["video_coords"][:, :, torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    flex = attach(tiny("ltx"), ["1x2x2"])
    flex.fix("1x2x2")
    with pytest.raises(ValueError, match="the coordinates of 60 tokens are no frames of one size"):
        flex.transformer(**call)


def test_clips_behind_one_another_are_folded_each_by_itself():
    sizes, x = (1, 2, 4), torch.randn(1, 3, 7, 2, 2)
    together = folding_for((7, 2, 2), (2, 2, 2), (1, 1, 1), True, sizes)
    alone = [folding_for((n, 2, 2), (2, 2, 2), (1, 1, 1), True) for n in sizes]
    parts = x.split(sizes, 2)
    folded = torch.cat([folding.fold(part) for folding, part in zip(alone, parts, strict=True)], 2)
    assert torch.equal(together.fold(x), folded) and torch.equal(together.unfold(folded), x)
    means = torch.cat([folding.upsample(folding.block_mean(p)) for folding, p in zip(alone, parts, strict=True)], 2)
    torch.testing.assert_close(together.upsample(together.block_mean(x)), means)
    assert together.centres[0].tolist() == [0, 1, 2, 3, 4.5, 6]


def test_weak_tokens_of_key_frames_keep_their_time():
    """No coarse token lies between a key frame and the clip beside it."""
    transformer = tiny("ltx")
    flex = attach(transformer, ["2x2x2"], "direct")
    flex.fix("2x2x2")
    seen = []
    transformer.rope.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(output[0]), with_kwargs=True
    )
    call = with_coordinates(inputs(transformer, (5, 2, 2), 1), [16, 0, 1, 9, 17], 2, 2)
    with torch.no_grad():
        transformer(**call)
        times = [16, 0, 5, 17]  # 16 | 0 | 1 9 | 17
        at = torch.tensor([[time / 25, 16.0, 16.0] for time in times]).T[None]
        flex.remove()
        transformer.rope(call["hidden_states"], video_coords=at)
    torch.testing.assert_close(seen[0], seen[1], atol=1e-4, rtol=0)
