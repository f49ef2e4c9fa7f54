"""Guided patch sizes: one forward that gives what both guidance branches give together."""

import pytest
import torch
from families import STEPS, tiny_pipeline
from test_calls import guidance_until, sample

import flexivid
from flexivid.model.adapter import AdapterConfig, read_config, save_adapter
from flexivid.model.flexible import FlexTransformer
from flexivid.model.hooks import attached
from flexivid.model.lora import add_lora
from flexivid.patches.sizes import parse_mode
from flexivid.sampling.budget import least_budget, schedule_for_budget
from flexivid.sampling.flops import flop_counter_mode
from flexivid.sampling.places import is_few, places_of_guided
from flexivid.sampling.purse import BudgetError
from flexivid.sampling.schedule import Schedule, explicit_schedule, powerful_of
from flexivid.training.config import DistillConfig
from flexivid.training.noise import NoiseLevels
from flexivid.training.student import build_student, weak_errors

COSTS = {"1x2x2": 100, "1x4x4": 20, "1x4x4-guided": 22}
SCALE = 5.0  # Wan's own


def guided_adapter(folder, transformer, modes=("1x4x4", "1x4x4-guided"), scale=SCALE):
    """An adapter whose weights are random, so that its modes differ."""
    flex = FlexTransformer(transformer, list(modes), "snr")
    add_lora(flex, 2)
    torch.manual_seed(3)
    for name, parameter in [*transformer.named_parameters(), *flex.weak_modes.named_parameters()]:
        if "lora_B" in name or "patch_size_embedding" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    flex.guidance_scale = scale
    config = AdapterConfig.of(
        flex,
        lora_rank=2,
        components=["transformer"],
        base_model="tiny",
    )
    save_adapter(folder, config, {"transformer": flex})
    flexivid.disable(transformer)
    return folder


@pytest.fixture(scope="module")
def enabled(tmp_path_factory):
    pipe, call = tiny_pipeline("wan")
    folder = guided_adapter(tmp_path_factory.mktemp("guided"), pipe.transformer)
    return pipe, {**call, "guidance_scale": SCALE}, folder


class TestSchedule:
    def test_notation_and_cost(self):
        schedule = explicit_schedule("1x4x4-guided:2,reused:1,1x2x2:1,01x4x4:1", 5, 2, list(COSTS))
        assert schedule.steps[0] == ("1x4x4-guided",) * 2
        assert schedule.forwards("1x2x2") == ["1x4x4-guided"] * 2 + ["1x2x2"] * 2 + ["1x4x4"] * 2 + ["1x4x4"] * 2
        assert schedule.cost(COSTS) == 2 * 22 + 2 * 100 + 2 * 2 * 20
        assert Schedule.from_json(schedule.to_json()) == schedule
        assert explicit_schedule(schedule.to_text(), 5, 2, list(COSTS)) == schedule
        assert str(schedule).startswith("2 x 1x4x4-guided, 1 x reused, 1 x 1x2x2")

    def test_what_cannot_be_is_refused(self):
        assert parse_mode("1x4x4-guided") == ((1, 4, 4), True)
        with pytest.raises(ValueError, match="both guidance branches at once"):
            explicit_schedule("1x4x4-guided/1x4x4:1", 1, 2, list(COSTS))
        with pytest.raises(ValueError, match="both guidance branches at once"):
            explicit_schedule("1x4x4-guided:1", 1, 1, list(COSTS))
        with pytest.raises(ValueError, match="not a patch size of this model"):
            explicit_schedule("1x4x4-guided:1", 1, 2, ["1x2x2", "1x4x4"])
        with pytest.raises(ValueError, match="has to be trained"):
            flexivid.enable(tiny_pipeline("wan")[0], modes=["1x4x4-guided"], schedule="1x2x2")


