"""enable / disable / summary on a tiny stock WanPipeline."""

import pytest
import torch
from conftest import forward_inputs, sample, tiny_pipeline, tiny_transformer
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanVideoToVideoPipeline
from diffusers.hooks import FirstBlockCacheConfig, TaylorSeerCacheConfig
from PIL import Image

import flexivid
from flexivid.sampling.flops import flop_counter_mode
from flexivid.sampling.run import Run

MODES = ["1x4x4", "2x2x2", "2x4x4"]


def euler():
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def test_budget_one_and_disable_are_the_stock_pipeline(pipe):
    keys, stock = list(pipe.transformer.state_dict()), sample(pipe)
    flexivid.enable(pipe, modes=MODES, budget=1.0)
    assert torch.equal(sample(pipe), stock)
    flexivid.enable(pipe, modes=MODES, budget=0.5)
    assert not torch.equal(sample(pipe), stock)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe), stock)
    assert list(pipe.transformer.state_dict()) == keys


@pytest.mark.parametrize(
    ("budget", "make_scheduler", "guidance_scale", "guidance", "order"),
    [
        *[
            (budget, None, 3.0, "same", order)
            for budget in (1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.25)
            for order in ("interleaved", "weak-first")
        ],
        *[(budget, euler, guidance_scale, "same", None) for budget in (0.5, 0.25) for guidance_scale in (1.0, 3.0)],
        *[(budget, None, 3.0, "weak-uncond", None) for budget in (0.8, 0.5)],
        *[(budget, None, 3.0, "kept", "interleaved") for budget in (0.8, 0.5, 0.25)],
        *[(0.5, euler, scale, None, order) for scale in (1.0, 3.0) for order in (None, "interleaved")],
    ],
)
def test_counted_flops_keep_the_budget_and_the_prediction(
    pipe, budget, make_scheduler, guidance_scale, guidance, order
):
    if make_scheduler:
        pipe.scheduler = make_scheduler()
    settings = dict(steps=10, height=64, width=64, guidance_scale=guidance_scale, max_sequence_length=4)
    prompt_embeds, negative = pipe.encode_prompt("a red circle", max_sequence_length=4)
    settings |= dict(prompt=None, prompt_embeds=prompt_embeds, negative_prompt_embeds=negative)
    flexivid.enable(pipe, modes=MODES, budget=budget, guidance=guidance, order=order)
    sample(pipe, **settings)  # the session counts on the meta device in its first call, which must not be counted too
    with flop_counter_mode() as counter:
        sample(pipe, **settings)
    result = flexivid.summary(pipe)
    assert counter.get_total_flops() == pytest.approx(result.flops_used, rel=0.01)
    flexivid.disable(pipe)
    with flop_counter_mode() as full_counter:
        sample(pipe, **settings)
    assert full_counter.get_total_flops() == pytest.approx(result.flops_full, rel=0.01)
    assert counter.get_total_flops() <= budget * full_counter.get_total_flops()
    assert [tuple(step) for step in result.steps] == list(result.schedule.steps)
    keeps = guidance in (None, "kept")  # who names modes gets weak steps
    differ = guidance_scale > 1 and (keeps or guidance == "weak-uncond")
    assert any(len(set(step)) == 2 for step in result.steps) == differ
    assert any("kept" in step for step in result.steps) == (keeps and guidance_scale > 1)
    assert not any("reused" in step for step in result.steps)


def test_unreachable_budgets_name_the_least(pipe):
    flexivid.enable(pipe, modes=["2x2x2"], budget=0.1)
    with pytest.raises(flexivid.BudgetError, match="the least is 0\\."):
        sample(pipe)


@pytest.mark.parametrize("budget", [0, -1, 1.5, float("nan"), "abc"])
def test_budgets_out_of_range_are_refused_at_once(pipe, budget):
    with pytest.raises(flexivid.BudgetError, match="above 0 and up to 1"):
        flexivid.enable(pipe, budget=budget)


