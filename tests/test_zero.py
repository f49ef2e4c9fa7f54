"""Training with ZeRO of DeepSpeed, which has to be installed: make test-deepspeed."""

import signal
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_training_scale import ONE, ROOT, TWO, losses, run, start_and_signal, write

from flexivid.training.config import Config
from flexivid.training.sharding import check_sharding

ZERO = [*TWO[:-1], str(ROOT / "tests/train_with_zero_on_cpu.py")]
installed = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed: make test-deepspeed")


@pytest.fixture
def settings(training_config):
    """One weak mode: of several, the one that is not drawn gets a gradient of zero from ZeRO, and none otherwise."""
    distill = training_config["distill"] | {"modes": ["2x4x4"]}
    return training_config | {"steps": 10, "save_every": 4, "distill": distill}


@installed
@pytest.mark.parametrize(
    ("stage", "objective", "precision", "tolerance"),
    [(2, "distill", "bf16", 1e-3), (1, "distill", "no", 1e-5), (2, "shared", "no", 1e-5)],
)
def test_split_moments_change_nothing(tmp_path, settings, monkeypatch, stage, objective, precision, tolerance):
    """The curve of one process; killed, it goes on without ZeRO, and killed again, with it."""
    monkeypatch.setenv("FLEXIVID_ZERO_STAGE", str(stage))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    settings |= {"objective": objective, "micro_batches": 2}
    whole, whole_output = write(tmp_path, "whole", settings)
    run(ONE, whole)
    moved, output = write(tmp_path, "moved", settings, save_every=2)
    start_and_signal(ZERO, moved, output, after=3, number=signal.SIGKILL)
    start_and_signal(ONE, moved, output, after=6, number=signal.SIGKILL)
    run(ZERO, moved)
    assert torch.allclose(torch.tensor(losses(output)), torch.tensor(losses(whole_output)), atol=tolerance, rtol=0)
    result = {"distill": "result", "shared": "result/adapter"}[objective]
    expected, found = (load_file(folder / result / "flexivid.safetensors") for folder in (whole_output, output))
    assert expected.keys() == found.keys()
    assert all(torch.allclose(found[key], expected[key], atol=1e-3) for key in expected)


@pytest.mark.parametrize(
    ("stage", "offload", "precision", "more", "message"),
    [
        (3, "none", "bf16", {}, "only stages 1 and 2 of ZeRO are supported, not 3.*configs/accelerate/fsdp.yaml"),
        (0, "none", "bf16", {}, "not 0"),
        (2, "cpu", "bf16", {}, "offload_optimizer_device must be none, not cpu"),
        (2, "none", "fp16", {}, "mixed_precision must be bf16 or no, not fp16"),
        (2, "none", "bf16", {"optim": {"name": "muon"}}, "optim.name must be adamw, not muon"),
        (2, "none", "bf16", {}, None),
    ],
)
def test_what_zero_cannot_do_is_refused(settings, tmp_path, stage, offload, precision, more, message):
    plugin = SimpleNamespace(zero_stage=stage, offload_optimizer_device=offload)
    state = SimpleNamespace(deepspeed_plugin=plugin)
    launched = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, state=state, mixed_precision=precision, is_main_process=True
    )
    config = Config(**settings | more, output=tmp_path / "out")
    if message is None:
        check_sharding(launched, config)
    else:
        with pytest.raises(ValueError, match=message):
            check_sharding(launched, config)
