"""Draws quality over compute from the results.json of a sweep, some metrics only.

    python eval/pareto.py docs/measurements/sweep-full/results.json docs/measurements/sweep-40/results.json \\
        --metrics adherence_all frechet_distance_to_data --output docs/pareto.png

Of several sweeps, which must have sampled the same clips in the same way, an arm is that of the first that has it.
"""

import argparse
import json
import math
from pathlib import Path

from sweep.results import HIGHER_IS_BETTER, write_pareto


def joined(paths: list[Path]) -> dict:
    """The results of the first sweep, and the arms that the others have beside it.

    Raises ValueError if their full runs differ: figures of the others would then be of other clips.
    """
    first, *others = [json.loads(path.read_text()) for path in paths]
    for path, results in zip(paths[1:], others, strict=True):
        ours, theirs = ({row["arm"]: row for row in r["arms"]} for r in (first, results))
        before, now = ours["full"]["metrics"], theirs["full"]["metrics"]
        # Scored by another number of threads, the same clips differ in the last digits.
        if not all(math.isclose(before[name]["mean"], now[name]["mean"], rel_tol=1e-4) for name in before.keys() & now):
            raise ValueError(f"{path} is of other clips than {paths[0]}: their full runs differ")
        first["arms"] += [row for row in results["arms"] if row["arm"] not in ours]
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--metrics", nargs="+", choices=HIGHER_IS_BETTER, help="all by default")
    parser.add_argument("--leave-out", nargs="+", default=[], help="methods that are not drawn")
    parser.add_argument("--output", type=Path, default=Path("outputs/pareto.png"))
    arguments = parser.parse_args()
    try:
        results = joined(arguments.results)
    except ValueError as error:
        parser.error(str(error))
    results["arms"] = [row for row in results["arms"] if row["method"] not in arguments.leave_out]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_pareto(results, arguments.output, arguments.metrics)


if __name__ == "__main__":
    main()
