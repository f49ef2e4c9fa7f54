"""A few steps without guidance: the recipe in an adapter, and its distillation by distribution matching."""

import json
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import sample, tiny_pipeline, tiny_transformer
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from families import tiny_trainable_pipeline
from safetensors.torch import load_file
from training_runs import ONE, SHARDED, TWO, losses, run, start_and_signal, train_here, write

import flexivid
from flexivid.commands import sample as t2v
from flexivid.model.adapter import AdapterConfig, read_config, save_adapter
from flexivid.model.family import patch_size_of
from flexivid.model.recipe import Recipe
from flexivid.patches.sizes import format_patch_size, spatially_doubled
from flexivid.shapes.embedded import MODEL
from flexivid.shapes.pretrain import ShapesWorld
from flexivid.training.config import Config, load_config
from flexivid.training.few import FewObjective
from flexivid.training.few_config import FewConfig
from flexivid.training.few_forecast import few_forecast
from flexivid.training.few_runs import Runs, distribution_gradient
from flexivid.training.few_student import FAKE, STUDENT, FewStudent, build_few_student, is_of_fake_score
from flexivid.training.forecast import check_model
from flexivid.training.loop import train
from flexivid.training.noise import NoiseLevels
from flexivid.training.optimizers import build_optimizers
from flexivid.training.parallel.sharding import check_sharding

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = ["2x4x4", "1x4x4", "1x2x2", "1x4x4"]  # a weak one after the powerful one is not corrected
SETTINGS = FewConfig(patch_sizes=SIZES, rank=4)
RECIPE = SETTINGS.recipe(3.0)
CALL = {"steps": 4, "guidance_scale": 1.0}


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@torch.no_grad()
def shaken(student: FewStudent) -> FewStudent:
    """With every LoRA and weak mode away from where it starts."""
    generator = torch.Generator().manual_seed(7)
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter.half())  # as a file holds them
    return student


def student_of(pipe) -> FewStudent:
    return shaken(build_few_student(pipe.transformer, SETTINGS))


def runs_of(student: FewStudent, guidance_scale: float = 3.0) -> Runs:
    flex = student._flex[0]
    return Runs(flex, NoiseLevels(flex.diffusion, 3.0, flex.base_patch, flex.family), RECIPE, guidance_scale)


def saved(student: FewStudent, recipe: Recipe, folder: Path) -> Path:
    flex = student._flex[0]
    facts = {"base_model": "tiny", "components": ["transformer"], "max_sequence_length": 16}
    save_adapter(folder, AdapterConfig.of(flex, lora_rank=4, recipe=recipe, **facts), {"transformer": flex})
    return folder


@pytest.fixture
def adapter(tmp_path) -> Path:
    return saved(student_of(tiny_pipeline()), RECIPE, tmp_path / "adapter")


def text_of(pipe, **more) -> dict:
    texts = pipe.encode_prompt("a plain red circle", "", max_sequence_length=16, **more)
    return [{"encoder_hidden_states": text} for text in texts]


def test_noise_levels_are_those_of_the_scheduler_unless_given():
    assert RECIPE.sigmas == [1.0, 0.9, 0.75, 0.5]
    assert FewConfig(sigmas=[1.0, 0.5], patch_sizes=["1x4x4", "1x2x2"]).recipe(3.0).sigmas == [1.0, 0.5]


@pytest.mark.parametrize(
    ("sigmas", "patch_sizes", "message"),
    [
        ([1.0, 0.5, 0.2], ["1x4x4", "1x2x2"], "3 sigmas for 2 patch_sizes"),
        ([0.9, 0.5], ["1x4x4", "1x2x2"], "must fall from 1"),
        ([1.0, 1.0], ["1x4x4", "1x2x2"], "must fall from 1"),
        ([1.0, 0.0], ["1x4x4", "1x2x2"], "must fall from 1"),
        ([1.0, 0.5], ["1x4x4", "fine"], "'fine' is not a patch size"),
    ],
)
def test_what_is_no_recipe(sigmas, patch_sizes, message):
    with pytest.raises(ValueError, match=message):
        Recipe(sigmas=sigmas, patch_sizes=patch_sizes)
    with pytest.raises(ValueError, match=message):
        FewConfig(sigmas=sigmas, patch_sizes=patch_sizes)


