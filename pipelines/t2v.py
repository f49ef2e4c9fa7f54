"""Text to video at a share of the FLOPs.

    python pipelines/t2v.py --budget 0.25
    python pipelines/t2v.py --budget 0.25 --compare --prompt "a dotted green cross growing on a black background"
    python pipelines/t2v.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --budget 0.5 --prompt "a cat surfing"
    python pipelines/t2v.py --model Lightricks/LTX-Video --image cat.png --budget 0.5 --prompt "the cat looks up"

Writes a clip and a JSON file beside it: what ran at which step, FLOPs, seconds, peak memory. Without --model it samples
the small model that ships with the package, with its adapter.
"""

import argparse
import json
import os
import resource
import sys
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import load_image
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

import flexivid
from flexivid.model.adapter import locate_adapter, read_config
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of, transformer_of
from flexivid.patches.sizes import parse_patch_size
from flexivid.sampling.budget import check_budget
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
    usual_arguments,
    without_weights,
)
from flexivid.video import write_mp4, write_picture, write_side_by_side

PACKAGES = ("torch", "diffusers", "transformers", "peft")
DEFAULT_PROMPT = "a dotted green cross growing on a black background"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", help="may be given several times")
    add("--prompt-file", type=Path, help="a text file with one prompt a line")
    add("--negative-prompt", default="")
    add("--budget", help="share of the full FLOPs, above 0 and up to 1; 0.25 unless there is a --schedule")
    add("--schedule", help="instead of a budget, for example 2x4x4:35,1x2x2:5, or a .json file of eval/calibrate.py")
    add("--guidance", choices=["same", "kept", "weak-uncond"], help="of weak steps in a budget; see enable()")
    add("--order", choices=["interleaved", "weak-first"], help="of powerful and weak steps in a budget")
    add("--modes", nargs="+", help="weak patch sizes, for example 1x4x4 2x4x4; the adapter's by default")
    add("--parametrisation", choices=["snr", "direct"], help="without an adapter; snr by default")
    add("--model", help="folder or hub id in diffusers format; the embedded model by default")
    add("--adapter", help="folder or hub id; 'none' for training-free; the embedded one with the embedded model")
    add("--merge-lora", action=argparse.BooleanOptionalAction, help="see enable(); yes for the embedded model, else no")
    add("--steps", type=int)
    add("--guidance-scale", type=float)
    add("--frames", type=int)
    add("--height", type=int)
    add("--width", type=int)
    add("--fps", type=int, help="frames a second; the usual ones of the model's family")
    add("--image", help="file or address of the first frame, for a model that continues images")
    add("--seed", type=int, default=0)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU, else bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compare", action="store_true", help="run the full model on the same seed too, and show both side by side")
    add("--output", type=Path, default=Path("outputs/clip.mp4"))
    arguments = parser.parse_args(argv)
    arguments.text_length = None
    return arguments