def test_one_forward_stands_for_both_branches(enabled):
    """At the trained scale the guided prediction is what the scheduler gets, whatever the other branch would say."""
    pipe, call, folder = enabled
    flexivid.enable(pipe, folder, schedule=f"1x4x4-guided:2,1x2x2:{STEPS - 2}")
    forwards = []
    hook = pipe.transformer.blocks[0].register_forward_hook(lambda *_: forwards.append(1))
    clip = sample(pipe, call)
    hook.remove()
    assert len(forwards) == 2 + 2 * (STEPS - 2)
    assert flexivid.summary(pipe).steps[0] == ["1x4x4-guided"] * 2
    assert torch.equal(clip, sample(pipe, call)) and clip.isfinite().all()
    # Beside another negative prompt only the later steps see it.
    other = sample(pipe, {**call, "negative_prompt_embeds": torch.randn_like(call["negative_prompt_embeds"])})
    assert not torch.equal(clip, other)
    flexivid.enable(pipe, folder, schedule="1x4x4-guided")
    clips = [
        sample(pipe, {**call, "negative_prompt_embeds": embeds})
        for embeds in (call["negative_prompt_embeds"], torch.randn_like(call["negative_prompt_embeds"]))
    ]
    # u + w (c - u) of equal branches is rounded, so that what is compared is the same arithmetic.
    assert torch.equal(*clips)
    flexivid.disable(pipe)


def test_counted_is_predicted(enabled):
    pipe, call, folder = enabled
    flexivid.disable(pipe)
    with flop_counter_mode() as full:
        sample(pipe, call)
    flexivid.enable(pipe, folder, schedule=f"1x4x4-guided:3,reused:1,1x2x2:{STEPS - 4}")
    with flop_counter_mode() as used:
        sample(pipe, call)
    summary = flexivid.summary(pipe)
    assert summary.flops_used / summary.flops_full == pytest.approx(
        used.get_total_flops() / full.get_total_flops(), abs=0.005
    )
    flexivid.disable(pipe)


def test_the_models_own_patch_size_may_be_guided(tmp_path):
    """One forward that has a larger head than the powerful one, and is no powerful step."""
    pipe, call = tiny_pipeline("wan")
    call = {**call, "guidance_scale": SCALE}
    with flop_counter_mode() as full:
        sample(pipe, call)
    folder = guided_adapter(tmp_path, pipe.transformer, modes=("1x4x4", "1x2x2-guided"))
    flexivid.enable(pipe, folder, schedule=f"1x2x2-guided:3,reused:1,1x2x2:{STEPS - 4}", merge_lora=True)
    with flop_counter_mode() as used:
        clip = sample(pipe, call)
    summary = flexivid.summary(pipe)
    assert summary.ratio == pytest.approx(used.get_total_flops() / full.get_total_flops(), abs=0.005)
    assert torch.equal(clip, sample(pipe, call))
    flexivid.enable(pipe, folder, budget=0.15, merge_lora=True)
    sample(pipe, {**call, "num_inference_steps": 20})
    computed = [step for step in flexivid.summary(pipe).steps if "reused" not in step]
    assert computed == [["1x2x2-guided"] * 2] * len(computed) and len(computed) >= 5
    assert flexivid.summary(pipe).ratio <= 0.15
    costs = {"1x4x4": 20, "1x2x2": 100, "1x2x2-guided": 103}
    assert powerful_of(costs) == "1x2x2"
    assert Schedule((("1x2x2-guided",) * 2, ("1x2x2",) * 2)).cost(costs) == 303
    assert least_budget(costs) == 0.2
    flexivid.disable(pipe)


