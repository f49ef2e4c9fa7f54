"""The rivals of a sweep: that each samples as it says, at what it is said to cost, and is tuned to what it may cost."""

from argparse import Namespace
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline
from diffusers import UniPCMultistepScheduler
from families import tiny_pipeline as tiny_pipeline_of

from flexivid.inputs import shapes_scenes
from flexivid.sampling.places import reuse_places
from flexivid.sweep import arms, dbcache, levels, metrics, scoring, settings, tuning
from flexivid.sweep.probe import Probe, Trial
from flexivid.sweep.rivals import RIVALS, Rival
from flexivid.sweep.sampling import Clip, sample, stock_run

CALL = {"frames": 9, "height": 32, "width": 32, "steps": 8, "guidance_scale": 3.0, "text_length": 16, "fps": 8}
CLIPS = [Clip("a plain red circle growing on a black background", 0, 3), Clip("a blue square", 0, 4)]


def latents(pipe, run=stock_run, **call):
    """(latents, FLOPs) of CLIPS."""
    found, outputs = [], run

    def keep(*args, **kwargs):
        found.append(outputs(*args, **kwargs))
        return found[-1]

    meter = sample(pipe, CLIPS, {**CALL, **call}, count_flops=True, latents=True, run=keep)[1]
    return found[-1], meter.flops


@pytest.fixture(scope="module")
def probe():
    return Probe(tiny_pipeline(), CLIPS, CALL)


class TestPlaces:
    def test_all_places_are_the_stock_run(self, pipe):
        stock, flops = latents(pipe)
        with levels.at_places(pipe, range(8)) as sigmas:
            assert torch.equal(latents(pipe)[0], stock)
        assert len(sigmas) == 9 and sigmas[-1] == 0
        assert torch.equal(latents(pipe)[0], stock)

    def test_those_of_reuse_at_their_noise_levels(self, pipe, probe):
        (chosen,) = levels.our_places(probe, 0.5)[0]
        assert chosen == {"steps": 8, "places": reuse_places(4, 8)}
        seen, forward = [], pipe.transformer.forward
        pipe.transformer.forward = lambda **inputs: seen.append(inputs["timestep"][0].item()) or forward(**inputs)
        pipe.scheduler.set_timesteps(8)
        expected = pipe.scheduler.timesteps[reuse_places(4, 8)]
        with levels.only_at(pipe, chosen) as run:
            flops = latents(pipe, run)[1]
        assert seen[::2] == expected.tolist()  # of both guidance branches
        assert flops / probe.full_flops == pytest.approx(0.5)

    def test_a_shift_is_that_of_the_scheduler(self, pipe):
        stock = pipe.scheduler
        other = UniPCMultistepScheduler.from_config(stock.config, flow_shift=2 * stock.config.flow_shift)
        with levels.shifted(pipe, {"steps": 4, "shift": 2.0}) as run:
            found = latents(pipe, run, steps=4)[0]
        assert pipe.scheduler is stock
        pipe.scheduler = other
        assert torch.equal(found, latents(pipe, steps=4)[0])


