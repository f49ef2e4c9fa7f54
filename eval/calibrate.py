"""Finds the best schedule for a budget from the errors that the weak modes really make.

    python eval/calibrate.py --budgets 0.5 0.25 --output outputs/calibrated
    python pipelines/t2v.py --schedule outputs/calibrated/0.25.json

A few prompts are sampled at full compute; at every step each weak mode predicts from the same latents. `errors.png`
shows how wrong it is, and what is left of that when a powerful step some steps before corrects it.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import WanPipeline
from diffusers.utils import logging
from tqdm import tqdm

import flexivid
from flexivid.model.adapter import read_config
from flexivid.sampling.budget import check_budget, schedule_for_budget
from flexivid.sampling.calibration import best_schedule, residual_errors, step_weights, summed_error
from flexivid.sampling.schedule import KEPT
from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING
from flexivid.shapes.prompts import load_prompts
from flexivid.shapes.world import all_scenes
from sweep.sampling import write_json

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

GAPS = (1, 3, 5, 10)  # steps since the last powerful one, in the picture


class Errors(flexivid.Observer):
    """e(t) of every weak mode along a run of the powerful one, with both branches and with guidance that is kept."""

    def __init__(self, modes: list[str], scale: float, steps: int):
        self.patch_sizes, self.scale = tuple(modes), scale
        self.errors = {(mode, guidance): [] for mode in modes for guidance in (mode, KEPT)}
        self._of_branches: dict[tuple[int, str], torch.Tensor] = {}
        self._progress = tqdm(total=steps, desc="full run, every weak mode beside it")

    def error(self, step, branch, patch_size, x0_error):
        self._of_branches[branch, patch_size] = x0_error

    def guidance(self, step, x0_difference):
        """The last of a step: the errors of both its branches are there."""
        for mode in self.patch_sizes:
            conditional, unconditional = (self._of_branches[branch, mode] for branch in (0, 1))
            both = unconditional + self.scale * (conditional - unconditional)
            kept = conditional - (self.scale - 1) * x0_difference
            self.errors[mode, mode].append(both.flatten().numpy())
            self.errors[mode, KEPT].append(kept.flatten().numpy())
        self._progress.update()


def measure(pipe: WanPipeline, captions: list[str], modes: list[str], steps: int) -> tuple[dict, np.ndarray, dict]:
    """By kind of weak step e(t) of a full run, (steps, elements); noise levels; costs of a forward."""
    errors, sampling = Errors(modes, SAMPLING["guidance_scale"], steps), {**SAMPLING, "num_inference_steps": steps}
    with flexivid.observe(pipe, errors):
        pipe(captions, **sampling, generator=torch.Generator().manual_seed(0), output_type="latent")
    sizes = (sampling[name] for name in ("num_frames", "height", "width", "max_sequence_length"))
    stacked = {kind: np.stack(values) for kind, values in errors.errors.items()}
    return stacked, pipe.scheduler.sigmas.double().numpy(), flexivid.costs(pipe, *sizes)


def draw(residuals: dict[tuple, np.ndarray], sigmas: np.ndarray, path: Path) -> None:
    weights = step_weights(sigmas)
    # A column a weak mode: both guidance branches above, kept guidance below.
    columns = len(residuals) // 2
    figure, panels = plt.subplots(2, columns, figsize=(5 * columns, 7), sharex=True, sharey=True, squeeze=False)
    for (kind, table), panel in zip(residuals.items(), panels.T.flat, strict=True):
        steps = table.shape[1]
        if KEPT not in kind:  # there is nothing to keep without a powerful step before
            panel.plot(sigmas[:-1], table[steps] / weights, color="black", label="uncorrected")
        for gap in GAPS:
            left = [table[t - gap, t] / weights[t] for t in range(gap, steps)]
            panel.plot(sigmas[gap:-1], left, label=f"corrected {gap} step{'s' if gap > 1 else ''} before")
        panel.set_title("/".join(dict.fromkeys(kind)))
        panel.set_xlabel("noise level σ")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
    figure.supylabel("mean squared error of the guided x0 to the powerful one")
    panels[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.25])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--steps", type=int, default=SAMPLING["num_inference_steps"])
    parser.add_argument("--output", type=Path, default=Path("outputs/calibrated"))
    arguments = parser.parse_args()
    for budget in arguments.budgets:
        check_budget(budget)
    logging.set_verbosity_error()
    pipe = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    flexivid.enable(pipe, adapter=arguments.adapter, schedule=f"1x2x2:{arguments.steps}", merge_lora=True)
    judged = {scene for split in load_prompts().values() for scene in split}
    scenes = [scene for scene in all_scenes() if scene not in judged]
    picks = torch.randperm(len(scenes), generator=torch.Generator().manual_seed(1))[: arguments.prompts].tolist()
    errors, sigmas, costs = measure(
        pipe, [scenes[pick].caption for pick in picks], read_config(arguments.adapter).patch_sizes, arguments.steps
    )
    residuals = {kind: residual_errors(values, sigmas) for kind, values in errors.items()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(residuals, sigmas, arguments.output / "errors.png")
    powerful = max(costs, key=costs.get)
    for budget in arguments.budgets:
        schedule, error = best_schedule(residuals, costs, powerful, budget)
        full = 2 * arguments.steps * costs[powerful]
        plain = schedule_for_budget(costs, arguments.steps, budget, 2, "kept")
        result = {
            "schedule": schedule.to_json(),
            "budget": budget,
            "flops_ratio": schedule.cost(costs) / full,
            "predicted_error": error,
            "plain_schedule": str(plain),
            "plain_flops_ratio": plain.cost(costs) / full,
            "plain_predicted_error": summed_error(plain, residuals),
            "model": str(arguments.model),
            "adapter": str(arguments.adapter),
        }
        write_json(result, arguments.output / f"{budget:g}.json")
        print(f"{budget:g}: {schedule}, predicted error {error:.4g}")
        print(f"  plain: {plain}, predicted error {result['plain_predicted_error']:.4g}")


if __name__ == "__main__":
    main()
