"""docs/own-model.md works as it is written."""

import re
from pathlib import Path

import pytest
import torch

import flexivid
from flexivid.model.families import family_of
from flexivid.model.flexible import FlexTransformer
from flexivid.patches.folding import folding_for
from flexivid.sampling.flops import FlopCounter

PAGE = Path(__file__).parents[1] / "docs/own-model.md"


@pytest.fixture(scope="module")
def page() -> dict:
    names = {"__name__": "own_model"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S):
        exec(compile(block, PAGE.name, "exec"), names)
    return names


def test_the_page_runs_and_its_model_is_known(page):
    family = family_of(page["transformer"])
    assert family.name == "my-dit" and not torch.equal(page["weak"], page["stock"])


def test_a_coarse_token_stands_at_the_centre_of_what_it_covers(page):
    folding = folding_for((5, 8, 12), (1, 2, 2), (1, 2, 2), True)
    module = page["Positions"]()
    centred = page["positions_of_coarse_tokens"](module, module.forward, folding, None, 48, "cpu").unflatten(
        0, (5, 2, 3)
    )
    stock = module((5, 4, 6), 48, "cpu").unflatten(0, (5, 4, 6))
    torch.testing.assert_close(centred[1, 1, 2], stock[1, 2:4, 4:6].mean((0, 1)))


def test_flops_and_lora_of_such_a_model(page):
    flex = FlexTransformer(page["MyDiT"](), ["1x4x4"], "snr")
    call = page["example"](flex.transformer.config, (5, 8, 12), 7)
    costs = FlopCounter(flex).costs(call)
    assert 0 < costs["1x4x4"] < costs["1x2x2"]


def test_rows_of_flexivid_are_not_replaced(page):
    family = family_of(page["transformer"])
    assert flexivid.register(family) is family  # a notebook's cell may run twice
    with pytest.raises(ValueError, match="WanTransformer3DModel has a row already"):
        flexivid.register(page["flexivid"].Family(**{**vars(family), "transformer_class": "WanTransformer3DModel"}))
