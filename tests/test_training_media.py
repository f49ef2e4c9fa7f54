"""Training of models that take an image or a control video beside the prompt: a step passes what stock passes."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import every_of
from diffusers import HunyuanVideo15Pipeline, WanVACEPipeline
from families import tiny, tiny_image_pipeline, tiny_pipeline, trainable_hunyuan_15, with_text
from PIL import Image
from safetensors.torch import load_file
from training_runs import ROOT, losses, train_here, write

from flexivid.diffusion import Diffusion
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.patches.sizes import spatially_doubled
from flexivid.stock_pipelines import call_arguments
from flexivid.training.config import ClipsConfig, Config, DistillConfig
from flexivid.training.data import sources
from flexivid.training.data.clips import Reader, find_clips
from flexivid.training.data.latents import LatentCache, build_cache
from flexivid.training.distill import DistillObjective
from flexivid.training.forecast import check_model, forecast
from flexivid.training.noise import NoiseLevels, State
from flexivid.training.student import build_student, distillation_loss, predict, weak_errors
from flexivid.video import write_mp4

# Beside the prompt; hunyuan-video-1.5 fills the channels of an image without one.
MEDIA = {"wan-vace": "a control video", "hunyuan-video-1.5": None}
NAMES = ("wan2.1-i2v", "wan2.2-i2v", "wan2.2-ti2v", "ltx-i2v", "wan-vace", "hunyuan-video-1.5")
every_kind = every_of(NAMES, quick=["wan2.1-i2v", "ltx-i2v", "wan-vace"])
CLEAN_FRAME = ("wan2.2-ti2v", "ltx-i2v")  # to which the first frame is given as latents without noise
FRAMES, HEIGHT, WIDTH = 5, 32, 64
BUCKET = f"{FRAMES}x{HEIGHT}x{WIDTH}"
CAPTIONS = {"a": "a red circle", "b": "a striped blue square growing", "c": "a green triangle"}


def tiny_media_pipeline(name: str):
    """A stock pipeline that takes more than a prompt, which can be saved and trained on clips."""
    if name == "hunyuan-video-1.5":
        return trainable_hunyuan_15()
    if name == "wan-vace":
        pipe = tiny_pipeline(name)[0]
    elif name == "wan2.2-i2v":  # as Wan2.1's, without CLIP
        pipe = tiny_image_pipeline("wan2.1-i2v")[0]
        transformer = tiny("wan-i2v", image_dim=None, added_kv_proj_dim=None)
        pipe.register_modules(transformer=transformer, image_encoder=None, image_processor=None)
    else:
        pipe = tiny_image_pipeline(name)[0]
    return with_text(pipe)


def write_noise(path, seed: int, frames: int = FRAMES, height: int = HEIGHT, levels: int = 256) -> None:
    """A clip whose frames are like no other's. levels: of grey, or 2, as of a mask."""
    coarse = np.random.default_rng(seed).integers(0, levels, (frames, height // 8, WIDTH // 8, 3 if levels > 2 else 1))
    pixels = np.broadcast_to(coarse * (255 // (levels - 1)), (*coarse.shape[:3], 3)).astype(np.uint8)
    write_mp4(pixels.repeat(8, 1).repeat(8, 2), path, 10, crf=0)


@pytest.fixture
def clips(tmp_path):
    """a with a control video, b with a mask too, c with a mask alone."""
    folder = tmp_path / "clips"
    folder.mkdir()
    for seed, name in enumerate(("a.control", "b.control", "b.mask", "c.mask"), 10):
        write_noise(folder / f"{name}.mp4", seed, levels=2 if "mask" in name else 256)
    for seed, (name, caption) in enumerate(CAPTIONS.items()):
        write_noise(folder / f"{name}.mp4", seed)
        (folder / f"{name}.txt").write_text(caption)
    return folder


def images(path) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in Reader(path).read(np.arange(FRAMES))]


def stock_media(pipe, folder, name: str) -> dict:
    """What a user gives to the stock pipeline beside the prompt, for a clip of the folder."""
    if isinstance(pipe, HunyuanVideo15Pipeline):
        return {}
    if not isinstance(pipe, WanVACEPipeline):
        return {"image": images(folder / f"{name}.mp4")[0]}
    control, mask = (folder / f"{name}.{kind}.mp4" for kind in ("control", "mask"))
    media = {"video": images(control if control.exists() else folder / f"{name}.mp4")}
    return media | ({"mask": [image.convert("L") for image in images(mask)]} if mask.exists() else {})


def cache_of(pipe, folder, **more) -> LatentCache:
    settings = {"buckets": [BUCKET], "fps": 10, "max_sequence_length": 16, "held_out": 0, "drop_caption": 0.0}
    config = ClipsConfig(folder=folder, cache=folder.parent / "cache", **settings | more)
    return build_cache(config, pipe, Accelerator(cpu=True))


@pytest.fixture(autouse=True)
def one_process():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def passed(pipe, run) -> dict:
    """The arguments of the first forward that `run` makes."""
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda module, _, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    return {name: value for name, value in seen[0].items() if value is not None and name != "return_dict"}


def stock_forward(pipe, caption: str, media: dict) -> dict:
    sizes = {"frames": FRAMES, "height": HEIGHT, "width": WIDTH, "text_length": 16, "fps": 10}
    call = call_arguments(pipe, **sizes, steps=4, guidance_scale=1.0) | media
    generator = torch.Generator().manual_seed(0)
    return passed(pipe, lambda: pipe(prompt=caption, **call, generator=generator, output_type="latent"))


def state_of(pipe, x_0: torch.Tensor, conditions: dict, timestep: float = 700.0) -> State:
    family = family_of(pipe.transformer)
    diffusion = Diffusion(family.prediction, family.time_scale)
    levels = NoiseLevels(diffusion, 3.0, patch_size_of(pipe.transformer.config), family)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(4))
    return levels.state(x_0, noise, torch.full((len(x_0),), timestep), conditions)


def trained_forward(pipe, state: State) -> dict:
    arguments = pipe.transformer, family_of(pipe.transformer), state.x_t, state.timestep, state.conditions
    return passed(pipe, lambda: predict(*arguments))


def assert_same(name: str, trained: torch.Tensor, stock: torch.Tensor) -> None:
    """In the half precision in which shards hold them."""
    if torch.is_tensor(stock):
        assert torch.equal(trained.half(), stock.half()), name
    else:
        assert trained == stock, name


@every_kind
def test_a_step_passes_what_the_stock_pipeline_passes(clips, name):
    pipe = tiny_media_pipeline(name)
    cache = cache_of(pipe, clips)
    family, channels = family_of(pipe.transformer), pipe.vae.config.get("z_dim") or pipe.vae.config["latent_channels"]
    for place in cache.places[BUCKET]:
        clip = place.name.rsplit("/", 1)[1].removesuffix(".mp4")
        stock = stock_forward(pipe, CAPTIONS[clip], stock_media(pipe, clips, clip))
        scale = stock.pop("control_hidden_states_scale", torch.ones(1))
        assert (scale == 1).all()  # which the forward takes if it is not told
        level = float(stock["timestep"].max())
        state = state_of(pipe, *cache._read(BUCKET, [place], [False]), timestep=level)
        trained = trained_forward(pipe, state)
        assert trained.keys() == stock.keys()
        for argument in stock.keys() - {"hidden_states"}:
            assert_same(argument, trained[argument], stock[argument])
        given, latents = family.latents(trained), family.latents(stock)
        assert given.shape == latents.shape
        assert_same("channels beside the latents", given[:, channels:], latents[:, channels:])
        assert (stock["timestep"].ndim > 1) == (name in CLEAN_FRAME)
        if name in CLEAN_FRAME:
            assert (stock["timestep"] == 0).any()
            assert_same("clean latents", given[:, :channels, 0], latents[:, :channels, 0])
        assert not torch.equal(given[:, :channels, 1:], latents[:, :channels, 1:])


@every_kind
def test_an_empty_caption_leaves_a_clip_its_own_image(clips, name):
    pipe = tiny_media_pipeline(name)
    cache = cache_of(pipe, clips)
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False] * 3)
    dropped, without = cache._read(BUCKET, cache.places[BUCKET], [True] * 3)
    assert torch.equal(x_0, dropped)
    for found in (without, cache.unconditional(x_0, conditions)):
        changed = {key for key in conditions if torch.is_tensor(found[key]) and (found[key] != conditions[key]).any()}
        assert "encoder_hidden_states" in changed <= {"encoder_hidden_states", "encoder_attention_mask"}