def test_arguments_that_make_no_sense_are_refused(pipe):
    with pytest.raises(ValueError, match="not both"):
        flexivid.enable(pipe, budget=0.5, schedule="1x4x4")
    with pytest.raises(ValueError, match="give a budget"):
        flexivid.enable(pipe)
    with pytest.raises(ValueError, match="order belongs to a budget"):
        flexivid.enable(pipe, schedule="1x4x4", order="interleaved")
    with pytest.raises(ValueError, match="weak-first only"):
        flexivid.enable(pipe, budget=0.5, guidance="weak-uncond", order="interleaved")
    with pytest.raises(ValueError, match="1x3x3"):
        flexivid.enable(pipe, modes=["1x3x3"], budget=0.5)
    with pytest.raises(ValueError, match="4x4"):
        flexivid.enable(pipe, modes=["4x4"], budget=0.5)
    with pytest.raises(ValueError, match="no steps"):
        flexivid.enable(pipe.transformer, budget=0.5)
    with pytest.raises(ValueError, match="does not know"):
        flexivid.enable(torch.nn.Linear(1, 1), schedule="1x4x4")
    stock = sample(tiny_pipeline())
    assert torch.equal(sample(pipe), stock)


@pytest.mark.parametrize("make_scheduler", [None, euler])
def test_the_clock_starts_at_zero_in_every_call(pipe, make_scheduler):
    if make_scheduler:
        pipe.scheduler = make_scheduler()
    flexivid.enable(pipe, modes=MODES, schedule="2x4x4:2,1x4x4:1,1x2x2:2")
    first = sample(pipe, steps=5)
    steps = flexivid.summary(pipe).steps
    assert steps == [["2x4x4"] * 2] * 2 + [["1x4x4"] * 2] + [["1x2x2"] * 2] * 2
    assert torch.equal(sample(pipe, steps=5), first)
    assert flexivid.summary(pipe).steps == steps


def test_the_clock_without_cache_contexts(pipe, monkeypatch):
    """Pipelines that open no cache context are timed by their scheduler, branches by the order of the calls."""
    from contextlib import nullcontext

    flexivid.enable(pipe, modes=MODES, schedule="2x4x4:1,1x2x2/1x4x4:2,1x2x2:1")
    with_context = sample(pipe, steps=4)
    steps = flexivid.summary(pipe).steps
    monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda self, name, **_: nullcontext())
    assert torch.allclose(sample(pipe, steps=4), with_context, atol=1e-5)
    assert flexivid.summary(pipe).steps == steps


def test_the_unconditional_branch_must_not_be_the_finer_one(pipe):
    flexivid.enable(pipe, modes=["1x4x4"], schedule="1x4x4/1x2x2:4")
    with pytest.raises(ValueError, match="swap the two"):
        sample(pipe, steps=4)


def test_guidance_can_be_kept_only_from_a_powerful_step(pipe):
    flexivid.enable(pipe, modes=["1x4x4"], schedule="1x4x4/kept:3,1x2x2:1")
    with pytest.raises(ValueError, match="step 0 keeps the guidance of a powerful step before it, and there is none"):
        sample(pipe, steps=4)
    flexivid.enable(pipe, modes=["1x4x4"], schedule="1x2x2:1,1x4x4/kept:2,1x2x2/kept:1")
    assert sample(pipe, steps=4).isfinite().all()
    assert flexivid.summary(pipe).steps == [["1x2x2"] * 2, *[["1x4x4", "kept"]] * 2, ["1x2x2", "kept"]]


def test_the_same_noise_for_the_same_seed_at_every_budget(pipe, monkeypatch):
    starts = []
    prepare = WanPipeline.prepare_latents

    def remember(self, *args, **kwargs):
        starts.append(prepare(self, *args, **kwargs))
        return starts[-1]

    monkeypatch.setattr(WanPipeline, "prepare_latents", remember)
    for budget in (1.0, 0.6, 0.45):
        flexivid.enable(pipe, modes=["1x4x4"], budget=budget)
        sample(pipe)
    assert torch.equal(starts[0], starts[1]) and torch.equal(starts[0], starts[2])


@pytest.mark.parametrize("frames", [1, 5, 17, 21])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_frames_batch_and_guidance(pipe, frames, guidance_scale):
    flexivid.enable(pipe, modes=MODES, schedule="2x4x4:1,2x2x2:1,1x4x4:1,1x2x2:1")
    video = sample(
        pipe, steps=4, num_frames=frames, guidance_scale=guidance_scale, prompt=["a red circle"] * 3, output_type="np"
    )
    assert video.shape == (3, frames, 32, 32, 3)


