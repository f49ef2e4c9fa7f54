"""A transformer of one file in flexivid sample: `--model FILE --base PIPELINE`. GGUF files are in test_gguf.py."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers import DiffusionPipeline, WanPipeline
from families import tiny_pipeline as tiny_family_pipeline
from safetensors.torch import save_file
from test_t2v import CAPTION, frames_of

from flexivid import single_file
from flexivid.commands import sample

# Names of Wan's own code, as `from_single_file` translates them.
ORIGINAL = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    "to_out.0": "o",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "proj_out": "head.head",
    "scale_shift_table": "modulation",
}


def original(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    for ours, theirs in ORIGINAL.items():
        name = name.replace(ours, theirs)
    return name


def wide_transformer():
    """Whose rows, of 96 numbers, are whole blocks of GGUF."""
    return tiny_transformer(num_attention_heads=4)


@dataclass
class OneFile:
    """A whole pipeline whose transformer has its config only, and the weights that are missing there."""

    base: Path
    tensors: dict[str, torch.Tensor]

    def command(self, model: Path, folder: Path, *more: str) -> list[str]:
        sizes = "--budget 0.8 --steps 4 --frames 9 --height 32 --width 32 --device cpu --no-enlarge".split()
        places = ["--model", str(model), "--base", str(self.base), "--output", str(folder / "clip.mp4")]
        return [*places, *sizes, "--prompt", CAPTION, *more]


def base_in(folder: Path) -> OneFile:
    pipe = tiny_pipeline()
    pipe.register_modules(transformer=wide_transformer())
    pipe.save_pretrained(folder)
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    return OneFile(folder, {original(name): p.contiguous() for name, p in pipe.transformer.state_dict().items()})


@pytest.fixture(scope="module")
def one_file(tmp_path_factory) -> OneFile:
    return base_in(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_clip_of_one_file(one_file, tmp_path, prefix):
    path = tmp_path / "model.safetensors"
    save_file({f"{prefix}{name}": tensor for name, tensor in one_file.tensors.items()}, path)
    assert sample.main(one_file.command(path, tmp_path)) == 0
    pipe = tiny_pipeline()
    pipe.register_modules(transformer=wide_transformer())
    pipe.save_pretrained(tmp_path / "whole")
    (tmp_path / "same").mkdir()
    command = one_file.command(tmp_path / "whole", tmp_path / "same")
    del command[2:4]
    assert sample.main(command) == 0
    assert (frames_of(tmp_path / "clip.mp4") == frames_of(tmp_path / "same/clip.mp4")).all()
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["model"] == str(path) and record["flops"]["ratio"] <= 0.8


@pytest.fixture
def no_weights(monkeypatch):
    def read(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", read)
    monkeypatch.setattr(sample, "load_single_file", read)


def without(one_file, name: str) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in one_file.tensors.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (lambda one: without(one, "blocks.1.ffn.0.bias"), "blocks.1.ffn.net.0.proj.bias is not there"),
        (
            lambda one: {**one.tensors, "head.head.weight": torch.zeros(16, 48)},
            "proj_out.weight has shape (16, 48) there, and (16, 96) in this model",
        ),
        (lambda one: {**one.tensors, "blocks.0.ffn.0.scale_weight": torch.ones(1)}, "scaled float8 weights"),
        (lambda one: {"a": torch.ones(1)}, "does not hold the WanTransformer3DModel"),
    ],
)
def test_a_file_that_does_not_fit(one_file, tmp_path, capsys, no_weights, tensors, message):
    save_file(tensors(one_file), tmp_path / "model.safetensors")
    assert sample.main(one_file.command(tmp_path / "model.safetensors", tmp_path)) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "clip.mp4").exists()


def test_what_else_is_refused(one_file, tmp_path, capsys, no_weights, monkeypatch):
    path = tmp_path / "model.safetensors"
    command = one_file.command(path, tmp_path)

    def said(command) -> str:
        assert sample.main(command) == 2
        return capsys.readouterr().err

    assert "there is no file" in said(command)
    path.write_bytes(b"not a tensor")
    assert "is not a whole safetensors file" in said(command)
    save_file(one_file.tensors, path)
    assert "is a transformer without its pipeline: give --base" in said([*command[:2], *command[4:]])
    assert "--base is the pipeline of a --model that is one file" in said(command[2:])
    assert "--base is the pipeline of" in said(["--model", str(one_file.base), *command[2:]])
    assert "no model in diffusers format" in said([*command[:3], str(tmp_path), *command[4:]])
    monkeypatch.setattr(single_file, "is_gguf_available", lambda: False)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert "needs the package gguf: pip install gguf" in said(["--model", str(tmp_path / "model.gguf"), *command[2:]])


def test_a_pipeline_of_two_transformers(one_file, tmp_path):
    pipe = tiny_family_pipeline("wan")[0]
    two = WanPipeline(**pipe.components | {"transformer_2": pipe.transformer}, boundary_ratio=0.875)
    with pytest.raises(ValueError, match="is one transformer, and this WanPipeline has two"):
        single_file.check_single_file(tmp_path / "model.safetensors", two)


def test_a_class_that_diffusers_reads_from_no_single_file(tmp_path):
    with pytest.raises(ValueError, match="reads no single files of a CogVideoXTransformer3DModel"):
        single_file.check_single_file(tmp_path / "model.safetensors", tiny_family_pipeline("cogvideox-5b")[0])
