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
import os
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.utils import logging
from tqdm import tqdm

import flexivid
from flexivid.model.flexible import compile_blocks
from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING
from flexivid.shapes.oracle import judge
from flexivid.shapes.prompts import load_prompts
from flexivid.shapes.world import FACTORS, Scene
from sweep.bootstrap import interval
from sweep.settings import add_weights

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


def build_pipeline(model: Path, arm: Arm, dtype: str, compiled: bool) -> WanPipeline:
    """The arm's own pipeline, so that its compiled blocks stay valid while the arms alternate."""
    dtypes = {"default": torch.float32, "transformer": getattr(torch, dtype)}
    pipe = WanPipeline.from_pretrained(model, dtype=dtypes)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        compile_blocks(pipe.transformer)
    if arm.budget is not None:
        modes = None if arm.adapter else ["1x4x4", "2x4x4"]
        merge_lora = arm.adapter is not None
        settings = {"budget": arm.budget, "order": arm.order, "modes": modes, "merge_lora": merge_lora}
        flexivid.enable(pipe, adapter=arm.adapter, **settings)
    return pipe


def identity_of(model: Path, arm: Arm, scenes: list[Scene], dtype: str, compiled: bool) -> str:
    """Changes with whatever changes the clips of an arm."""
    digest = hashlib.sha256("\n".join([f"{dtype} {compiled}", *(scene.caption for scene in scenes)]).encode())
    for folder in (model, arm.adapter):
        if folder:
            add_weights(digest, folder)
    return digest.hexdigest()


def judge_arm(
    pipe: WanPipeline, arm: Arm, scenes: list[Scene], seed: int, path: Path, batch: int, identity: str
) -> dict:
    """What the oracle sees in the arm's clip of every scene, as lists of words; kept in `path` after every batch."""
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("identity") != identity:
        result = {"identity": identity, "flops_ratio": arm.steps / FULL_STEPS, "shown": []}
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
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(result))
        os.replace(beside, path)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--direct-adapter", type=Path, help="an adapter of the other parametrisation to compare")
    parser.add_argument("--output", type=Path, default=Path("outputs/adherence"))
    parser.add_argument("--arms", nargs="+", help="only these, beside full")
    parser.add_argument("--seen", type=int, default=128, help="prompts of combinations seen in training")
    parser.add_argument("--held-out", type=int, default=64, help="prompts of combinations that were not")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the transformer")
    parser.add_argument("--compile", action="store_true", help="compile the blocks: 1.3 to 2 times faster")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    prompts = load_prompts()
    splits = {"seen": prompts["seen"][: arguments.seen], "held out": prompts["held_out"][: arguments.held_out]}
    scenes = [scene for split in splits.values() for scene in split]
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
    arms = [arm for arm in arms if not arguments.arms or arm.name in ("full", *arguments.arms)]
    arguments.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict]] = {arm.name: [] for arm in arms}
    settings = {"dtype": arguments.dtype, "compiled": arguments.compile}
    identities = {arm: identity_of(arguments.model, arm, scenes, **settings) for arm in arms}
    pipes = {arm: build_pipeline(arguments.model, arm, **settings) for arm in arms}
    # Seeds outermost: a run that is stopped early has measured every arm on the same clips.
    for seed in range(arguments.seeds):
        for arm in arms:
            path = arguments.output / f"{arm.name}-seed{seed}.json"
            results[arm.name].append(judge_arm(pipes[arm], arm, scenes, seed, path, arguments.batch, identities[arm]))
        table = summarise(results, splits)
        (arguments.output / "summary.md").write_text(f"Seeds: {seed + 1}\n\n{table}")
    print(table)


if __name__ == "__main__":
    main()