@pytest.mark.parametrize("frames", [1, 5])
def test_few_frames_keep_the_budget_though_a_temporal_patch_saves_nothing(pipe, frames):
    stock = sample(pipe, num_frames=frames)
    flexivid.enable(pipe, modes=MODES, budget=1.0)
    assert torch.equal(sample(pipe, num_frames=frames), stock)
    for order in ("weak-first", "interleaved"):
        flexivid.enable(pipe, modes=MODES, budget=0.6, order=order)
        sample(pipe, num_frames=frames)
        result = flexivid.summary(pipe)
        assert result.ratio <= 0.6 and ["1x2x2", "1x2x2"] in result.steps
        assert order == "interleaved" or result.steps[-1] == ["1x2x2", "1x2x2"]


def test_a_shared_transformer_is_refused(pipe):
    other = WanPipeline(**pipe.components)
    flexivid.enable(pipe, modes=MODES, budget=0.5)
    with pytest.raises(ValueError, match="another pipeline"):
        flexivid.enable(other, modes=MODES, budget=0.5)
    flexivid.disable(pipe)
    flexivid.enable(other, modes=MODES, budget=0.5)


def test_an_interrupted_call_leaves_the_stock_transformer(pipe):
    inputs = forward_inputs()
    stock = pipe.transformer(**inputs, return_dict=False)[0]
    flexivid.enable(pipe, modes=MODES, budget=0.5)

    def interrupt(pipe, i, t, kwargs):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sample(pipe, callback_on_step_end=interrupt)
    sample(pipe)
    flexivid.disable(pipe)
    assert torch.equal(pipe.transformer(**inputs, return_dict=False)[0], stock)


def test_corrections_are_forgotten_between_calls(pipe):
    flexivid.enable(pipe, modes=["2x4x4"], schedule="2x4x4:1,1x2x2:1,2x4x4:2")
    first = sample(pipe, steps=4)
    assert torch.equal(sample(pipe, steps=4), first)


def test_two_transformers_split_at_a_boundary(monkeypatch):
    """Wan2.2-A14B: high-noise steps run in `transformer`, low-noise ones in `transformer_2`."""
    components = tiny_pipeline().components
    components |= {"transformer_2": tiny_transformer(seed=7), "boundary_ratio": 0.875}
    pipe = WanPipeline(**components)
    pipe.set_progress_bar_config(disable=True)
    stock = sample(pipe)
    flexivid.enable(pipe, modes=MODES, schedule="1x4x4:5,1x2x2:1")
    calls = {"transformer": 0, "transformer_2": 0}
    for name in calls:
        getattr(pipe, name).blocks[0].register_forward_hook(
            lambda *_, name=name: calls.__setitem__(name, calls[name] + 1)
        )
    assert not torch.equal(sample(pipe), stock)
    assert flexivid.summary(pipe).steps == [["1x4x4"] * 2] * 5 + [["1x2x2"] * 2]
    assert calls["transformer"] > 0 and calls["transformer_2"] > 0 and sum(calls.values()) == 12
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe), stock)
    # What the first transformer corrects, the second one goes on with.
    flexivid.enable(pipe, modes=MODES, schedule="1x2x2:1,1x4x4:5")
    corrected = sample(pipe)
    stock_forward = Run.forward

    def without_corrections(self, flex, *args):
        if flex.transformer is pipe.transformer_2:
            self.corrections.clear()
        return stock_forward(self, flex, *args)

    monkeypatch.setattr(Run, "forward", without_corrections)
    assert not torch.equal(sample(pipe), corrected)


def test_summary_before_a_call_says_so(pipe):
    with pytest.raises(ValueError, match="call it first"):
        flexivid.summary(pipe)


