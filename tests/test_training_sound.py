"""Training of LTX-2, which makes sound beside the video: a step passes what stock does, sound as noisy as the video."""

from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DiffusionPipeline, LTX2ImageToVideoPipeline
from families import ltx2_with_text_and_sound
from training_runs import losses, train_here, write
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

import flexivid
from flexivid.diffusion import Diffusion
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.stock_pipelines import call_arguments
from flexivid.training.config import ClipsConfig, Config, DistillConfig
from flexivid.training.data.buckets import Bucket
from flexivid.training.data.clips import load_clip, load_sound
from flexivid.training.data.latents import LatentCache, build_cache
from flexivid.training.data.media import pictures
from flexivid.training.data.sound import FLOOR, encode_sound, log_mel
from flexivid.training.distill import load_base
from flexivid.training.forecast import check_model, forecast
from flexivid.training.noise import STREAM_NOISE, NoiseLevels, with_stream_noise
from flexivid.training.student import build_student, distillation_loss, predict, weak_errors
from flexivid.training.validation import picture_of

FRAMES, HEIGHT, WIDTH, FPS = 9, 32, 64, 10
BUCKET = f"{FRAMES}x{HEIGHT}x{WIDTH}"
TOKENS = 22  # of sound, of which 25 a second: round(.9 * 25) = round(22.5), to even
SOUND = "audio_hidden_states"
RATE = 16000


