"""The quality-compute curve: every arm on the same prompts and noise, scored, drawn, and written as a page.

    flexivid sweep --dry-run
    flexivid sweep --budgets 1.0 0.6 0.4 0.25 --output outputs/sweep
    accelerate launch --num_processes 8 -m flexivid sweep --output outputs/sweep         # splits the batches over GPUs
    torchrun --nproc_per_node 2 -m flexivid sweep --device cpu --output outputs/sweep    # or over CPU processes

A sweep that was stopped goes on where it was; `--output` of another sweep is refused. Results: results.json,
results.csv, pareto.png, report.html.
"""

import argparse
import shlex
import sys
import time
from datetime import timedelta
from importlib.metadata import version

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, WanPipeline
from tqdm import tqdm

from flexivid.command_line import command
from flexivid.devices import share_cores
from flexivid.files import write_json
from flexivid.inputs import SHAPES_SETS, check_sizes, empty_pipeline, read_json
from flexivid.sampling.flops import flops_text
from flexivid.shapes.embedded import MODEL
from flexivid.shapes.world import parse_caption
from flexivid.stock_pipelines import load, pipeline_class
from flexivid.sweep.arms import Arm, all_arms, picked, possible, reachable, tuned
from flexivid.sweep.curve import write_pareto
from flexivid.sweep.probe import Probe
from flexivid.sweep.report import shown_clips, write_report
from flexivid.sweep.results import assemble, write_csv
from flexivid.sweep.sampling import Clip, Sampler, clips_of, sample
from flexivid.sweep.scoring import Scorer
from flexivid.sweep.settings import (
    check_arguments,
    check_identity,
    device_name,
    device_of,
    identity_of,
    parse_arguments,
    pipeline_call,
    prompts_of,
    tuning_clips,
)
from flexivid.sweep.tuning import tune_all
from flexivid.sweep.vbench import DIMENSIONS, availability, score_arms

PACKAGES = ("flexivid", "torch", "diffusers", "transformers", "peft")


def print_plan(arguments, pipe, arms: list[Arm], clips: list[Clip], call: dict) -> None:
    """What a sweep would do and cost, from two real steps of one batch."""
    batch = clips[: arguments.batch]
    short = {**call, "steps": 2}
    flops = sample(pipe, batch, short, count_flops=True, latents=True)[1].flops
    began = time.perf_counter()
    sample(pipe, batch, short, count_flops=False, latents=True)
    seconds = (time.perf_counter() - began) / 2 * call["steps"] / len(batch)
    full = flops / 2 * call["steps"] / len(batch)
    print(f"{len(arms)} arms x {len(clips)} clips of {call['frames']}x{call['height']}x{call['width']}")
    print(f"{'arm':28}{'FLOPs':>14}{'about minutes':>16}")
    for arm in arms:
        spent, minutes = (arm.budget * cost * len(clips) for cost in (full, seconds / 60))
        print(f"{arm.name:28}{flops_text(spent):>14}{minutes:16.1f}")
    share = sum(arm.budget for arm in arms)
    total = share * seconds * (len(clips) + arguments.batch) / 60
    print(f"{'all, with timing':28}{flops_text(share * full * len(clips)):>14}{total:16.1f}")
    print("The minutes suppose that seconds follow FLOPs; decoding, tuning, timing and scoring come on top.")


def print_dimensions(names: list[str], cache, own_prompts: bool) -> None:
    """What each dimension lacks. own_prompts: the sweep is on those of VBench, which some dimensions need."""
    print("VBench dimensions:")
    for name, missing in availability(cache).items():
        if name in names:
            unfit = "" if own_prompts or DIMENSIONS[name].any_prompt else "other prompts: --prompts vbench"
            print(f"  {name:24}{'; '.join(filter(None, (missing, unfit))) or 'can be scored'}")


def load_pipeline(arguments: argparse.Namespace, device: torch.device) -> DiffusionPipeline:
    dtype = getattr(torch, arguments.dtype)
    if arguments.model:
        pipe = load(arguments.model, pipeline_class(arguments.model, with_image=False), dtype)
    else:
        pipe = WanPipeline.from_pretrained(MODEL, dtype={"default": torch.float32, "transformer": dtype})
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def checked_arms(arguments: argparse.Namespace, empty: DiffusionPipeline, call: dict, say) -> list[Arm]:
    """The arms that can be run. empty: the pipeline without weights."""
    check_sizes(empty, *(call[name] for name in ("frames", "height", "width")))
    arms = picked(all_arms(arguments, empty, call), arguments.arms)
    arms = possible(arms, empty, call, arguments.names_rivals, say)
    return reachable(arms, empty, call, say)