def test_video_to_video_starts_midway(pipe):
    """It opens no cache context and slices the timesteps, so the first forward is step 0 at a noise level below 1."""
    video_to_video = WanVideoToVideoPipeline(
        **{name: pipe.components[name] for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")}
    )
    video_to_video.set_progress_bar_config(disable=True)
    video = [Image.new("RGB", (32, 32), (40 * i, 0, 0)) for i in range(5)]
    positions = []
    flexivid.enable(video_to_video, modes=["1x4x4"], schedule="1x4x4:3,1x2x2:2")
    runner = video_to_video.transformer._diffusers_hook.get_hook("flexivid").flex.runner
    read = runner.clock.read
    runner.clock.read = lambda *call: positions.append(read(*call)) or positions[-1]
    for _ in range(2):
        video_to_video(
            video=video,
            prompt="a red circle",
            height=32,
            width=32,
            num_inference_steps=10,
            strength=0.5,
            guidance_scale=3.0,
            max_sequence_length=16,
            output_type="latent",
        )
        assert runner.summary.steps == [["1x4x4"] * 2] * 3 + [["1x2x2"] * 2] * 2
    expected = [float(sigma) for sigma in video_to_video.scheduler.sigmas[5:10] for _ in range(2)] * 2
    assert [position.sigma for position in positions] == pytest.approx(expected)


def test_cpu_offload_before_or_after_enable(pipe):
    expected = None
    for offload_first in (True, False):
        fresh = tiny_pipeline()
        stock = sample(fresh)
        if offload_first:
            fresh.enable_model_cpu_offload(device="cpu")
        flexivid.enable(fresh, modes=MODES, budget=0.5)
        if not offload_first:
            fresh.enable_model_cpu_offload(device="cpu")
        first = sample(fresh)
        assert torch.equal(sample(fresh), first) and not torch.equal(first, stock)
        assert expected is None or torch.equal(first, expected)
        expected = first
        flexivid.disable(fresh)
        assert torch.equal(sample(fresh), stock) and torch.equal(sample(fresh), stock)


def test_a_schedule_names_its_own_modes_and_is_checked(pipe):
    flexivid.enable(pipe, schedule="2x4x4:2,1x2x2:2")
    sample(pipe, steps=4)
    assert flexivid.summary(pipe).steps[0] == ["2x4x4"] * 2
    flexivid.enable(pipe, schedule=flexivid.Schedule((("1x4x4",), ("1x2x2",))))
    sample(pipe, steps=2)
    assert flexivid.summary(pipe).steps == [["1x4x4"] * 2, ["1x2x2"] * 2]
    with pytest.raises(ValueError, match="adds up to 2 steps, but there are 3"):
        sample(pipe, steps=3)
    flexivid.enable(pipe, schedule="2x2x2/1x4x4:2", modes=["2x2x2", "1x4x4"])
    with pytest.raises(ValueError, match="swap the two"):
        sample(pipe, steps=2)


def test_a_failed_enable_keeps_the_one_before(pipe):
    flexivid.enable(pipe, modes=MODES, schedule="1x4x4")
    before = sample(pipe)
    with pytest.raises(ValueError, match="1x3x3"):
        flexivid.enable(pipe, modes=["1x3x3"], budget=0.5)
    assert torch.equal(sample(pipe), before)


class TestTogetherWithACache:
    """FirstBlockCache keeps the tokens of the last forward: of the same patch size only."""

    SCHEDULE = "2x4x4:2,1x2x2:1,2x4x4:2,1x2x2:1"

    def run(self, pipe, threshold: float | None):
        flexivid.enable(pipe, modes=MODES, schedule=self.SCHEDULE)
        if threshold is not None:
            pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        blocks = []
        handle = pipe.transformer.blocks[-1].attn1.register_forward_hook(
            lambda module, args, output: blocks.append(output.shape[1])
        )
        try:
            return sample(pipe, steps=6), blocks
        finally:
            handle.remove()
            if threshold is not None:
                pipe.transformer.disable_cache()
            flexivid.disable(pipe)

    def test_a_cache_that_never_hits_changes_nothing(self, pipe):
        stock = sample(pipe, steps=6)
        without, blocks = self.run(pipe, None)
        cached, cached_blocks = self.run(pipe, 0.0)
        assert torch.equal(cached, without) and cached_blocks == blocks
        assert torch.equal(sample(pipe, steps=6), stock)

    def test_a_cache_that_always_hits_runs_every_patch_size_once_a_branch(self, pipe):
        clip, blocks = self.run(pipe, 1e9)
        assert clip.isfinite().all()
        assert len(blocks) == 4 and len(set(blocks)) == 2
        # And in the next call again: states do not outlive a call.
        assert torch.equal(self.run(pipe, 1e9)[0], clip)

    def test_other_caches_are_refused(self, pipe):
        flexivid.enable(pipe, modes=MODES, budget=0.5)
        pipe.transformer.enable_cache(TaylorSeerCacheConfig())
        with pytest.raises(ValueError, match="TaylorSeerCacheConfig does not work"):
            sample(pipe)
