"""Finds the best schedule for a budget from the errors that the weak modes really make.

    python eval/calibrate.py --budgets 0.5 0.25 --output outputs/calibrated
    python pipelines/t2v.py --schedule outputs/calibrated/0.25.json

A few prompts are sampled at full compute; at every step each weak mode predicts from the same latents. `errors.png`
shows how wrong it is, and what is left of that when a powerful step some steps before corrects it.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import WanPipeline
from tqdm import tqdm

import flexivid
from flexivid.command_line import Parser, add_prompts, budget_share, command, count
from flexivid.files import replacing, write_json
from flexivid.inputs import check_arm, check_output_folder, empty_wan_pipeline, read_prompts
from flexivid.model.adapter import read_config
from flexivid.sampling.budget import schedule_for_budget
from flexivid.sampling.calibration import best_schedule, residual_errors, step_weights, summed_error
from flexivid.sampling.schedule import KEPT
from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING, USUAL

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
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--budgets", type=budget_share, nargs="+", default=[0.5, 0.25])
    add_prompts(parser, default="shapes-unjudged")
    parser.add_argument("--max-prompts", type=count, default=16, help="only the first so many")
    parser.add_argument("--steps", type=count, default=SAMPLING["num_inference_steps"])
    parser.add_argument("--output", type=Path, default=Path("outputs/calibrated"))
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    check_output_folder(arguments.output)
    call, least = {**USUAL, "steps": arguments.steps}, min(arguments.budgets)
    empty = empty_wan_pipeline(arguments.model)
    check_arm(empty, call, adapter=arguments.adapter, budget=least, merge_lora=True)


def compared(residuals: dict[tuple, np.ndarray], costs: dict, budget: float, steps: int) -> dict:
    """The schedule found for a budget and the plain one, what they cost and what is predicted of them."""
    powerful = max(costs, key=costs.get)
    schedule, error = best_schedule(residuals, costs, powerful, budget)
    full = 2 * steps * costs[powerful]
    plain = schedule_for_budget(costs, steps, budget, 2, "kept")
    print(f"{budget:g}: {schedule}, predicted error {error:.4g}")
    print(f"  plain: {plain}, predicted error {summed_error(plain, residuals):.4g}")
    return {
        "schedule": schedule.to_json(),
        "budget": budget,
        "flops_ratio": schedule.cost(costs) / full,
        "predicted_error": error,
        "plain_schedule": str(plain),
        "plain_flops_ratio": plain.cost(costs) / full,
        "plain_predicted_error": summed_error(plain, residuals),
    }


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    captions = read_prompts(arguments.prompts)[: arguments.max_prompts]
    check_arguments(arguments)
    pipe = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    flexivid.enable(pipe, adapter=arguments.adapter, schedule=f"1x2x2:{arguments.steps}", merge_lora=True)
    modes = read_config(arguments.adapter).patch_sizes
    errors, sigmas, costs = measure(pipe, captions, modes, arguments.steps)
    residuals = {kind: residual_errors(values, sigmas) for kind, values in errors.items()}
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(residuals, sigmas, arguments.output / "errors.png")
    made_with = {"model": str(arguments.model), "adapter": str(arguments.adapter)}
    for budget in arguments.budgets:
        result = compared(residuals, costs, budget, arguments.steps)
        write_json(arguments.output / f"{budget:g}.json", result | made_with)


if __name__ == "__main__":
    sys.exit(main())
