"""A dry run of a config that ships with flexivid needs no network: the published architectures are in the package."""

import inspect
import socket
from pathlib import Path

import diffusers
import pytest
from conftest import every_of, write_clip
from training_runs import train_here

from flexivid.published import ARCHITECTURES, load_index, load_part
from flexivid.training.config import load_config
from flexivid.training.forecast import check_model
from flexivid.training.modular import MiniMaxH3Pipeline

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*-lora.yaml"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    def refuse(*given):
        raise AssertionError("a dry run asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


def test_every_config_names_a_model_that_is_known():
    assert {str(load_config(ROOT / "configs" / name).base) for name in CONFIGS} == ARCHITECTURES.keys()


@every_of(CONFIGS, quick=["wan2.1-1.3b-lora.yaml"])
def test_configs_fit_the_published_models(folder, name):
    """Sizes, modes and budgets, from the public configurations alone."""
    config = load_config(ROOT / "configs" / name)
    write_clip(folder / "a.control.mp4")  # which Wan-VACE asks for
    check_model(config.model_copy(update={"clips": config.clips.model_copy(update={"folder": folder})}))


@pytest.mark.parametrize("hub_id", ARCHITECTURES)
def test_every_setting_is_one_of_its_class(hub_id):
    architecture = ARCHITECTURES[hub_id]
    for class_name, settings in architecture.parts.values():
        module = diffusers if hasattr(diffusers, class_name) else diffusers.pipelines.ltx2
        parameters = inspect.signature(getattr(module, class_name).__init__).parameters
        assert settings.keys() <= parameters.keys()
        # What equals the default need not be said.
        assert not [name for name, value in settings.items() if parameters[name].default == value]
    modular = {"MiniMaxH3ModularPipeline": MiniMaxH3Pipeline}
    pipeline = modular.get(architecture.pipeline) or getattr(diffusers, architecture.pipeline)
    assert {*architecture.settings, *architecture.parts} <= inspect.signature(pipeline).parameters.keys()


def test_a_folder_of_that_name_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "genmo/mochi-1-preview").mkdir(parents=True)
    (tmp_path / "genmo/mochi-1-preview/model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert load_index("genmo/mochi-1-preview")["_class_name"] == "WanPipeline"
    assert load_part("Lightricks/LTX-Video", "vae", diffusers.AutoencoderKLLTXVideo) == {}


@pytest.mark.slow
def test_a_whole_dry_run(tmp_path, monkeypatch, capsys):
    settings = {
        "output": str(tmp_path / "out"),
        # The rest costs time only.
        "distill.modes": "[2x4x4]",
        "distill.mode_weights": "[1.0]",
        "gradient-checkpointing": "false",
        "validation.prompts": "[]",
    }
    overrides = [word for name, value in settings.items() for word in (f"--{name}", value)]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert train_here(ROOT / "configs/wan2.1-1.3b-lora.yaml", "--dry-run", *overrides) == 0
    said = capsys.readouterr().out
    assert "Wan-AI/Wan2.1-T2V-1.3B-Diffusers: 1.419 B parameters" in said
    assert "data/clips is not there yet" in said and not (tmp_path / "out").exists()
