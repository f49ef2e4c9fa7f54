"""Stock pipelines of every family: enable, sample at a budget, disable."""

from dataclasses import replace

import pytest
import torch
from conftest import every_of
from diffusers import (
    CogVideoXDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    ModularPipeline,
    SkipLayerGuidance,
)
from families import (
    CONDITIONED,
    DECODING,
    IMAGE_PIPELINES,
    STEPS,
    TINY,
    assert_same_clip,
    coarse_patch_sizes,
    every,
    family_named,
    tiny_image_pipeline,
    tiny_pipeline,
)

import flexivid
from flexivid.diffusion import FLOWS
from flexivid.model.families import family_of
from flexivid.model.lora import HOOK_NAME
from flexivid.sampling.flops import flop_counter_mode
from flexivid.sampling.schedule import KEPT
from flexivid.stock_pipelines import ARGUMENTS, set_guidance_scale, usual_arguments

PIPELINES = [name for name in TINY if name != "wan-i2v"]
# Whose pipelines call the transformer once a branch.
SEPARATE = [name for name in PIPELINES if family_named(name).guidance == "separate"]
every_pipeline = every(PIPELINES)


def sample(pipe, call: dict) -> torch.Tensor:
    call = call | {"generator": torch.Generator().manual_seed(0)}
    with torch.no_grad():
        return (
            pipe(**call, output="latents") if isinstance(pipe, ModularPipeline) else pipe(**call, return_dict=False)[0]
        )


@every_pipeline
def test_budget_one_and_disable_are_the_stock_pipeline(name):
    pipe, call = tiny_pipeline(name)
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    weak = sample(pipe, call)
    assert weak.shape == stock.shape and weak.isfinite().all() and not torch.equal(weak, stock)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


@every_pipeline
@pytest.mark.parametrize("order", ["interleaved", pytest.param("weak-first", marks=pytest.mark.slow)])
def test_counted_flops_keep_the_budget_in_every_call(name, order):
    pipe, call = tiny_pipeline(name)
    if "prompt_attention_mask" in call:  # Mochi computes on valid tokens only, and all are counted
        call |= {key: torch.ones_like(value) for key, value in call.items() if key.endswith("_mask")}
    with flop_counter_mode() as full:
        sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order=order)
    sample(pipe, call)
    outputs = []
    for _ in range(2):
        with flop_counter_mode() as counter:
            outputs.append(sample(pipe, call))
        summary = flexivid.summary(pipe)
        assert len(summary.steps) == STEPS
        assert len({name for step in summary.steps for name in step} - {KEPT}) == 2
        outside = full.get_total_flops() - summary.flops_full
        assert outside < 0.01 * summary.flops_full or name in CONDITIONED + DECODING
        assert summary.flops_used + outside == pytest.approx(counter.get_total_flops(), rel=0.01)
        assert summary.ratio <= 0.6
    assert torch.equal(*outputs)


@every(SEPARATE)
@pytest.mark.parametrize(("budget", "branches"), [(0.3, 2), (0.6, 1)])
def test_a_low_budget_and_no_guidance(name, budget, branches):
    pipe, call = tiny_pipeline(name)
    if branches == 1:
        set_guidance_scale(pipe, 1.0)
        call |= {"guidance_scale": 1.0} if "guidance_scale" in call else {}
    with flop_counter_mode() as full:
        sample(pipe, call)
    flexivid.enable(pipe, budget=budget, modes=coarse_patch_sizes(pipe.transformer)[-1:])
    sample(pipe, call)
    with flop_counter_mode() as counter:
        assert sample(pipe, call).isfinite().all()
    summary = flexivid.summary(pipe)
    assert {len(step) for step in summary.steps} == {branches} and summary.ratio <= budget
    saved = summary.flops_full - summary.flops_used
    assert full.get_total_flops() - counter.get_total_flops() == pytest.approx(saved, rel=0.01)