def write_with_sound(
    path: Path,
    sound: np.ndarray | None,
    rate: int = 48000,
    frames: int = FRAMES,
    size: tuple[int, int] = (HEIGHT, WIDTH),
    fps: int = FPS,
):
    """A clip of noise, and the sound, (samples,) or (2, samples), if there is one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(len(path.stem))
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=fps, options={"threads": "1", "crf": "0", "bf": "0"})
        video.height, video.width, video.pix_fmt = *size, "yuv420p"
        layout = "mono" if sound is None or sound.ndim == 1 else "stereo"
        if sound is not None:
            audio = container.add_stream("flac" if path.suffix == ".mkv" else "aac", rate=rate, layout=layout)
        for number in range(frames):
            coarse = generator.integers(0, 256, (size[0] // 8, size[1] // 8, 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(coarse.repeat(8, 0).repeat(8, 1), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if sound is not None:
            sound = np.atleast_2d(sound).astype(np.float32)
            for start in range(0, sound.shape[1], 1024):
                part = np.ascontiguousarray(sound[:, start : start + 1024])
                if path.suffix == ".mkv":  # flac takes whole numbers
                    whole = (part * 32767).astype(np.int16).T.reshape(1, -1)
                    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(whole), format="s16", layout=layout)
                else:
                    frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=layout)
                frame.rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    path.with_suffix(".txt").write_text("a red circle")
    return path


def tone(seconds: float, hertz: float = 440.0, rate: int = 48000) -> np.ndarray:
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


@pytest.fixture
def clips(tmp_path) -> Path:
    """One with sound, one whose sound is another, one without."""
    folder = tmp_path / "clips"
    write_with_sound(folder / "low.mp4", tone(0.9, 300.0))
    write_with_sound(folder / "higher.mp4", np.stack([tone(0.9, 2000.0), tone(0.9, 900.0)]))
    write_with_sound(folder / "silent.mp4", None)
    return folder


@pytest.fixture(autouse=True)
def one_process():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def with_image(pipe) -> LTX2ImageToVideoPipeline:
    return LTX2ImageToVideoPipeline(**pipe.components)


KINDS = {"text": lambda pipe: pipe, "image": with_image}


def cache_of(pipe, folder: Path, **more) -> LatentCache:
    settings = {"buckets": [BUCKET], "fps": FPS, "max_sequence_length": 16, "held_out": 0, "drop_caption": 0.0}
    config = ClipsConfig(folder=folder, cache=folder.parent / "cache", **settings | more)
    return build_cache(config, pipe, Accelerator(cpu=True))


def state_of(pipe, x_0: torch.Tensor, conditions: dict, timestep: torch.Tensor):
    """Noisy video and sound, and the noise of the latter."""
    family, generator = family_of(pipe.transformer), torch.Generator().manual_seed(4)
    diffusion = Diffusion(family.prediction, family.time_scale)
    levels = NoiseLevels(diffusion, 3.0, patch_size_of(pipe.transformer.config), family)
    noise = torch.randn(x_0.shape, generator=generator)
    conditions = with_stream_noise(conditions, family, len(x_0), generator)
    return levels.state(x_0, noise, timestep, conditions), conditions[STREAM_NOISE]


@torch.no_grad()
def passed(pipe, run) -> list[dict]:
    """The arguments of every forward that `run` makes."""
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, _, kwargs: seen.append(kwargs), with_kwargs=True)
    run()
    handle.remove()
    return [{key: value for key, value in given.items() if value is not None} for given in seen]


def clip_of(place) -> Path:
    return Path(place.name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_passes_what_the_stock_pipeline_passes(clips, kind):
    """Every argument, at the first step of the stock pipeline and a later one, but the latents of another clip."""
    pipe = KINDS[kind](ltx2_with_text_and_sound())
    pipe.set_progress_bar_config(disable=True)
    cache, family = cache_of(pipe, clips), family_of(pipe.transformer)
    sizes = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "text_length": 16, "fps": FPS}
    call = call_arguments(pipe, **sizes, steps=4, guidance_scale=1.0) | {"stg_scale": 0.0, "audio_stg_scale": 0.0}
    call |= {"modality_scale": 1.0, "audio_modality_scale": 1.0}
    assert len(cache.places[BUCKET]) == 3
    for place in cache.places[BUCKET]:
        frames = load_clip(clip_of(place), [Bucket.parse(BUCKET)], FPS)[1]
        image = {"image": pictures(frames[:, :1])[0]} if kind == "image" else {}
        stock = passed(pipe, lambda image=image: pipe(prompt="a red circle", **call, **image, output_type="latent"))
        assert len(stock) == 4 and [SOUND in given for given in stock] == [True] * 4
        for given in (stock[0], stock[2]):
            state, _ = state_of(pipe, *cache._read(BUCKET, [place], [False]), given["timestep"].max()[None])
            arguments = (pipe.transformer, family, state.x_t, state.timestep, state.conditions)
            (trained,) = passed(pipe, lambda arguments=arguments: predict(*arguments))
            assert trained.keys() == given.keys()
            for name in given.keys() - {"hidden_states", SOUND}:
                told, stocks = trained[name], given[name]
                if torch.is_tensor(stocks) and "encoder" in name:  # shards hold text in half precision
                    told, stocks = told.half(), stocks.half()
                assert torch.equal(told, stocks) if torch.is_tensor(stocks) else told == stocks, name
            assert all(trained[name].shape == given[name].shape for name in ("hidden_states", SOUND))
            assert (given["timestep"].ndim > 1) == ("audio_timestep" in given) == (kind == "image")
            if kind == "image":
                clean = [family.latents(one)[:, :, 0].half() for one in (trained, given)]
                assert torch.equal(*clean) and clean[0].any()


def test_sound_is_as_noisy_as_the_video_and_told_so(clips):
    pipe = ltx2_with_text_and_sound()
    cache = cache_of(pipe, clips)
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False, True, False])
    timestep = torch.tensor([900.0, 500.0, 100.0])
    state, noise = state_of(pipe, x_0, conditions, timestep)
    sigma = (timestep / 1000).view(-1, 1, 1)
    torch.testing.assert_close(state.conditions[SOUND], (1 - sigma) * conditions[SOUND] + sigma * noise)
    assert torch.equal(state.conditions["sigma"], timestep) and STREAM_NOISE not in state.conditions
    assert conditions[SOUND].shape == (3, TOKENS, 4) and noise.std() > 0.8


def test_each_clip_has_its_own_sound_and_one_without_is_silent(clips):
    pipe = ltx2_with_text_and_sound()
    cache = cache_of(pipe, clips)
    _, conditions = cache._read(BUCKET, cache.places[BUCKET], [True] * 3)  # whatever its caption
    sound = {clip_of(place).stem: row for place, row in zip(cache.places[BUCKET], conditions[SOUND], strict=True)}
    silence = encode_sound(pipe, torch.zeros(2, 14400), TOKENS)
    torch.testing.assert_close(sound["silent"], silence, atol=2e-3, rtol=2e-3)
    truth = {
        name: encode_sound(pipe, load_sound(clips / f"{name}.mp4", Bucket(9, 1, 1), FPS, RATE), TOKENS)
        for name in sound
    }
    for name, latents in truth.items():
        assert torch.equal(latents.half(), sound[name].half())
        assert name == "silent" or (latents - silence).abs().max() > 0.01
    assert (truth["low"] - truth["higher"]).abs().max() > 0.01


def test_a_spectrogram_is_that_of_another_implementation():
    samples = torch.randn(2, 16000, generator=torch.Generator().manual_seed(0))
    samples[1, 4000:9000] = 0
    filters = mel_filter_bank(513, 64, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
    window = window_function(1024, "hann", periodic=True)
    settings = {"power": 1.0, "mel_filters": filters, "mel_floor": FLOOR, "log_mel": "log"}
    found = log_mel(samples, 16000, 160, 64)
    for one, other in zip(found, samples.numpy(), strict=True):
        truth = spectrogram(other, window, 1024, 160, **settings)
        np.testing.assert_allclose(one.numpy(), truth.T, atol=1e-3)
    assert found.min() == pytest.approx(np.log(FLOOR))


def test_latents_of_sound_are_those_that_the_stock_pipeline_decodes():
    pipe = ltx2_with_text_and_sound()
    pipe.audio_vae.latents_mean.normal_()
    pipe.audio_vae.latents_std.uniform_(0.5, 2.0)
    samples = torch.randn(2, 14400)
    packed = encode_sound(pipe, samples, TOKENS)[None]
    raw = pipe._denormalize_audio_latents(packed, pipe.audio_vae.latents_mean, pipe.audio_vae.latents_std)
    raw = pipe._unpack_audio_latents(raw, TOKENS, num_mel_bins=2)
    mel = log_mel(torch.nn.functional.pad(samples, (0, 1024)), 16000, 160, 8)[None, :, : 4 * TOKENS - 3]
    with torch.no_grad():
        torch.testing.assert_close(raw, pipe.audio_vae.encode(mel).latent_dist.mode(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("ending", "rate"), [("mp4", 48000), ("mkv", 44100)])  # whose times are in milliseconds
def test_sound_is_cut_with_the_frames(tmp_path, ending, rate):
    """Of 30 frames the 9 in the middle begin at 1.1 s (10.5, rounded): a click at 1.5 s is heard .4 s later."""
    sound = tone(3.0, 200.0, rate) * 0.2
    sound[int(1.5 * rate) :][:48] = 0.9
    path = write_with_sound(tmp_path / f"clip.{ending}", sound, rate, frames=30)
    heard = load_sound(path, Bucket.parse(BUCKET), FPS, RATE)
    assert heard.shape == (2, 14400) and torch.equal(heard[0], heard[1])
    assert int(heard[0].abs().argmax()) / RATE == pytest.approx(0.4, abs=0.003)
    quiet = heard[0, :6000]
    assert quiet.std() == pytest.approx(0.1 / 2**0.5, rel=0.05)  # one channel is no softer in both
    assert quiet.diff().abs().max() < 0.02  # no tear where parts of the file meet


def test_sound_that_ends_before_the_clip_is_silent_from_there(tmp_path):
    heard = load_sound(write_with_sound(tmp_path / "clip.mp4", tone(0.4)), Bucket.parse(BUCKET), FPS, RATE)
    assert heard[0, :6000].std() > 0.3 and not heard[0, 8000:].any()


def test_teacher_samples_are_what_the_stock_pipeline_ends_with(tmp_path):
    pipe, prompts, ends = ltx2_with_text_and_sound(), tmp_path / "prompts.txt", []
    pipe.vae.latents_mean.normal_()
    pipe.audio_vae.latents_std.uniform_(0.5, 2.0)
    prompts.write_text("a red circle\n")
    settings = {"buckets": [BUCKET], "fps": FPS, "max_sequence_length": 16, "held_out": 0, "drop_caption": 0.0}
    config = ClipsConfig(prompts=prompts, cache=tmp_path / "cache", teacher_steps=3, teacher_guidance=3.0, **settings)
    cache = build_cache(config, pipe, Accelerator(cpu=True))
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False])

    def keep(pipe, index, timestep, tensors):
        ends.append(tensors["latents"])
        return {}

    sizes = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "text_length": 16, "fps": FPS}
    call = call_arguments(pipe, **sizes, steps=3, guidance_scale=3.0) | {"callback_on_step_end": keep}
    with torch.no_grad():
        output = pipe(prompt="a red circle", **call, generator=torch.Generator().manual_seed(0), output_type="latent")
    family = family_of(pipe.transformer)
    torch.testing.assert_close(family.packed(x_0), ends[-1], atol=5e-3, rtol=5e-3)
    raw = pipe._denormalize_audio_latents(conditions[SOUND], pipe.audio_vae.latents_mean, pipe.audio_vae.latents_std)
    torch.testing.assert_close(pipe._unpack_audio_latents(raw, TOKENS, 2), output.audio, atol=1e-2, rtol=1e-2)


def settings_of(tmp_path: Path, clips: Path, kind: str) -> dict:
    ltx2_with_text_and_sound().save_pretrained(tmp_path / "base")
    data = {"folder": str(clips), "cache": str(tmp_path / "cache"), "buckets": [BUCKET], "fps": FPS}
    return {
        "objective": "distill",
        "base": str(tmp_path / "base"),
        "steps": 2,
        "batch_size": 2,
        "log_every": 1,
        "sample_every": 1000,
        "clips": data | {"max_sequence_length": 16, "first_frame": kind == "image"},
        "distill": {"modes": ["1x2x2"], "rank": 4, "correction_gap": 0.2},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_two_steps_from_a_folder_and_a_sample(tmp_path, clips, kind, monkeypatch, capsys):
    monkeypatch.setattr("flexivid.training.distill.SIGMAS", (0.9,))
    settings = settings_of(tmp_path, clips, kind)
    path, output = write(tmp_path, "run", settings)
    assert train_here(path) == 0
    assert np.isfinite(losses(output)).all() and len(losses(output)) == 2
    capsys.readouterr()
    assert train_here(path, "--dry-run") == 0
    assert "TFLOP a step" in capsys.readouterr().out
    pipe = KINDS[kind](DiffusionPipeline.from_pretrained(tmp_path / "base"))
    pipe.set_progress_bar_config(disable=True)
    flexivid.enable(pipe, adapter=output / "result", budget=0.6, order="interleaved")
    call = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH, "num_inference_steps": 6, "max_sequence_length": 16}
    frames = load_clip(clips / "low.mp4", [Bucket.parse(BUCKET)], FPS)[1]
    image = {"image": pictures(frames[:, :1])[0]} if kind == "image" else {}
    video, sound = pipe(prompt="a red circle", **call, **image, output_type="latent", return_dict=False)
    assert video.isfinite().all() and sound.isfinite().all() and flexivid.summary(pipe).ratio <= 0.6


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_lora_and_sound_has_layers_of_its_own(clips, kind):
    pipe = KINDS[kind](ltx2_with_text_and_sound())
    cache = cache_of(pipe, clips)
    student = build_student(pipe.transformer, DistillConfig(modes=["1x2x2"], rank=4))
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # they start at zero, and so would the gradients of the others
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False] * 3)
    state, _ = state_of(pipe, x_0, conditions, torch.tensor([900.0, 500.0, 100.0]))
    errors = weak_errors(student, student._flex[0], ["1x2x2"], state)
    distillation_loss(errors).backward()
    loras = {name: weight for name, weight in student.named_parameters() if "lora_" in name}
    assert loras and all(weight.grad is not None and weight.grad.any() for weight in loras.values())
    assert not any("audio" in name for name in loras)  # sound is the stock's: nothing of its own is trained
    if kind == "image":
        assert not errors[:, :, :, 0].any() and torch.equal(state.x_t[:, :, 0], x_0[:, :, 0])


def test_sound_matters_to_the_loss(clips):
    """Video looks at sound: had it another noise level, teacher and student would be asked something else."""
    pipe = ltx2_with_text_and_sound()
    cache, family = cache_of(pipe, clips), family_of(pipe.transformer)
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False] * 3)
    state, noise = state_of(pipe, x_0, conditions, torch.full((3,), 300.0))
    with torch.no_grad():
        right, at_first = (
            predict(pipe.transformer, family, state.x_t, state.timestep, state.conditions | {SOUND: sound})
            for sound in (state.conditions[SOUND], noise)
        )
    assert (right - at_first).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (
            {"objective": "shared", "distill": {"modes": ["1x2x2"]}},
            "LTX2VideoTransformer3DModel makes sound, which shared does not train: use distill",
        ),
        (
            {"objective": "few", "distill": None},
            "LTX2VideoTransformer3DModel makes sound, which few does not train: use distill",
        ),
        (
            {"distill": {"modes": ["1x2x2"], "rank": 4, "on_policy": 0.5}},
            "on_policy is for pipelines such as Wan's",
        ),
        (
            {"clips": {"max_sequence_length": 18}},
            "clips.max_sequence_length is 18: for .*base it must be a multiple of 4",
        ),
    ],
)
def test_what_is_not_built_is_refused_before_anything_is_loaded(tmp_path, clips, monkeypatch, more, said):
    settings = settings_of(tmp_path, clips, "text") | {"output": tmp_path / "out"}
    settings |= more | {"clips": settings["clips"] | more.get("clips", {})}
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    config = Config(**{name: value for name, value in settings.items() if value is not None})
    with pytest.raises(ValueError, match=said) as caught:
        check_model(config)
    assert "\n" not in str(caught.value)


def test_a_clip_whose_sound_cannot_be_read_is_skipped_with_the_reason(clips, monkeypatch):
    def broken(path, rate):
        raise av.InvalidDataError(1, "Invalid data found when processing input")
        yield

    monkeypatch.setattr("flexivid.training.data.readers._sounds", broken)
    with pytest.raises(ValueError, match=r"low.mp4: its sound cannot be read: Invalid data found"):
        cache_of(ltx2_with_text_and_sound(), clips)


@pytest.mark.parametrize("kind", KINDS)
def test_a_forecast_in_half_precision(tmp_path, clips, kind):
    settings = settings_of(tmp_path, clips, kind) | {"output": tmp_path / "out"}
    assert "TFLOP a step" in forecast(Config(**settings), 1, mixed_precision=True)


def test_a_base_in_half_precision_has_its_vaes_in_full(tmp_path, clips):
    config = Config(**settings_of(tmp_path, clips, "image") | {"output": tmp_path / "out", "base_dtype": "bfloat16"})
    pipe = load_base(config)
    kinds = {
        name: getattr(pipe, name).dtype for name in ("transformer", "text_encoder", "connectors", "vae", "audio_vae")
    }
    assert list(kinds.values()) == [torch.bfloat16] * 3 + [torch.float32] * 2
    assert len(cache_of(pipe, clips).places[BUCKET]) == 3


def test_all_that_a_picture_needs_is_on_the_device_meanwhile(tmp_path, clips):
    pipe, config = ltx2_with_text_and_sound(), Config(**settings_of(tmp_path, clips, "text"), output=tmp_path / "out")
    drawing = picture_of(pipe, config, SimpleNamespace(device="meta"), tmp_path / "picture.png", steps=2)
    drawing.__enter__()
    modules = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert {name for name, part in modules.items() if part.device.type != "meta"} == {"transformer"}
