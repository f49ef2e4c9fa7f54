"""The quality-compute curve: every arm on the same prompts and noise, scored, drawn, and written as a page.

    python eval/vbench_sweep.py --dry-run
    python eval/vbench_sweep.py --budgets 1.0 0.6 0.4 0.25 --output outputs/sweep
    accelerate launch --num_processes 2 eval/vbench_sweep.py --output outputs/sweep      # splits the batches

A sweep that was stopped goes on where it was; `--output` of another sweep is refused. Results: results.json,
results.csv, pareto.png, report.html.
"""

import argparse
import hashlib
import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, WanPipeline
from diffusers.utils import logging
from tqdm import tqdm

import flexivid
from flexivid.schedules import BudgetError
from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING
from flexivid.shapes.prompts import load_prompts
from flexivid.shapes.world import parse_caption
from sweep.arms import METHODS, Arm, flexivid_arms
from sweep.report import write_report
from sweep.results import assemble, write_csv, write_pareto
from sweep.rivals import CACHES, NEAR, tune
from sweep.sampling import Clip, Sampler, clips_of, sample, write_json
from sweep.scoring import Scorer
from sweep.vbench import DIMENSIONS, availability, score_arms, standard_prompts

REAL_SAMPLING = {
    "num_frames": 81,
    "height": 480,
    "width": 832,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "max_sequence_length": 512,
}
PROBE_CLIPS = 2  # that caches are tuned on
PACKAGES = ("flexivid", "torch", "diffusers", "transformers", "peft")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub id in diffusers format; the embedded model by default")
    parser.add_argument("--adapter", help="flexivid adapter, folder or hub id; the embedded model's by default")
    parser.add_argument("--direct-adapter", help="an adapter of the direct parametrisation, for the method `direct`")
    parser.add_argument("--modes", nargs="+", help="weak patch sizes of training-free arms; the family's by default")
    parser.add_argument("--budgets", type=float, nargs="+", default=[1.0, 0.6, 0.4, 0.25])
    methods = "; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items())
    parser.add_argument("--methods", nargs="+", choices=METHODS, help=methods)
    parser.add_argument("--rivals", nargs="*", choices=["steps", *CACHES], help="instead of every one of them")
    parser.add_argument("--prompts", default="shapes", help="shapes (the embedded world), vbench, or a text file")
    parser.add_argument("--max-prompts", type=int, help="only the first so many")
    parser.add_argument("--videos-per-prompt", type=int, default=2)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--frames", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=16, help="clips that are sampled at once")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="transformer")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dimensions", nargs="*", default=[], help="of VBench: names, or all")
    parser.add_argument("--vbench-cache", type=Path, help="folder of VBench's weights; ~/.cache/vbench by default")
    parser.add_argument("--report-prompts", type=int, default=6, help="prompts whose clips are in report.html")
    parser.add_argument("--output", type=Path, default=Path("outputs/sweep"))
    parser.add_argument("--dry-run", action="store_true", help="say what would be done and what is missing")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    """Fills in what depends on other arguments. Raises ValueError that says what would be right."""
    embedded = arguments.model is None
    if embedded and arguments.adapter is None:
        arguments.adapter = ADAPTER
    if arguments.methods is None:
        rivals = ["steps", *CACHES] if arguments.rivals is None else arguments.rivals
        arguments.methods = ["adapter", "training-free", *rivals] if arguments.adapter else ["training-free", *rivals]
    elif arguments.rivals is not None:
        raise ValueError("--methods names the rivals too; give one of --methods and --rivals")
    needed = {
        "adapter": "adapter",
        "weak-first": "adapter",
        "adapter-half-steps": "adapter",
        "direct": "direct_adapter",
    }
    for method in arguments.methods:
        if method in needed and getattr(arguments, needed[method]) is None:
            raise ValueError(f"the method {method} needs --{needed[method].replace('_', '-')}")
    for budget in arguments.budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"a budget is a share of the full FLOPs, above 0 and up to 1, not {budget}")
    arguments.budgets = sorted({budget for budget in arguments.budgets if budget < 1}, reverse=True)
    if unknown := set(arguments.dimensions) - {*DIMENSIONS, "all"}:
        raise ValueError(f"VBench has no dimension {unknown.pop()}; it has {', '.join(DIMENSIONS)}")
    if "all" in arguments.dimensions:
        arguments.dimensions = list(DIMENSIONS)
    if embedded and arguments.modes is None:
        arguments.modes = ["1x4x4", "2x4x4"]
    for name in ("videos_per_prompt", "batch", "max_prompts"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}")


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompts == "shapes":
        prompts = [scene.caption for scene in load_prompts()["seen"]]
    elif arguments.prompts == "vbench":
        prompts = standard_prompts(arguments.dimensions)
    else:
        path = Path(arguments.prompts)
        if not path.exists():
            raise ValueError(f"--prompts must be shapes, vbench or a text file, and there is no file {path}")
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"no prompts in {arguments.prompts}")
    return prompts[: arguments.max_prompts]


