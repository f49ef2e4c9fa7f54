"""A page with a dial: full, fewer steps and a budget side by side.

    flexivid app                                                          the embedded model, on this machine
    flexivid app --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers --adapter FOLDER --budget 0.5

Open the address that it prints. Moving the dial shows at once what a budget buys; a button samples all three. With a
few-step --adapter and no --budget, its recipe runs instead, and there is no dial.
"""

import argparse
import os
import signal
import socket
import tempfile
from importlib.util import find_spec
from pathlib import Path

from flexivid.app.planner import Planner
from flexivid.app.sampler import Sampler
from flexivid.command_line import Parser, budget_share, command, seed
from flexivid.commands.sample import load_pipeline
from flexivid.commands.sample_options import add_model, check_model_and_adapter, check_with_model


def port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"must be a number from 1 to 65535, not {text}")
    return int(text)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="flexivid app", description=__doc__)
    add = parser.add_argument
    add_model(parser)
    add("--budget", type=budget_share, help="where the dial begins; 0.25 unless there is a few-step --adapter")
    add("--seed", type=seed, default=0, help="that the page begins with")
    add("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 lets other machines in")
    add("--port", type=port, help="the first free one from 7860 on")
    parser.set_defaults(schedule=None, image=None)
    return parser.parse_args(argv)


def check_server(arguments: argparse.Namespace) -> None:
    """Raises ValueError for a page that could not be served."""
    if find_spec("gradio") is None:
        raise ValueError('flexivid app needs gradio: pip install "flexivid[app]"')
    try:
        socket.create_server((arguments.host, arguments.port or 0)).close()
    except OSError as error:
        place = arguments.host if arguments.port is None else f"{arguments.host}, port {arguments.port}"
        raise ValueError(f"nothing can be served at {place}: {error.strerror}") from None


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check_server(arguments)
    check_model_and_adapter(arguments)
    empty = check_with_model(arguments)
    planner = Planner(empty, arguments)
    planner.plan(arguments.budget, arguments.steps)
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    from flexivid.app.page import Page, serve

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stopped as by Ctrl-C, so that no files stay
    with tempfile.TemporaryDirectory(prefix="flexivid-") as folder:
        pipe, load_seconds = load_pipeline(arguments, type(empty))
        page = Page(planner, Sampler(pipe, arguments, load_seconds, Path(folder)), arguments)
        serve(page.build(), arguments.host, arguments.port, Path(folder))
