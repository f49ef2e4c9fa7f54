"""Flow maps, told where a step goes: from t to r a coarse pass goes from t' to r', as noisy as means are there.

In a world whose clips are of one value a block, Gaussian, both flow maps are known: trajectories of its probability
flow scale with the standard deviation of what is at a noise level (Song et al., arXiv 2011.13456).
"""

import math

import pytest
import torch
from families import CHANNELS, attach, coarse_patch_sizes, grid_for, inputs, tiny, tiny_image_pipeline, tiny_pipeline
from test_family_pipelines import sample

import flexivid
from flexivid.model.averaged import Averaged
from flexivid.model.call import Call

FLOW_MAPS = {"anyflow": {}, "hunyuan-video-1.5": {"use_meanflow": True}}
every_flow_map = pytest.mark.parametrize("name", FLOW_MAPS)
STEPS = [(1.0, 0.9), (1.0, 0.0), (0.9, 0.5), (0.5, 0.2), (0.2, 0.0)]
OF_X0 = 0.7


def spread(sigma: float, of_noise: float = 1.0) -> float:
    """Standard deviation of what is at a noise level."""
    return math.hypot((1 - sigma) * OF_X0, sigma * of_noise)


class World:
    """One weak patch size of a tiny model, whose network is the exact flow map of the coarse grid."""

    def __init__(self, name: str, parametrisation: str = "snr"):
        transformer = tiny(name, **FLOW_MAPS[name])
        (self.patch_size,) = patch_sizes = coarse_patch_sizes(transformer)[:1]
        self.flex = attach(transformer, patch_sizes, parametrisation)
        self.family = self.flex.family
        self.call = inputs(transformer, grid_for(transformer, 4, 6), batch=1)
        self.folding = self.family.folding(
            self.call, self.flex.weak_modes[self.patch_size].multiple, self.flex.base_patch
        )

    def network(self, **changed) -> tuple[torch.Tensor]:
        t, r = (changed[name].flatten()[0].item() / 1000 for name in ("timestep", self.family.destination))
        mean = self.family.latents(changed).unflatten(1, (4, -1)).mean(1)[:, :CHANNELS]
        velocity = mean * (1 - spread(r) / spread(t)) / (t - r)
        return (self.family.packed(torch.cat([velocity, velocity.new_zeros(1, 4 * CHANNELS, *velocity.shape[2:])], 1)),)

    def asked(self, x_t: torch.Tensor, t: float, r: float) -> Call:
        beside = self.family.latents(self.call)[:, CHANNELS:]
        arguments = self.call | self.family.arguments_for(torch.cat([x_t, beside], 1))
        like = self.call["timestep"]
        arguments |= {
            "timestep": torch.full_like(like, 1000 * t),
            self.family.destination: torch.full_like(like, 1000 * r),
        }
        return Call(self.family, self.flex.base_patch, arguments, self.network)

    def step(self, x_t: torch.Tensor, t: float, r: float) -> torch.Tensor:
        call = self.asked(x_t, t, r)
        velocity = self.flex.predict(call, self.patch_size, self.flex.diffusion, call.level(self.flex.diffusion))
        return x_t - (t - r) * velocity


def check_a_step(name: str, t: float, r: float) -> None:
    """What the coarse grid sees moves as means of latents do, and the noise that it does not see shrinks with sigma."""
    world, generator = World(name), torch.Generator().manual_seed(0)
    noise = torch.randn(1, CHANNELS, *world.folding.size, generator=generator)
    blocks = world.folding.fold(noise).unflatten(1, (4, -1))
    unseen = world.folding.unfold((blocks - blocks.mean(1, keepdim=True)).flatten(1, 2))
    seen = torch.randn(1, CHANNELS, 1, 1, 1, generator=generator)  # of one value, which up-sampling leaves as it is
    expected = seen * spread(r, 0.5) / spread(t, 0.5) + unseen * r / t
    torch.testing.assert_close(world.step(seen + unseen, t, r), expected, atol=1e-4, rtol=1e-4)


@every_flow_map
@pytest.mark.parametrize(("t", "r"), STEPS)
def test_a_coarse_step_is_that_of_the_means(name, t, r):
    check_a_step(name, t, r)


@every_flow_map
@pytest.mark.parametrize(("t", "r"), [(0.9, 0.5), (0.5, 0.2)])
def test_told_the_r_of_the_base_grid_it_would_be_another_step(name, t, r, monkeypatch):
    of = Averaged.of.__func__

    def untold(cls, call, *args):
        averaged = of(cls, call, *args)
        averaged.timesteps[call.family.destination].fill_(1000 * r)
        return averaged

    monkeypatch.setattr(Averaged, "of", classmethod(untold))
    with pytest.raises(AssertionError):
        check_a_step(name, t, r)


