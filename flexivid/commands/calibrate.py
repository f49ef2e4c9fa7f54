"""Finds the best schedule for a budget: which steps to compute, and at which patch size; the others reuse the last x0.

    flexivid calibrate --budgets 0.25 0.1 --output outputs/calibrated
    flexivid sample --schedule outputs/calibrated/0.1.json

A few prompts are sampled at full compute; at every step each weak mode predicts from the same latents. `errors.png`
shows how wrong each is, beside what holding the last x0 for some steps errs by.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import torch
from diffusers import WanPipeline
from tqdm import tqdm

import flexivid
from flexivid.command_line import (
    Parser,
    add_embedded_adapter,
    add_embedded_model,
    add_prompts,
    budget_share,
    command,
    count,
)
from flexivid.files import replacing, write_json
from flexivid.inputs import check_arm, check_output_folder, empty_wan_pipeline, read_prompts
from flexivid.model.adapter import read_config
from flexivid.patches.sizes import parse_mode
from flexivid.sampling.budget import schedule_for_budget
from flexivid.sampling.calibration import best_schedule, hold_errors, predicted_error
from flexivid.sampling.schedule import powerful_of
from flexivid.shapes.embedded import SAMPLING, USUAL

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

GAPS = (1, 3, 5, 10)  # steps since the last computed one, in the picture


class Predictions(flexivid.Observer):
    """The guided x0 along a run of the powerful mode, and what every weak mode errs by at the same latents."""

    def __init__(self, modes: list[str], scale: float, steps: int):
        self.patch_sizes, self.scale = tuple(modes), scale
        self.guided_x0: list[np.ndarray] = []
        self.errors: dict[str, list[np.ndarray]] = {mode: [] for mode in modes}
        self._of_branches: dict[tuple[int, str], torch.Tensor] = {}
        self._conditional: torch.Tensor | None = None
        self._progress = tqdm(total=steps, desc="full run, every weak mode beside it")

    def error(self, step, branch, patch_size, x0_error):
        self._of_branches[branch, patch_size] = x0_error

    def x0(self, step, branch, x0):
        if branch == 0:
            self._conditional = x0

    def guidance(self, step, x0_difference):
        """The last of a step: x0 and errors of both branches are there."""
        guidance = (self.scale - 1) * x0_difference
        self.guided_x0.append((self._conditional + guidance).flatten().numpy())
        for mode in self.patch_sizes:
            conditional, unconditional = (self._of_branches[branch, mode] for branch in (0, 1))
            if parse_mode(mode)[1]:  # one forward is to give what guidance adds, too
                error = conditional - guidance
            else:
                error = unconditional + self.scale * (conditional - unconditional)
            self.errors[mode].append(error.flatten().numpy())
        self._progress.update()


def measure(pipe: WanPipeline, captions: list[str], modes: list[str], steps: int) -> tuple[np.ndarray, dict]:
    """Guided x0 of a full run, (steps, elements), and by kind of weak step what it errs by, likewise."""
    seen, sampling = Predictions(modes, SAMPLING["guidance_scale"], steps), {**SAMPLING, "num_inference_steps": steps}
    with flexivid.observe(pipe, seen):
        pipe(captions, **sampling, generator=torch.Generator().manual_seed(0), output_type="latent")
    return np.stack(seen.guided_x0), {(mode,) * 2: np.stack(values) for mode, values in seen.errors.items()}


def draw(x0: np.ndarray, errors: dict[tuple, np.ndarray], sigmas: np.ndarray, path: Path) -> None:
    figure, panel = plt.subplots(figsize=(8, 5))
    for kind, values in errors.items():
        panel.plot(sigmas[:-1], np.square(values).mean(1), label=kind[0])
    for gap in GAPS:
        held = np.square(x0[gap:] - x0[:-gap]).mean(1)
        panel.plot(sigmas[gap:-1], held, "--", label=f"x0 of {gap} step{'s' if gap > 1 else ''} before")
    panel.set(xlabel="noise level σ", ylabel="mean squared error of the guided x0", yscale="log")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="flexivid calibrate", description=__doc__)
    add_embedded_model(parser)
    add_embedded_adapter(parser)
    parser.add_argument(
        "--budgets", type=budget_share, nargs="+", default=[0.5, 0.25], help="shares of the full FLOPs, a schedule each"
    )
    add_prompts(parser, default="shapes-unjudged")
    parser.add_argument("--max-prompts", type=count, default=16, help="only the first so many")
    parser.add_argument(
        "--steps", type=count, default=SAMPLING["num_inference_steps"], help="denoising steps; %(default)s by default"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/calibrated"), help="folder; %(default)s by default"
    )
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    check_output_folder(arguments.output)
    call, least = {**USUAL, "steps": arguments.steps}, min(arguments.budgets)
    empty = empty_wan_pipeline(arguments.model)
    check_arm(empty, call, adapter=arguments.adapter, budget=least, merge_lora=True)


def compared(tables: dict[tuple, np.ndarray], costs: dict, budget: float, steps: int) -> dict:
    """The schedule found for a budget and the plain one, what they cost and what is predicted of them."""
    powerful = powerful_of(costs)
    schedule, error = best_schedule(tables, costs, powerful, budget)
    full = 2 * steps * costs[powerful]
    plain = schedule_for_budget(costs, steps, budget, 2, order="reuse")
    print(f"{budget:g}: {schedule}, predicted error {error:.4g}")
    print(f"  plain: {plain}, predicted error {predicted_error(plain, tables):.4g}")
    return {
        "schedule": schedule.to_json(),
        "budget": budget,
        "flops_ratio": schedule.cost(costs) / full,
        "predicted_error": error,
        "plain_schedule": str(plain),
        "plain_flops_ratio": plain.cost(costs) / full,
        "plain_predicted_error": predicted_error(plain, tables),
    }


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    captions = read_prompts(arguments.prompts)[: arguments.max_prompts]
    check_arguments(arguments)
    pipe = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    flexivid.enable(pipe, adapter=arguments.adapter, schedule=f"1x2x2:{arguments.steps}", merge_lora=True)
    x0, errors = measure(pipe, captions, read_config(arguments.adapter).patch_sizes, arguments.steps)
    arguments.output.mkdir(parents=True, exist_ok=True)
    draw(x0, errors, pipe.scheduler.sigmas.double().numpy(), arguments.output / "errors.png")
    costs = flexivid.costs(pipe, *(USUAL[name] for name in ("frames", "height", "width", "text_length")))
    powerful = (powerful_of(costs),) * 2
    tables = hold_errors(x0, {powerful: np.zeros_like(x0), **errors})
    made_with = {"model": str(arguments.model), "adapter": str(arguments.adapter)}
    for budget in arguments.budgets:
        result = compared(tables, costs, budget, arguments.steps)
        write_json(arguments.output / f"{budget:g}.json", result | made_with)