@pytest.mark.parametrize("merge_lora", [False, True])
def test_a_pipeline_takes_the_steps_that_were_trained(pipe, adapter, merge_lora):
    noise = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    flexivid.enable(pipe, adapter=adapter, merge_lora=merge_lora)
    found = sample(pipe, latents=noise, prompt="a plain red circle", **CALL)
    assert flexivid.summary(pipe).steps == [[size] for size in SIZES]
    other = tiny_pipeline()
    with torch.no_grad():
        student = student_of(other)
        expected = runs_of(student).student(student, noise, text_of(other)[0], stop=3)
    assert torch.allclose(found, expected, atol=2e-5)
    without = tiny_pipeline()
    without.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert not torch.allclose(found, sample(without, latents=noise, prompt="a plain red circle", **CALL), atol=1e-2)


def test_guided_patch_sizes_run_without_guidance_in_a_recipe_only(pipe, tmp_path):
    settings = FewConfig(patch_sizes=["1x4x4-guided", "1x2x2-guided"], rank=4, guidance_scale=3.0)
    recipe, other = settings.recipe(3.0), tiny_pipeline()
    student = shaken(build_few_student(other.transformer, settings))
    folder = saved(student, recipe, tmp_path / "guided")
    assert read_config(folder).guidance_scale == 3
    flexivid.enable(pipe, adapter=folder)
    noise, call = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), {"guidance_scale": 1.0}
    found = sample(pipe, latents=noise, prompt="a plain red circle", steps=2, **call)
    assert flexivid.summary(pipe).steps == [["1x4x4-guided"], ["1x2x2-guided"]]
    flex = student._flex[0]
    runs = Runs(flex, NoiseLevels(flex.diffusion, 3.0, flex.base_patch, flex.family), recipe, 3.0)
    with torch.no_grad():
        expected = runs.student(student, noise, text_of(other)[0], stop=1)
    assert torch.allclose(found, expected, atol=2e-5)
    flexivid.enable(pipe, adapter=folder, schedule="1x4x4-guided:2")
    with pytest.raises(ValueError, match="1x4x4-guided gives both guidance branches at once, .* has no guidance"):
        sample(pipe, steps=2, **call)
    again = settings.model_copy(update={"adapter": folder})
    assert build_few_student(tiny_transformer(), again)._flex[0].guidance_scale == 3
    with pytest.raises(ValueError, match="guidance_scale 3.0 != 4.0"):
        build_few_student(tiny_transformer(), again.model_copy(update={"guidance_scale": 4.0}))
    with pytest.raises(ValueError, match="1x4x4-guided gives guidance: guidance_scale must be above 1"):
        FewConfig(patch_sizes=["1x4x4-guided"], guidance_scale=1.0)


def test_off_the_recipe_the_model_is_stock_bit_for_bit(pipe, adapter):
    usual, names, scheduler = sample(pipe), set(pipe.transformer.state_dict()), pipe.scheduler
    for settings in ({"budget": 1.0}, {"schedule": "1x2x2:6"}):
        flexivid.enable(pipe, adapter=adapter)
        sample(pipe, **CALL)
        assert pipe.scheduler is not scheduler
        flexivid.enable(pipe, adapter=adapter, **settings)
        assert pipe.scheduler is scheduler and torch.equal(sample(pipe), usual)
    flexivid.enable(pipe, adapter=adapter)
    sample(pipe, **CALL)
    flexivid.disable(pipe)
    assert pipe.scheduler is scheduler and set(pipe.transformer.state_dict()) == names
    assert torch.equal(sample(pipe), usual)


def test_what_fails_leaves_the_recipe_enabled(pipe, adapter, tmp_path):
    flexivid.enable(pipe, adapter=adapter)
    before, scheduler = sample(pipe, **CALL), pipe.scheduler
    (adapter / "flexivid.safetensors").rename(tmp_path / "gone")
    with pytest.raises(flexivid.AdapterError, match="is missing"):
        flexivid.enable(pipe, adapter=adapter, budget=0.9)
    assert pipe.scheduler is scheduler and torch.equal(sample(pipe, **CALL), before)


