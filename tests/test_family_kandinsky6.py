"""Kandinsky 6: sound beside the video, told one timestep with it, and an image as a frame behind the clip."""

from types import SimpleNamespace

import pytest
import torch
from einops import rearrange
from families import (
    CHANNELS,
    STEPS,
    attach,
    check_sound_is_stock,
    grid_for,
    inputs,
    sample_with_sound,
    tiny,
    tiny_image_pipeline,
    tiny_pipeline,
)

import flexivid
from flexivid.sampling.flops import flop_counter_mode
from flexivid.shapes.build import build_tokenizer
from flexivid.stock_pipelines import sound_of, unknown_words
from flexivid.training.config import Config
from flexivid.training.forecast import check_model

PIPELINES = [lambda: tiny_pipeline("kandinsky6"), lambda: tiny_image_pipeline("kandinsky6-i2v")]


@pytest.mark.parametrize("make", PIPELINES)
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_sound_is_stock_too(make, guidance_scale):
    pipe, call = make()
    check_sound_is_stock(pipe, call | {"guidance_scale": guidance_scale}, budget=0.5)


@pytest.mark.parametrize("make", PIPELINES)
@pytest.mark.parametrize("sample_audio", [True, False])
@pytest.mark.parametrize("budget", [0.6, 0.3])
def test_flops_are_counted_with_and_without_sound(make, sample_audio, budget):
    pipe, call = make()
    call["sample_audio"] = sample_audio
    with flop_counter_mode() as full:
        stock = sample_with_sound(pipe, call)
    assert (stock[1] is not None) == sample_audio
    flexivid.enable(pipe, budget=budget, modes=["2x4x4"])
    first = sample_with_sound(pipe, call)
    with flop_counter_mode() as counter:
        second = sample_with_sound(pipe, call)
    assert torch.equal(first[0], second[0]) and not torch.equal(first[0], stock[0])
    summary = flexivid.summary(pipe)
    assert len(summary.steps) == STEPS and summary.ratio <= budget
    # Beside the transformer its pipeline encodes the image.
    outside = full.get_total_flops() - summary.flops_full
    assert outside == 0 if "image" not in call else outside > 0
    assert counter.get_total_flops() == summary.flops_used + outside


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_sound_is_told_its_own_noise_level(parametrisation):
    transformer = tiny("kandinsky6")
    flex = attach(transformer, ["1x4x4"], parametrisation)
    flex.fix("1x4x4")
    call, told = inputs(transformer, grid_for(transformer, 4, 6)), {}
    for name in ("video_time_embeddings", "audio_time_embeddings"):
        transformer.get_submodule(f"{name}.time_proj").register_forward_pre_hook(
            lambda module, args, name=name: told.update({name: args[0].tolist()})
        )
    with torch.no_grad():
        transformer(**call)
    assert told["audio_time_embeddings"] == [800.0] * 2
    expected = 1000 * 0.4 / 0.6 if parametrisation == "snr" else 800.0  # the mean of four: sigma .4 / (.2 + .4)
    assert told["video_time_embeddings"] == pytest.approx([expected] * 2)


