"""What a run says of its speed: FLOPs as they are made, utilisation of a peak that is known, time left."""

import json

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from flexivid import devices
from flexivid.sampling.flops import flop_counter_mode
from flexivid.shapes.pretrain import ShapesWorld
from flexivid.training.config import Config
from flexivid.training.distill import DistillObjective
from flexivid.training.few import WARMUP, FewObjective
from flexivid.training.finite import StepResult
from flexivid.training.progress import Log, for_people, peak_of_run
from flexivid.training.shared import SharedObjective


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def check_flops(objective, steps) -> None:
    """Those of a step as they are counted while it is made. Plain attention: the counter knows no other backward."""
    for step in steps:
        with flop_counter_mode() as counter:
            objective.loss(objective.model, step, 0).backward()
        assert objective.flops(step) == counter.get_total_flops() > 0, step


@pytest.mark.parametrize("more", [{}, {"modes_per_step": 2, "correction_gap": 0.2}], ids=["plain", "gap"])
def test_flops_of_distillation_are_those_that_are_made(tmp_path, training_config, accelerator, more):
    distill = training_config["distill"] | more
    settings = training_config | {"attention_backend": "_native_math", "distill": distill}
    objective = DistillObjective(Config(**settings, output=tmp_path / "out"), accelerator, ShapesWorld())
    check_flops(objective, range(3))
    forwards = [objective.costs.forward(objective.batches.of(2)[1], name) for name in distill["modes"]]
    learning = [objective.costs.learning(objective.batches.of(2)[1], name) for name in distill["modes"]]
    assert all(f < once < 3 * f for f, once in zip(forwards, learning, strict=True)), "a frozen base has no gradients"


def test_flops_of_all_weights_are_those_that_are_made(tmp_path, training_config, accelerator):
    distill = {"modes": training_config["distill"]["modes"]}
    settings = training_config | {"objective": "shared", "attention_backend": "_native_math", "distill": distill}
    objective = SharedObjective(Config(**settings, output=tmp_path / "out"), accelerator, ShapesWorld())
    check_flops(objective, range(4))


def test_flops_of_few_steps_are_those_that_are_made(tmp_path, training_config, accelerator):
    shared = {name: value for name, value in training_config.items() if name not in ("distill", "data")}
    few = {"patch_sizes": ["2x4x4", "1x4x4", "1x2x2"], "rank": 4, "fake_updates": 1, "warmup_steps": 2}
    data = {"frames": 9, "size": 32, "text_lengths": {16: 1.0}}
    settings = shared | {"objective": "few", "attention_backend": "_native_math", "few": few, "data": data}
    settings["validation"] = {"steps": 3}
    objective = FewObjective(Config(**settings, output=tmp_path / "out"), accelerator, ShapesWorld())
    objective.batches.of(0)  # its pool of the teacher's runs is not counted
    assert objective.loss_name(0) == WARMUP
    check_flops(objective, [0, 2, 3, 4, 5, 6, 7])


class Objective:
    def flops(self, step: int) -> int:
        return 10**12


def log_of(tmp_path, accelerator, monkeypatch, **more) -> Log:
    monkeypatch.setattr("time.perf_counter", lambda: log_of.now)
    log_of.now = 100.0
    config = Config(objective="distill", output=tmp_path, steps=10, batch_size=6, trackers=[], **more)
    return Log(config, Objective(), accelerator, start=2)


def test_the_line_of_a_step(tmp_path, accelerator, monkeypatch):
    log = log_of(tmp_path, accelerator, monkeypatch)
    for step in (2, 3):
        log.add(StepResult([0.5], [1.0]), step, seconds=2.0)
    log_of.now = 110.0  # six seconds of them were pictures
    shown = log.write(4, 1.0, 1e-3)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {
            "step": 4,
            "loss": 0.5,
            "seconds_per_step": 2.0,
            "clips_per_second": 3.0,
            "tflops_per_second": 0.5,
            "seconds_left": 30.0,
        }
    ]
    assert shown == {"loss": "0.5000", "clips/s": "3", "speed": "500 GFLOP/s", "left": "0:00:30"}


def test_utilisation_is_of_a_peak_that_is_given(tmp_path, accelerator, monkeypatch):
    log = log_of(tmp_path, accelerator, monkeypatch, peak_tflops=2.0)
    log.add(StepResult([0.5], [1.0]), 2, seconds=2.0)
    log_of.now = 102.0
    assert log.write(3, 1.0, 1e-3)["MFU"] == "25.0%"
    assert json.loads((tmp_path / "log.jsonl").read_text())["mfu"] == 0.25


def test_a_peak_is_known_or_given_and_never_made_up(tmp_path, monkeypatch):
    def peak(name: str, precision: str, processes: int = 1, **more) -> float | None:
        class Accelerated:
            device, mixed_precision, num_processes = torch.device("cuda", 0), precision, processes

        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        return peak_of_run(Config(objective="distill", output=tmp_path, **more), Accelerated)

    assert peak("NVIDIA H200", "bf16", processes=8) == pytest.approx(8 * 989e12)
    assert peak("NVIDIA H200", "no") is None and peak("NVIDIA H200 NVL", "bf16") is None
    assert peak("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16") is None
    assert peak("Some other GPU", "no", processes=2, peak_tflops=10) == 20e12
    assert devices.peak_flops(torch.device("cpu")) is None


def test_where_nothing_is_counted_nothing_is_said_of_flops():
    assert for_people({"clips_per_second": 12.345, "seconds_left": 90061.4}) == {
        "clips/s": "12.3",
        "left": "1 day, 1:01:01",
    }
