"""Text to video at a share of the FLOPs.

    python pipelines/t2v.py --budget 0.25
    python pipelines/t2v.py --budget 0.25 --compare --prompt "a dotted green cross growing on a black background"
    python pipelines/t2v.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --budget 0.5 --prompt "a cat surfing"
    python pipelines/t2v.py --model Lightricks/LTX-Video --image cat.png --budget 0.5 --prompt "the cat looks up"

Writes a clip and a JSON file beside it: what ran at which step, FLOPs, seconds, peak memory. Without --model it samples
the small model that ships with the package, with its adapter.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image

import flexivid
from flexivid.command_line import (
    Parser,
    add_device,
    add_prompts,
    budget_share,
    command,
    count,
    guidance_scale,
    patch_size,
    seed,
)
from flexivid.devices import peak_memory_bytes
from flexivid.files import write_json
from flexivid.inputs import check_model, check_output_file, check_sizes, read_prompts
from flexivid.model.adapter import locate_adapter, read_config
from flexivid.model.families import family_of
from flexivid.model.family import transformer_of
from flexivid.sampling.few_steps import call_of, share_of_full
from flexivid.sampling.places import fewer_steps
from flexivid.sampling.schedule import read_schedule
from flexivid.shapes.embedded import ADAPTER, MODEL, USUAL
from flexivid.stock_pipelines import (
    ARGUMENTS,
    call_arguments,
    latent_channels_of,
    load,
    now,
    pipeline_class,
    set_guidance_scale,
    timed,
    unknown_words,
    usual_arguments,
    without_weights,
)
from flexivid.video import write_mp4, write_picture, write_side_by_side

PACKAGES = ("torch", "diffusers", "transformers", "peft")
DEFAULT_PROMPT = "a dotted green cross growing on a black background"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--prompt", action="append", help="may be given several times")
    add_prompts(parser, "--prompt-file")
    add("--negative-prompt", default="")
    add(
        "--budget",
        type=budget_share,
        help="share of the full FLOPs, above 0 and up to 1; 0.25 unless there is a --schedule, or a few-step --adapter",
    )
    add("--schedule", help="instead of a budget, for example 2x4x4:35,1x2x2:5, or a .json file of eval/calibrate.py")
    add("--guidance", choices=["same", "kept", "weak-uncond"], help="of weak steps in a budget; see enable()")
    add("--order", choices=["reuse", "interleaved", "weak-first"], help="of the steps of a budget; see enable()")
    add("--modes", type=patch_size, nargs="+", help="weak patch sizes, as 1x4x4 2x4x4; the adapter's by default")
    add("--parametrisation", choices=["snr", "direct"], help="without an adapter; snr by default")
    add("--model", help="folder or hub id in diffusers format; the embedded model by default")
    add("--adapter", help="folder or hub id; 'none' for training-free; the embedded one with the embedded model")
    add("--merge-lora", action=argparse.BooleanOptionalAction, help="see enable(); yes for the embedded model, else no")
    add("--steps", type=count)
    add("--guidance-scale", type=guidance_scale)
    add("--frames", type=count)
    add("--height", type=count)
    add("--width", type=count)
    add("--fps", type=count, help="frames a second; the usual ones of the model's family")
    add("--image", help="file or address of the first frame, for a model that continues images")
    add("--seed", type=seed, default=0)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU, else bfloat16")
    add_device(parser)
    add("--compare", action="store_true", help="full and fewer steps of the same cost and seed beside it")
    add("--output", type=Path, default=Path("outputs/clip.mp4"))
    arguments = parser.parse_args(argv)
    arguments.text_length = arguments.recipe = None
    # What the full run has else than a few-step one, and the share of its FLOPs that these steps would cost at full.
    arguments.full, arguments.share = {}, Fraction(1)
    return arguments


def fill(arguments: argparse.Namespace, values: dict) -> None:
    """Sets what the user has not given."""
    for name, value in values.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt or [])
    if arguments.prompts:
        prompts += read_prompts(arguments.prompts)
    elif not prompts and not arguments.model:
        prompts = [DEFAULT_PROMPT]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; give --prompt some words")
    return prompts


def check_arguments(arguments: argparse.Namespace) -> None:
    """Fills in what does not depend on the model. Raises ValueError or OSError for what is wrong without knowing it."""
    if arguments.schedule is not None:
        arguments.budget = None
        if arguments.schedule.endswith(".json"):
            arguments.schedule = read_schedule(Path(arguments.schedule))
    check_output_file(arguments.output, ".mp4")
    if arguments.image and not arguments.model:
        raise ValueError("the embedded model takes no --image; give the --model of a pipeline that does")
    if arguments.model:
        check_model(arguments.model)
    if arguments.adapter is None and not arguments.model:
        arguments.adapter = str(ADAPTER)
    elif arguments.adapter == "none":
        arguments.adapter = None
    if arguments.adapter:
        config = read_config(locate_adapter(arguments.adapter))
        fill(arguments, {"text_length": config.max_sequence_length})
        if arguments.budget is None and arguments.schedule is None:
            arguments.recipe = config.recipe
    if arguments.schedule is None and arguments.recipe is None:
        fill(arguments, {"budget": 0.25})


def enable(pipe: DiffusionPipeline, arguments: argparse.Namespace) -> None:
    names = ("adapter", "modes", "budget", "schedule", "guidance", "order", "parametrisation")
    merge_lora = arguments.merge_lora and arguments.adapter is not None
    flexivid.enable(pipe, **{name: getattr(arguments, name) for name in names}, merge_lora=merge_lora)


def plan(pipe: DiffusionPipeline, arguments: argparse.Namespace) -> None:
    """Raises ValueError for sizes, modes, adapters, schedules and budgets that cannot work with this pipeline."""
    transformer = transformer_of(pipe)
    family = family_of(transformer)
    if family.makes_images:
        raise ValueError(f"{type(pipe).__name__} makes images, and this script videos")
    takes_image = family.image_by_timestep or pipe.config.get("expand_timesteps")
    if arguments.image and not takes_image and transformer.config["in_channels"] == latent_channels_of(pipe.vae):
        raise ValueError("this model was trained on text alone: it has no channels for an --image")
    enable(pipe, arguments)
    check_sizes(pipe, arguments.frames, arguments.height, arguments.width)
    sizes = (arguments.frames, arguments.height, arguments.width, arguments.steps, arguments.text_length)
    flexivid.plan(pipe, *sizes, guided=arguments.guidance_scale > 1)


def check_with_model(arguments: argparse.Namespace) -> type[DiffusionPipeline]:
    """What can be wrong with the model or does not fit it, from its configs alone. Returns the class of the pipeline.

    Fills in what the pipeline does when it is not told.
    """
    model = arguments.model or MODEL
    pipeline = pipeline_class(model, arguments.image is not None)
    with warnings.catch_warnings(action="ignore"):  # of copies between tensors that have no data
        empty = without_weights(model, pipeline)
        usual = usual_arguments(empty) | ({} if arguments.model else USUAL) | {"merge_lora": not arguments.model}
        if arguments.recipe is not None:
            family = family_of(transformer_of(empty))
            fill(arguments, call_of(arguments.recipe, family))
            arguments.full = {name: usual[name] for name in ("steps", "guidance_scale")}
            arguments.share = share_of_full(arguments.recipe, family, **arguments.full)
        fill(arguments, usual)
        plan(empty, arguments)
    if arguments.image:
        arguments.image = load_image(arguments.image)
    return pipeline


def load_pipeline(arguments: argparse.Namespace, pipeline: type[DiffusionPipeline]) -> tuple[DiffusionPipeline, float]:
    """The pipeline on its device, and the seconds that took."""
    began = time.perf_counter()
    dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device.type == "cpu" else "bfloat16"))
    pipe = load(arguments.model or MODEL, pipeline, dtype)
    pipe.to(arguments.device)
    return pipe, round(time.perf_counter() - began, 3)


def generate(pipe: DiffusionPipeline, arguments: argparse.Namespace, prompt: str, **changed):
    """One clip. Returns its frames (T, H, W, 3) uint8 and the seconds of text, denoise and decode.

    changed: other values of arguments, by name.
    """
    values = {name: getattr(arguments, name) for name in ARGUMENTS} | changed
    set_guidance_scale(pipe, values["guidance_scale"])
    call = call_arguments(pipe, **values)
    if arguments.image:
        call["image"] = arguments.image
    if arguments.negative_prompt:
        call["negative_prompt"] = arguments.negative_prompt
    seconds, began = {"text": 0.0, "denoise": 0.0, "decode": 0.0}, now(arguments.device)
    with (
        timed(pipe, "encode_prompt", seconds, "text", arguments.device),
        timed(pipe.vae, "decode", seconds, "decode", arguments.device),
    ):
        generator = torch.Generator().manual_seed(arguments.seed)
        frames = pipe(prompt=prompt, **call, generator=generator, output_type="np").frames[0]
    seconds["denoise"] = now(arguments.device) - began - seconds["text"] - seconds["decode"]
    return (frames * 255).round().astype(np.uint8), {name: round(value, 3) for name, value in seconds.items()}


def paths_of(output: Path, prompts: list[str]) -> Iterator[tuple[Path, str]]:
    for i, prompt in enumerate(prompts):
        yield (output if len(prompts) == 1 else output.with_name(f"{output.stem}-{i}.mp4")), prompt


def record_of(arguments: argparse.Namespace, prompt: str, frames: np.ndarray, summary, seconds: dict) -> dict:
    """What is written beside a clip."""
    full = round(summary.flops_full / arguments.share)
    return {
        "prompt": prompt,
        "model": arguments.model or "embedded",
        **{name: getattr(arguments, name) for name in ("adapter", "seed", "steps", "guidance_scale")},
        "size": list(frames.shape[:3]),
        "budget": arguments.budget,
        "flops": {"full": full, "used": summary.flops_used, "ratio": summary.flops_used / full},
        "schedule": summary.steps,
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(arguments.device),
        "versions": {"flexivid": flexivid.__version__, **{name: version(name) for name in PACKAGES}},
    }


def compare(pipe, arguments: argparse.Namespace, prompt: str, path: Path, ours: dict, ratio: float) -> float:
    """Shows full and fewer steps of the same seed beside our clip. Returns the full run's seconds of denoising.

    ours: its label and frames. ratio: of its FLOPs to those of its own steps at full; the fewer ones do not exceed it.
    """
    flexivid.disable(pipe)
    fewer = fewer_steps(arguments.steps, ratio)
    fewer_frames, fewer_seconds = generate(pipe, arguments, prompt, steps=fewer)
    frames, seconds = generate(pipe, arguments, prompt, **arguments.full)
    share = float(arguments.share * fewer / arguments.steps)
    arms = {
        f"100% FLOPs, {seconds['denoise']:.1f} s": frames,
        f"{share:.0%} FLOPs, {fewer} steps, {fewer_seconds['denoise']:.1f} s": fewer_frames,
    } | ours
    write_side_by_side(arms, path.with_name(f"{path.stem}-compare.mp4"), arguments.fps)
    write_picture(arms, path.with_name(f"{path.stem}-compare.png"))
    return seconds["denoise"]


def make_clip(
    pipe: DiffusionPipeline, arguments: argparse.Namespace, prompt: str, path: Path, load_seconds: float
) -> None:
    if unknown := unknown_words(pipe, prompt):
        print(f"warning: the model does not know the word {', '.join(map(repr, unknown))}", file=sys.stderr)
    plan(pipe, arguments)  # counts FLOPs, which then do not count as denoising time
    frames, seconds = generate(pipe, arguments, prompt)
    summary = flexivid.summary(pipe)
    write_mp4(frames, path, arguments.fps)
    record = record_of(arguments, prompt, frames, summary, {"load": load_seconds, **seconds})
    write_json(path.with_suffix(".json"), record)

    print(f"\n{prompt} -> {path}\nschedule: {str(summary).splitlines()[0]}")
    flops, full_seconds = record["flops"], "-"
    if arguments.compare:
        ours = {f"{flops['ratio']:.0%} FLOPs, flexivid, {seconds['denoise']:.1f} s": frames}
        full_seconds = f"{compare(pipe, arguments, prompt, path, ours, summary.ratio):.2f}"
    print(f"{'':6}{'TFLOP':>12}{'share':>9}{'denoise s':>12}")
    for name, spent in (("full", full_seconds), ("used", f"{seconds['denoise']:.2f}")):
        print(f"{name:6}{flops[name] / 1e12:12.4g}{flops[name] / flops['full']:9.1%}{spent:>12}")


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    prompts = prompts_of(arguments)
    check_arguments(arguments)
    pipeline = check_with_model(arguments)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    pipe, load_seconds = load_pipeline(arguments, pipeline)
    for path, prompt in paths_of(arguments.output, prompts):
        make_clip(pipe, arguments, prompt, path, load_seconds)


if __name__ == "__main__":
    sys.exit(main())