@every_kind
def test_the_loss_is_of_what_is_noisy_and_gradients_arrive(clips, name):
    pipe = tiny_media_pipeline(name)
    cache = cache_of(pipe, clips)
    weak = spatially_doubled(patch_size_of(pipe.transformer.config))
    student = build_student(pipe.transformer, DistillConfig(modes=[weak], rank=4))
    x_0, conditions = cache._read(BUCKET, cache.places[BUCKET], [False] * 3)
    state = state_of(pipe, x_0, conditions)
    errors = weak_errors(student, student._flex[0], [weak], state)
    assert errors[:, :, :, 1:].square().mean() > 0
    if name in CLEAN_FRAME:
        assert not errors[:, :, :, 0].any() and torch.equal(state.x_t[:, :, 0], x_0[:, :, 0])
    loss = distillation_loss(errors)
    loss.backward()
    trained = [p for n, p in student.named_parameters() if p.requires_grad]
    assert loss.isfinite() and all(p.grad is not None for p in trained)
    assert sum(bool(p.grad.any()) for p in trained) > len(trained) // 2


class Killed(Exception):
    pass


@every_kind
def test_two_steps_from_a_folder_and_on_after_a_kill(tmp_path, clips, name, monkeypatch, capsys):
    pipe = tiny_media_pipeline(name)
    pipe.save_pretrained(tmp_path / "base")
    settings = {
        "objective": "distill",
        "base": str(tmp_path / "base"),
        "steps": 3,
        "batch_size": 2,
        "log_every": 1,
        "save_every": 1,
        "sample_every": 1000,
        "clips": {"folder": str(clips), "cache": str(tmp_path / "cache"), "buckets": [BUCKET], "fps": 10},
        "distill": {"modes": [spatially_doubled(patch_size_of(pipe.transformer.config))], "rank": 4},
    }
    settings["clips"] |= {"max_sequence_length": 16, "first_frame": name in CLEAN_FRAME}
    index = tmp_path / "base/model_index.json"
    if name in CLEAN_FRAME:  # as they are published
        index.write_text(index.read_text().replace("ImageToVideo", ""))
    monkeypatch.setattr("flexivid.training.distill.SIGMAS", (0.9,))
    whole, output = write(tmp_path, "whole", settings)
    assert train_here(whole) == 0
    assert np.isfinite(losses(output)).all() and len(losses(output)) == 3
    media = MEDIA.get(name, "an image")
    card = (output / "result/README.md").read_text()
    assert f"data: clips of `clips`{f', with {media} for each' if media else ''}\n" in card
    capsys.readouterr()
    assert train_here(whole, "--dry-run") == 0
    said = capsys.readouterr().out
    assert f"MiB of {tmp_path}/cache{f', with what the pipeline makes of {media}' if media else ''}\n" in said
    killed, again = write(tmp_path, "killed", settings)
    loss = DistillObjective.loss

    def until_killed(self, model, step, micro_batch):
        if step == 2:
            raise Killed
        return loss(self, model, step, micro_batch)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(DistillObjective, "loss", until_killed)
        train_here(killed)
    assert train_here(killed) == 0
    assert losses(again) == losses(output)
    one, other = (load_file(folder / "result/flexivid.safetensors") for folder in (output, again))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    ("change", "made"),
    [
        (lambda folder: write_noise(folder / "b.mask.mp4", 30, levels=2), 3),
        (lambda folder: (folder / "b.mask.mp4").unlink(), 3),
        (lambda folder: None, 0),
    ],
)
def test_a_control_video_or_mask_that_has_changed_is_encoded_again(clips, monkeypatch, change, made):
    pipe, read = tiny_media_pipeline("wan-vace"), []
    load = sources.load_clip
    monkeypatch.setattr(sources, "load_clip", lambda path, *rest: read.append(path.name) or load(path, *rest))
    cache_of(pipe, clips)
    assert len(read) == 3
    read.clear()
    change(clips)
    assert cache_of(pipe, clips).broken == [] and len(read) == made


