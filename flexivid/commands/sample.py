"""Text to video at a share of the FLOPs.

    flexivid sample --budget 0.25
    flexivid sample --budget 0.25 --compare --prompt "a dotted green cross growing on a black background"
    flexivid sample --schedule 1x2x2:2,1x2x2+1x4x4@0.35:38 --show-patches
    flexivid sample --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --budget 0.5 --prompt "a cat surfing"
    flexivid sample --model Lightricks/LTX-Video --image cat.png --budget 0.5 --prompt "the cat looks up"
    flexivid sample --model wan2.1-t2v-14b-Q4_K_M.gguf --base Wan-AI/Wan2.1-T2V-14B-Diffusers --prompt "a cat surfing"

Writes a clip and a JSON file beside it: what ran at which step, FLOPs, seconds, peak memory. Without --model it samples
the small model that ships with the package, with its adapter.
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

import flexivid
from flexivid.command_line import command, say
from flexivid.commands.sample_options import (
    check_arguments,
    check_with_model,
    parse_arguments,
    pipeline_of,
    plan,
    prompts_of,
    sizes_of,
)
from flexivid.devices import peak_memory_bytes
from flexivid.files import write_json
from flexivid.model.adapter import read_config
from flexivid.model.families import family_of
from flexivid.patch_grid import FineBlocks, patches_drawn
from flexivid.running import next_budget
from flexivid.sampling.few_steps import call_of
from flexivid.sampling.flops import flops_text
from flexivid.sampling.places import fewer_steps
from flexivid.sampling.schedule import in_runs
from flexivid.shapes.embedded import FEW_ADAPTER
from flexivid.single_file import load_single_file
from flexivid.stock_pipelines import (
    ARGUMENTS,
    call_arguments,
    decoders,
    load,
    now,
    set_guidance_scale,
    sound_of,
    timed,
    unknown_words,
)
from flexivid.video import Clip, enlarge, write_mp4, write_picture, write_side_by_side

PACKAGES = ("torch", "diffusers", "transformers", "peft")


def load_pipeline(arguments: argparse.Namespace, pipeline: type[DiffusionPipeline]) -> tuple[DiffusionPipeline, float]:
    """The pipeline on its device, and the seconds that took."""
    began = time.perf_counter()
    dtype = getattr(torch, arguments.dtype or ("float32" if arguments.device.type == "cpu" else "bfloat16"))
    say(f"loading {arguments.model or 'the embedded model'} onto {arguments.device}, {str(dtype).split('.')[1]}")
    parts = {"transformer": load_single_file(Path(arguments.model), arguments.base, dtype)} if arguments.base else {}
    pipe = load(pipeline_of(arguments), pipeline, dtype, **parts)
    pipe.to(arguments.device)
    return pipe, round(time.perf_counter() - began, 3)


def generate(
    pipe: DiffusionPipeline, arguments: argparse.Namespace, prompt: str, **changed
) -> tuple[Clip, dict[str, float]]:
    """One clip, and the seconds of text, denoise and decode.

    changed: other values of arguments, by name.
    """
    values = {name: getattr(arguments, name) for name in ARGUMENTS} | changed
    set_guidance_scale(pipe, values["guidance_scale"])
    pipe.set_progress_bar_config(desc="denoising")
    call = call_arguments(pipe, **values)
    if arguments.image:
        call["image"] = arguments.image
    if arguments.negative_prompt:
        call["negative_prompt"] = arguments.negative_prompt
    seconds, device = {"text": 0.0, "denoise": 0.0, "decode": 0.0}, arguments.device
    began = now(device)
    with ExitStack() as around:
        around.enter_context(timed(pipe, "encode_prompt", seconds, "text", device, partial(say, "encoding the prompt")))
        for part, method in decoders(pipe):
            around.enter_context(timed(part, method, seconds, "decode", device, partial(say, "decoding the clip")))
        generator = torch.Generator().manual_seed(arguments.seed)
        output = pipe(prompt=prompt, **call, generator=generator, output_type="np")
    seconds["denoise"] = now(device) - began - seconds["text"] - seconds["decode"]
    clip = Clip((output.frames[0] * 255).round().astype(np.uint8), sound_of(pipe, output))
    return clip, {name: round(value, 3) for name, value in seconds.items()}


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
        "schedule_in_runs": in_runs(summary.steps),
        "seconds": seconds,
        "peak_memory_bytes": peak_memory_bytes(arguments.device),
        "versions": {"flexivid": flexivid.__version__, **{name: version(name) for name in PACKAGES}},
    }


def few_steps(pipe, arguments: argparse.Namespace, prompt: str, full_flops: int) -> dict[str, Clip]:
    """The clip of the embedded model's few-step adapter, by its label. pipe: stock, as it is again afterwards."""
    recipe = read_config(FEW_ADAPTER).recipe
    say(f"to compare with: {recipe.steps} steps without guidance, distilled")
    flexivid.enable(pipe, adapter=FEW_ADAPTER, merge_lora=True)
    clip, seconds = generate(pipe, arguments, prompt, **call_of(recipe, family_of(pipe.transformer)))
    share = flexivid.summary(pipe).flops_used / full_flops
    flexivid.disable(pipe)
    return {f"{share:.0%} FLOPs, flexivid, {recipe.steps} distilled steps, {seconds['denoise']:.1f} s": clip}