def image_call(transformer, frames: int) -> dict:
    """As the pipeline calls its transformer: a given frame behind so many of the clip."""
    call = inputs(transformer, (frames + 1, 8, 12))
    latents = call["hidden_states"]
    latents[..., CHANNELS:] = 0
    latents[:, -1, ..., -1] = 1
    types = torch.zeros(2, frames + 1, dtype=torch.long)
    types[:, -1] = 1
    places = torch.cat([torch.arange(frames), torch.zeros(1, dtype=torch.long)])
    return call | {"visual_token_type_ids": types, "visual_rope_pos": (places, torch.arange(4), torch.arange(6))}


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
@pytest.mark.parametrize("frames", [4, 5])
def test_an_image_stays_clean_and_by_itself(frames, parametrisation):
    """At twice the frames an even clip ends in half a block, which a frame behind it would fill."""
    transformer, seen = tiny("kandinsky6"), {}
    call = image_call(transformer, frames)

    def note(name: str, given: bool):
        def hook(module, args, output):
            seen[name] = args[0] if given else output

        transformer.get_submodule(name).register_forward_hook(hook)

    for name in ("visual_token_type_embeddings", "video_time_embeddings", "visual_embeddings"):
        note(name, given=True)
    note("visual_rope_embeddings", given=False)
    flex = attach(transformer, ["2x4x4"], parametrisation)
    flex.fix("2x4x4")
    with torch.no_grad():
        output = transformer(**call)
    assert output.sample.shape == (2, frames + 1, 8, 12, CHANNELS) and output.sample.isfinite().all()
    coarse = 1 + -(-(frames - 1) // 2) + 1  # the first frame, the others in twos, the image
    assert seen["visual_token_type_embeddings"].tolist() == [[0] * (coarse - 1) + [1]] * 2
    assert seen["video_time_embeddings"].shape == (2,)
    folded = rearrange(call["hidden_states"][:, -1], "b (h m) (w n) c -> b h w (m n c)", m=2, n=2)
    assert torch.equal(seen["visual_embeddings"][:, -1], folded.repeat(1, 1, 1, 2))  # both frames of a block are it
    rotations = seen["visual_rope_embeddings"]
    assert len(rotations) == coarse
    torch.testing.assert_close(rotations[-1], rotations[0])  # at the place of the first frame, which stands alone
    assert not torch.allclose(rotations[-2], rotations[0])
    if parametrisation == "snr":  # nothing is left to predict
        assert not output.sample[:, -1].any() and output.sample[:, :-1].any()


def test_what_kandinsky6_does_not_take_is_refused():
    with pytest.raises(ValueError, match="with out_visual_dim 40 is not supported: only 4 is"):
        attach(tiny("kandinsky6", out_visual_dim=10 * CHANNELS, out_audio_dim=20), ["1x4x4"])
    transformer = tiny("kandinsky6")
    flex, call = attach(transformer, ["1x4x4"]), image_call(transformer, 5)
    flex.family.check(call)
    flex.family.check(inputs(transformer, (5, 8, 12)) | {"hidden_states": torch.zeros(2, 5, 8, 12, 2 * CHANNELS + 1)})
    first = call["hidden_states"].flip(1)  # a mask that names the first frame
    for wrong in ({"hidden_states": first}, {"visual_token_type_ids": None}):
        with pytest.raises(ValueError, match="Kandinsky 6 is given an image as its pipeline gives it"):
            flex.family.check(call | wrong)


@pytest.mark.parametrize(
    "pipeline, said",
    [
        (lambda: tiny_image_pipeline("kandinsky6-i2v")[0], "Kandinsky6Transformer3DModel makes sound"),
        (lambda: tiny_pipeline("kandinsky5")[0], "Kandinsky5Transformer3DModel takes text of two encoders"),
    ],
)
def test_training_is_refused(tmp_path, pipeline, said):
    pipeline().save_pretrained(tmp_path / "base")
    clips = {"folder": tmp_path, "cache": tmp_path / "cache", "buckets": ["17x64x96"]}
    settings = {"objective": "distill", "steps": 1, "batch_size": 1, "distill": {"modes": ["1x4x4"], "rank": 4}}
    config = Config(**settings, base=tmp_path / "base", output=tmp_path / "out", clips=clips)
    with pytest.raises(ValueError, match=f"{said}.*: it cannot be trained yet"):
        check_model(config)


def test_sound_of_a_clip():
    pipe, call = tiny_image_pipeline("kandinsky6-i2v")
    with torch.no_grad():
        output = pipe(**call | {"output_type": "np", "num_inference_steps": 1, "num_frames": 9})
    sound = sound_of(pipe, output)
    assert sound.rate == 8000 and sound.samples.shape == (1, 3 * 1024)  # 9 frames of 24 a second, in whole latents
    assert sound.samples.any()


def test_words_that_the_tokenizer_of_a_processor_does_not_know():
    tokenizer = build_tokenizer()
    pipe = SimpleNamespace(tokenizer=SimpleNamespace(tokenizer=tokenizer))
    assert unknown_words(pipe, "qwertz") == unknown_words(SimpleNamespace(tokenizer=tokenizer), "qwertz") == ["qwertz"]
