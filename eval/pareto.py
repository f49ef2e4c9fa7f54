"""Draws quality over compute from the results.json of a sweep, some metrics only.

    python eval/pareto.py docs/measurements/sweep-40/results.json --metrics adherence_all frechet_distance_to_data \\
        --output docs/pareto.png
"""

import argparse
import json
from pathlib import Path

from sweep.results import HIGHER_IS_BETTER, write_pareto


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--metrics", nargs="+", choices=HIGHER_IS_BETTER, help="all by default")
    parser.add_argument("--leave-out", nargs="+", default=[], help="methods that are not drawn")
    parser.add_argument("--output", type=Path, default=Path("outputs/pareto.png"))
    arguments = parser.parse_args()
    results = json.loads(arguments.results.read_text())
    results["arms"] = [row for row in results["arms"] if row["method"] not in arguments.leave_out]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_pareto(results, arguments.output, arguments.metrics)


if __name__ == "__main__":
    main()
