"""The page of models: what is supported, and what patch sizes cost on published models. A second a model."""

from flexivid.command_line import Parser, command
from flexivid.models import page


@command
def main(argv: list[str] | None = None) -> None:
    Parser(prog="flexivid models", description=__doc__).parse_args(argv)
    for line in page():
        print(line, flush=True)
