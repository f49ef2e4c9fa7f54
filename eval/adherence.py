"""Prompt adherence of the embedded model: full compute, budgets, and fewer steps, on the same prompts and seeds.

    python eval/adherence.py --output docs/measurements/adherence --seeds 3

The oracle judges every clip on pattern, colour, shape, motion and background. What it saw is kept in one file per arm
and seed, and a run that was stopped goes on where it was. `summary.md` holds adherence, the paired difference of every
arm to full compute with its 95 % bootstrap interval over prompts, and a control: full compute judged against the
prompts of other clips.
"""

import argparse
import hashlib
import json
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from tqdm import tqdm

import flexivid
from flexivid.command_line import Parser, add_batch, add_embedded_adapter, add_embedded_model, command, count
from flexivid.files import write_text
from flexivid.inputs import check_arm, check_model, check_output_folder, empty_wan_pipeline, read_json
from flexivid.model.flexible import compile_blocks
from flexivid.shapes.embedded import SAMPLING, USUAL
from flexivid.shapes.oracle import judge
from flexivid.shapes.prompts import load_prompts
from flexivid.shapes.world import FACTORS, Scene
from flexivid.sweep.bootstrap import interval
from flexivid.sweep.settings import digest_of

COLUMNS = (*FACTORS, "all")
FULL_STEPS = SAMPLING["num_inference_steps"]
SHUFFLE = 37  # the control judges clip i against prompt i + SHUFFLE


@dataclass(frozen=True)
class Arm:
    name: str
    steps: int = FULL_STEPS
    budget: float | None = None
    adapter: Path | None = None
    order: str | None = None


def settings_of(arm: Arm) -> dict:
    """Arguments of `flexivid.enable`."""
    return {
        "adapter": arm.adapter,
        "budget": arm.budget,
        "order": arm.order,
        "modes": None if arm.adapter else ["1x4x4", "2x4x4"],
        "merge_lora": arm.adapter is not None,
    }