def test_calls_that_are_not_the_recipes_are_refused_in_one_sentence(pipe, adapter):
    flexivid.enable(pipe, adapter=adapter)
    with pytest.raises(ValueError, match="the recipe of this adapter has 4 steps, not 5: call the pipeline with 4"):
        sample(pipe, steps=5, guidance_scale=1.0)
    with pytest.raises(ValueError, match="trained to run without guidance: give guidance_scale 1"):
        sample(pipe, steps=4, guidance_scale=3.0)
    sizes = {"frames": 9, "height": 32, "width": 32, "text_length": 16}
    with pytest.raises(ValueError, match="has 4 steps, not 40"):
        flexivid.plan(pipe, **sizes, steps=40, guided=False)
    with pytest.raises(ValueError, match="give guidance_scale 1"):
        flexivid.plan(pipe, **sizes, steps=4)
    assert flexivid.plan(pipe, **sizes, steps=4, guided=False).steps == tuple((size,) for size in SIZES)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    with pytest.raises(ValueError, match="now it has another: enable it again"):
        sample(pipe, **CALL)
    for name, value in {"modes": ["1x4x4"], "guidance": "same", "order": "reuse"}.items():
        with pytest.raises(ValueError, match=f"{name} would do nothing"):
            flexivid.enable(pipe, adapter=adapter, **{name: value})


def test_a_recipe_of_one_patch_size_alone(pipe, adapter):
    config = json.loads((adapter / "flexivid_config.json").read_text())
    config |= {"patch_sizes": [], "recipe": {"sigmas": [1.0, 0.5], "patch_sizes": ["1x2x2", "1x2x2"]}}
    (adapter / "flexivid_config.json").write_text(json.dumps(config))
    flexivid.enable(pipe, adapter=adapter)
    sample(pipe, steps=2, guidance_scale=1.0)
    assert flexivid.summary(pipe).ratio > 1  # LoRA is counted
    config |= {"patch_sizes": ["1x4x4"], "recipe": {"sigmas": [1.0, 0.5], "patch_sizes": ["1x4x4", "1x4x4"]}}
    (adapter / "flexivid_config.json").write_text(json.dumps(config))
    flexivid.enable(pipe, adapter=adapter)
    sample(pipe, steps=2, guidance_scale=1.0)
    assert flexivid.summary(pipe).ratio < 0.7
    config |= {"patch_sizes": [], "recipe": {"sigmas": [1.0, 0.5], "patch_sizes": ["1x4x4", "1x2x2"]}}
    (adapter / "flexivid_config.json").write_text(json.dumps(config))
    with pytest.raises(flexivid.AdapterError, match="runs 1x4x4, which it has no weights for"):
        flexivid.enable(pipe, adapter=adapter)


def test_the_gradient_is_none_where_the_distributions_agree():
    x_0, real = torch.randn(2, 4, 3, 8, 8), torch.randn(2, 4, 3, 8, 8)
    assert not distribution_gradient(x_0, real, real).any()
    fake = real + torch.tensor([1.0, 2.0]).view(-1, 1, 1, 1, 1)
    gradient = distribution_gradient(x_0, fake, real)
    distance = (x_0 - real).abs().mean((1, 2, 3, 4))
    assert torch.allclose(gradient.mean((1, 2, 3, 4)), torch.tensor([1.0, 2.0]) / distance)


@pytest.fixture
def settings(training_config):
    few = {"patch_sizes": ["2x4x4", "1x4x4", "1x2x2"], "rank": 4, "fake_updates": 2, "guidance_scale": 3.0}
    data = {"frames": 9, "size": 32, "text_lengths": {16: 1.0}}
    shared = {name: value for name, value in training_config.items() if name not in ("distill", "data")}
    return shared | {"objective": "few", "steps": 9, "few": few, "data": data, "validation": {"steps": 6}}


def objective_of(settings: dict, tmp_path, accelerator, **few) -> FewObjective:
    config = Config(**{**settings, "few": settings["few"] | few}, output=tmp_path / "out")
    return FewObjective(config, accelerator, ShapesWorld())