def tune(sampler: Sampler, arms: list[Arm], clips: list[Clip], identity: dict, state: PartialState) -> list[Arm]:
    """The arms with settings of their rivals, which the main process finds. clips: to tune them on."""
    folder = sampler.folder
    if state.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "sweep.json", identity)
        tune_all(lambda: Probe(sampler.pipe, clips, sampler.call), arms, folder / "tuning.json")
    state.wait_for_everyone()
    return tuned(arms, read_json(folder / "tuning.json"), state.print)


def make(sampler: Sampler, scorer: Scorer, arms: list[Arm], state: PartialState) -> None:
    """Samples and scores the batches of this process."""
    numbers = list(range(len(sampler.batches)))[state.process_index :: state.num_processes]
    missing = sum(not sampler.record(arm, number).exists() for arm in arms for number in numbers)
    with tqdm(total=missing, desc="batches", disable=not state.is_main_process) as progress:
        for arm in arms:
            progress.set_postfix_str(arm.name)
            sampler.make(arm, numbers, progress)
    for number in tqdm(numbers, desc="scoring", unit="batch", disable=not state.is_main_process):
        scorer.score(arms, number)
    state.wait_for_everyone()


def write_results(
    arguments: argparse.Namespace, sampler: Sampler, scorer: Scorer, arms: list[Arm], prompts: list[str], device
) -> None:
    sampler.time(arms, arguments.rounds)
    folder, names = sampler.folder, [arm.name for arm in arms]
    vbench = score_arms(arguments.dimensions, folder, names, arguments.vbench_cache, arguments.prompts == "vbench")
    facts = {
        "command": shlex.join(["flexivid", "sweep", *arguments.words]),
        "versions": {name: version(name) for name in PACKAGES},
        "call": sampler.call,
        "prompts": len(prompts),
        "videos_per_prompt": arguments.videos_per_prompt,
        "dtype": arguments.dtype,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }
    if scorer.scenes:
        facts["frechet_distance_to_data_of_data"] = scorer.floor(arguments.videos_per_prompt)
    results = assemble(facts, sampler, scorer, arms, arguments.videos_per_prompt, vbench)
    write_json(folder / "results.json", results)
    write_csv(results, folder / "results.csv")
    write_pareto(results, folder / "pareto.png")
    write_report(results, sampler, prompts[: arguments.report_prompts], folder / "report.html")
    for name in ("results.json", "results.csv", "pareto.png", "report.html"):
        print(folder / name)


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(__doc__, sys.argv[1:] if argv is None else argv)
    check_arguments(arguments)
    prompts = prompts_of(arguments)
    clips = clips_of(prompts, arguments.videos_per_prompt, arguments.seed)
    empty = empty_pipeline(arguments.model or MODEL)
    call = pipeline_call(arguments, empty)
    # The other processes wait while the first one tunes the rivals, which may take hours.
    state = PartialState(cpu=arguments.device.type == "cpu", timeout=timedelta(days=7))
    device = device_of(state, arguments.device)
    if device.type == "cpu":
        share_cores(state.num_processes)
    identity = check_identity(arguments.output / "sweep.json", identity_of(arguments, clips, call, device))
    if state.is_main_process and (arguments.dimensions or arguments.dry_run):
        names = arguments.dimensions or list(DIMENSIONS)
        print_dimensions(names, arguments.vbench_cache, arguments.prompts == "vbench")
    arms = checked_arms(arguments, empty, call, state.print)
    pipe = load_pipeline(arguments, device)
    if arguments.dry_run:
        if state.is_main_process:
            print_plan(arguments, pipe, arms, clips, call)
        return

    shown = shown_clips(clips, prompts[: arguments.report_prompts])
    sampler = Sampler(pipe, clips, arguments.output, call, arguments.batch, shown)
    arms = tune(sampler, arms, tuning_clips(arguments, clips), identity, state)
    scenes = {prompt: parse_caption(prompt) for prompt in prompts} if arguments.prompts in SHAPES_SETS else None
    scorer = Scorer(sampler, scenes, device)
    make(sampler, scorer, arms, state)
    if not state.is_main_process:
        return
    if device.type == "cpu":
        share_cores(1)  # the others are done
    write_results(arguments, sampler, scorer, arms, prompts, device)