def fill(arguments: argparse.Namespace, values: dict) -> None:
    """Sets what the user has not given."""
    for name, value in values.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def check_arguments(arguments: argparse.Namespace) -> list[str]:
    """Everything that can be wrong before a model is loaded. Returns the prompts; raises ValueError or OSError."""
    if arguments.schedule is not None:
        arguments.budget = None
        if arguments.schedule.endswith(".json"):
            arguments.schedule = read_schedule(Path(arguments.schedule))
    else:
        try:
            arguments.budget = float(0.25 if arguments.budget is None else arguments.budget)
        except ValueError:
            raise ValueError(f"budget must be a number above 0 and up to 1, not {arguments.budget!r}") from None
        check_budget(arguments.budget)
    for mode in arguments.modes or []:
        parse_patch_size(mode)
    for name in ("frames", "height", "width", "steps", "fps"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, not {getattr(arguments, name)}")
    prompts = list(arguments.prompt or [])
    if arguments.prompt_file:
        prompts += [line.strip() for line in arguments.prompt_file.read_text().splitlines() if line.strip()]
        if not prompts:
            raise ValueError(f"{arguments.prompt_file} holds no prompt; write one a line")
    elif not prompts and not arguments.model:
        prompts = [DEFAULT_PROMPT]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; give --prompt some words")
    if arguments.output.suffix != ".mp4":
        raise ValueError(f"the output must be an .mp4 file, not {arguments.output}")
    if arguments.image and not arguments.model:
        raise ValueError("the embedded model takes no --image; give the --model of a pipeline that does")
    if arguments.output.is_dir():
        raise ValueError(f"the output {arguments.output} is a folder; name a file in it")
    if arguments.model and not (Path(arguments.model) / "model_index.json").is_file():
        if Path(arguments.model).exists() or arguments.model.count("/") != 1:
            raise ValueError(f"no model in diffusers format at {arguments.model}: it has no model_index.json")
    if arguments.adapter is None and not arguments.model:
        arguments.adapter = str(ADAPTER)
    elif arguments.adapter == "none":
        arguments.adapter = None
    if arguments.adapter:
        read_config(locate_adapter(arguments.adapter))
    if not 0 <= arguments.seed < 2**63:
        raise ValueError(f"the seed must be 0 or more and below 2**63, not {arguments.seed}")
    try:
        device = torch.device(arguments.device)
    except RuntimeError:
        raise ValueError(f"{arguments.device!r} is no device; use for example --device cpu or --device cuda") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no CUDA device {device.index or 0} here; use --device cpu")
    return prompts


def unknown_words(pipe: DiffusionPipeline, prompt: str) -> list[str]:
    """Words of a prompt that the tokenizer does not know."""
    tokenizer = pipe.tokenizer
    return [
        word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids
    ]


def enable(pipe: DiffusionPipeline, arguments: argparse.Namespace) -> None:
    flexivid.enable(
        pipe,
        adapter=arguments.adapter,
        modes=arguments.modes,
        budget=arguments.budget,
        schedule=arguments.schedule,
        guidance=arguments.guidance,
        order=arguments.order,
        parametrisation=arguments.parametrisation,
        merge_lora=arguments.merge_lora and arguments.adapter is not None,
    )


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
    stride, shrink = family.compression(pipe)
    patch_size = patch_size_of(transformer.config)
    for name, patch in (("height", patch_size[1]), ("width", patch_size[2])):
        unit, value = patch * shrink, getattr(arguments, name)
        if value % unit:
            raise ValueError(f"{name} must be a multiple of {unit}, such as {-(-value // unit) * unit}, not {value}")
    if arguments.frames % stride != 1 % stride:
        fitting = arguments.frames // stride * stride + 1
        raise ValueError(f"frames must be 1 + a multiple of {stride}, such as {fitting}, not {arguments.frames}")
    sizes = (arguments.frames, arguments.height, arguments.width, arguments.steps, arguments.text_length)
    flexivid.plan(pipe, *sizes, guided=arguments.guidance_scale > 1)


def peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def generate(pipe: DiffusionPipeline, arguments: argparse.Namespace, prompt: str):
    """One clip. Returns its frames (T, H, W, 3) uint8 and the seconds of text, denoise and decode."""
    call = call_arguments(pipe, **{name: getattr(arguments, name) for name in ARGUMENTS})
    if arguments.image:
        call["image"] = load_image(arguments.image)
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


def run(arguments: argparse.Namespace) -> None:
    prompts = check_arguments(arguments)
    dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16"))
    model = arguments.model or MODEL
    pipeline = pipeline_class(model, arguments.image is not None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies between tensors that have no data
        empty = without_weights(model, pipeline)
        if arguments.adapter:
            fill(arguments, {"text_length": read_config(locate_adapter(arguments.adapter)).max_sequence_length})
        if not arguments.model:
            fill(arguments, USUAL | {"merge_lora": True})
        fill(arguments, usual_arguments(empty) | {"merge_lora": False})
        plan(empty, arguments)
    folder = arguments.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the output folder {folder} is not writable")
    began = time.perf_counter()
    pipe = load(model, pipeline, dtype)
    set_guidance_scale(pipe, arguments.guidance_scale)
    pipe.to(arguments.device)
    load_seconds = round(time.perf_counter() - began, 3)

    for i, prompt in enumerate(prompts):
        unknown = unknown_words(pipe, prompt)
        if unknown:
            print(f"warning: the model does not know the word {', '.join(map(repr, unknown))}", file=sys.stderr)
        path = arguments.output
        if len(prompts) > 1:
            path = path.with_name(f"{path.stem}-{i}.mp4")
        plan(pipe, arguments)  # counts FLOPs, which then do not count as denoising time
        frames, seconds = generate(pipe, arguments, prompt)
        summary = flexivid.summary(pipe)
        write_mp4(frames, path, arguments.fps)
        record = {
            "prompt": prompt,
            "model": arguments.model or "embedded",
            "adapter": arguments.adapter,
            "seed": arguments.seed,
            "steps": arguments.steps,
            "guidance_scale": arguments.guidance_scale,
            "size": list(frames.shape[:3]),
            "budget": arguments.budget,
            "flops": {"full": summary.flops_full, "used": summary.flops_used, "ratio": summary.ratio},
            "schedule": summary.steps,
            "seconds": {"load": load_seconds, **seconds},
            "peak_memory_bytes": peak_memory_bytes(arguments.device),
            "versions": {"flexivid": flexivid.__version__, **{name: version(name) for name in PACKAGES}},
        }
        beside = path.with_suffix(".json.partial")
        beside.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(beside, path.with_suffix(".json"))

        print(f"\n{prompt} -> {path}\nschedule: {str(summary).splitlines()[0]}")
        rows = [("used", summary.flops_used, seconds["denoise"])]
        if arguments.compare:
            flexivid.disable(pipe)
            full_frames, full_seconds = generate(pipe, arguments, prompt)
            rows.insert(0, ("full", summary.flops_full, full_seconds["denoise"]))
            arms = {
                f"100% FLOPs, {full_seconds['denoise']:.1f} s": full_frames,
                f"{summary.ratio:.0%} FLOPs, {seconds['denoise']:.1f} s": frames,
            }
            write_side_by_side(arms, path.with_name(f"{path.stem}-compare.mp4"), arguments.fps)
            write_picture(arms, path.with_name(f"{path.stem}-compare.png"))
        else:
            rows.insert(0, ("full", summary.flops_full, None))
        print(f"{'':6}{'TFLOP':>12}{'share':>9}{'denoise s':>12}")
        for name, flops, spent in rows:
            shown = "-" if spent is None else f"{spent:.2f}"
            print(f"{name:6}{flops / 1e12:12.4g}{flops / summary.flops_full:9.1%}{shown:>12}")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        run(arguments)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
