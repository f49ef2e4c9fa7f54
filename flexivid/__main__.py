"""The command `flexivid`, also `python -m flexivid`: finds the module of a subcommand, and lets it run."""

import importlib
import sys
from typing import NamedTuple

import flexivid


class Command(NamedTuple):
    """module: has a `main(argv)`, which returns the exit code. extra: of the package, that it needs. words: of the
    command line, before the user's."""

    module: str
    about: str
    extra: str | None = None
    words: tuple[str, ...] = ()


COMMANDS = {
    "sample": Command("flexivid.commands.sample", "clips from prompts at a share of the FLOPs"),
    "app": Command("flexivid.app", "the same in a browser, beside full and fewer steps", "app"),
    "train": Command(
        "flexivid.train", "trains an adapter; several processes: accelerate launch -m flexivid train", "train"
    ),
    "sweep": Command("flexivid.commands.sweep", "quality over compute against fewer steps and caches", "eval"),
    "calibrate": Command("flexivid.commands.calibrate", "the schedule of least measured error for a budget", "eval"),
    "latency": Command("flexivid.commands.latency", "seconds, FLOP/s and memory of patch sizes and budgets", "eval"),
    "models": Command("flexivid.commands.models", "what is supported, and what patch sizes cost"),
    "adapters": Command("flexivid.commands.adapters", "lists, inspects, checks and merges adapters"),
    "merge": Command("flexivid.commands.adapters", "flexivid adapters merge", words=("merge",)),
}


def overview() -> str:
    lines = [flexivid.__doc__, "", "usage: flexivid COMMAND ...", ""]
    lines += [f"  {name:<11}{command.about}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "flexivid COMMAND --help lists the options of one; flexivid --version."])


def refuse(message: str) -> int:
    print("error:", message, file=sys.stderr)
    return 2


def main(argv: list[str] | None = None) -> int:
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help", "--version"):
        print(f"flexivid {flexivid.__version__}" if name == "--version" else overview())
        return 0
    if name not in COMMANDS:
        return refuse(f"there is no command {name}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    try:
        module = importlib.import_module(command.module)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if command.extra is None or missing.partition(".")[0] == "flexivid":
            raise
        return refuse(f'flexivid {name} needs {missing}: pip install "flexivid[{command.extra}]"')
    return module.main([*command.words, *words])


if __name__ == "__main__":
    sys.exit(main())