@every_flow_map
def test_direct_goes_where_the_base_grid_goes(name):
    world, told = World(name, "direct"), {}

    def still(**changed):
        told.update(changed)
        return (torch.zeros_like(world.family.packed(world.family.latents(changed)[:, : 4 * CHANNELS])),)

    world.network = still
    world.step(torch.randn(1, CHANNELS, *world.folding.size), 0.9, 0.5)
    assert (told["timestep"] == 900).all() and (told[world.family.destination] == 500).all()


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_clean_frames_stay_and_are_told_where_the_others_go(parametrisation):
    """Image-to-video of AnyFlow: the first latent frames have timestep 0, and the r of all."""
    transformer = tiny("anyflow")
    flex = attach(transformer, ["2x4x4"], parametrisation)
    flex.fix("2x4x4")
    call = inputs(transformer, (5, 8, 12))
    call["timestep"][:, 0] = 0
    told = []
    transformer.condition_embedder.register_forward_pre_hook(lambda module, args: told.append(args[:2]))
    with torch.no_grad():
        output = flex.family.latents({"hidden_states": transformer(**call)[0]})
    (t, r), frames = told[0], 3  # 1 | 2 3 | 4 5
    assert t.shape == r.shape == (2, frames)
    assert (t[:, 0] == 0).all() and (t[:, 1:] == t[0, 1]).all() and (r == r[0, 0]).all()
    if parametrisation == "direct":
        assert t[0, 1] == 800 and r[0, 0] == 500
    else:
        assert 0 < r[0, 0] < 500 and 0 < t[0, 1] < 800
        assert not output[:, :, 0].any() and output[:, :, 1:].any()
    assert output.isfinite().all()


@pytest.mark.parametrize("patch_size", ["1x2x2", "1x4x4"])
def test_reused_steps_are_one_longer_step(patch_size):
    """A flow map goes past the steps that compute nothing: as if these were not there."""
    pipe, call = tiny_pipeline("anyflow")
    call["num_inference_steps"] = 4
    told = []
    pipe.transformer.condition_embedder.register_forward_pre_hook(lambda module, args: told.append(args[1].unique()))
    flexivid.enable(pipe, schedule=f"{patch_size}:1,reused:2,{patch_size}:1", modes=["1x4x4"])
    with_reused = sample(pipe, call)
    sigmas = [1.0, 0.25]  # before the scheduler's shift: those of the steps that compute
    flexivid.enable(pipe, schedule=f"{patch_size}:2", modes=["1x4x4"])
    two = sample(pipe, call | {"num_inference_steps": 2, "sigmas": sigmas})
    torch.testing.assert_close(with_reused, two, atol=1e-4, rtol=1e-4)
    assert len(told) == 4 and torch.allclose(torch.stack(told[:2]), torch.stack(told[2:]))


def test_a_pipeline_with_mean_flow():
    """HunyuanVideo-1.5 with use_meanflow: its image-to-video pipeline tells r."""
    pipe, call = tiny_image_pipeline("hunyuan-video-1.5-i2v")
    pipe.register_modules(transformer=tiny("hunyuan-video-1.5", use_meanflow=True))
    call["num_inference_steps"] = 4
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert torch.equal(sample(pipe, call), stock)
    flexivid.enable(pipe, budget=0.7, order="interleaved")
    weak = sample(pipe, call)
    assert torch.equal(sample(pipe, call), weak) and weak.isfinite().all() and not torch.equal(weak, stock)
    assert flexivid.summary(pipe).ratio <= 0.7
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


@pytest.mark.parametrize("use_meanflow", [False, True])
def test_hunyuan_video_15_runs_weak_passes_in_half_precision(use_meanflow):
    """Whose forward computes in the precision of its timestep."""
    transformer = tiny("hunyuan-video-1.5", use_meanflow=use_meanflow).to(torch.bfloat16)
    call = inputs(transformer, grid_for(transformer, 4, 6))
    if not use_meanflow:
        call.pop("timestep_r", None)
    is_float = {name: torch.is_tensor(value) and value.is_floating_point() for name, value in call.items()}
    call = {name: value.to(torch.bfloat16) if is_float[name] else value for name, value in call.items()}
    (patch_size,) = modes = coarse_patch_sizes(transformer)[:1]
    flex = attach(transformer, modes)
    with torch.no_grad():
        stock = transformer(**call, return_dict=False)[0]
        flex.fix(patch_size)
        weak = transformer(**call, return_dict=False)[0]
    assert weak.dtype == stock.dtype == torch.bfloat16 and weak.isfinite().all() and not torch.equal(weak, stock)
