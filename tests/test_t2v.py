"""flexivid sample, called in process on a tiny random pipeline."""

import json
import shutil
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from conftest import tiny_pipeline, tiny_transformer
from diffusers import CogVideoXImageToVideoPipeline, LTXPipeline, WanPipeline
from families import SOUND_RATE, ltx2_with_text_and_sound, tiny_image_pipeline, with_text
from families import tiny_pipeline as tiny_family_pipeline
from PIL import Image
from test_flexible import attach, config_of

from flexivid.commands import sample as t2v
from flexivid.model.adapter import save_adapter
from flexivid.sampling.flops import flops_text
from flexivid.stock_pipelines import call_arguments, load, sound_of, usual_arguments
from flexivid.video import Sound, write_mp4

CAPTION = "a plain red circle growing on a black background"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def call(model, tmp_path):
    def run(*arguments, output=tmp_path / "out/clip.mp4"):
        fixed = f"--model {model} --steps 4 --frames 9 --height 32 --width 32 --fps 4 --device cpu".split()
        return t2v.main([*fixed, "--output", str(output), *map(str, arguments)])

    return run


def frames_of(path: Path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def sounds_of(path: Path) -> list[tuple[np.ndarray, int]]:
    """Samples (channels, samples) and rate of every track."""
    with av.open(str(path)) as container:
        count = len(container.streams.audio)
    found = []
    for index in range(count):
        with av.open(str(path)) as container:
            parts = [frame.to_ndarray() for frame in container.decode(audio=index)]
            found.append((np.concatenate(parts, axis=1), container.streams.audio[index].rate))
    return found


def test_a_clip_and_its_record(call, tmp_path, capsys):
    assert call("--budget", 0.8, "--prompt", CAPTION, "--seed", 3) == 0
    assert frames_of(tmp_path / "out/clip.mp4").shape == (9, 256, 256, 3)  # of 32 pixels hardly anything is seen
    record = json.loads((tmp_path / "out/clip.json").read_text())
    keys = "prompt model adapter seed steps guidance_scale size budget flops schedule schedule_in_runs seconds"
    assert list(record) == [*keys.split(), "peak_memory_bytes", "versions"]
    assert record["size"] == [9, 32, 32] and record["prompt"] == CAPTION and record["seed"] == 3
    assert record["flops"]["used"] / record["flops"]["full"] == record["flops"]["ratio"] <= 0.8
    assert len(record["schedule"]) == 4 and set(record["seconds"]) == {"load", "text", "denoise", "decode"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"clip.mp4", "clip.json"}
    steps = [["1x2x2"] * 2, ["1x2x2"] * 2, ["reused"] * 2, ["1x2x2"] * 2]
    assert record["schedule"] == steps and record["schedule_in_runs"] == "2 x 1x2x2, 1 x reused, 1 x 1x2x2"
    said = capsys.readouterr()
    assert record["schedule_in_runs"] in said.out and flops_text(record["flops"]["used"]) in said.out
    assert "the budget of 0.8 became 0.75: steps are whole, and a budget buys more from 1 on" in said.out
    stages = ("loading", "planning", "encoding the prompt", "denoising", "decoding the clip")
    places = [said.err.index(stage) for stage in stages]
    assert places == sorted(places)


def test_a_small_clip_is_enlarged_by_whole_pixels_or_left_as_it_is(call, tmp_path):
    for more, side in (([], 256), (["--no-enlarge"], 32)):
        assert call("--budget", 1, "--prompt", CAPTION, "--output", tmp_path / f"{side}.mp4", *more) == 0
        assert json.loads((tmp_path / f"{side}.json").read_text())["size"] == [9, 32, 32]
    small, large = (frames_of(tmp_path / f"{side}.mp4").astype(float) for side in (32, 256))
    assert small.shape == (9, 32, 32, 3) and large.shape == (9, 256, 256, 3)
    pixels = large[:, 4::8, 4::8]
    assert np.abs(large - pixels.repeat(8, 1).repeat(8, 2)).mean() < 3  # but for what h264 loses
    assert np.abs(pixels - large[:, :1, :1]).mean() > 10


def test_patches_are_drawn_over_a_second_clip(call, tmp_path):
    mixed = "1x2x2+1x4x4@0.5"
    assert call("--prompt", CAPTION, "--schedule", f"1x2x2:1,reused:1,{mixed}:2", "--show-patches") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"clip.mp4", "clip.json", "clip-patches.mp4"}
    assert frames_of(tmp_path / "out/clip-patches.mp4").shape == (3 * 9, 8 + 16 + 512, 512, 3)