@every(["consisid", "cogvideox-5b", "easyanimate", "allegro"])
@pytest.mark.parametrize(("budget", "guidance_scale"), [(0.3, 3.0), (0.6, 1.0), (0.3, 1.0)])
def test_a_low_budget_and_no_guidance_where_it_is_batched(name, budget, guidance_scale):
    pipe, call = tiny_pipeline(name)
    call["guidance_scale"] = guidance_scale
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, budget=budget, modes=coarse_patch_sizes(pipe.transformer)[-1:])
    first = sample(pipe, call)
    with flop_counter_mode() as counter:
        assert torch.equal(sample(pipe, call), first) and first.isfinite().all()
    summary = flexivid.summary(pipe)
    assert {len(step) for step in summary.steps} == {1} and summary.ratio <= budget
    saved = summary.flops_full - summary.flops_used
    assert full.get_total_flops() - counter.get_total_flops() == pytest.approx(saved, rel=0.01)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


# These stand for images in channels beside the latents, and as clean frames.
@every_of(IMAGE_PIPELINES, quick=("wan2.1-i2v", "ltx-i2v", "cogvideox-i2v"))
def test_image_to_video(name):
    pipe, call = tiny_image_pipeline(name)
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    with_vae = full.get_total_flops()
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    first = sample(pipe, call)
    with flop_counter_mode() as counter:
        assert torch.equal(sample(pipe, call), first)
    summary = flexivid.summary(pipe)
    assert first.isfinite().all() and not torch.equal(first, stock)
    assert len(summary.steps) == STEPS and summary.ratio <= 0.6
    assert with_vae - counter.get_total_flops() == pytest.approx(summary.flops_full - summary.flops_used, rel=0.01)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


def clock(pipe, call: dict) -> list[tuple[int, float, float]]:
    """For every forward: its step, the noise level that it is told, and that of the stock timestep."""
    flex = pipe.transformer._diffusers_hook.get_hook(HOOK_NAME).flex
    runner, seen = flex.runner, []
    read = runner.clock.read

    def read_and_note(pipe, asked):
        position = read(pipe, asked)
        timestep = torch.as_tensor(asked.arguments["timestep"]).float().max()
        diffusion = replace(flex.diffusion, alphas_cumprod=getattr(pipe.scheduler, "alphas_cumprod", None))
        seen.append((position.step, position.sigma, diffusion.level(timestep).s.item()))
        return position

    runner.clock.read = read_and_note
    sample(pipe, call)
    runner.clock.read = read
    return seen


def check_clock(name: str, make_scheduler=None) -> None:
    pipe, call = tiny_pipeline(name, make_scheduler and make_scheduler())
    flexivid.enable(pipe, budget=0.6, order="weak-first")
    for _ in range(2):  # the first step is step 0 of every call, also of the second one
        forwards = clock(pipe, call)
        branches = len(forwards) // STEPS
        assert [step for step, _, _ in forwards] == [step for step in range(STEPS) for _ in range(branches)]
        levels = [told if told is not None else of_timestep for _, told, of_timestep in forwards]
        assert levels == sorted(levels, reverse=True) and levels[0] > 0.9
        if pipe.transformer._diffusers_hook.get_hook(HOOK_NAME).flex.family.prediction in FLOWS:
            assert levels == pytest.approx([of_timestep for _, _, of_timestep in forwards], abs=2e-3)
        summary = flexivid.summary(pipe)
        planned = summary.schedule.steps
        assert summary.steps == [[step[min(i, len(step) - 1)] for i in range(branches)] for step in planned]


@every_pipeline
def test_the_clock_is_that_of_the_scheduler(name):
    check_clock(name)


@pytest.mark.parametrize(
    ("name", "make_scheduler"),
    [
        ("cogvideox-2b", lambda: CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
        ("consisid", lambda: CogVideoXDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)),
        ("wan", lambda: FlowMatchEulerDiscreteScheduler(shift=5.0)),
        ("ltx", lambda: FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)),
    ],
)
def test_the_clock_with_other_schedulers(name, make_scheduler):
    check_clock(name, make_scheduler)


@every_pipeline
def test_several_clips_at_once_are_each_the_clip_alone(name):
    if name in ("wan-vace", "minimax-h3"):
        pytest.skip("its pipeline makes one clip")
    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    twice = {key: value.repeat_interleave(2, 0) for key, value in call.items() if isinstance(value, torch.Tensor)}
    if name == "dit":
        twice = {"class_labels": call["class_labels"] * 2}
    if name == "consisid":  # one face for all clips
        twice = twice | {"image": [call["image"]] * 2, "id_cond": call["id_cond"]}
    if name == "framepack":
        twice["image"] = call["image"] * 2
    both = pipe(**call | twice, generator=generators, return_dict=False)[0]
    assert_same_clip(both[:1], sample(pipe, call))


