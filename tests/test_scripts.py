"""Scripts: they can be imported, run small, and what they share means the same in each."""

import argparse
import ast
import importlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import every_of
from test_bad_input import FILES, ROOT, TABLE, main_of

import spectrum
from flexivid import command_line, inputs
from flexivid.__main__ import COMMANDS
from flexivid.commands import latency, sample
from flexivid.shapes.world import all_scenes
from flexivid.sweep import settings
from flexivid.sweep.architectures import ARCHITECTURES

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "eval").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_can_be_imported(name):
    assert callable(importlib.import_module(name).main)


@pytest.mark.slow
def test_latency_of_the_embedded_model(tmp_path):
    few = ["--steps", "4", "--repeats", "1", "--budgets", "0.6", "--denoise-only", "--output", str(tmp_path)]
    assert latency.main(few) == 0
    rows = {row["arm"]: row for row in json.loads((tmp_path / "latency.json").read_text())["rows"]}
    assert {"stock", "idle", "budget-0.6", "1x4x4", "2x2x2", "2x4x4"} == rows.keys()
    assert rows["budget-0.6"]["flops_ratio"] <= 0.6 and rows["2x4x4"]["flops_ratio"] < 0.2


class _Stop(Exception):
    pass


@pytest.fixture
def options_of(monkeypatch):
    """The options of a script by name, as its parser knows them."""

    def stop(parser, *args):
        raise _Stop(parser)

    for name in ("parse_args", "parse_known_args"):
        monkeypatch.setattr(command_line.Parser, name, stop)

    def options(script: str) -> dict[str, argparse.Action]:
        with pytest.raises(_Stop) as stopped:
            main_of(script)([])
        return {name: action for action in stopped.value.args[0]._actions for name in action.option_strings}

    return options


@pytest.mark.parametrize(
    ("name", "kind", "scripts"),
    [
        ("--prompts", None, {"t2v", "vbench_sweep", "calibrate", "spectrum"}),
        ("--device", command_line.device, {"t2v", "vbench_sweep", "latency"}),
        ("--rounds", command_line.count, {"vbench_sweep", "latency", "data_speed"}),
        ("--batch", command_line.count, {"vbench_sweep", "latency", "adherence"}),
    ],
)
def test_an_option_means_the_same_wherever_it_is(options_of, name, kind, scripts):
    found = {script: options[name] for script in TABLE if name in (options := options_of(script))}
    assert found.keys() == scripts
    assert {action.type for action in found.values()} == {kind}
    helps = {action.help.replace("vbench (VBench's own), ", "") for action in found.values()}
    assert len(helps) == 1


def test_the_page_of_commands_has_every_script_and_what_is_the_same():
    page = (ROOT / "docs/commands.md").read_text()
    missing = [name for name in (*FILES.values(), "--prompts", "--device", "--rounds", "--batch") if name not in page]
    assert missing == ["flexivid/commands/adapters.py"]
    assert [name for name in COMMANDS if f"`flexivid {name}`" not in page] == []


def options_without_help(source: str) -> list[str]:
    """Of a script: names of options that `--help` says nothing about."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and node.args]
    options = [call for call in calls if re.fullmatch("add|.*\\.add_argument", ast.unparse(call.func))]
    return [ast.unparse(each.args[0]) for each in options if "help" not in {keyword.arg for keyword in each.keywords}]


FOLDERS = ("flexivid", "eval", "pipelines")


@pytest.mark.parametrize("path", [path for name in FOLDERS for path in (ROOT / name).rglob("*.py")], ids=str)
def test_every_option_has_words_of_its_own_in_help(path):
    assert options_without_help(path.read_text()) == []


def test_an_option_without_help_is_found():
    source = "parser.add_argument('--a', help='b')\nspent.add_argument('--c', type=int)\nadd('--d')"
    assert options_without_help(source) == ["'--c'", "'--d'"]


def test_former_names_still_do():
    arguments = latency.parse_arguments("--batches 1 8 --repeats 3 --device cpu".split())
    assert (arguments.batch, arguments.rounds, arguments.device) == ([1, 8], 3, torch.device("cpu"))
    arguments = settings.parse_arguments("", "--timed-rounds 2 --cpu".split())
    assert (arguments.rounds, arguments.device) == (2, torch.device("cpu"))
    assert sample.parse_arguments(["--prompt-file", "a.txt"]).prompts == "a.txt"


def test_latency_takes_what_its_arms_reach(tmp_path):
    """Four powerful steps of forty, the others reused."""
    arguments = latency.parse_arguments(["--budgets", "0.1", "--device", "cpu", "--output", str(tmp_path / "out")])
    assert latency.call_of(arguments, ARCHITECTURES["embedded"])["num_inference_steps"] == 40


def test_sets_of_prompts_and_files(tmp_path):
    (tmp_path / "prompts.txt").write_text("a circle\n\n  a square \n")
    assert inputs.read_prompts(str(tmp_path / "prompts.txt")) == ["a circle", "a square"]
    seen, held_out, others = (set(inputs.read_prompts(name)) for name in inputs.SHAPES_SETS)
    assert (len(seen), len(held_out)) == (128, 64) and len(seen | held_out | others) == len(all_scenes())
    # What schedules have been calibrated on so far.
    assert inputs.read_prompts("shapes-unjudged")[:2] == [
        "a striped cyan cross growing on a gray background",
        "a striped purple cross moving right on a gray background",
    ]


def test_one_device_for_several_processes_is_refused():
    with pytest.raises(ValueError, match="--device cuda:1 is one device, and there are 2 processes: --device cuda"):
        settings.device_of(SimpleNamespace(num_processes=2, device=torch.device("cuda:0")), torch.device("cuda:1"))


SMALL = {
    "calibrate": ("--max-prompts 1 --steps 4 --budgets 0.6", {"0.6.json", "errors.png"}),
    "spectrum": ("--max-prompts 1", {"spectrum.json", "spectrum.md", "spectrum.png"}),
    "x0_error": ("--clips 1", {"x0_error.json", "x0_error.md", "x0_error.png"}),
}


@every_of(SMALL, quick=["spectrum"])
def test_a_small_run_writes_whole_files_and_nothing_else(name, tmp_path, monkeypatch):
    words, files = SMALL[name]
    monkeypatch.setattr(spectrum, "STEPS", 4)
    assert main_of(name)([*words.split(), "--output", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
