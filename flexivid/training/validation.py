"""What a distillation has reached: errors over noise levels and over steps, and frames at every budget."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline

from flexivid.files import write_text
from flexivid.model.flexible import FlexTransformer
from flexivid.sampling.runner import PipelineRunner
from flexivid.stock_pipelines import decoders
from flexivid.training.config import Config
from flexivid.training.data.buckets import Bucket
from flexivid.training.data.conditions import clip_arguments
from flexivid.training.data.sources import encoders_of
from flexivid.training.parallel.launch import autocast
from flexivid.video import write_picture

SIGMAS = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)

Errors = dict[str, list[float]]  # by patch size, over SIGMAS


def mean_errors(errors: Errors) -> dict[str, float]:
    return {patch_size: sum(values) / len(values) for patch_size, values in errors.items()}


def record(path: Path, step: int, facts: dict) -> list[dict]:
    """Adds a line to validation.jsonl, in the place of those of later steps, which are made again after a kill.

    Returns all lines.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if line["step"] < step] + [{"step": step, **facts}]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def record_errors(path: Path, step: int, clips: str, errors: Errors) -> list[dict]:
    """`record` of mean errors. clips: what they are of. One that is not finite is null."""
    means = {name: value if math.isfinite(value) else None for name, value in mean_errors(errors).items()}
    return record(path, step, {"clips": clips, "errors": means})


@contextmanager
def picture_of(
    pipe: DiffusionPipeline, config: Config, accelerator: Accelerator, path: Path, **call
) -> Iterator[Callable]:
    """Gives `draw(label, prompt, seed)`, which samples a clip of the first bucket as a row of the picture.

    call: by the names of `stock_pipelines.ARGUMENTS`. Encoders and decoders are on the accelerator's device.
    """
    arguments, rows = clip_arguments(pipe, Bucket.parse(config.clips.buckets[0]), config.clips, **call), {}

    def draw(label: str, prompt: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad(), autocast(accelerator):
            frames = pipe(prompt=prompt, **arguments, generator=generator, output_type="np").frames[0]
        rows[f"{label}: {prompt}"] = (frames * 255).round().astype("uint8")

    parts = {*encoders_of(pipe).values(), *(part for part, _ in decoders(pipe))}
    for part in parts:
        part.to(accelerator.device)
    yield draw
    for part in parts:
        part.to("cpu")
    clear_device_cache()
    if rows and accelerator.is_main_process:
        write_picture(rows, path)


def sample_budgets(pipe: DiffusionPipeline, flex: FlexTransformer, config: Config, accelerator, path: Path) -> None:
    """A picture with a row of frames for every validation prompt and budget."""
    settings = config.validation
    call = {"steps": settings.steps, "guidance_scale": settings.guidance_scale}
    with picture_of(pipe, config, accelerator, path, **call) as draw:
        for prompt in settings.prompts:
            for budget in settings.budgets:
                PipelineRunner(pipe, {"transformer": flex}, budget=budget, schedule=None, order="interleaved")
                draw(f"{budget:g}", prompt)
