"""The scripts of eval/ that have no test of their own: they can be imported, and the clock runs."""

import importlib
import json
from pathlib import Path

import pytest

import latency

SCRIPTS = sorted(path.stem for path in (Path(__file__).parents[1] / "eval").glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_it_can_be_imported(name):
    assert callable(importlib.import_module(name).main)


def test_latency_of_the_embedded_model(tmp_path):
    few = ["--steps", "4", "--repeats", "1", "--budgets", "0.6", "--denoise-only", "--output", str(tmp_path)]
    assert latency.main(few) == 0
    rows = {row["arm"]: row for row in json.loads((tmp_path / "latency.json").read_text())["rows"]}
    assert {"stock", "idle", "budget-0.6", "1x4x4", "2x2x2", "2x4x4"} == rows.keys()
    assert rows["budget-0.6"]["flops_ratio"] <= 0.6 and rows["2x4x4"]["flops_ratio"] < 0.2