class TestBudgets:
    """Small budgets, where one of the model's own patch size is at hand."""

    costs = {"1x2x2": 1000, "1x4x4": 220, "1x4x4-guided": 230, "1x2x2-guided": 1006}

    @pytest.mark.parametrize("budget, coarse", [(0.03, 4), (0.05, 4), (0.06, 4), (0.075, 0), (0.1, 0)])
    def test_all_computed_steps_are_guided_and_where_these_are_few_the_first_ones_coarse(self, budget, coarse):
        schedule = schedule_for_budget(self.costs, 40, budget, 2)
        computed = [step[0] for step in schedule.steps if step[0] != "reused"]
        fine = computed.count("1x2x2-guided")
        assert computed == ["1x4x4-guided"] * coarse + ["1x2x2-guided"] * fine
        assert all(step[0] == "1x4x4-guided" for step in schedule.steps[:coarse])
        assert schedule.cost(self.costs) <= budget * 80 * 1000 < schedule.cost(self.costs) + 1006

    def test_without_a_coarse_one_and_where_none_fits(self):
        costs = {name: cost for name, cost in self.costs.items() if name != "1x4x4-guided"}
        steps = [step[0] for step in schedule_for_budget(costs, 40, 0.05, 2).steps]
        assert steps[0] == "1x2x2-guided" and steps.count("1x2x2-guided") == 3 and steps.count("reused") == 37
        # What fits hardly leaves no room for coarse ones, and less than one is refused, with the least that is not.
        assert [step[0] for step in schedule_for_budget(self.costs, 40, 0.0126, 2).steps].count("reused") == 39
        with pytest.raises(BudgetError, match="the least is 0.013"):
            schedule_for_budget(self.costs, 40, 0.0125, 2)

    def test_larger_budgets_and_few_steps_keep_powerful_ones(self):
        for steps, budget in ((40, 0.125), (40, 0.25), (8, 0.25)):
            schedule = schedule_for_budget(self.costs, steps, budget, 2, ends_powerful=is_few(steps))
            assert ("1x2x2",) * 2 in schedule.steps and ("1x2x2-guided",) * 2 not in schedule.steps
        assert "1x2x2-guided" not in str(schedule_for_budget(self.costs, 40, 0.25, 1))

    @pytest.mark.parametrize("first", [0, 2, 4])
    @pytest.mark.parametrize("count", [1, 3, 7, 30])
    def test_places_rise_and_begin_after_the_first_ones(self, first, count):
        places = places_of_guided(first, count, 40)
        assert len(places) == count and places == sorted(set(places))
        assert places[0] >= first and places[-1] < 40
        assert first or places[0] == 0


def test_another_scale_is_refused(enabled):
    pipe, call, folder = enabled
    flexivid.enable(pipe, folder, schedule=f"1x4x4-guided:2,1x2x2:{STEPS - 2}")
    with pytest.raises(ValueError, match=r"guidance_scale is 3, and .* trained for 5"):
        sample(pipe, {**call, "guidance_scale": 3.0})
    with pytest.raises(ValueError, match="both guidance branches at once"):
        sample(pipe, {**call, "guidance_scale": 1.0})
    flexivid.disable(pipe)


