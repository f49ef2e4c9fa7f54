"""Draws quality over compute from the results.json of a sweep, some metrics only.

    python eval/pareto.py docs/measurements/sweep-full/results.json docs/measurements/sweep-40/results.json \\
        --metrics adherence_all frechet_distance_to_data --output docs/pareto.png

Of several sweeps, which must have sampled the same clips in the same way, an arm is that of the first that has it.
"""

import math
import sys
from pathlib import Path

from flexivid.command_line import Parser, command
from flexivid.inputs import check_output_file, read_json
from flexivid.sweep.curve import write_pareto
from flexivid.sweep.metrics import HIGHER_IS_BETTER

NEEDED = {"arm", "method", "flops_ratio", "metrics"}  # of an arm


def read_results(path: Path) -> dict:
    """A results.json. Raises ValueError for another file."""
    results = read_json(path)
    rows = results.get("arms")
    whole = isinstance(rows, list) and all(isinstance(row, dict) and row.keys() >= NEEDED for row in rows)
    if not whole or "full" not in {row["arm"] for row in rows}:
        raise ValueError(f"{path} is no results.json of eval/vbench_sweep.py with a full run and other arms")
    return results


def joined(paths: list[Path]) -> dict:
    """The results of the first sweep, and the arms that the others have beside it.

    Raises ValueError if their full runs differ: figures of the others would then be of other clips.
    """
    first, *others = [read_results(path) for path in paths]
    for path, results in zip(paths[1:], others, strict=True):
        ours, theirs = ({row["arm"]: row for row in r["arms"]} for r in (first, results))
        before, now = ours["full"]["metrics"], theirs["full"]["metrics"]
        # Scored by another number of threads, the same clips differ in the last digits.
        if not all(math.isclose(before[name]["mean"], now[name]["mean"], rel_tol=1e-4) for name in before.keys() & now):
            raise ValueError(f"{path} is of other clips than {paths[0]}: their full runs differ")
        first["arms"] += [row for row in results["arms"] if row["arm"] not in ours]
    return first


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="results.json of sweeps of the same clips")
    parser.add_argument("--metrics", nargs="+", choices=HIGHER_IS_BETTER, help="all by default")
    parser.add_argument("--leave-out", nargs="+", default=[], help="methods that are not drawn")
    parser.add_argument("--output", type=Path, default=Path("outputs/pareto.png"), help="%(default)s by default")
    arguments = parser.parse_args(argv)
    check_output_file(arguments.output, ".png")
    results = joined(arguments.results)
    methods = {row["method"] for row in results["arms"]}
    if unknown := set(arguments.leave_out) - methods:
        raise ValueError(f"there is no method {min(unknown)} to leave out; there are {', '.join(sorted(methods))}")
    results["arms"] = [row for row in results["arms"] if row["method"] not in arguments.leave_out]
    measured = {name for row in results["arms"] for name in row["metrics"]}
    if missing := set(arguments.metrics or []) - measured:
        raise ValueError(f"no arm has the metric {min(missing)}; they have {', '.join(sorted(measured)) or 'none'}")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_pareto(results, arguments.output, arguments.metrics)


if __name__ == "__main__":
    sys.exit(main())