def gradients(objective: FewObjective, step: int) -> dict[str, torch.Tensor]:
    objective.model.zero_grad()
    objective.loss(objective.model, step, 0).backward()
    return {name: p.grad.clone() for name, p in objective.model.named_parameters() if p.grad is not None}


def step_of(objective: FewObjective, kind: str, stop: int) -> int:
    """One that trains `kind` by runs that end at `stop`."""
    return next(s for s in range(1000) if objective.loss_name(s) == kind and objective.draw(s)[0][1] == stop)


def test_a_student_like_its_teacher_learns_nothing(tmp_path, settings, accelerator):
    """The fake score starts as the teacher; without guidance they agree, whatever the student's clips are."""
    objective = objective_of(settings, tmp_path, accelerator, guidance_scale=1.0)
    step = step_of(objective, STUDENT, 2)
    assert objective.loss(objective.model, step, 0) == 0
    assert not any(gradient.any() for gradient in gradients(objective, step).values())
    with_guidance = objective_of(settings, tmp_path, accelerator)
    assert with_guidance.loss(with_guidance.model, step, 0) > 1e-5


def test_gradients_reach_the_last_step_of_the_run_and_nothing_else(tmp_path, settings, accelerator):
    objective = objective_of(settings, tmp_path, accelerator)
    shaken(objective.model)
    for stop, size in enumerate(objective.recipe.patch_sizes):
        found = gradients(objective, step_of(objective, STUDENT, stop))
        assert found and all(f"-{size}." in name or f"weak_modes.{size}." in name for name in found), set(found)
    found = gradients(objective, step_of(objective, FAKE, 1))
    assert found and all(map(is_of_fake_score, found))


@pytest.mark.parametrize("kind", [STUDENT, FAKE])
@pytest.mark.parametrize("stop", [0, 2])
def test_gradient_checkpointing_changes_no_gradient(tmp_path, settings, accelerator, kind, stop):
    found = []
    for checkpointing in (False, True):
        objective = objective_of(settings | {"gradient_checkpointing": checkpointing}, tmp_path, accelerator)
        shaken(objective.model)
        found.append(gradients(objective, step_of(objective, kind, stop)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-7) for name in found[0])


def test_the_fake_score_follows_the_student(tmp_path, settings, accelerator):
    """Nearer to the student's clips than the teacher is, which it starts as; and the student stays as it is."""
    objective = objective_of(settings | {"batch_size": 8}, tmp_path, accelerator, fake_lr=1e-2)
    model = objective.model
    shaken(model)
    for name, parameter in model.named_parameters():
        if is_of_fake_score(name) and "lora_B" in name:
            parameter.data.zero_()
    student = {name: p.detach().clone() for name, p in model.named_parameters() if not is_of_fake_score(name)}
    optimizers = build_optimizers(objective.config, {n: p for n, p in model.named_parameters() if p.requires_grad})
    steps = [step for step in range(60) if objective.loss_name(step) == FAKE]
    with torch.no_grad():
        before = sum(objective.loss(model, step, 0) for step in steps[-5:])
    for step in steps[:-5]:
        objective.loss(model, step, 0).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        after = sum(objective.loss(model, step, 0) for step in steps[-5:])
    assert after < 0.9 * before
    assert all(torch.equal(p, student[name]) for name, p in model.named_parameters() if name in student)


def test_learning_rates_are_two(tmp_path, settings, accelerator):
    objective = objective_of(settings, tmp_path, accelerator, fake_lr=0.25)
    trained = {name: p for name, p in objective.model.named_parameters() if p.requires_grad}
    student, fake = build_optimizers(objective.config, trained)
    assert (student.param_groups[0]["lr"], fake.param_groups[0]["lr"]) == (8e-4, 0.25)
    of_fake = [p for name, p in trained.items() if is_of_fake_score(name)]
    assert {id(p) for p in fake.param_groups[0]["params"]} == {id(p) for p in of_fake} and of_fake


