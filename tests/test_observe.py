"""What an observer of a run sees, and that it changes nothing; what is left in memory after a call."""

import gc

import pytest
import torch
from families import STEPS, tiny_pipeline
from test_calls import sample

import flexivid
from flexivid.running import next_budget
from flexivid.sampling.schedule import KEPT


class Everything(flexivid.Observer):
    patch_sizes = ("1x4x4",)

    def __init__(self):
        ticks = iter(range(10**6))
        self.clock = lambda: next(ticks)
        self.forwards, self.errors, self.differences = [], {}, {}

    def forward(self, forward):
        self.forwards.append(forward)

    def error(self, step, branch, patch_size, x0_error):
        self.errors[step, branch, patch_size] = x0_error

    def guidance(self, step, x0_difference):
        self.differences[step] = x0_difference


def test_an_observer_sees_every_forward_and_changes_nothing():
    pipe, call = tiny_pipeline("wan")
    with pytest.raises(ValueError, match="not enabled"), flexivid.observe(pipe, Everything()):
        pass
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    clip, ratio = sample(pipe, call), flexivid.summary(pipe).ratio
    with flexivid.observe(pipe, Everything()) as seen:
        assert torch.equal(sample(pipe, call), clip)
    summary = flexivid.summary(pipe)
    assert summary.ratio == ratio
    assert [[f.patch_size for f in seen.forwards if f.step == step] for step in range(STEPS)] == summary.steps
    for f in seen.forwards:
        runs = 0 if f.patch_size == KEPT else 2 if f.patch_size == "1x2x2" else 1  # compared with the weak one
        assert (f.seconds, f.stock_seconds) == (2 * runs + 1, runs)
    powerful = {step for step, names in enumerate(summary.steps) if names == ["1x2x2"] * 2}
    assert powerful and set(seen.differences) == powerful
    assert set(seen.errors) == {(step, branch, "1x4x4") for step in powerful for branch in (0, 1)}
    count = len(seen.forwards)
    sample(pipe, call)
    assert len(seen.forwards) == count


def test_errors_are_those_of_the_predictions():
    """x0 = x_t - sigma v: against a weak and a powerful forward of the same latents."""
    pipe, call = tiny_pipeline("wan")
    flexivid.enable(pipe, schedule="1x2x2", modes=["1x4x4"])
    inputs = []
    note = lambda module, args, kwargs: inputs.append(kwargs)  # noqa: E731
    handle = pipe.transformer.register_forward_pre_hook(note, with_kwargs=True)
    with flexivid.observe(pipe, Everything()) as seen:
        sample(pipe, call)
    handle.remove()
    flexivid.disable(pipe)
    # The scheduler rounds its timesteps, from which a bare transformer reads the noise level of a weak forward.
    sigma = pipe.scheduler.sigmas[:1]
    timesteps, outputs = {"1x2x2": inputs[0]["timestep"], "1x4x4": 1000 * sigma}, {}
    for patch_size in ("1x2x2", "1x4x4"):
        flexivid.enable(pipe.transformer, schedule=patch_size, modes=["1x4x4"])
        with torch.no_grad():
            told = {"timestep": timesteps[patch_size], "return_dict": False}
            outputs[patch_size] = [pipe.transformer(**{**kwargs, **told})[0] for kwargs in inputs[:2]]
        flexivid.disable(pipe.transformer)
    for branch in (0, 1):
        expected = -sigma * (outputs["1x4x4"][branch] - outputs["1x2x2"][branch])
        torch.testing.assert_close(seen.errors[0, branch, "1x4x4"], expected, atol=2e-3, rtol=1e-2)
    expected = -sigma * (outputs["1x2x2"][0] - outputs["1x2x2"][1])
    torch.testing.assert_close(seen.differences[0], expected, atol=2e-3, rtol=1e-2)


def test_costs_are_those_of_the_plan():
    pipe, call = tiny_pipeline("wan")
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    costs = flexivid.costs(pipe, 17, 64, 96, 7)
    sample(pipe, call)
    assert flexivid.summary(pipe).flops_full == 2 * STEPS * costs["1x2x2"] and costs["1x4x4"] < costs["1x2x2"]


@pytest.mark.parametrize("order", ["reuse", "interleaved", "weak-first"])
def test_the_next_budget_is_the_least_that_buys_another_schedule(order):
    pipe, sizes = tiny_pipeline("wan")[0], (17, 64, 96, STEPS, 7)

    def plan(budget):
        flexivid.enable(pipe, budget=budget, order=order)
        return flexivid.plan(pipe, *sizes)

    own = plan(0.55)
    found = next_budget(pipe, *sizes)
    assert found > 0.55 and plan(found) != own == plan(round(found - 0.001, 3))
    plan(1.0)
    assert next_budget(pipe, *sizes) is None
    flexivid.enable(pipe, schedule="1x2x2")
    assert next_budget(pipe, *sizes) is None


@pytest.mark.parametrize("name", ["wan", "hunyuan-video", "cogvideox-5b"])
@pytest.mark.parametrize("ending", ["end", "error"])
def test_no_latents_stay_after_a_call(name, ending):
    """Of what a pipeline and what flexivid hooked to it can reach, nothing has the size of latents."""
    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, budget=0.5, order="interleaved")
    shape = sample(pipe, call).shape

    def tensors() -> int:
        gc.collect()
        return sum(torch.is_tensor(thing) and thing.shape[-2:] == shape[-2:] for thing in gc.get_objects())

    before = tensors()
    if ending == "error":

        def fail(module, args):
            if len(flexivid.summary(pipe).steps) > 4:
                raise KeyboardInterrupt

        handle = pipe.transformer.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            sample(pipe, call)
        handle.remove()
    else:
        sample(pipe, call)
    assert tensors() <= before
