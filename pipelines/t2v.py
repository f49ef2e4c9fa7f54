"""Text to video at a share of the FLOPs.

    python pipelines/t2v.py --budget 0.25
    python pipelines/t2v.py --budget 0.25 --compare --prompt "a dotted green cross growing on a black background"
    python pipelines/t2v.py --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --budget 0.5 --prompt "a cat surfing"

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
from diffusers import AutoencoderKLWan, DiffusionPipeline, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

import flexivid
from flexivid.adapter import locate_adapter, read_config
from flexivid.schedules import check_budget, parse_patch_size, read_schedule
from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING
from flexivid.video import write_mp4, write_picture, write_side_by_side

EMBEDDED = {
    "frames": SAMPLING["num_frames"],
    "height": SAMPLING["height"],
    "width": SAMPLING["width"],
    "steps": SAMPLING["num_inference_steps"],
    "guidance_scale": SAMPLING["guidance_scale"],
    "fps": 8,
    "merge_lora": True,
}
USUAL = {
    "frames": 81,
    "height": 480,
    "width": 832,
    "steps": 50,
    "guidance_scale": 5.0,
    "fps": 16,
    "merge_lora": False,
}
PACKAGES = ("torch", "diffusers", "transformers", "peft")
DEFAULT_PROMPT = "a striped red circle moving right on a black background"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--prompt", action="append", help="may be given several times")
    add("--prompt-file", type=Path, help="a text file with one prompt a line")
    add("--negative-prompt", default="")
    add("--budget", help="share of the full FLOPs, above 0 and up to 1; 0.25 unless there is a --schedule")
    add("--schedule", help="instead of a budget, for example 2x4x4:35,1x2x2:5, or a .json file of eval/calibrate.py")
    add("--guidance", default="same", choices=["same", "weak-uncond"])
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
    add("--fps", type=int)
    add("--seed", type=int, default=0)
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU, else bfloat16")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--compare", action="store_true", help="run the full model on the same seed too, and show both side by side")
    add("--output", type=Path, default=Path("outputs/clip.mp4"))
    arguments = parser.parse_args(argv)
    for name, value in (USUAL if arguments.model else EMBEDDED).items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    return arguments


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
        if getattr(arguments, name) < 1:
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


def plan(pipe: DiffusionPipeline, arguments: argparse.Namespace, text_length: int) -> None:
    """Raises ValueError for sizes, modes, adapters, schedules and budgets that cannot work with this pipeline."""
    enable(pipe, arguments)
    base_patch = pipe.transformer.config.patch_size
    for name, unit in (("height", base_patch[1]), ("width", base_patch[2])):
        unit, value = unit * pipe.vae_scale_factor_spatial, getattr(arguments, name)
        if value % unit:
            raise ValueError(f"{name} must be a multiple of {unit}, such as {-(-value // unit) * unit}, not {value}")
    stride = pipe.vae_scale_factor_temporal
    if arguments.frames % stride != 1:
        fitting = arguments.frames // stride * stride + 1
        raise ValueError(f"frames must be 1 + a multiple of {stride}, such as {fitting}, not {arguments.frames}")
    sizes = (arguments.frames, arguments.height, arguments.width, arguments.steps, text_length)
    flexivid.plan(pipe, *sizes, guided=arguments.guidance_scale > 1)


def without_weights(model: str | Path) -> WanPipeline:
    """The pipeline of a folder or hub id from its configs alone, on the meta device."""
    configs = {
        name: component.load_config(model, subfolder=name)
        for name, component in (("transformer", WanTransformer3DModel), ("vae", AutoencoderKLWan))
    }
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(configs["transformer"])
        vae = AutoencoderKLWan.from_config(configs["vae"])
    return WanPipeline(tokenizer=None, text_encoder=None, scheduler=None, vae=vae, transformer=transformer)


@torch.no_grad()
def decode(pipe: DiffusionPipeline, latents: torch.Tensor) -> np.ndarray:
    """What WanPipeline does after its loop: latents -> (T, H, W, 3) uint8."""
    config = pipe.vae.config
    latents = latents.to(pipe.vae.device, pipe.vae.dtype)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1).to(latents) for v in (config.latents_mean, config.latents_std))
    video = pipe.vae.decode(latents * std + mean, return_dict=False)[0]
    return (pipe.video_processor.postprocess_video(video, output_type="np")[0] * 255).round().astype(np.uint8)


def peak_memory_bytes(device: str) -> int:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@torch.no_grad()
def generate(pipe: DiffusionPipeline, arguments: argparse.Namespace, prompt: str, text_length: int):
    """One clip. Returns its frames (T, H, W, 3) uint8 and the seconds of text, denoise and decode."""
    marks = [time.perf_counter()]
    embeds, negative = pipe.encode_prompt(
        prompt,
        negative_prompt=arguments.negative_prompt,
        do_classifier_free_guidance=arguments.guidance_scale > 1,
        max_sequence_length=text_length,
        device=torch.device(arguments.device),
    )
    marks.append(time.perf_counter())
    latents = pipe(
        prompt_embeds=embeds,
        negative_prompt_embeds=negative,
        height=arguments.height,
        width=arguments.width,
        num_frames=arguments.frames,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        generator=torch.Generator().manual_seed(arguments.seed),
        output_type="latent",
    ).frames
    marks.append(time.perf_counter())
    frames = decode(pipe, latents)
    marks.append(time.perf_counter())
    seconds = dict(zip(("text", "denoise", "decode"), np.diff(marks).round(3).tolist(), strict=True))
    return frames, seconds


def run(arguments: argparse.Namespace) -> None:
    prompts = check_arguments(arguments)
    dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device == "cpu" else "bfloat16"))
    model = arguments.model or MODEL
    text_length = 512 if arguments.model else SAMPLING["max_sequence_length"]
    if arguments.adapter:
        text_length = read_config(locate_adapter(arguments.adapter)).max_sequence_length or text_length
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies between tensors that have no data
        plan(without_weights(model), arguments, text_length)
    folder = arguments.output.parent
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"the output folder {folder} is not writable")
    began = time.perf_counter()
    pipe = WanPipeline.from_pretrained(model, dtype={"default": dtype, "vae": torch.float32})
    pipe.to(arguments.device)
    load_seconds = round(time.perf_counter() - began, 3)

    for i, prompt in enumerate(prompts):
        unknown = unknown_words(pipe, prompt)
        if unknown:
            print(f"warning: the model does not know the word {', '.join(map(repr, unknown))}", file=sys.stderr)
        path = arguments.output
        if len(prompts) > 1:
            path = path.with_name(f"{path.stem}-{i}.mp4")
        plan(pipe, arguments, text_length)  # counts FLOPs, which then do not count as denoising time
        frames, seconds = generate(pipe, arguments, prompt, text_length)
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
            full_frames, full_seconds = generate(pipe, arguments, prompt, text_length)
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
