"""pipelines/t2v.py from the command line down to the files, on a tiny random pipeline."""

import importlib.util
import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from PIL import Image

from flexivid.adapter import AdapterConfig, save_adapter, transformer_shape
from flexivid.flexible import FlexTransformer
from flexivid.lora import add_lora
from flexivid.video import GAP, Arm, side_by_side, tiled, written_whole

spec = importlib.util.spec_from_file_location("t2v", Path(__file__).parents[1] / "pipelines/t2v.py")
t2v = importlib.util.module_from_spec(spec)
spec.loader.exec_module(t2v)

PROMPT = "a plain red circle growing on a black background"


def write_adapter(folder, transformer):
    flex = FlexTransformer(transformer, ["1x4x4", "2x4x4"], "snr")
    add_lora(flex, 4)
    config = AdapterConfig(
        patch_sizes=["1x4x4", "2x4x4"],
        parametrisation="snr",
        lora_rank=4,
        components=["transformer"],
        base_model="tiny",
        transformer_class="WanTransformer3DModel",
        transformer_shape=transformer_shape(flex),
        max_sequence_length=12,
    )
    save_adapter(folder, config, {"transformer": flex})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    return write_adapter(tmp_path_factory.mktemp("adapter"), tiny_transformer())


@pytest.fixture
def run(model, adapter, tmp_path):
    """Runs the script into `tmp_path/out/clip.mp4`; later options replace these. Returns the exit code."""

    def run(*options, prompt=PROMPT):
        argv = ["--model", model, "--adapter", adapter, "--steps", 4, "--frames", 9, "--height", 32, "--width", 32]
        argv += ["--device", "cpu", "--output", tmp_path / "out/clip.mp4"] + (["--prompt", prompt] if prompt else [])
        return t2v.main([str(option) for option in (*argv, *options)])

    return run


def read_clip(path) -> np.ndarray:
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_the_clip_and_its_json(run, model, adapter, tmp_path, capsys):
    assert run("--budget", "0.5", "--seed", "3", "--prompt", "a red dog, growing", prompt=None) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip.json", "clip.mp4"]
    clip = read_clip(tmp_path / "out/clip.mp4")
    assert clip.shape == (9, 32, 32, 3)
    facts = json.loads((tmp_path / "out/clip.json").read_text())
    assert (
        list(facts)
        == (
            "prompt model adapter seed steps guidance_scale size budget flops schedule seconds peak_memory_bytes versions"
        ).split()
    )
    assert (facts["prompt"], facts["model"], facts["adapter"]) == ("a red dog, growing", str(model), str(adapter))
    assert (facts["seed"], facts["steps"], facts["guidance_scale"], facts["budget"]) == (3, 4, 5.0, 0.5)
    assert facts["size"] == [9, 32, 32]
    flops = facts["flops"]
    assert flops["ratio"] == flops["used"] / flops["full"] <= 0.5
    assert len(facts["schedule"]) == 4 and facts["schedule"][-1] == ["1x2x2", "1x2x2"]
    assert list(facts["seconds"]) == ["load", "text", "denoise", "decode"] and min(facts["seconds"].values()) > 0
    assert facts["peak_memory_bytes"] > 1e6
    assert {"flexivid", "torch", "diffusers", "transformers"} <= set(facts["versions"])
    printed = capsys.readouterr()
    assert "the model does not know: dog\n" in printed.err
    assert f"{flops['ratio']:.1%}" in printed.out and str(tmp_path / "out/clip.mp4") in printed.out


def test_the_frames_are_those_of_the_pipeline(model, adapter, tmp_path, monkeypatch, run):
    """At budget 1 the script's own encoding and decoding give what one call of the stock pipeline gives."""
    written = []
    monkeypatch.setattr(t2v, "write_mp4", lambda path, frames, fps: written.append(frames))
    assert run("--budget", "1", "--seed", "3", "--guidance-scale", "3") == 0
    stock = tiny_pipeline()(
        PROMPT,
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=12,
        generator=torch.Generator().manual_seed(3),
    ).frames[0]
    # Half a grey level, and one for whatever saving changed.
    assert np.abs(written[0] - stock * 255).max() <= 1.5


def test_a_prompt_file_and_the_comparison(run, tmp_path):
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\na blue square\n")
    assert run("--prompt-file", tmp_path / "prompts.txt", "--compare", "--budget", "0.5", prompt=None) == 0
    out = tmp_path / "out"
    names = [f"clip-{i}{end}" for i in (0, 1) for end in (".mp4", ".json", "-compare.mp4", "-compare.png")]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    assert [json.loads((out / f"clip-{i}.json").read_text())["prompt"] for i in (0, 1)] == [PROMPT, "a blue square"]
    label = 20  # 14 pixels of font for a clip 256 pixels wide
    assert read_clip(out / "clip-1-compare.mp4").shape == (9, 256 + 2 * label, 2 * 256 + GAP, 3)
    assert Image.open(out / "clip-1-compare.png").size == (5 * 256, 2 * (256 + label))