def test_the_teachers_run_is_that_of_its_pipeline(pipe):
    """At twice the steps, through the noise levels of the recipe."""
    noise = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    conditions, empty = text_of(pipe)
    student = student_of(pipe)
    states = runs_of(student).teacher(student, noise, conditions, empty, steps=7)
    assert len(states) == 5 and torch.equal(states[0], noise)
    other, seen = tiny_pipeline(), []
    other.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    other.scheduler.set_timesteps = lambda steps, device: FlowMatchEulerDiscreteScheduler.set_timesteps(
        other.scheduler, sigmas=torch.linspace(1, 0, 9)[:-1].tolist()
    )

    def keep(pipe, index, timestep, tensors):
        seen.append(tensors["latents"])
        return {}

    call = {"steps": 8, "latents": noise, "prompt": "a plain red circle", "callback_on_step_end": keep}
    sample(other, **call)
    assert torch.allclose(states[1:, 0], torch.stack(seen[1::2])[:, 0], atol=1e-4)


class Killed(Exception):
    pass


def test_killed_and_resumed_is_not_killed(tmp_path, settings, accelerator):
    settings |= {"few": settings["few"] | {"warmup_steps": 2, "warmup_every": 1, "warmup_clips": 4}}

    def go(name: str, until: int | None = None) -> None:
        config = Config(**settings, output=tmp_path / name)
        objective = FewObjective(config, accelerator, ShapesWorld())
        loss_of = objective.loss

        def loss(model, step, micro_batch):
            if step == until:
                raise Killed
            return loss_of(model, step, micro_batch)

        objective.loss = loss
        train(config, objective, accelerator)

    go("whole")
    for until in (4, 8):
        with pytest.raises(Killed):
            go("killed", until)
    go("killed")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    lines = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    kinds = [next(key for key in line if key.startswith("loss/")) for line in lines]
    assert [kind.removeprefix("loss/") for kind in kinds] == ["warm-up"] * 2 + [FAKE, FAKE, STUDENT] * 2 + [FAKE]
    killed, whole = (tmp_path / name / "result" for name in ("killed", "whole"))
    for name in ("flexivid.safetensors", "pytorch_lora_weights.safetensors"):
        found, expected = load_file(killed / name), load_file(whole / name)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    checkpoint = load_file(tmp_path / "whole/checkpoint-00000009.safetensors")
    assert any(is_of_fake_score(name) for name in checkpoint)
    lora = load_file(whole / "pytorch_lora_weights.safetensors")
    assert {name.split(".blocks")[0] for name in lora} == {f"transformer.{size}" for size in SIZES}
    assert (whole / "README.md").read_text().count("num_inference_steps=3")
    pipe = tiny_pipeline()
    flexivid.enable(pipe, adapter=whole)
    sample(pipe, steps=3, guidance_scale=1.0)