def test_models_that_take_no_control_video_do_not_look_at_it(clips, monkeypatch):
    pipe = tiny_media_pipeline("wan2.2-ti2v")
    cache_of(pipe, clips)
    (clips / "a.control.mp4").unlink()
    monkeypatch.setattr(sources, "load_clip", None)
    assert len(cache_of(pipe, clips).places[BUCKET]) == 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda folder: (folder / "a.control.mp4").unlink(),
            "it has neither a control video nor a mask",
        ),
        (lambda folder: (folder / "a.control.mp4").write_text("none"), "a.control.mp4: Invalid data"),
        (
            lambda folder: write_noise(folder / "a.control.mp4", 1, frames=7),
            "a.control.mp4 has 7 frames at 10",
        ),
        (lambda folder: write_noise(folder / "a.control.mp4", 1, height=48), "48x64, and the clip 5 at 10, 32x64"),
    ],
)
def test_clips_without_what_belongs_to_them_are_skipped_with_the_reason(clips, change, reason):
    change(clips)
    cache = cache_of(tiny_media_pipeline("wan-vace"), clips)
    assert len(cache.places[BUCKET]) == 2
    ((name, said),) = cache.broken
    assert name.endswith("/a.mp4") and reason in said


def test_control_videos_and_masks_are_found_or_named(clips):
    found = {clip.path.name: [path.name for path in clip.beside] for clip in find_clips(clips)}
    assert found == {"a.mp4": ["a.control.mp4"], "b.mp4": ["b.control.mp4", "b.mask.mp4"], "c.mp4": ["c.mask.mp4"]}
    (clips / "metadata.csv").write_text("video,control,mask,text\na.mp4,b.control.mp4,,one, two\nb.mp4,,,two\n")
    a, b = find_clips(clips)
    assert (a.control.name, a.mask, a.caption) == ("b.control.mp4", None, "one, two")
    assert (b.control.name, b.mask.name) == ("b.control.mp4", "b.mask.mp4")
    (clips / "metadata.csv").write_text("video,control,text\na.mp4,../out.mp4,one\n")
    with pytest.raises(ValueError, match="out.mp4 leaves the data folder"):
        find_clips(clips)


