"""Adapters for other families than Wan2.1, trained on clips and on the teacher's samples; every config in configs/."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import every_of
from diffusers import DiffusionPipeline
from families import TRAINABLE, every, tiny_trainable_pipeline

import flexivid
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.patches.sizes import spatially_doubled
from flexivid.stock_pipelines import call_arguments
from flexivid.training.config import ClipsConfig, Config, load_config
from flexivid.training.data.buckets import Bucket
from flexivid.training.data.conditions import conditions_of
from flexivid.training.distill import DistillObjective
from flexivid.training.forecast import check_model
from flexivid.training.loop import train
from flexivid.training.student import predict

CONFIGS = Path(__file__).parents[1] / "configs"
# Whose tiny model stands in for the published one.
STANDS_IN = {
    "hunyuan-video-lora.yaml": "hunyuan-video",
    "ltx-video-lora.yaml": "ltx",
    "ltx-2-lora.yaml": "ltx-2",
    "cogvideox-5b-lora.yaml": "cogvideox-5b",
    "mochi-lora.yaml": "mochi",
    "wan2.1-1.3b-lora.yaml": "wan2.2-ti2v",
    "wan2.1-14b-lora.yaml": "wan2.2-ti2v",
    "wan2.2-ti2v-5b-lora.yaml": "wan2.2-ti2v",
    "wan2.2-a14b-lora.yaml": "wan2.2-ti2v",
}
BUCKET = {"mochi": "7x64x96"}


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def trained(config: Config, accelerator: Accelerator) -> DistillObjective:
    check_model(config)
    objective = DistillObjective(config, accelerator)
    train(config, objective, accelerator)
    return objective


@every_of(TRAINABLE, quick=["ltx"])
@pytest.mark.parametrize("source", ["folder", "prompts"])
def test_an_adapter_for_another_family(tmp_path, folder, accelerator, name, source):
    pipe = tiny_trainable_pipeline(name)
    pipe.save_pretrained(tmp_path / "base")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    bucket = BUCKET.get(name, "9x64x96")
    clips = {"cache": tmp_path / "cache", "buckets": [bucket], "fps": 10, "max_sequence_length": 16}
    clips |= {"folder": folder} if source == "folder" else {"prompts": tmp_path / "prompts.txt", "teacher_steps": 4}
    patch_size = spatially_doubled(patch_size_of(pipe.transformer.config))
    config = Config(
        objective="distill",
        base=tmp_path / "base",
        output=tmp_path / "out",
        steps=3,
        batch_size=2,
        log_every=1,
        sample_every=3,
        clips=clips,
        validation={"prompts": ["a red circle"], "budgets": [1.0, 0.9], "steps": 4},
        flow_shift=1.0 if name == "mochi" else 3.0,
        distill={"modes": [patch_size], "rank": 4, "sigma_range": [0.1, 1.0]},
    )
    trained(config, accelerator)
    assert list((tmp_path / "out/samples").glob("*.png"))
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "base")
    pipe.set_progress_bar_config(disable=True)
    flexivid.enable(pipe, adapter=tmp_path / "out/result", budget=0.9, order="interleaved")
    frames, height, width = map(int, bucket.split("x"))
    call = call_arguments(pipe, frames=frames, height=height, width=width, steps=6, text_length=16)
    latents = pipe(
        prompt="a red circle", **call, output_type="latent", generator=torch.Generator().manual_seed(0)
    ).frames
    assert latents.isfinite().all() and flexivid.summary(pipe).ratio <= 0.9


@every(TRAINABLE)
def test_conditions_are_what_the_pipeline_passes(name):
    pipe = tiny_trainable_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    frames, height, width = map(int, BUCKET.get(name, "9x64x96").split("x"))
    config = ClipsConfig(folder=".", max_sequence_length=16, fps=12)
    conditions = conditions_of(pipe, "a red circle", Bucket(frames, height, width), config)
    seen = []

    def keep(module, args, kwargs, output):
        seen.append((kwargs, output[0]))

    pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    sizes = {"frames": frames, "height": height, "width": width, "text_length": 16, "fps": 12}
    family = family_of(pipe.transformer)
    unguided = {} if family.guidance == "embedded" else {"guidance_scale": 1.0}  # there it is an input of the network
    pipe(prompt="a red circle", **call_arguments(pipe, **sizes, steps=4, **unguided), output_type="latent")
    kwargs, output = seen[0]
    with torch.no_grad():
        conditions |= {name: kwargs[name] for name in family.streams}  # noise, as latents are
        again = predict(pipe.transformer, family, family.latents(kwargs), kwargs["timestep"], conditions)
    assert torch.equal(again, family.latents(kwargs | {"hidden_states": output}))
    if name == "ltx":  # whose positions are in seconds
        assert conditions["rope_interpolation_scale"][0] == pipe.vae_temporal_compression_ratio / 12


@pytest.mark.slow
@pytest.mark.parametrize("file", STANDS_IN)
def test_every_config_trains_a_tiny_model_of_its_class(tmp_path, folder, accelerator, file):
    name = STANDS_IN[file]
    pipe = tiny_trainable_pipeline(name)
    config = load_config(CONFIGS / file)
    if config.flow_shift != 3.0 and name.startswith("wan"):
        pipe.scheduler.register_to_config(flow_shift=config.flow_shift)
    if name == "hunyuan-video":
        pipe.scheduler.register_to_config(shift=config.flow_shift)
    if name.startswith("ltx"):
        pipe.scheduler.register_to_config(use_dynamic_shifting=True)
    pipe.save_pretrained(tmp_path / "base")
    clips = config.clips.model_copy(
        update={"folder": folder, "cache": tmp_path / "cache", "buckets": [BUCKET.get(name, "9x64x96")], "fps": 10.0}
    )
    small = {
        "base": tmp_path / "base",
        "output": tmp_path / "out",
        "steps": 2,
        "batch_size": 2,
        "micro_batches": 1,
        "base_dtype": "float32",
        "compile": False,
        "sample_every": 1000,
        "clips": clips,
        "validation": config.validation.model_copy(update={"prompts": []}),
        "distill": config.distill.model_copy(update={"rank": 4}),
    }
    trained(config.model_copy(update=small), accelerator)
    assert (tmp_path / "out/result/flexivid.safetensors").exists()
