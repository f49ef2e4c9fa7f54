"""Training of models that take the first frame of a clip beside the prompt: what they are given is what stock gives."""

import inspect

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import every_of
from families import tiny_image_pipeline, with_text
from training_runs import losses, train_here, write

from flexivid.model.families import family_of
from flexivid.stock_pipelines import call_arguments
from flexivid.training.config import ClipsConfig
from flexivid.training.data.clips import Bucket, load_clip
from flexivid.training.data.latents import build_cache
from flexivid.training.data.media import picture
from flexivid.training.noise import NoiseLevels
from flexivid.training.student import Student, build_student, predict

NAMES = ("wan2.1-i2v", "wan2.2-i2v", "wan2.2-ti2v")
BUCKET = Bucket(9, 64, 96)


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def tiny_media_pipeline(name: str):
    """A stock pipeline that takes an image, which can be saved and trained on clips. wan2.2-i2v: without CLIP."""
    pipe = with_text(tiny_image_pipeline(name)[0])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def clips_config(folder, **more) -> ClipsConfig:
    more = {"buckets": [str(BUCKET)], "fps": 10, "max_sequence_length": 16, "held_out": 0, "drop_caption": 0.0} | more
    return ClipsConfig(folder=folder, cache=folder.parent / "cache", **more)


def stock_forward(pipe, caption: str, **media) -> dict:
    """The arguments of the first forward of a stock call for a clip."""
    seen = []
    sizes = {"frames": BUCKET.frames, "height": BUCKET.height, "width": BUCKET.width, "text_length": 16, "fps": 10}
    call = call_arguments(pipe, **sizes, steps=4, guidance_scale=1.0)
    handle = pipe.transformer.register_forward_pre_hook(lambda module, a, k: seen.append(k), with_kwargs=True)
    pipe(prompt=caption, **call, **media, generator=torch.Generator().manual_seed(0), output_type="latent")
    handle.remove()
    return seen[0]


def trained_forward(pipe, cache, place: int) -> dict:
    """The arguments that training passes for a clip of the cache at the noise level 1."""
    seen, flex = [], build_student(pipe.transformer, settings()).eval()._flex[0]
    x_0, conditions = cache._read(str(BUCKET), [cache.places[str(BUCKET)][place]], [False])
    levels = NoiseLevels(flex.diffusion, 3.0, flex.base_patch)
    state = levels.state(x_0, torch.zeros_like(x_0), torch.tensor([1000.0]), conditions)
    return state
