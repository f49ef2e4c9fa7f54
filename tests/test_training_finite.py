"""Losses, gradients and weights that are not finite: nothing they touch is kept, and the run says so and stops."""

import json
import math
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file
from training_runs import ONE, SHARDED, TWO, Launch, ended, said_by, write

from flexivid.training.config import Config
from flexivid.training.finite import TrainingFailed
from flexivid.training.loop import train
from flexivid.training.report import draw_errors
from flexivid.training.validation import SIGMAS, record_errors

NAN, INF = math.nan, math.inf


class Overflow(torch.autograd.Function):
    """A finite loss with a gradient that is not."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * INF


FAULTS = {
    "nan": lambda loss: loss * NAN,
    "inf": lambda loss: loss * INF,
    "nan with a finite gradient": lambda loss: loss + NAN,
    "gradient": Overflow.apply,
}


class Objective:
    """A layer that learns to give zeros. broken: steps, counted from 0, with a fault."""

    facts, batches = {}, nullcontext()

    def __init__(self, broken=(), fault="nan", micro_batch: int = 0):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(3, 2)
        self.broken, self.fault, self.micro_batch, self.seen = broken, FAULTS[fault], micro_batch, {}

    def loss(self, model, step, micro_batch):
        self.seen[step] = self.model.weight.detach().clone()
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        return self.fault(loss) if step in self.broken and micro_batch == self.micro_batch else loss

    def flops(self, step):
        return 0

    def sample(self, path):
        pass

    def save(self, folder):
        folder.mkdir()
        save_file(self.model.state_dict(), folder / "weights.safetensors")


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def config_of(tmp_path: Path, **more) -> Config:
    usual = {"steps": 6, "batch_size": 4, "log_every": 1, "save_every": 1, "optim": {"lr": 0.1, "warmup": 1}}
    return Config(objective="distill", output=tmp_path / "out", **usual | more)


def log_of(config: Config) -> list[dict]:
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in (config.output / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("more", [{}, {"optim": {"name": "muon", "lr": 0.1, "muon_lr": 0.1}}, {"micro_batches": 2}])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, accelerator, capsys, fault, more):
    config = config_of(tmp_path, **more)
    objective = Objective({2}, fault, micro_batch=config.micro_batches - 1)
    train(config, objective, accelerator)
    seen = objective.seen
    assert torch.equal(seen[3], seen[2]) and not torch.equal(seen[2], seen[1]) and not torch.equal(seen[4], seen[3])
    assert all(value.isfinite().all() for value in load_file(config.output / "result/weights.safetensors").values())
    lines = log_of(config)
    assert [line.get("left_out", 0) for line in lines] == [0, 0, 1, 0, 0, 0]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
    out = capsys.readouterr().out
    assert "step 3: the " in out and "Likely cause: " in out and "left out" in out
    assert ("gradient norm is" in out) == (fault == "gradient")


def test_without_the_step_it_is_the_same_run(tmp_path, accelerator):
    """Moments and the average are not touched either: as if the step had never been."""
    config = config_of(tmp_path, optim={"lr": 0.1, "warmup": 1, "decay": 0.0}, steps=5, keep_checkpoints=5)
    train(config, Objective({2}), accelerator)
    tensors = [load_file(config.output / f"checkpoint-{step:08d}.safetensors") for step in (2, 4)]
    assert not (config.output / "checkpoint-00000003.safetensors").exists()
    assert {name for name in tensors[0] if name.startswith("optimizer")} and all(
        value.isfinite().all() for value in tensors[1].values()
    )
    steps = [value for name, value in tensors[1].items() if name.endswith(".step")]
    assert steps and all(int(value) == 3 for value in steps)


def test_too_many_in_a_row_stop_the_run(tmp_path, accelerator):
    config = config_of(tmp_path, steps=9, max_nonfinite_steps=3)
    with pytest.raises(TrainingFailed, match="step 7: the loss is nan.* Likely cause: .*3 such steps in a row"):
        train(config, Objective({1, 2, 4, 5, 6, 7}), accelerator)
    assert [path.name for path in config.output.glob("checkpoint-*")] == ["checkpoint-00000004.safetensors"]
    assert not (config.output / "result").exists()
    train(config, Objective(), accelerator)  # the fault is gone: it goes on
    assert (config.output / "result").exists() and log_of(config)[-1]["step"] == 9


def test_a_run_of_no_finite_step_has_no_result(tmp_path, accelerator):
    config = config_of(tmp_path, steps=3)
    with pytest.raises(TrainingFailed, match="none of the 3 steps up to step 3 was finite"):
        train(config, Objective({0, 1, 2}), accelerator)
    assert not (config.output / "result").exists() and not list(config.output.glob("checkpoint-*"))


@pytest.mark.parametrize("step", [2, 5])
def test_weights_that_are_not_finite_are_not_saved(tmp_path, accelerator, step):
    config, objective = config_of(tmp_path), Objective()
    loss = objective.loss

    def spoil(model, now, micro_batch):
        found = loss(model, now, micro_batch)
        if now == step:
            objective.model.bias.data[0] = INF  # after the forward: loss and gradient are finite
        return found

    objective.loss = spoil
    with pytest.raises(TrainingFailed, match=rf"after step {step + 1} .*not finite \(bias\)"):
        train(config, objective, accelerator)
    assert [path.name for path in config.output.glob("checkpoint-*")] == [f"checkpoint-{step:08d}.safetensors"]
    assert not (config.output / "result").exists()


def test_a_broken_base_is_named(tmp_path, accelerator):
    objective = Objective()
    objective.model.bias.requires_grad_(False)[0] = NAN
    with pytest.raises(TrainingFailed, match="the weight bias is not finite: the base is broken"):
        train(config_of(tmp_path), objective, accelerator)


def test_errors_that_are_not_finite_are_drawn_and_recorded(tmp_path):
    errors = {"1x4x4": [NAN] * len(SIGMAS), "2x4x4": [0.1] * (len(SIGMAS) - 1) + [INF]}
    history = record_errors(tmp_path / "validation.jsonl", 3, "on some clips", errors)
    assert history == [{"step": 3, "clips": "on some clips", "errors": {"1x4x4": None, "2x4x4": None}}]
    draw_errors(errors, history, "on some clips", tmp_path / "error.png")
    assert (tmp_path / "error.png").exists()


def check_stopped(launch: Launch, tmp_path: Path, settings: dict, monkeypatch) -> None:
    """Step 3 is left out, steps 5 to 7 end the run; with several processes only the last one's losses are broken."""
    monkeypatch.setenv("FLEXIVID_NAN", "2,4,5,6,7,8")
    path, output = write(tmp_path, "broken", settings, steps=10, save_every=2, max_nonfinite_steps=3)
    assert ended(launch.start(path, "train_with_nan.py")) != 0, "a run that is not finite was a success"
    said = said_by(path).read_text()
    assert "error: step 7: the loss is nan" in said and "3 such steps in a row" in said
    assert "Likely cause" in said and said.count("error: step") == 1
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line.get("left_out")] == [3, 5, 6]
    (kept,) = output.glob("checkpoint-*.safetensors")
    assert kept.name == "checkpoint-00000004.safetensors" and not (output / "result").exists()
    assert all(value.isfinite().all() for value in load_file(kept).values())


@pytest.mark.slow
@pytest.mark.parametrize("launch", [ONE, TWO, SHARDED], ids=["one", "ddp", "fsdp"])
def test_all_processes_leave_a_step_out_and_stop_together(tmp_path, training_config, monkeypatch, launch):
    check_stopped(launch, tmp_path, training_config, monkeypatch)