class TestLowResolution:
    def test_it_begins_with_the_full_runs_noise(self, pipe):
        def first_latents(run=stock_run):
            seen = []
            with pipe.transformer.register_forward_pre_hook(
                lambda module, args, inputs: seen.append(inputs["hidden_states"]), with_kwargs=True
            ):
                latents(pipe, run)
            return seen[0]

        with levels.low_resolution_first(pipe, {"low_steps": 4}) as run:
            low = first_latents(run)
        full = first_latents()
        corners = [full[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
        assert torch.allclose(low, sum(corners) / 2, atol=1e-6)

    @pytest.mark.parametrize("low", [1, 3, 7])
    def test_counted_flops_are_those_of_its_steps(self, pipe, probe, low):
        with levels.low_resolution_first(pipe, {"low_steps": low}) as run:
            found, flops = latents(pipe, run)
        assert flops == pytest.approx(probe.full_flops * (8 - low + low * probe.low_share) / 8)
        assert found.shape == latents(pipe)[0].shape and 0.15 < probe.low_share < 0.35

    def test_a_perfect_network_ends_at_its_x0(self, pipe):
        """Whatever the size: x0 is constant, so that nothing is lost on the way to full size."""

        def forward(hidden_states, timestep, **_):
            sigma = (timestep / 1000).view(-1, 1, 1, 1, 1).float()
            seen.append((hidden_states.shape[-1], hidden_states.std().item(), sigma.max().item()))
            return ((hidden_states - 0.5) / sigma,)

        seen = []
        pipe.transformer.forward = forward
        with levels.low_resolution_first(pipe, {"low_steps": 5}) as run:
            found, _ = latents(pipe, run)
        assert torch.allclose(found, torch.full_like(found, 0.5), atol=1e-2)
        sides = [side for side, _, _ in seen[::2]]
        assert sides == [sides[0]] * 5 + [2 * sides[0]] * 3
        # The noise that is left is what the noise level says, at both sizes.
        for _, std, sigma in seen:
            assert std == pytest.approx(sigma, rel=0.15)

    def test_its_pairs_cost_the_budget(self, probe):
        pairs = [pair for (pair,) in levels.low_and_full_steps(probe, 0.5)]
        assert len(pairs) > 1
        for pair in pairs:
            full, low = pair["steps"] - pair["low_steps"], pair["low_steps"]
            assert low >= 1 <= full and pair["steps"] <= 8
            assert full + low * probe.low_share <= 4 < full + (low + 1) * probe.low_share or pair["steps"] == 8

    @pytest.mark.parametrize(
        "name, message",
        [
            ("cogvideox-5b", "predicts v_prediction"),
            ("ltx", "takes and gives latents as frames"),
            ("wan", "multiples of"),
        ],
    )
    def test_what_it_cannot_sample_is_refused(self, name, message):
        pipe, call = tiny_pipeline_of(name)
        assert message in levels.low_resolution_refusal(pipe, {"height": 24, "width": 24})


class TestCacheDit:
    def test_it_is_said_what_to_install(self, pipe, monkeypatch):
        monkeypatch.setattr(dbcache, "find_spec", lambda name: None)
        assert "pip install cache-dit" in dbcache.refusal(pipe, CALL)

    def test_several_processes_are_refused(self, pipe, monkeypatch):
        pytest.importorskip("cache_dit")
        assert dbcache.refusal(pipe, CALL) is None
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        for processes, refused in ((1, False), (2, True)):
            monkeypatch.setattr(torch.distributed, "get_world_size", lambda processes=processes: processes)
            assert (dbcache.refusal(pipe, CALL) is not None) is refused

    def test_few_steps_are_tried_where_a_cache_does_not_come_down_to_the_budget(self):
        steps = [family[0]["steps"] for family in dbcache.families(SimpleNamespace(steps=40), 0.1)]
        assert set(steps) == {40, 20, 10}
        assert {family[0]["steps"] for family in dbcache.families(SimpleNamespace(steps=40), 0.8)} == {40}

    def test_it_samples_and_leaves_the_pipeline_as_it_was(self, pipe):
        pytest.importorskip("cache_dit")
        stock, flops = latents(pipe)
        chosen = {"residual_diff_threshold": 4.0, "max_warmup_steps": 2, "max_continuous_cached_steps": -1}
        with dbcache.cached(pipe, {**chosen, "steps": 8, "taylorseer_order": 0}) as run:
            cached, fewer = latents(pipe, run)
        assert 0.4 < fewer / flops < 0.9 and not torch.equal(cached, stock)
        assert torch.equal(latents(pipe)[0], stock)
        assert "forward" not in vars(pipe.transformer)
        settings_of_flexivid = {"modes": ["1x4x4"], "budget": 0.6}
        found = []
        for each in (pipe, tiny_pipeline()):  # and flexivid works on it as on a new one
            with arms.Arm("", "", 0.6, 8, flexivid=settings_of_flexivid).on(each):
                found.append(latents(each)[0])
        assert torch.equal(*found)


class TestTuning:
    class Probe:
        """Of a rival whose setting is the share of the FLOPs itself, and that is the better the later its letter."""

        pipe, steps = None, 40

        def __init__(self):
            self.runs = 0

        def __call__(self, run, steps):
            self.runs += 1
            return Trial(run["share"], ord(run["name"]) + run["share"])

    def rival(self, shares: dict[str, list[float]]) -> Rival:
        @contextmanager
        def on(pipe, settings):
            yield settings

        families = [[{"share": share, "name": name} for share in line] for name, line in shares.items()]
        return Rival("", lambda probe, budget: families, on, lambda pipe, call: None)

    def test_finds_the_nearest_share_with_few_runs(self):
        shares, probe = [1.0, 0.9, 0.83, 0.7, 0.62, 0.52, 0.41, 0.35, 0.31], self.Probe()
        found = list(tuning.tune(probe, self.rival({"a": shares}), [0.8, 0.5, 0.25]))
        assert [trial.share for _, trial in found] == [0.83, 0.52, 0.31]
        assert found[1][0] == {"share": 0.52, "name": "a"}
        assert probe.runs <= len(shares)

    def test_the_better_of_those_that_cost_the_same(self):
        rival = self.rival({"a": [0.9, 0.5], "c": [0.8, 0.52], "b": [0.9, 0.49], "z": [0.9, 0.6]})
        ((chosen, trial),) = tuning.tune(self.Probe(), rival, [0.5])
        assert chosen == {"share": 0.52, "name": "c"} and trial.psnr == ord("c") + 0.52

    def test_the_nearest_where_none_is_close(self):
        ((chosen, _),) = tuning.tune(self.Probe(), self.rival({"a": [0.9, 0.3], "c": [0.8, 0.4]}), [0.1])
        assert chosen["share"] == 0.3
        assert tuning.near(0.1) == pytest.approx(0.02) and tuning.near(0.5) == 0.05

    def test_on_captions_that_are_not_measured(self):
        arguments = Namespace(prompts="shapes-unjudged", seed=7, max_prompts=None)
        captions = [scene.caption for scene in shapes_scenes("shapes-unjudged")]
        swept = [Clip(caption, 0, 7 + k) for k, caption in enumerate(captions[-3:])]
        clips = settings.tuning_clips(arguments, swept)
        assert [clip.prompt for clip in clips] == captions[-7:-3]
        assert not {clip.seed for clip in clips} & {clip.seed for clip in swept}

    @pytest.mark.parametrize("name", ["low-resolution", "steps-at-our-places", "steps-optimised", "taylorseer"])
    def test_every_rival_is_tuned_to_a_budget(self, name, probe):
        ((chosen, trial),) = tuning.tune(probe, RIVALS[name], [0.5])
        assert abs(trial.share - 0.5) <= tuning.near(0.5)
        arm = arms.Arm(name, name, 0.5, chosen.get("steps", 8), rival=name, settings=chosen)
        with arm.on(probe.pipe) as run:
            assert probe(run, arm.steps) == trial
        assert probe().psnr == 100.0  # stock again


class TestMetrics:
    @pytest.mark.parametrize("contrast, side", [(200, 8), (40, 8), (200, 4)])
    def test_displacement_of_a_square(self, contrast, side):
        def clip(speed):
            frames = np.zeros((5, 64, 64, 3), np.uint8)
            for index, frame in enumerate(frames):
                frame[20 : 20 + side, 10 + speed * index : 10 + speed * index + side] = contrast
            return frames

        still, slow, fast = (metrics.displacement(clip(speed)) for speed in (0, 1, 3))
        assert still == 0 and fast == pytest.approx(3 * slow, rel=1e-3)
        assert slow == pytest.approx(0.5, rel=0.05)  # half of a square's edge runs along the motion

    def test_spread_is_the_distance_of_two_clips(self):
        features = np.zeros((2, 3, 4, 5))
        features[1, 2, :, 0] = 6.0  # one of three clips is 6 away from both others
        assert metrics.spread(features).tolist() == [0.0, 4.0]

    def test_a_ratio_of_itself_is_one_and_has_no_interval(self):
        values = np.random.default_rng(0).uniform(1, 2, 30)
        assert scoring._ratio(values, values) == {"mean": 1.0, "low": 1.0, "high": 1.0}
        half = scoring._ratio(values / 2 * np.linspace(0.9, 1.1, 30), values)
        assert half["low"] < half["mean"] < half["high"] and half["mean"] == pytest.approx(0.5, abs=0.02)
