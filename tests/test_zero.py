"""Training with ZeRO of DeepSpeed, which has to be installed: make test-deepspeed."""

import signal
from contextlib import nullcontext
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_training_finite import check_stopped
from training_runs import ONE, Launch, losses, run, start_and_signal, write

from flexivid.training.config import Config
from flexivid.training.parallel import zero
from flexivid.training.parallel.sharding import check_sharding

ZERO = Launch("train_with_zero_on_cpu.py", 2, by_torchrun=True)
installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-deepspeed")


@pytest.fixture
def settings(training_config, tmp_path, folder):
    clips = dict(folder=str(folder), cache=str(tmp_path / "cache"), buckets=["5x16x32"], fps=10, max_sequence_length=16)
    validation = {"prompts": ["a red circle"], "budgets": [1.0, 0.6], "steps": 9}
    more = {"steps": 20, "save_every": 2, "micro_batches": 2, "clips": clips, "validation": validation}
    return {key: value for key, value in training_config.items() if key != "data"} | more


@installed
@pytest.mark.parametrize(("stage", "precision", "tolerance"), [(1, "no", 1e-5), (2, "bf16", 1e-3)])
def test_split_moments_change_nothing(tmp_path, settings, monkeypatch, stage, precision, tolerance):
    """The curve of one process; killed, it goes on without ZeRO, and killed again, with it.

    With one weak mode: of several, the one that is not drawn has a gradient of zero with ZeRO, and none without.
    """
    monkeypatch.setenv("FLEXIVID_ZERO_STAGE", str(stage))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    settings["distill"]["modes"] = ["2x4x4"]
    whole, whole_output = write(tmp_path, "whole", settings)
    run(ONE, whole)
    moved, output = write(tmp_path, "moved", settings, sample_every=3)
    start_and_signal(ZERO, moved, output, after=5, number=signal.SIGKILL)
    assert (output / "samples/000003.png").exists() and (output / "samples/000003-error.png").exists()
    start_and_signal(ONE, moved, output, after=12, number=signal.SIGKILL)
    run(ZERO, moved)
    assert torch.allclose(torch.tensor(losses(output)), torch.tensor(losses(whole_output)), atol=tolerance, rtol=0)
    expected, found = (load_file(folder / "result/flexivid.safetensors") for folder in (whole_output, output))
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-3) for key in expected)


@installed
def test_a_killed_run_of_all_weights_goes_on_as_if_nothing_had_happened(tmp_path, settings):
    settings |= {"objective": "shared", "distill": {"modes": settings["distill"]["modes"]}}
    whole, whole_output = write(tmp_path, "whole", settings)
    run(ZERO, whole)
    killed, output = write(tmp_path, "killed", settings)
    start_and_signal(ZERO, killed, output, after=5, number=signal.SIGKILL)
    run(ZERO, killed)
    assert torch.allclose(torch.tensor(losses(output)), torch.tensor(losses(whole_output)), atol=1e-5, rtol=0)


@installed
def test_steps_that_are_not_finite_are_left_out_and_stop_the_run(tmp_path, training_config, monkeypatch):
    check_stopped(ZERO, tmp_path, training_config, monkeypatch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stage": 3}, "only stages 1 and 2 of ZeRO are supported, not 3.*configs/accelerate/fsdp.yaml"),
        ({"stage": 0}, "not 0"),
        ({"offload": "cpu"}, "offload_optimizer_device must be none, not cpu"),
        ({"precision": "fp16"}, "mixed_precision must be bf16 or no, not fp16"),
        ({"optimizer": "muon"}, "optim.name must be adamw, not muon"),
        ({"installed": "0.18.9"}, "DeepSpeed 0.18.9 is too old: pip install"),
        ({}, None),
    ],
)
def test_what_zero_cannot_do_is_refused(settings, tmp_path, monkeypatch, change, message):
    usual = {"stage": 2, "offload": "none", "precision": "bf16", "optimizer": "adamw", "installed": "0.19.8"}
    launch = SimpleNamespace(**usual | change)
    monkeypatch.setattr(zero, "version", lambda name: launch.installed)
    plugin = SimpleNamespace(zero_stage=launch.stage, offload_optimizer_device=launch.offload)
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=plugin),
        mixed_precision=launch.precision,
    )
    config = Config(**settings | {"optim": {"name": launch.optimizer}}, output=tmp_path / "out")
    with nullcontext() if message is None else pytest.raises(ValueError, match=message):
        check_sharding(accelerator, config)
