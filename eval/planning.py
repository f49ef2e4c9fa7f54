"""Time and memory of planning: `flexivid.enable` and the first `flexivid.plan` on published sizes, without weights.

    OMP_NUM_THREADS=1 python eval/planning.py --output outputs/planning.json

Each model is planned in processes of its own, forked from one that has imported the libraries and counted nothing.
All are the least of several runs; on a machine that does other things too, look at the CPU's. Memory is
the most that the process held meanwhile, over what it held with the empty transformer built. Both need Linux.
"""

import argparse
import inspect
import sys
import time
from multiprocessing import get_context
from pathlib import Path

import diffusers
import torch

import flexivid
from flexivid.command_line import Parser, command, count, say
from flexivid.files import write_json
from flexivid.inputs import check_output_file
from flexivid.models import PUBLISHED, Published

PIPELINES = {"WanTransformer3DModel": "WanPipeline", "LTX2VideoTransformer3DModel": "LTX2Pipeline"}
NAMES = ("Wan2.1-T2V-1.3B", "Wan2.1-T2V-14B, Wan2.2-A14B", "LTX-2 19B")
MODELS = {f"{model.name} {'x'.join(map(str, model.pixels))}": model for model in PUBLISHED if model.name in NAMES}
REFERENCE = next(iter(MODELS))
STEPS, BUDGET = 40, 0.5
MIB = 2**20


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/planning.json"), help="%(default)s by default")
    parser.add_argument("--runs", type=count, default=3, help="processes a model; %(default)s by default")
    return parser.parse_args(argv)


def held(what: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{what}:")) / 1024


def planned(model: Published) -> dict[str, float]:
    """Seconds by the clock and of the CPU, and MiB, of enable and the first plan. To be run in a fresh process."""
    with torch.device("meta"):
        transformer = getattr(diffusers, model.transformer_class)(**model.config)
    pipeline = getattr(diffusers, PIPELINES[model.transformer_class])
    parameters = list(inspect.signature(pipeline).parameters.values())
    others = {parameter.name: None for parameter in parameters if parameter.default is parameter.empty}
    pipe = pipeline(**others | {"transformer": transformer})
    before, began, computed = held("VmRSS"), time.perf_counter(), time.process_time()
    flexivid.enable(pipe, budget=BUDGET)
    enabled = time.perf_counter()
    flexivid.plan(pipe, *model.pixels, steps=STEPS, text_length=model.text_length)
    return {
        "seconds": time.perf_counter() - began,
        "enable_seconds": enabled - began,
        "cpu_seconds": time.process_time() - computed,
        "mib": held("VmHWM") - before,
    }


def measured(model: Published, runs: int) -> dict[str, float]:
    """The least of several runs, but the most memory, each in a process of its own."""
    with get_context("fork").Pool(1, maxtasksperchild=1) as processes:
        rows = processes.map(planned, [model] * runs, chunksize=1)
    return {name: (max if name == "mib" else min)(row[name] for row in rows) for name in rows[0]}


def as_table(rows: dict[str, dict[str, float]]) -> str:
    lines = [
        "| model | seconds | of that enable | CPU seconds | MiB | CPU, of the first |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        ratio = row["cpu_seconds"] / rows[REFERENCE]["cpu_seconds"]
        numbers = (*(f"{row[key]:.2f}" for key in ("seconds", "enable_seconds", "cpu_seconds")), f"{row['mib']:.0f}")
        lines.append(f"| {name} | {' | '.join(numbers)} | {ratio:.2f} |")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check_output_file(arguments.output, ".json")
    rows = {}
    for name, model in MODELS.items():
        say(name)
        rows[name] = measured(model, arguments.runs)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    settings = {"runs": arguments.runs, "threads": torch.get_num_threads(), "steps": STEPS, "budget": BUDGET}
    write_json(arguments.output, settings | {"torch": torch.__version__, "models": rows})
    print(as_table(rows))


if __name__ == "__main__":
    sys.exit(main())