@pytest.mark.slow
def test_processes_and_micro_batches_change_nothing(tmp_path, settings):
    whole, whole_output = write(tmp_path, "whole", settings)
    assert train_here(whole) == 0
    both, output = write(tmp_path, "both", settings, micro_batches=2)
    run(TWO, both)
    curves = [torch.tensor(losses(folder)) for folder in (whole_output, output)]
    assert len(curves[0]) == 9 and torch.allclose(*curves, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_sharded_weights_change_nothing(tmp_path, settings):
    """FSDP: the curve of one process; killed, it goes on without FSDP, and killed again, with it."""
    settings |= {"few": settings["few"] | {"warmup_steps": 2, "warmup_every": 1, "warmup_clips": 4}}
    whole, whole_output = write(tmp_path, "whole", settings, steps=13)
    assert train_here(whole) == 0
    moved, output = write(tmp_path, "moved", settings, steps=13, sample_every=3)
    start_and_signal(SHARDED, moved, output, after=5, number=signal.SIGKILL)
    assert json.loads((output / "validation.jsonl").read_text().splitlines()[0]).keys() == {
        "step",
        "motion",
        "diversity",
    }
    start_and_signal(ONE, moved, output, after=9, number=signal.SIGKILL)
    run(SHARDED, moved)
    assert torch.allclose(torch.tensor(losses(output)), torch.tensor(losses(whole_output)), atol=1e-5, rtol=0)
    for name in ("flexivid.safetensors", "pytorch_lora_weights.safetensors"):
        expected, found = (load_file(folder / "result" / name) for folder in (whole_output, output))
        assert expected.keys() == found.keys()
        assert all(torch.allclose(found[key], expected[key], atol=1e-3) for key in expected)


def test_another_family_from_prompts_alone(tmp_path, accelerator):
    """No clip is read, and the teacher samples none; pictures and figures come from the student's runs."""
    pipe = tiny_trainable_pipeline("ltx")
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    powerful = format_patch_size(patch_size_of(pipe.transformer.config))
    config = Config(
        objective="few",
        base=tmp_path / "base",
        output=tmp_path / "out",
        steps=4,
        batch_size=2,
        log_every=1,
        sample_every=4,
        clips={
            **{"cache": tmp_path / "cache", "buckets": ["9x64x96"], "fps": 10, "max_sequence_length": 16},
            "prompts": tmp_path / "prompts.txt",
        },
        validation={"prompts": ["a red circle"], "steps": 4},
        few={"patch_sizes": [spatially_doubled(patch_size_of(pipe.transformer.config)), powerful], "rank": 4}
        | {"fake_updates": 1, "warmup_steps": 1, "warmup_clips": 2},
    )
    check_model(config)
    train(config, FewObjective(config, accelerator), accelerator)
    assert list((tmp_path / "out/samples").glob("*.png"))
    line = json.loads((tmp_path / "out/validation.jsonl").read_text())
    assert line["step"] == 4 and line["motion"] > 0 and line["diversity"] > 0
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    flexivid.enable(pipe, adapter=tmp_path / "out/result")
    call = {"prompt": "a red circle", "height": 64, "width": 96, "num_frames": 9, "max_sequence_length": 16}
    pipe(**call, num_inference_steps=2, guidance_scale=1.0, output_type="latent")
    with pytest.raises(ValueError, match="give guidance_scale 1"):
        pipe(**call, num_inference_steps=2, guidance_scale=3.0)
    with pytest.raises(ValueError, match="has 2 steps, not 4"):
        pipe(**call, num_inference_steps=4, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"few": {"sigma_range": [0.0, 0.98]}}, "sigma_range must rise and lie between 0 and 1"),
        ({"few": {"patch_sizes": []}}, "at least 1 item"),
        ({"few": {"guidance_scale": 0.5}}, "greater than or equal to 1"),
        ({"few": {"warmup_clips": 4}}, "warmup_clips would not be read, because few.warmup_steps is 0"),
        ({"optim": {"name": "muon"}}, "few has a learning rate of its own"),
        ({"distill": {"rank": 4}}, "few does not read distill"),
        ({"data": {"clips": 4}}, "few does not read data.clips"),
        ({"clips": {"prompts": "p", "teacher_steps": 4}}, "few does not read clips.teacher_steps"),
        ({"clips": {"prompts": "p"}, "validation": {"budgets": [0.5]}}, "few does not read validation.budgets"),
        ({"objective": "distill", "few": {"rank": 4}}, "distill does not read few"),
    ],
)
def test_configs_that_are_refused(more, message):
    with pytest.raises(ValueError, match=message):
        Config(**{"objective": "few", "output": "out", "base": "base", **more})


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"distributed_type": DistributedType.FSDP, "is_fsdp2": False, "mixed_precision": "no"}, "only version 2"),
        ({"distributed_type": DistributedType.DEEPSPEED}, "or with FSDP; not with DeepSpeed"),
        ({"distributed_type": DistributedType.NO, "mixed_precision": "fp16"}, "mixed_precision bf16 or no, not fp16"),
    ],
)
def test_launches_that_are_refused(settings, tmp_path, facts, message):
    with pytest.raises(ValueError, match=message):
        check_sharding(type("Launched", (), facts), Config(**settings, output=tmp_path))