def compare(
    pipe, arguments: argparse.Namespace, prompt: str, path: Path, ours: dict[str, Clip], ratio: float, full_flops: int
) -> float:
    """Shows full and fewer steps of the same seed beside our clip, and with the embedded model its few-step adapter.

    Returns the full run's seconds of denoising. ours: its label and itself. ratio: of its FLOPs to those of its own
    steps at full; the fewer ones do not exceed it. full_flops: of the full run.
    """
    flexivid.disable(pipe)
    fewer = fewer_steps(arguments.steps, ratio)
    say(f"to compare with: {fewer} of {arguments.steps} steps")
    fewer_clip, fewer_seconds = generate(pipe, arguments, prompt, steps=fewer)
    say("to compare with: full compute")
    clip, seconds = generate(pipe, arguments, prompt, **arguments.full)
    share = float(arguments.share * fewer / arguments.steps)
    arms = {
        f"100% FLOPs, {seconds['denoise']:.1f} s": clip,
        f"{share:.0%} FLOPs, {fewer} steps, {fewer_seconds['denoise']:.1f} s": fewer_clip,
    } | ours
    if not arguments.model and arguments.recipe is None:
        arms |= few_steps(pipe, arguments, prompt, full_flops)
    write_side_by_side(arms, path.with_name(f"{path.stem}-compare.mp4"), arguments.fps)
    write_picture({label: each.frames for label, each in arms.items()}, path.with_name(f"{path.stem}-compare.png"))
    return seconds["denoise"]


def why_not_all(pipe, arguments: argparse.Namespace, ratio: float) -> str | None:
    """Where a budget is not spent to the last bit: what it became, and which one buys more."""
    if arguments.budget is None or round(ratio, 3) == round(arguments.budget, 3):
        return None
    more = next_budget(pipe, **sizes_of(arguments))
    buys_more = f", and a budget buys more from {more:g} on" if more is not None else ""
    return f"the budget of {arguments.budget:g} became {ratio:.3g}: steps are whole{buys_more}"


def make_clip(
    pipe: DiffusionPipeline, arguments: argparse.Namespace, prompt: str, path: Path, load_seconds: float
) -> None:
    if unknown := unknown_words(pipe, prompt):
        say(f"warning: the model does not know the word {', '.join(map(repr, unknown))}")
    say("planning: which patch size each step runs at")
    plan(pipe, arguments)  # counts FLOPs, which then do not count as denoising time
    chosen = FineBlocks()
    with flexivid.observe(pipe, chosen) if arguments.show_patches else nullcontext():
        clip, seconds = generate(pipe, arguments, prompt)
    summary, frames = flexivid.summary(pipe), clip.frames
    write_mp4(enlarge(frames) if arguments.enlarge else frames, path, arguments.fps, sounds=clip.sounds)
    record = record_of(arguments, prompt, frames, summary, {"load": load_seconds, **seconds})
    write_json(path.with_suffix(".json"), record)
    if arguments.show_patches:
        say("drawing the patches of each step")
        drawn = patches_drawn(pipe, frames, summary.steps, chosen, arguments.fps)
        write_mp4(drawn, path.with_name(f"{path.stem}-patches.mp4"), arguments.fps)
    why = why_not_all(pipe, arguments, summary.ratio)

    flops, full_seconds = record["flops"], "-"
    if arguments.compare:
        ours = {f"{flops['ratio']:.0%} FLOPs, flexivid, {seconds['denoise']:.1f} s": clip}
        full_seconds = f"{compare(pipe, arguments, prompt, path, ours, summary.ratio, flops['full']):.2f}"
    print(f"\n{prompt} -> {path}\nschedule: {record['schedule_in_runs']}")
    print(f"{'':6}{'FLOPs':>14}{'share':>9}{'denoise s':>12}")
    for name, spent in (("full", full_seconds), ("used", f"{seconds['denoise']:.2f}")):
        print(f"{name:6}{flops_text(flops[name]):>14}{flops[name] / flops['full']:9.1%}{spent:>12}")
    if why is not None:
        print(why)


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv, __doc__)
    prompts = prompts_of(arguments)
    check_arguments(arguments)
    pipeline = type(check_with_model(arguments))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    pipe, load_seconds = load_pipeline(arguments, pipeline)
    for path, prompt in paths_of(arguments.output, prompts):
        make_clip(pipe, arguments, prompt, path, load_seconds)
