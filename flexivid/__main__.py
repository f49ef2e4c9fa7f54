"""Small tools.

python -m flexivid models                                what is supported, and what patch sizes cost
python -m flexivid merge HIGH LOW --output BOTH          joins adapters for the two transformers of a pipeline
"""

import argparse
import sys
from pathlib import Path

from flexivid.model.adapter import merge_adapters
from flexivid.models import page


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flexivid", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("models")
    merge = commands.add_parser("merge")
    merge.add_argument("adapters", type=Path, nargs="+", help="adapter folders")
    merge.add_argument("--output", type=Path, required=True, help="folder of the joined adapter")
    arguments = parser.parse_args(argv)
    if arguments.command == "models":
        for line in page():
            print(line, flush=True)
        return 0
    try:
        merge_adapters(arguments.adapters, arguments.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