def test_a_negative_prompt_beside_embedded_guidance():
    """HunyuanVideo then calls the transformer twice a step: both at one patch size, both counted."""
    pipe, call = tiny_pipeline("hunyuan-video")
    negative = {f"negative_{key}": value.flip(0) * 0.5 for key, value in call.items() if "embeds" in key}
    call |= negative | {"negative_prompt_attention_mask": call["prompt_attention_mask"], "true_cfg_scale": 3.0}
    with flop_counter_mode() as full:
        sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    sample(pipe, call)
    with flop_counter_mode() as counter:
        sample(pipe, call)
    summary = flexivid.summary(pipe)
    assert all(len(step) == 2 and len(set(step)) == 1 for step in summary.steps)
    assert summary.flops_full == pytest.approx(full.get_total_flops(), rel=0.01)
    assert summary.flops_used == pytest.approx(counter.get_total_flops(), rel=0.01)
    assert summary.ratio <= 0.6


@pytest.mark.parametrize("guidance", ["kept", "weak-uncond"])
def test_guidance_that_is_batched_cannot_be_mixed_or_kept(guidance):
    pipe, _ = tiny_pipeline("ltx")
    with pytest.raises(ValueError, match=f"{guidance} needs a pipeline that calls its guidance branches apart; ltx"):
        flexivid.enable(pipe, budget=0.6, guidance=guidance)


@pytest.mark.parametrize("frames", [16, 17, 18, 19, 20, 21, 23])
def test_latent_frames_are_those_of_the_pipeline(frames):
    """Allegro's VAE takes any number, and its pipeline rounds odd and even ones in its own ways."""
    pipe, call = tiny_pipeline("allegro")
    flexivid.enable(pipe, budget=1.0)
    latents = sample(pipe, call | {"num_frames": frames, "num_inference_steps": 1})
    found = family_of(pipe.transformer).latent_size(pipe, frames, call["height"], call["width"])
    assert found == tuple(latents.shape[2:])


def test_guiders():
    pipe, call = tiny_pipeline("motif-video")
    assert usual_arguments(pipe)["guidance_scale"] == 3.0
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    outputs = [sample(pipe, call)]
    assert {len(step) for step in flexivid.summary(pipe).steps} == {2}
    for scale, branches in ((5.0, 2), (1.0, 1)):
        set_guidance_scale(pipe, scale)
        outputs.append(sample(pipe, call))
        assert {len(step) for step in flexivid.summary(pipe).steps} == {branches}
    assert not torch.equal(outputs[0], outputs[1])
    pipe.register_modules(guider=SkipLayerGuidance(guidance_scale=3.0, skip_layer_guidance_layers=[0]))
    with pytest.raises(ValueError, match="SkipLayerGuidance changes layers of the transformer"):
        sample(pipe, call)


def test_a_size_that_the_pipeline_chooses():
    usual = usual_arguments(tiny_image_pipeline("hunyuan-video-1.5-i2v")[0])
    assert (usual["frames"], usual["height"], usual["width"]) == (121, 64, 96)


@pytest.mark.parametrize(("name", "size"), [("allegro", (88, 720, 1280)), ("cogvideox-5b", (17, 64, 96))])
def test_a_size_that_the_configuration_has(name, size):
    usual = usual_arguments(tiny_pipeline(name)[0])
    assert (usual["frames"], usual["height"], usual["width"]) == size


@every_pipeline
def test_a_plan_is_what_the_call_runs(name):
    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    if name == "dit":
        with pytest.raises(ValueError, match="its pipeline does not tell them"):
            flexivid.plan(pipe, 1, 96, 96, STEPS, text_length=7)
        return
    frames = next((call[key] for key in ARGUMENTS["frames"] if key in call), 1)
    steps = call["num_inference_steps"]
    planned = flexivid.plan(pipe, frames, call["height"], call["width"], steps, text_length=7)
    sample(pipe, call)
    assert flexivid.summary(pipe).schedule == planned