@every_kind
def test_a_base_in_half_precision_has_its_vae_in_full(clips, name):
    pipe = tiny_media_pipeline(name)
    for part in ("transformer", "text_encoder"):  # as `load_base` loads them
        getattr(pipe, part).to(torch.bfloat16)
    cache = cache_of(pipe, clips)
    assert len(cache.places[BUCKET]) == 3 and pipe.vae.dtype == torch.float32


CONFIGS = [("wan2.2-i2v-a14b-lora", "wan2.2-i2v"), ("wan-vace-lora", "wan-vace"), ("ltx-video-lora", "ltx-i2v")]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "name"), CONFIGS)
def test_configs_train_a_tiny_model_of_their_class(tmp_path, clips, file, name, monkeypatch):
    monkeypatch.setattr("flexivid.training.distill.SIGMAS", (0.9,))
    tiny_media_pipeline(name).save_pretrained(tmp_path / "base")
    small = {
        "base": tmp_path / "base",
        "output": tmp_path / "out",
        "steps": 2,
        "batch_size": 2,
        "micro_batches": 1,
        "base_dtype": "float32",
        "compile": "false",
        "flow_shift": 3.0,
        "log_every": 1,
        "sample_every": 1000,
        "clips.folder": clips,
        "clips.cache": tmp_path / "cache",
        "clips.buckets": f"[{BUCKET}]",
        "clips.fps": 10,
        "distill.rank": 4,
        "validation": "null",
    }
    overrides = [str(word) for key, value in small.items() for word in (f"--{key}", value)]
    assert train_here(ROOT / f"configs/{file}.yaml", *overrides) == 0
    assert np.isfinite(losses(tmp_path / "out")[-1])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("anyflow", "AnyFlowTransformer3DModel is told the timestep that a step goes to"),
        ("wan-animate", "WanAnimatePipeline takes image beside the prompt, which is built for WanImageToVideo"),
        ("chronoedit", "ChronoEditPipeline takes image beside the prompt, which is built for WanImageToVideo"),
        ("motif-video", "takes 9 channels and its VAE has 4: it has conditions beside the text"),
    ],
)
def test_what_is_not_built_is_refused_before_anything_is_loaded(tmp_path, clips, monkeypatch, name, said):
    tiny_pipeline(name)[0].save_pretrained(tmp_path / "base")
    monkeypatch.setattr("diffusers.DiffusionPipeline.from_pretrained", None)
    data = {"folder": clips, "buckets": [BUCKET]}
    config = Config(objective="distill", base=tmp_path / "base", output=tmp_path / "out", clips=data)
    with pytest.raises(ValueError, match=said):
        check_model(config)


@every_kind
def test_a_forecast_in_half_precision(tmp_path, clips, name):
    pipe = tiny_media_pipeline(name)
    pipe.save_pretrained(tmp_path / "base")
    data = {"folder": clips, "buckets": [BUCKET], "max_sequence_length": 16}
    modes = {"modes": [spatially_doubled(patch_size_of(pipe.transformer.config))], "rank": 4}
    config = Config(objective="distill", base=tmp_path / "base", output=tmp_path / "out", clips=data, distill=modes)
    said = forecast(config, 1, mixed_precision=True)
    assert "TFLOP a step" in said and "MiB of runs/latents" in said
