"""The command lines of all scripts: options that mean the same everywhere, and what becomes of a user's mistake.

A mistake is one sentence on stderr and exit code 2, before anything expensive is begun or anything written.
"""

import argparse
import math
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from flexivid.inputs import SHAPES_SETS
from flexivid.patches.sizes import parse_patch_size
from flexivid.sampling.budget import check_budget
from flexivid.shapes.embedded import ADAPTER, MODEL

MISTAKES = (ValueError, OSError, SafetensorError)


class Parser(argparse.ArgumentParser):
    """Takes whole names of options only, so that one that is missing here is not read as another."""

    def __init__(self, **settings):
        usual = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(**usual | settings)

    def error(self, message: str):
        """Raises ValueError with the message in the words of a sentence, instead of printing the usage."""
        raise ValueError(message.removeprefix("argument ").replace(": must be ", " must be ", 1))


def say(text: str) -> None:
    """What a script is doing now, on stderr: what it found goes to stdout."""
    print(text, file=sys.stderr, flush=True)


def refuse(error: Exception) -> int:
    """Says what is wrong in one line. Returns the exit code."""
    named = isinstance(error, OSError) and error.filename is not None and error.strerror is not None
    text = f"{error.filename}: {error.strerror}" if named else str(error)
    say(f"error: {' '.join(text.split())}")
    return 2


def command(main: Callable[[list[str] | None], None]) -> Callable[[list[str] | None], int]:
    """Makes a script's main return its exit code: 0, 2 after a mistake of the user, 1 if nobody reads on (`| head`)."""

    @wraps(main)
    def with_exit_code(argv: list[str] | None = None) -> int:
        diffusers_logging.set_verbosity_error()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            main(argv)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left would be written at exit
            return 1
        except MISTAKES as error:
            return refuse(error)
        return 0

    return with_exit_code


def _number(text: str, kind: type, what: str, fits: Callable[[float], bool]):
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not fits(value):  # nothing is true of NaN
        raise argparse.ArgumentTypeError(f"{what}, not {text}")
    return value


def count(text: str) -> int:
    return _number(text, int, "must be at least 1, a whole number below 10**9", lambda value: 1 <= value < 10**9)


def seed(text: str) -> int:
    return _number(text, int, "the seed must be 0 or more, a whole number below 2**63", lambda v: 0 <= v < 2**63)


def guidance_scale(text: str) -> float:
    return _number(text, float, "must be a number, 0 or more", lambda value: 0 <= value < math.inf)


def share(text: str) -> float:
    """Of something, and neither nothing nor all of it."""
    return _number(text, float, "must be a share, above 0 and below 1", lambda value: 0 < value < 1)


def budget_share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = text
    try:
        check_budget(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("budget ")) from None
    return value


def patch_size(text: str) -> str:
    try:
        parse_patch_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def device(text: str) -> torch.device:
    """A device of torch that is here."""
    try:
        found = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device; use for example --device cpu or --device cuda"
        ) from None
    missing = argparse.ArgumentTypeError(f"there is no device {text} here; use --device cpu")
    if found.type == "cuda":
        # Counted, not tried: a process of several must not open the others' devices.
        if (found.index or 0) >= torch.cuda.device_count():
            raise argparse.ArgumentTypeError(f"there is no CUDA device {found.index or 0} here; use --device cpu")
    elif found.type != "cpu":
        try:
            torch.zeros(1, device=found).item()
        except (RuntimeError, AssertionError, ImportError, NotImplementedError):
            raise missing from None
    elif found.index:
        raise missing
    return found


def add_device(parser: argparse.ArgumentParser) -> None:
    usual = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--device", type=device, default=usual, help="of torch: cpu, cuda, cuda:1, ...; cuda where there is one"
    )


def add_embedded_model(parser: argparse.ArgumentParser) -> None:
    """Of scripts that measure in the embedded world."""
    help_ = "folder of a Wan pipeline of the embedded world; the embedded model by default"
    parser.add_argument("--model", type=Path, default=MODEL, help=help_)


def add_embedded_adapter(parser: argparse.ArgumentParser) -> None:
    help_ = "adapter folder; the embedded one by default"
    parser.add_argument("--adapter", type=Path, default=ADAPTER, help=help_)


def add_prompts(parser: argparse.ArgumentParser, *other_names: str, default: str | None = None, sets: str = "") -> None:
    """sets: names that the script takes beside those of the embedded world, with a comma after each."""
    help_ = f"{', '.join(SHAPES_SETS)} (captions of the embedded world), {sets}or a text file with one prompt a line"
    parser.add_argument("--prompts", *other_names, dest="prompts", default=default, help=help_)


def add_rounds(parser: argparse.ArgumentParser, *other_names: str, default: int) -> None:
    help_ = "how often everything is timed; the median is what is said"
    parser.add_argument("--rounds", *other_names, dest="rounds", type=count, default=default, help=help_)


def add_batch(parser: argparse.ArgumentParser, *other_names: str, default, **settings) -> None:
    help_ = "clips that go through the transformer together"
    parser.add_argument("--batch", *other_names, dest="batch", type=count, default=default, help=help_, **settings)