def test_an_adapter_to_start_from(adapter):
    start = FewConfig(patch_sizes=["1x4x4", "1x2x2"], rank=4, adapter=adapter)
    student = build_few_student(tiny_transformer(), start)
    lora = load_file(adapter / "pytorch_lora_weights.safetensors")
    for size in ("1x4x4", "1x2x2"):
        key = "blocks.0.attn1.to_q.lora_B"
        found = student.get_parameter(f"transformer.{key}.flexivid-{size}.weight")
        assert torch.equal(found, lora[f"transformer.{size}.{key}.weight"].float()) and found.requires_grad
    assert not student.get_parameter(f"transformer.{key}.flexivid-{FAKE}.weight").any()
    for change, message in (
        ({"rank": 8}, "lora_rank 4 != 8"),
        ({"patch_sizes": ["2x2x2", "1x2x2"]}, "it has no patch size 2x2x2"),
    ):
        with pytest.raises(ValueError, match=message):
            build_few_student(tiny_transformer(), start.model_copy(update=change))
    with pytest.raises(ValueError, match="1x3x3 is not an integer multiple"):
        build_few_student(tiny_transformer(), FewConfig(patch_sizes=["1x3x3", "1x2x2"]))


@pytest.mark.parametrize("name", ["cogvideox", "wan2.2-a14b"])
def test_bases_that_are_refused(tmp_path, settings, name):
    pipe = tiny_trainable_pipeline("cogvideox-5b") if name == "cogvideox" else tiny_pipeline()
    if name == "wan2.2-a14b":
        pipe.register_modules(transformer_2=tiny_transformer(1))
        pipe.register_to_config(boundary_ratio=0.875)
    pipe.save_pretrained(tmp_path / "base")
    clips = {"prompts": "p.txt", "buckets": ["9x64x96"], "max_sequence_length": 16}
    config = Config(objective="few", base=tmp_path / "base", output=tmp_path, clips=clips, few=settings["few"])
    message = "few is for models of flow matching" if name == "cogvideox" else "has two transformers"
    with pytest.raises(ValueError, match=message):
        check_model(config, with_clips=False)


def test_a_dry_run_says_what_it_will_cost(settings, tmp_path):
    text = few_forecast(Config(**settings, output=tmp_path), processes=2, mixed_precision=True)
    assert "4 clips, 2 processes x 1 micro-batches x 2" in text and "EFLOP in 9 steps, 3 of them the student's" in text
    assert "memory a process, at least" in text and all(size in text for size in ("2x4x4", "1x4x4", "1x2x2"))
    student = build_few_student(tiny_transformer(), FewConfig(**settings["few"]))
    fake = sum(p.numel() for name, p in student.named_parameters() if is_of_fake_score(name))
    assert f"fake score {fake / 1e6:.2f} M" in text


@pytest.mark.parametrize("name", ["wan2.1-1.3b-few", "ltx-video-few"])
def test_configs_fit_the_published_models(name):
    check_model(load_config(CONFIGS / f"{name}.yaml"), with_clips=False)


def test_t2v_reads_steps_and_guidance_off_the_recipe(tmp_path, capsys):
    """Of the embedded model; beside it, with --compare, its usual 40 steps would be taken."""
    transformer = WanTransformer3DModel.from_pretrained(MODEL / "transformer")
    student = build_few_student(transformer, FewConfig(patch_sizes=["2x4x4", "1x2x2"], rank=4))
    flex = student._flex[0]
    config = AdapterConfig.of(
        flex,
        lora_rank=4,
        components=["transformer"],
        base_model="embedded",
        max_sequence_length=32,
        recipe={"sigmas": [1.0, 0.6], "patch_sizes": ["2x4x4", "1x2x2"]},
    )
    save_adapter(tmp_path / "few", config, {"transformer": flex})
    command = ["--adapter", str(tmp_path / "few"), "--output", str(tmp_path / "clip.mp4"), "--device", "cpu"]
    assert t2v.main(command) == 0
    record = json.loads((tmp_path / "clip.json").read_text())
    assert (record["steps"], record["guidance_scale"], record["budget"]) == (2, 1.0, None)
    assert record["schedule"] == [["2x4x4"], ["1x2x2"]]
    for more, message in (
        (["--steps", "5"], "has 2 steps, not 5"),
        (["--guidance-scale", "4"], "give guidance_scale 1"),
        (["--order", "reuse"], "order would do nothing"),
    ):
        assert t2v.main([*command, *more]) == 2 and message in capsys.readouterr().err