def test_compare_shows_all_three_clips(call, tmp_path):
    assert call("--budget", 0.8, "--prompt", CAPTION, "--compare") == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"clip.mp4", "clip.json", "clip-compare.mp4", "clip-compare.png"}
    assert frames_of(tmp_path / "out/clip-compare.mp4").shape == (9, 256 + 16, 768, 3)
    assert Image.open(tmp_path / "out/clip-compare.png").size == (5 * 128, 3 * (128 + 16))


def test_prompt_file_and_schedule(call, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text(f"{CAPTION}\n\na zebra\n")
    assert call("--prompt-file", tmp_path / "prompts.txt", "--schedule", "1x4x4:3,1x2x2:1") == 0
    records = [json.loads((tmp_path / f"out/clip-{i}.json").read_text()) for i in (0, 1)]
    assert [record["prompt"] for record in records] == [CAPTION, "a zebra"]
    assert records[0]["schedule"] == [["1x4x4"] * 2] * 3 + [["1x2x2"] * 2] and records[0]["budget"] is None
    assert "does not know the word 'zebra'" in capsys.readouterr().err


def test_a_schedule_file(call, tmp_path, capsys):
    path = tmp_path / "schedule.json"
    steps = [["1x2x2"] * 2, ["1x4x4"] * 2, ["1x4x4"] * 2, ["1x2x2"] * 2]
    path.write_text(json.dumps({"schedule": steps, "budget": 0.7}))
    assert call("--prompt", CAPTION, "--schedule", path) == 0
    assert json.loads((tmp_path / "out/clip.json").read_text())["schedule"] == steps
    for content, message in (
        ("1x4x4:4", "is not JSON"),
        ("{}", "holds no schedule"),
        ('{"schedule": ["1x4x4"]}', "a schedule is a list with a list of patch sizes per step"),
        (json.dumps({"schedule": steps[:3]}), "adds up to 3 steps"),
    ):
        path.write_text(content)
        assert call("--prompt", CAPTION, "--schedule", path) == 2
        assert message in capsys.readouterr().err
    assert call("--prompt", CAPTION, "--schedule", tmp_path / "missing.json") == 2
    assert "missing.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "0"], "above 0 and up to 1"),
        (["--budget", "-1"], "above 0 and up to 1"),
        (["--budget", "1.5"], "above 0 and up to 1"),
        (["--budget", "abc"], "not 'abc'"),
        (["--budget", "0.05"], "the least is"),
        (["--modes", "1x3x3"], "1x3x3 is not an integer multiple"),
        (["--modes", "4x4"], "4x4"),
        (["--schedule", "1x4x4:9"], "adds up to 9 steps"),
        (["--prompt", ""], "prompt is empty"),
        (["--adapter", "nowhere/at/all"], "nowhere/at/all"),
        (["--model", "nowhere/at/all"], "no model_index.json"),
        (["--frames", "0"], "frames must be at least 1"),
        (["--frames", "10"], "frames must be 1 + a multiple of 4, such as 9"),
        (["--height", "36"], "height must be a multiple of 8, such as 40"),
        (["--device", "cuda:7"], "no CUDA device 7"),
        (["--device", "banana"], "'banana' is no device"),
        (["--seed", "-1"], "the seed must be"),
        (["--prompt-file", "missing.txt"], "missing.txt"),
    ],
)
def test_bad_input_is_refused_before_weights_are_read(call, tmp_path, capsys, monkeypatch, arguments, message):
    def read_weights(*args, **kwargs):
        raise AssertionError("weights were read")

    monkeypatch.setattr(t2v.DiffusionPipeline, "from_pretrained", read_weights)
    monkeypatch.setattr(t2v.torch.cuda, "device_count", lambda: 0)
    assert call("--prompt", CAPTION, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written(call, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert call("--prompt", CAPTION, "--budget", 0.8, output=tmp_path / "file/clip.mp4") == 2
    assert "file" in capsys.readouterr().err
    (tmp_path / "folder.mp4").mkdir()
    assert call("--prompt", CAPTION, output=tmp_path / "folder.mp4") == 2
    assert "is a folder" in capsys.readouterr().err
    assert call("--prompt", CAPTION, output=tmp_path / "clip.gif") == 2
    assert "must be an .mp4 file" in capsys.readouterr().err


def test_adapters_that_do_not_fit(call, tmp_path, capsys):
    flex = attach(tiny_transformer(num_layers=3))
    save_adapter(tmp_path / "other", config_of(flex), {"transformer": flex})
    assert call("--prompt", CAPTION, "--adapter", tmp_path / "other") == 2
    assert "num_layers 3 != 2" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert call("--prompt", CAPTION, "--adapter", tmp_path / "empty") == 2
    assert "has no flexivid_config.json" in capsys.readouterr().err
    flex = attach(tiny_transformer())
    save_adapter(tmp_path / "own", config_of(flex), {"transformer": flex})
    for merge_lora in ("--no-merge-lora", "--merge-lora"):
        assert call("--prompt", CAPTION, "--adapter", tmp_path / "own", "--budget", 0.8, merge_lora) == 0
    config = (tmp_path / "own/flexivid_config.json").read_text()
    (tmp_path / "own/flexivid_config.json").write_text(config.replace("{", '{"colour": "red",', 1))
    assert call("--prompt", CAPTION, "--adapter", tmp_path / "own", "--budget", 0.8) == 2
    assert "colour: Extra inputs are not permitted" in capsys.readouterr().err
    (tmp_path / "own/flexivid_config.json").write_text(config)
    (tmp_path / "own/flexivid.safetensors").write_bytes(b"not a tensor")
    assert call("--prompt", CAPTION, "--adapter", tmp_path / "own", "--budget", 0.8) == 2
    assert "not a whole safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "pipeline", "arguments"),
    [
        ("ltx-i2v", LTXPipeline, []),
        ("ltx-i2v", LTXPipeline, ["--image"]),  # the folder names the text-to-video pipeline
        ("cogvideox-i2v", CogVideoXImageToVideoPipeline, ["--image"]),
        ("wan2.2-ti2v", WanPipeline, []),
    ],
)
def test_other_families(tmp_path, name, pipeline, arguments):
    with_text(pipeline.from_pipe(tiny_image_pipeline(name, text_length=226)[0])).save_pretrained(tmp_path / "model")
    Image.new("RGB", (96, 64), (200, 40, 40)).save(tmp_path / "image.png")
    sizes = "--steps 8 --frames 9 --height 64 --width 96 --budget 0.9 --device cpu".split()
    image = [*arguments, str(tmp_path / "image.png")] if arguments else []
    output = ["--output", str(tmp_path / "clip.mp4")]
    assert t2v.main(["--model", str(tmp_path / "model"), "--prompt", CAPTION, *sizes, *image, *output]) == 0
    assert frames_of(tmp_path / "clip.mp4").shape == (9, 256, 384, 3)
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["flops"]["ratio"] <= 0.9 and record["seconds"]["text"] > 0 and record["seconds"]["decode"] > 0


@pytest.fixture(scope="module")
def ltx2(tmp_path_factory):
    """Its folder, and what the stock pipeline makes of CAPTION and seed 3."""
    folder, pipe = tmp_path_factory.mktemp("ltx2"), ltx2_with_text_and_sound()
    pipe.save_pretrained(folder)
    sizes = {"num_inference_steps": 4, "num_frames": 17, "height": 64, "width": 96}
    return folder, pipe(CAPTION, **sizes, generator=torch.Generator().manual_seed(3), output_type="np")


def test_sound_stands_beside_the_frames(ltx2, tmp_path):
    model, stock = ltx2
    sizes = "--steps 4 --frames 17 --height 64 --width 96 --device cpu --seed 3 --compare".split()
    output = ["--output", str(tmp_path / "clip.mp4"), "--prompt", CAPTION]
    assert t2v.main(["--model", str(model), *sizes, *output, "--schedule", "1x1x1:2,1x2x2/kept:1,1x1x1:1"]) == 0
    assert frames_of(tmp_path / "clip.mp4").shape == (17, 256, 384, 3)
    (own, own_rate), *others = sounds_of(tmp_path / "clip.mp4")
    assert own_rate == SOUND_RATE and len(own) == 2 and not others
    assert own.shape[1] == pytest.approx(SOUND_RATE * 17 / 24, rel=0.2)  # as long as the clip, in whole AAC frames
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert container.streams.video[0].average_rate == 24
    # Beside it full compute, fewer steps and ours, in this order.
    (full, rate), (fewer, _), (ours, _) = sounds_of(tmp_path / "clip-compare.mp4")
    assert rate == SOUND_RATE and frames_of(tmp_path / "clip-compare.mp4").shape == (17, 256 + 16, 3 * 384, 3)
    np.testing.assert_array_equal(ours, own)
    assert not any(np.array_equal(*pair) for pair in ((full, fewer), (full, ours), (fewer, ours)))
    truth = sound_of(ltx2_with_text_and_sound(), stock)
    heard = full[:, : truth.samples.shape[1]]
    np.testing.assert_allclose(heard, truth.samples, atol=0.1 * np.abs(truth.samples).max())  # but for what AAC loses
    write_mp4(frames_of(tmp_path / "clip.mp4"), tmp_path / "stock.mp4", 24, sounds=[truth])
    [(of_stock, _)] = sounds_of(tmp_path / "stock.mp4")
    np.testing.assert_array_equal(full, of_stock)


def test_usual_sizes_of_a_pipeline_that_does_not_say(ltx2):
    pipe = ltx2_with_text_and_sound()
    usual = usual_arguments(pipe)
    assert (usual["frames"], usual["height"], usual["width"], usual["fps"]) == (121, 512, 768, 24)
    # Sound has guidance of its own, and goes without where the video does.
    assert call_arguments(pipe, guidance_scale=1.0) == {"guidance_scale": 1.0, "audio_guidance_scale": 1.0}
    assert call_arguments(pipe, guidance_scale=3.0) == {"guidance_scale": 3.0}


@pytest.mark.parametrize("channels", [1, 2])
def test_a_tone_comes_back_as_high_and_as_long(tmp_path, channels):
    rate, pitch = 24000, 440
    tone = 0.5 * np.sin(2 * np.pi * pitch * np.arange(rate) / rate, dtype=np.float32)[None].repeat(channels, 0)
    write_mp4(np.zeros((24, 32, 32, 3), np.uint8), tmp_path / "tone.mp4", 24, sounds=[Sound(tone, rate)])
    [(found, found_rate)] = sounds_of(tmp_path / "tone.mp4")
    assert found_rate == rate and len(found) == channels and found.shape[1] == pytest.approx(rate, rel=0.1)
    spectrum = np.abs(np.fft.rfft(found[0][:rate]))
    assert np.fft.rfftfreq(rate, 1 / rate)[spectrum.argmax()] == pytest.approx(pitch, abs=1)
    assert np.abs(found[:, 2048 : rate - 2048]).max() == pytest.approx(0.5, abs=0.05)


def test_images_for_a_model_that_takes_none(tmp_path, capsys):
    with_text(tiny_family_pipeline("mochi")[0]).save_pretrained(tmp_path / "model")
    arguments = ["--prompt", CAPTION, "--output", str(tmp_path / "clip.mp4")]
    assert t2v.main([*arguments, "--model", str(tmp_path / "model"), "--image", "image.png"]) == 2
    assert "MochiPipeline takes no image" in capsys.readouterr().err
    with_text(tiny_family_pipeline("latte")[0]).save_pretrained(tmp_path / "latte")
    sizes = "--frames 5 --height 96 --width 96 --budget 0.01".split()
    assert t2v.main([*arguments, "--model", str(tmp_path / "latte"), *sizes]) == 2
    assert "budget 0.01 cannot be reached" in capsys.readouterr().err
    assert t2v.main([*arguments, "--image", "image.png"]) == 2
    assert "the embedded model takes no --image" in capsys.readouterr().err


def test_weights_that_are_pickled_are_not_read(model, tmp_path):
    """Not through a folder that a command was given, where `check_model` looks first, nor by what loads."""
    folder = tmp_path / "pickled"
    shutil.copytree(model, folder)
    torch.save({}, folder / "transformer/diffusion_pytorch_model.bin")
    (folder / "transformer/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(OSError, match="safetensors"):
        load(folder, WanPipeline, torch.float32)
