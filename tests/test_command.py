"""The command `flexivid`: its subcommands, what it says where something is missing, and what ships with it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from safetensors.torch import load_file, save_file
from test_flexible import attach, config_of

import flexivid
from flexivid import public
from flexivid.__main__ import COMMANDS, main
from flexivid.model.adapter import WEIGHTS_NAME, save_adapter
from flexivid.shapes.embedded import ADAPTER, MODEL
from flexivid.training.config import load_config

ROOT = Path(__file__).parents[1]
EXTRAS = ("matplotlib", "scipy", "torchmetrics", "efficientnet_lite_pytorch", "decord", "tensorboard")


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)


def test_help_needs_no_torch():
    done = python("import sys; from flexivid.__main__ import main; main(['--help']); print('torch' in sys.modules)")
    *said, torch_is_there = done.stdout.splitlines()
    assert torch_is_there == "False" and all(any(line.startswith(f"  {name} ") for line in said) for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith(
        f"usage: flexivid {name.replace('merge', 'ad')}"
    )


def test_no_and_unknown_commands(capsys):
    assert main([]) == 0 and "usage: flexivid COMMAND" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out == f"flexivid {flexivid.__version__}\n"
    assert main(["sing"]) == 2 and "there is no command sing; there are sample" in capsys.readouterr().err


def test_a_missing_extra_is_named(monkeypatch, capsys):
    for name in ("flexivid.commands.calibrate", "flexivid.train"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["calibrate"]) == 2
    assert capsys.readouterr().err == 'error: flexivid calibrate needs matplotlib: pip install "flexivid[eval]"\n'


@pytest.mark.slow
def test_who_reads_no_further_hears_nothing():
    command = f"{sys.executable} -m flexivid adapters list | true"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == done.stderr == ""


@pytest.mark.slow
def test_what_needs_no_extra_does_without():
    absent = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS}))"
    modules = [command.module for command in COMMANDS.values() if command.extra is None]
    done = python(f"{absent}; import flexivid.public, {', '.join(modules)}")
    assert done.returncode == 0, done.stderr


def test_the_package_has_the_public_names():
    assert flexivid.__all__ is public.__all__ and {*public.__all__} <= {*dir(flexivid)}
    assert all(getattr(flexivid, name) is getattr(public, name) for name in public.__all__)
    with pytest.raises(AttributeError, match="module 'flexivid' has no attribute 'enabled'"):
        flexivid.enabled  # noqa: B018


@pytest.mark.parametrize("name", ["shapes-flex-4", "shapes-flex-4.yaml", str(ROOT / "configs/shapes-flex-4.yaml")])
def test_a_config_by_name_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load_config(name)
    assert (config.base, config.distill.adapter, config.output) == (MODEL, ADAPTER, Path("runs/shapes-flex-4"))
    (tmp_path / "shapes-flex-4.yaml").write_text("objective: vae\noutput: mine\n")
    assert load_config("shapes-flex-4.yaml").output == Path("mine")  # a file of one's own comes first


def test_an_unknown_config_names_those_that_ship(tmp_path):
    with pytest.raises(ValueError, match="no config file at shapes, and none of that name ships.*: .*shapes-flex-4"):
        load_config("shapes")
    with pytest.raises(ValueError, match="no config file at"):
        load_config(tmp_path / "shapes-flex-4.yaml")


@pytest.fixture
def own(tmp_path) -> Path:
    """An adapter of the tiny model in `model`, beside it."""
    tiny_pipeline().save_pretrained(tmp_path / "model")
    flex = attach(tiny_transformer())
    config = config_of(flex).model_copy(update={"base_model": str(tmp_path / "model")})
    save_adapter(tmp_path / "own", config, {"transformer": flex})
    return tmp_path / "own"


def test_list(own, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (own.parent / "broken").mkdir()
    (own.parent / "broken/flexivid_config.json").write_text("{")
    assert main(["adapters", "list", str(own.parent)]) == 0
    flex, few, broken, ours = capsys.readouterr().out.splitlines()
    assert flex.startswith(
        "flexivid/assets/shapes-flex: 1x4x4, 2x2x2, 2x4x4, 1x4x4-guided, 1x2x2-guided; for flexivid/assets/shapes"
    )
    assert few.startswith("flexivid/assets/shapes-few: ")
    assert "is not JSON" in broken and ours.startswith(f"{own}: ") and ours.endswith(f"; for {own.parent / 'model'}")


def test_inspect(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["adapters", "inspect", "flexivid/assets/shapes-flex"]) == 0
    said = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert said["base model"].strip() == "flexivid/assets/shapes" and said["guidance scale"].strip() == "4.0"
    assert "num_layers 6" in said["shape"] and "seed 29" in said["training"]
    flex = load_file(ADAPTER / WEIGHTS_NAME) | load_file(ADAPTER / "pytorch_lora_weights.safetensors")
    count = sum(tensor.numel() for name, tensor in flex.items() if name.startswith("transformer.1x4x4."))
    assert f"transformer.1x4x4 {count / 1e6:.3g} M" in said["numbers"]


def test_check(own, capsys):
    assert main(["adapters", "check", str(own)]) == 0
    assert capsys.readouterr().out == f"{own} is whole and fits {own.parent / 'model'}\n"
    assert main(["adapters", "check", str(ADAPTER)]) == 0
    assert main(["adapters", "check", str(own), "--model", str(MODEL)]) == 2
    assert "this model's transformer differs" in capsys.readouterr().err


def test_check_finds_what_is_no_number(own, capsys):
    tensors = load_file(own / WEIGHTS_NAME)
    name = min(tensors)
    tensors[name].view(-1)[0] = torch.nan
    save_file(tensors, own / WEIGHTS_NAME)
    assert main(["adapters", "check", str(own)]) == 2
    assert f"{name} holds what is no finite number" in capsys.readouterr().err


def test_a_cut_file_is_found(own, capsys):
    content = (own / WEIGHTS_NAME).read_bytes()
    (own / WEIGHTS_NAME).write_bytes(content[:-10])
    for command in ("inspect", "check"):
        assert main(["adapters", command, str(own)]) == 2
        assert f"{own / WEIGHTS_NAME} is not a whole safetensors file" in capsys.readouterr().err