class TestTraining:
    def settings(self, **changes):
        return DistillConfig(
            **{"modes": ["1x4x4", "1x4x4-guided"], "guidance_scale": SCALE, "rank": 2, **changes},
        )

    def test_the_target_is_the_guided_teacher(self):
        """Against the powerful mode taken for its own student: only the guided target differs, by guidance."""
        pipe, call = tiny_pipeline("wan")
        student = build_student(pipe.transformer, self.settings())
        flex = student._flex[0]
        torch.manual_seed(0)
        x_0 = torch.randn(2, 4, 3, 8, 8)
        state = NoiseLevels(flex.diffusion, 3.0, flex.base_patch, flex.family).state(
            x_0,
            torch.randn_like(x_0),
            torch.full((2,), 800.0),
            {"encoder_hidden_states": call["prompt_embeds"][:1].expand(2, -1, -1)},
        )
        empty = {"encoder_hidden_states": torch.randn_like(state.conditions["encoder_hidden_states"])}
        state = type(state)(state.x_t, state.timestep, state.level, state.conditions, empty)
        plain, guided = weak_errors(student, flex, ["1x4x4", "1x4x4-guided"], state)
        with torch.no_grad():
            (c,), (u,) = (
                student([flex.powerful], state.x_t, state.timestep, conditions)
                for conditions in (state.conditions, state.unconditional)
            )
        # New modes start equal, so that the errors differ by what guidance adds: (w - 1) (c - u), in x0.
        expected = state.x0_difference(flex.diffusion, (SCALE - 1) * (c - u))
        torch.testing.assert_close(plain - guided, expected, atol=1e-5, rtol=1e-4)
        assert expected.abs().max() > 1e-3
        guided.square().mean().backward()
        trained = {name for name, p in student.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        assert any("1x4x4-guided" in name and "lora_B" in name for name in trained)
        assert not any("lora" in name and "-guided" not in name for name in trained)

    def test_a_new_guided_mode_starts_from_the_one_without_guidance(self, tmp_path):
        pipe, _ = tiny_pipeline("wan")
        folder = guided_adapter(tmp_path, pipe.transformer, modes=("1x4x4",), scale=None)
        assert read_config(folder).guidance_scale is None
        student = build_student(pipe.transformer, self.settings(adapter=folder))
        flex = student._flex[0]
        assert flex.guidance_scale == SCALE
        plain, guided = flex.weak_modes["1x4x4"], flex.weak_modes["1x4x4-guided"]
        assert torch.equal(plain.patch_size_embedding, guided.patch_size_embedding)
        weights = dict(pipe.transformer.named_parameters())
        names = [name for name in weights if ".lora_B." in name and name.endswith("1x4x4.weight")]
        assert names
        for name in names:
            assert weights[name].any() and torch.equal(weights[name], weights[name.replace("1x4x4", "1x4x4-guided")])

    def test_one_of_the_models_own_patch_size_starts_as_the_model(self, tmp_path):
        pipe, call = tiny_pipeline("wan")
        folder = guided_adapter(tmp_path, pipe.transformer, modes=("1x4x4",), scale=None)
        student = build_student(pipe.transformer, self.settings(modes=["1x4x4", "1x2x2-guided"], adapter=folder))
        x_t, timestep = torch.randn(2, 4, 3, 8, 8), torch.full((2,), 800.0)
        conditions = {"encoder_hidden_states": call["prompt_embeds"][:1].expand(2, -1, -1)}
        with torch.no_grad():
            powerful, guided, weak = student(["1x2x2", "1x2x2-guided", "1x4x4"], x_t, timestep, conditions)
        torch.testing.assert_close(guided, powerful, atol=1e-4, rtol=1e-4)
        assert (weak - powerful).abs().max() > 0.01

    def test_settings_that_do_not_go_together(self):
        with pytest.raises(ValueError, match="go together"):
            self.settings(guidance_scale=None)
        with pytest.raises(ValueError, match="go together"):
            self.settings(modes=["1x4x4"])
        with pytest.raises(ValueError, match="neither correction_gap nor on_policy"):
            self.settings(correction_gap=0.2)


@pytest.mark.parametrize("last", [1, 4, 6])
def test_guidance_that_ends_leaves_no_guided_step(tmp_path, last):
    """Also where the rest of the budget buys nothing, and no other weak patch size is at hand."""
    pipe, call = tiny_pipeline("wan")
    folder = guided_adapter(tmp_path, pipe.transformer, modes=("1x4x4-guided",))
    flexivid.enable(pipe, folder, budget=0.15)
    assert sample(pipe, {**call, "guidance_scale": SCALE} | guidance_until(last)).isfinite().all()
    steps = flexivid.summary(pipe).steps
    assert "1x4x4-guided" in steps[0] and [len(step) for step in steps] == [2] * (last + 1) + [1] * (STEPS - last - 1)
    assert not any("1x4x4-guided" in step for step in steps[last + 1 :])


def test_an_adapter_says_its_scale(enabled):
    pipe, _, folder = enabled
    flexivid.enable(pipe, folder, schedule="1x2x2")
    assert attached(pipe.transformer).guidance_scale == SCALE == read_config(folder).guidance_scale
    flexivid.disable(pipe)