def pipeline_call(arguments: argparse.Namespace) -> dict:
    """The arguments of the pipeline, the same for every arm but for the steps."""
    call = dict(SAMPLING if arguments.model is None else REAL_SAMPLING)
    named = {"num_frames": "frames", "num_inference_steps": "steps"}
    for key in call.keys() - {"max_sequence_length"}:
        given = getattr(arguments, named.get(key, key))
        call[key] = call[key] if given is None else given
    return call


def identity_of(arguments: argparse.Namespace, clips: list[Clip], call: dict) -> dict:
    """What every clip of a sweep depends on: a folder holds the clips of one sweep only."""
    weights = {}
    for name in ("model", "adapter", "direct_adapter"):
        source = getattr(arguments, name) or (MODEL if name == "model" else "")
        digest = hashlib.sha256(str(source).encode())
        for path in sorted(Path(source).rglob("*.safetensors")) if source and Path(source).is_dir() else []:
            digest.update(path.read_bytes())
        weights[name] = digest.hexdigest()
    named = [clip.prompt for clip in clips]
    return {
        **weights,
        "call": call,
        "clips": hashlib.sha256("\n".join(named).encode()).hexdigest(),
        "seed": arguments.seed,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
    }


def check_identity(folder: Path, identity: dict) -> None:
    path = folder / "sweep.json"
    if path.exists():
        before = json.loads(path.read_text())
        if differing := [key for key in identity if before.get(key) != identity[key]]:
            raise ValueError(
                f"{folder} holds a sweep with another {', '.join(differing)}; give another --output, or delete it"
            )
    else:
        write_json(identity, path)


def tune_caches(arguments: argparse.Namespace, pipe: DiffusionPipeline, clips: list[Clip], call: dict, path: Path):
    """Tunes the caches to every budget. What was found is kept in `path`, after each cache."""
    known = json.loads(path.read_text()) if path.exists() else {}
    write_json(known, path)

    def probe() -> int:
        return sample(pipe, clips[:PROBE_CLIPS], call, count_flops=True, latents=True)[1].flops

    caches = [method for method in arguments.methods if method in CACHES]
    for name in tqdm(caches, desc="tuning caches", disable=not caches):
        found = known.setdefault(name, {})
        missing = [budget for budget in arguments.budgets if f"{budget:g}" not in found]
        if not missing:
            continue
        if "full_flops" not in known:
            known["full_flops"] = probe()
        tuned = tune(pipe, CACHES[name], missing, probe, known["full_flops"], call["num_inference_steps"])
        for budget, (settings, share) in tuned.items():
            found[f"{budget:g}"] = {"settings": settings, "share": share}
        write_json(known, path)


def cache_arms(arguments: argparse.Namespace, steps: int, tuning: dict, say) -> list[Arm]:
    """The arms of the caches that come near a budget; says which do not."""
    arms = []
    for name in (method for method in arguments.methods if method in CACHES):
        for budget in arguments.budgets:
            found = tuning[name][f"{budget:g}"]
            if abs(found["share"] - budget) > NEAR:
                say(f"{name} does not reach {budget:g}: the nearest is {found['share']:.3f}")
            else:
                arms.append(Arm(f"{name}-{budget:g}", name, budget, steps, cache=found["settings"]))
    return arms


def reachable(arms: list[Arm], pipe: DiffusionPipeline, call: dict, say) -> list[Arm]:
    """The arms without those of flexivid that the patch sizes cannot bring below their budget; says which."""
    kept = []
    for arm in arms:
        try:
            with arm.on(pipe):
                if arm.flexivid is not None:
                    sizes = (call[name] for name in ("num_frames", "height", "width"))
                    flexivid.plan(pipe, *sizes, arm.steps, call["max_sequence_length"], call["guidance_scale"] > 1)
            kept.append(arm)
        except BudgetError as error:
            say(f"{arm.name} is left out: {error}")
    return kept


