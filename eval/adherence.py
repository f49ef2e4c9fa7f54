"""Prompt adherence of the embedded model: full compute, budgets, and fewer steps, on the same prompts and seeds.

    python eval/adherence.py --output docs/measurements/adherence --seeds 3

The oracle judges every clip on pattern, colour, shape, motion and background. Arms are written one file each and a
run that was stopped goes on where it was. `summary.md` holds adherence and the paired difference of every arm to full
compute with its 95 % bootstrap interval over prompts.
"""

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.utils import logging
from tqdm import tqdm

import flexivid
from flexivid.shapes.oracle import adherence
from flexivid.shapes.prompts import load_prompts
from flexivid.shapes.world import FACTORS

ASSETS = Path(flexivid.__file__).parent / "assets"
COLUMNS = (*FACTORS, "all")


@dataclass(frozen=True)
class Arm:
    name: str
    steps: int
    budget: float | None = None
    adapter: Path | None = None


def sample_arm(pipe: WanPipeline, arm: Arm, scenes: list, seeds: int, path: Path, batch: int) -> dict:
    """Hits per column, one list entry a clip, prompts within seeds; kept in `path` after every batch."""
    jobs = [(seed, i) for seed in range(seeds) for i in range(len(scenes))]
    hits = json.loads(path.read_text()) if path.exists() else {column: [] for column in COLUMNS}
    hits.pop("flops_ratio", None)
    flexivid.disable(pipe)
    if arm.budget is not None:
        flexivid.enable(pipe, adapter=arm.adapter, budget=arm.budget, modes=None if arm.adapter else ["1x4x4", "2x4x4"])
    ratio = arm.steps / 40
    progress = tqdm(range(len(hits["all"]), len(jobs), batch), desc=arm.name)
    for start in progress:
        part = jobs[start : start + batch]
        wanted = [scenes[i] for _, i in part]
        video = pipe(
            [scene.caption for scene in wanted],
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=arm.steps,
            guidance_scale=4.0,
            max_sequence_length=32,
            generator=[torch.Generator().manual_seed(1000 * seed + i) for seed, i in part],
            output_type="pt",
        ).frames
        for column, values in adherence(video.transpose(1, 2) * 2 - 1, wanted).items():
            hits[column] += [int(value) for value in values]
        if arm.budget is not None:
            ratio = flexivid.summary(pipe).ratio
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps({**hits, "flops_ratio": ratio}))
        os.replace(beside, path)
    return json.loads(path.read_text())


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """95 % interval of the mean of per-prompt values: (prompts,)."""
    picks = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.percentile(values[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "shapes")
    parser.add_argument("--adapter", type=Path, default=ASSETS / "shapes-flex")
    parser.add_argument("--direct-adapter", type=Path, help="an adapter of the other parametrisation to compare")
    parser.add_argument("--output", type=Path, default=Path("outputs/adherence"))
    parser.add_argument("--prompts", type=int, default=192, help="the first so many, a third of them held out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    pipe = WanPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)
    prompts = load_prompts()
    seen_count = arguments.prompts * 2 // 3
    scenes = prompts["seen"][:seen_count] + prompts["held_out"][: arguments.prompts - seen_count]
    arms = [
        Arm("full", 40),
        Arm("adapter-0.25", 40, 0.25, arguments.adapter),
        Arm("steps-10", 10),
        Arm("training-free-0.5", 40, 0.5),
    ]
    if arguments.direct_adapter:
        arms.append(Arm("direct-adapter-0.25", 40, 0.25, arguments.direct_adapter))
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = {
        arm.name: sample_arm(pipe, arm, scenes, arguments.seeds, arguments.output / f"{arm.name}.json", arguments.batch)
        for arm in arms
    }
    lines = ["| split | arm | FLOPs | " + " | ".join(COLUMNS) + " |", "|---" * (3 + len(COLUMNS)) + "|"]
    for split, rows in (("seen", slice(0, seen_count)), ("held out", slice(seen_count, None))):
        per_prompt = {
            name: {c: np.reshape(hits[c], (arguments.seeds, -1)).mean(0)[rows] for c in COLUMNS}
            for name, hits in results.items()
        }
        for name, values in per_prompt.items():
            cells = [f"{100 * values[c].mean():.1f}" for c in COLUMNS]
            if name != "full":
                for i, c in enumerate(COLUMNS):
                    difference = 100 * (values[c] - per_prompt["full"][c])
                    low, high = bootstrap(difference)
                    cells[i] += f" ({difference.mean():+.1f}, {low:+.1f} to {high:+.1f})"
            lines.append(f"| {split} | {name} | {results[name]['flops_ratio']:.3f} | " + " | ".join(cells) + " |")
    (arguments.output / "summary.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
