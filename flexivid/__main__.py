"""Small tools.

python -m flexivid models                                what is supported, and what patch sizes cost
python -m flexivid merge HIGH LOW --output BOTH          joins adapters for the two transformers of a pipeline
"""

import argparse
import sys
from pathlib import Path

from flexivid.command_line import Parser, command
from flexivid.inputs import check_output_folder
from flexivid.model.adapter import merge_adapters
from flexivid.models import page


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m flexivid", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("models")
    merge = commands.add_parser("merge")
    merge.add_argument("adapters", type=Path, nargs="+", help="adapter folders")
    merge.add_argument("--output", type=Path, required=True, help="folder of the joined adapter, new or empty")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.command == "models":
        for line in page():
            print(line, flush=True)
        return
    check_output_folder(arguments.output)
    if arguments.output.is_dir() and any(arguments.output.iterdir()):
        raise ValueError(f"{arguments.output} is not empty; give another --output, or delete it")
    merge_adapters(arguments.adapters, arguments.output)
    print(arguments.output)


if __name__ == "__main__":
    sys.exit(main())