def print_plan(arguments, pipe, arms: list[Arm], clips: list[Clip], call: dict) -> None:
    """What a sweep would do and cost, from two real steps of one batch."""
    batch = clips[: arguments.batch]
    short = {**call, "num_inference_steps": 2}
    flops = sample(pipe, batch, short, count_flops=True, latents=True)[1].flops
    began = time.perf_counter()
    sample(pipe, batch, short, count_flops=False, latents=True)
    seconds = (time.perf_counter() - began) / 2 * call["num_inference_steps"] / len(batch)
    full = flops / 2 * call["num_inference_steps"] / len(batch)
    caches = [(f"{m}-{b:g}", b) for m in arguments.methods if m in CACHES for b in arguments.budgets]
    rows = [(arm.name, arm.budget) for arm in arms] + caches
    print(f"{len(rows)} arms x {len(clips)} clips of {call['num_frames']}x{call['height']}x{call['width']}")
    print(f"{'arm':28}{'TFLOP':>12}{'about minutes':>16}")
    for name, budget in rows:
        print(f"{name:28}{budget * full * len(clips) / 1e12:12.4g}{budget * seconds * len(clips) / 60:16.1f}")
    share = sum(budget for _, budget in rows)
    total = share * seconds * (len(clips) + arguments.batch) / 60
    print(f"{'all, with timing':28}{share * full * len(clips) / 1e12:12.4g}{total:16.1f}")
    print("The minutes suppose that seconds follow FLOPs; tuning and scoring come on top.")
    print("\nVBench dimensions:")
    for dimension, missing in availability(arguments.vbench_cache).items():
        print(f"  {dimension:24}{'can be scored' if not missing else missing}")


def run(arguments: argparse.Namespace) -> None:
    check_arguments(arguments)
    prompts, call = read_prompts(arguments), pipeline_call(arguments)
    clips = clips_of(prompts, arguments.videos_per_prompt, arguments.seed)
    scenes = {prompt: parse_caption(prompt) for prompt in prompts} if arguments.prompts == "shapes" else None
    steps = call["num_inference_steps"]
    adapters = (arguments.adapter, arguments.direct_adapter)
    arms = flexivid_arms(arguments.methods, arguments.budgets, steps, *adapters, arguments.modes)

    state = PartialState(cpu=arguments.device == "cpu")
    folder = arguments.output
    if state.is_main_process and not arguments.dry_run:
        folder.mkdir(parents=True, exist_ok=True)
        check_identity(folder, identity_of(arguments, clips, call))
    load = DiffusionPipeline if arguments.model else WanPipeline
    dtypes = {"default": torch.float32, "transformer": getattr(torch, arguments.dtype)}
    if arguments.model:
        dtypes = {"default": getattr(torch, arguments.dtype), "vae": torch.float32}
    pipe = load.from_pretrained(arguments.model or MODEL, dtype=dtypes).to(state.device)
    pipe.set_progress_bar_config(disable=True)
    arms = reachable(arms, pipe, call, state.print)
    if arguments.dry_run:
        return print_plan(arguments, pipe, arms, clips, call)

    sampler = Sampler(pipe, clips, folder, call, arguments.batch)
    if state.is_main_process:
        tune_caches(arguments, pipe, clips, call, folder / "tuning.json")
    state.wait_for_everyone()
    arms += cache_arms(arguments, steps, json.loads((folder / "tuning.json").read_text()), state.print)
    numbers = list(range(len(sampler.batches)))[state.process_index :: state.num_processes]
    missing = sum(not sampler.record(arm, number).exists() for arm in arms for number in numbers)
    with tqdm(total=missing, desc="batches", disable=not state.is_main_process) as progress:
        for arm in arms:
            progress.set_postfix_str(arm.name)
            sampler.make(arm, numbers, timed=state.is_main_process, progress=progress)
    state.wait_for_everyone()
    if not state.is_main_process:
        return

    scorer = Scorer(sampler, scenes, call["height"])
    for arm in tqdm(arms, desc="scoring"):
        scorer.score(arm)
    standard = arguments.prompts == "vbench"
    vbench = score_arms(arguments.dimensions, folder, [arm.name for arm in arms], arguments.vbench_cache, standard)
    facts = {
        "command": " ".join(["python eval/vbench_sweep.py", *sys.argv[1:]]),
        "versions": {name: version(name) for name in PACKAGES},
        "call": call,
        "prompts": len(prompts),
        "videos_per_prompt": arguments.videos_per_prompt,
        "dtype": arguments.dtype,
        "threads": torch.get_num_threads(),
    }
    results = assemble(facts, sampler, scorer, arms, arguments.videos_per_prompt, vbench)
    write_json(results, folder / "results.json")
    write_csv(results, folder / "results.csv")
    write_pareto(results, folder / "pareto.png")
    write_report(results, sampler, prompts[: arguments.report_prompts], folder / "report.html")
    for name in ("results.json", "results.csv", "pareto.png", "report.html"):
        print(folder / name)


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    logging.set_verbosity_error()
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