def test_labels_frames_and_order_in_comparisons():
    arms = [Arm("full model", "1 s", np.full((3, 16, 32, 3), 90, np.uint8)), Arm("b", "2 s", np.zeros((3, 16, 32, 3)))]
    arms[1] = Arm("b", "2 s", np.full((3, 16, 32, 3), 200, np.uint8))
    video, picture = side_by_side(arms), np.asarray(tiled(arms))
    assert (video[:, -1, 0] == 90).all() and (video[:, -1, -1] == 200).all()
    assert (video[:, :40] == 255).any() and picture.shape[1] == 3 * 512
    assert (picture[200, 0] == 90).all() and (picture[-1, -1] == 200).all()


def test_a_schedule_overrides_the_budget(run, tmp_path):
    assert run("--schedule", "2x4x4:3,1x2x2:1", "--budget", "0.9", "--guidance-scale", "1") == 0
    facts = json.loads((tmp_path / "out/clip.json").read_text())
    assert facts["schedule"] == [["2x4x4"]] * 3 + [["1x2x2"]] and facts["budget"] is None


def test_without_an_adapter_weak_modes_are_training_free(run, tmp_path):
    assert run("--adapter", "none", "--modes", "1x4x4", "--budget", "0.7", "--parametrisation", "direct") == 0
    assert json.loads((tmp_path / "out/clip.json").read_text())["adapter"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "above 0 and up to 1"),
        (["--budget", "-1"], "not -1"),
        (["--budget", "1.5"], "not 1.5"),
        (["--budget", "abc"], "not 'abc'"),
        (["--budget", "0.01"], "the least is 0."),
        (["--adapter", "none", "--modes", "1x3x3"], "1x4x4, 2x2x2 or 2x4x4 would be"),
        (["--adapter", "none", "--modes", "4x4"], "2 numbers instead of 3"),
        (["--modes", "2x2x2"], "it has 1x4x4, 2x4x4"),
        (["--parametrisation", "direct"], "trained for snr, not direct"),
        (["--schedule", "1x4x4:3"], "adds up to 3 steps, but there are 4"),
        (["--prompt", " "], "--prompt is empty"),
        (["--prompt-file", "none.txt"], "none.txt cannot be read: No such file"),
        (["--prompt-file", "/dev/null"], "/dev/null is empty"),
        (["--output", "clip.gif"], "must end in .mp4"),
        (["--output", f"{__file__}/clip.mp4"], "is a file, not a folder"),
        (["--model", "/no/such/model"], "no model at /no/such/model"),
        (["--model", str(Path(__file__).parent)], "no model_index.json"),
        (["--adapter", str(Path(__file__).parent)], "no flexivid_config.json"),
        (["--frames", "10"], "9 or 13 would do"),
        (["--height", "40"], "32 or 48 would do"),
        (["--width", "8"], "16 would do"),
        (["--steps", "0"], "'0' is not a whole number of at least 1"),
        (["--device", "nothing"], "--device nothing is no device"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(run, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(t2v, "load", lambda arguments: pytest.fail("it should not get here"))
    assert_refused(run, options, message, tmp_path, capsys)


def assert_refused(run, options, message, tmp_path, capsys):
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["flexivid.safetensors", "pytorch_lora_weights.safetensors"])
def test_a_corrupt_adapter(run, adapter, tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(t2v, "load", lambda arguments: pytest.fail("it should not get here"))
    folder = tmp_path / "corrupt"
    shutil.copytree(adapter, folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])
    assert_refused(run, ["--adapter", folder], f"{name} is not a whole safetensors file", tmp_path, capsys)
    (folder / name).unlink()
    assert_refused(run, ["--adapter", folder], "the adapter is incomplete", tmp_path, capsys)


def test_an_adapter_of_another_model(run, tmp_path, capsys):
    folder = write_adapter(tmp_path / "other", tiny_transformer(num_layers=3))
    assert_refused(run, ["--adapter", folder], "num_layers 3 != 2", tmp_path, capsys)


def test_a_model_whose_weights_are_corrupt(run, model, tmp_path, capsys):
    for part in ("transformer/diffusion_pytorch_model", "text_encoder/model"):
        folder = tmp_path / part.split("/")[0]
        shutil.copytree(model, folder)
        path = folder / f"{part}.safetensors"
        path.write_bytes(path.read_bytes()[:1000])
        assert run("--model", folder, "--budget", "0.5") == 2
        assert "\nerror: " in "\n" + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_default_prompt_only_where_it_makes_sense(run, tmp_path, capsys):
    assert run(prompt=None) == 2
    assert "give --prompt or --prompt-file" in capsys.readouterr().err


def test_a_file_is_whole_or_not_there(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "x.json") as beside:
        beside.write_text("half")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