def build_pipeline(model: Path, arm: Arm, dtype: str, compiled: bool) -> WanPipeline:
    """The arm's own pipeline, so that its compiled blocks stay valid while the arms alternate."""
    dtypes = {"default": torch.float32, "transformer": getattr(torch, dtype)}
    pipe = WanPipeline.from_pretrained(model, dtype=dtypes, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        compile_blocks(pipe.transformer)
    if arm.budget is not None:
        flexivid.enable(pipe, **settings_of(arm))
    return pipe


def identity_of(model: Path, arm: Arm, scenes: list[Scene], dtype: str, compiled: bool) -> str:
    """Changes with whatever changes the clips of an arm."""
    digest = hashlib.sha256("\n".join([f"{dtype} {compiled}", *(scene.caption for scene in scenes)]).encode())
    for folder in (model, arm.adapter):
        if folder:
            digest.update(digest_of(folder).encode())
    return digest.hexdigest()


def judge_arm(
    pipe: WanPipeline, arm: Arm, scenes: list[Scene], seed: int, path: Path, batch: int, identity: str
) -> dict:
    """What the oracle sees in the arm's clip of every scene, as lists of words; kept in `path` after every batch."""
    fresh = {"identity": identity, "flops_ratio": arm.steps / FULL_STEPS, "shown": []}
    result = read_json(path) if path.exists() else fresh
    for start in tqdm(range(len(result["shown"]), len(scenes), batch), desc=f"{arm.name}, seed {seed}"):
        wanted = scenes[start : start + batch]
        video = pipe(
            [scene.caption for scene in wanted],
            **{**SAMPLING, "num_inference_steps": arm.steps},
            generator=[torch.Generator().manual_seed(1000 * seed + start + i) for i in range(len(wanted))],
            output_type="pt",
        ).frames
        seen = [judge(clip) for clip in video.transpose(1, 2) * 2 - 1]
        result["shown"] += [[words[factor] for factor in FACTORS] for words in seen]
        if arm.budget is not None:
            result["flops_ratio"] = flexivid.summary(pipe).ratio
        write_text(path, json.dumps(result))
    return result


def hits(shown: np.ndarray, asked: list[Scene]) -> np.ndarray:
    """shown: (seeds, prompts, factors) words. Returns the share of hits over seeds, (prompts, factors + "all")."""
    right = shown == np.array([astuple(scene) for scene in asked], dtype=object)
    return np.concatenate([right, right.all(-1, keepdims=True)], -1).mean(0)


def summarise(results: dict[str, list[dict]], splits: dict[str, list[Scene]]) -> str:
    """A Markdown table. results: per arm a list over seeds, of clips in the order of the splits."""
    lines = ["| split | arm | FLOPs | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    start = 0
    for split, asked in splits.items():
        words = {
            name: np.array([seed["shown"][start : start + len(asked)] for seed in seeds], dtype=object)
            for name, seeds in results.items()
        }
        start += len(asked)
        full = hits(words["full"], asked)
        for name, shown in words.items():
            values = hits(shown, asked)
            cells = [f"{100 * share:.1f}" for share in values.mean(0)]
            if name != "full":
                for i, difference in enumerate(100 * (values - full).T):
                    low, high = interval(difference)
                    cells[i] += f" ({difference.mean():+.1f}, {low:+.1f} to {high:+.1f})"
            lines.append(f"| {split} | {name} | {results[name][0]['flops_ratio']:.3f} | " + " | ".join(cells) + " |")
        control = hits(words["full"], asked[SHUFFLE % len(asked) :] + asked[: SHUFFLE % len(asked)]).mean(0)
        lines.append(f"| {split} | full, shuffled prompts | | " + " | ".join(f"{100 * c:.1f}" for c in control) + " |")
    return "\n".join(lines) + "\n"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add_embedded_model(parser)
    add_embedded_adapter(parser)
    add("--direct-adapter", type=Path, help="an adapter of the other parametrisation to compare")
    add("--output", type=Path, default=Path("outputs/adherence"), help="folder; %(default)s by default")
    add("--arms", nargs="+", help="only these, beside full")
    add("--seen", type=count, default=128, help="prompts of combinations seen in training")
    add("--held-out", type=count, default=64, help="prompts of combinations that were not")
    add("--seeds", type=count, default=3, help="clips of each prompt; %(default)s by default")
    add_batch(parser, default=32)
    add("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the transformer")
    add("--compile", action="store_true", help="compile the blocks: 1.3 to 2 times faster")
    return parser.parse_args(argv)


def arms_of(arguments: argparse.Namespace) -> list[Arm]:
    """Those that are asked for, or all. Raises ValueError for one that there is not."""
    arms = [
        Arm("full"),
        Arm("adapter-0.25", budget=0.25, adapter=arguments.adapter),
        Arm("steps-10", steps=10),
        Arm("training-free-0.5", budget=0.5),
        Arm("training-free-0.25", budget=0.25),
        Arm("adapter-0.25-weak-first", budget=0.25, adapter=arguments.adapter, order="weak-first"),
        Arm("training-free-0.5-weak-first", budget=0.5, order="weak-first"),
    ]
    if arguments.direct_adapter:
        arms.append(Arm("direct-adapter-0.25", budget=0.25, adapter=arguments.direct_adapter))
    if unknown := set(arguments.arms or []) - {arm.name for arm in arms}:
        raise ValueError(f"there is no arm {min(unknown)}; there are {', '.join(arm.name for arm in arms)}")
    return [arm for arm in arms if not arguments.arms or arm.name in ("full", *arguments.arms)]


def check_arms(model: Path, arms: list[Arm]) -> None:
    """Raises ValueError for adapters that do not fit the model, and for budgets that cannot be reached."""
    empty = empty_wan_pipeline(model)
    for arm in arms:
        if arm.budget is not None:
            check_arm(empty, {**USUAL, "steps": arm.steps}, **settings_of(arm))


def check_output(folder: Path, identities: dict[Arm, str], seeds: int) -> None:
    """Raises ValueError for a folder that cannot be written into, or that holds what another run has found."""
    check_output_folder(folder)
    for arm, identity in identities.items():
        for seed in range(seeds):
            path = folder / f"{arm.name}-seed{seed}.json"
            if path.exists() and read_json(path).get("identity") != identity:
                raise ValueError(
                    f"{path} is of another model, adapter, dtype or other prompts; give another --output, or delete it"
                )


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    prompts = load_prompts()
    splits = {"seen": prompts["seen"][: arguments.seen], "held out": prompts["held_out"][: arguments.held_out]}
    scenes = [scene for split in splits.values() for scene in split]
    arms = arms_of(arguments)
    check_model(arguments.model)
    settings = {"dtype": arguments.dtype, "compiled": arguments.compile}
    identities = {arm: identity_of(arguments.model, arm, scenes, **settings) for arm in arms}
    check_output(arguments.output, identities, arguments.seeds)
    check_arms(arguments.model, arms)
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {arm.name: [] for arm in arms}
    pipes = {arm: build_pipeline(arguments.model, arm, **settings) for arm in arms}
    # Seeds outermost: a run that is stopped early has measured every arm on the same clips.
    for seed in range(arguments.seeds):
        for arm in arms:
            path = arguments.output / f"{arm.name}-seed{seed}.json"
            results[arm.name].append(judge_arm(pipes[arm], arm, scenes, seed, path, arguments.batch, identities[arm]))
        table = summarise(results, splits)
        write_text(arguments.output / "summary.md", f"Seeds: {seed + 1}\n\n{table}")
    print(table)


if __name__ == "__main__":
    sys.exit(main())
