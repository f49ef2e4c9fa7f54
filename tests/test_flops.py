"""FLOPs of the published architectures, on the meta device: the check values of the design."""

from collections import Counter

import pytest
import torch
from conftest import forward_inputs, tiny_transformer
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from families import tiny
from torch import nn

from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora
from flexivid.sampling import flops
from flexivid.sampling.flops import FlopCounter, flop_counter_mode, flops_text
from flexivid.sampling.twin import each_once, without_hooks, without_weights


def wan2_1_1_3b():
    with torch.device("meta"):
        return WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30)


def test_wan_1_3b_agrees_with_the_published_figures():
    flex = FlexTransformer(wan2_1_1_3b(), ["1x4x4", "2x2x2", "2x4x4"], "direct")
    call = {
        "hidden_states": torch.empty(1, 16, 21, 60, 104, device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "encoder_hidden_states": torch.empty(1, 512, 4096, device="meta"),
    }
    counter = FlopCounter(flex)
    costs = counter.costs(call)
    full = costs["1x2x2"]
    assert full / 1e12 == pytest.approx(283, abs=1)
    assert costs["1x4x4"] / full == pytest.approx(0.119, abs=0.001)
    assert costs["2x2x2"] / full == pytest.approx(0.350, abs=0.001)
    assert costs["2x4x4"] / full == pytest.approx(0.052, abs=0.001)


def test_flops_as_people_write_them():
    assert flops_text(283.4e12) == "283 TFLOP" and flops_text(1.2345e12) == "1.23 TFLOP"
    assert flops_text(999.9e9) == "1 TFLOP" and flops_text(25_184e12) == "25.2 PFLOP"
    assert flops_text(7) == "7 FLOP" and flops_text(8_600) == "8.6 kFLOP" and flops_text(3e22) == "30000 EFLOP"


def test_a_model_is_counted_once_a_process_and_what_costs_more_is_counted_anew(monkeypatch):
    counted, count = [], FlopCounter._count
    monkeypatch.setattr(flops, "_counted", {})
    monkeypatch.setattr(FlopCounter, "_count", lambda *given: counted.append(given[2]) or count(*given))

    def costs(rank: int = 0, frames: int = 5, parametrisation: str = "snr", **settings) -> dict[str, int]:
        flex = FlexTransformer(tiny_transformer(**settings), ["1x4x4"], parametrisation)
        if rank:
            add_lora(flex, rank)
        return FlopCounter(flex).costs(forward_inputs(frames=frames))

    first = costs()
    assert sorted(counted) == ["1x2x2", "1x4x4"] and costs() == first and len(counted) == 2
    for more in ({"rank": 4}, {"rank": 8}, {"frames": 9}, {"parametrisation": "direct"}, {"num_layers": 3}):
        counted.clear()
        assert costs(**more)["1x4x4"] != first["1x4x4"] and len(counted) == 2, more


def test_of_blocks_that_are_alike_one_is_built_and_runs(monkeypatch):
    """So that planning takes a model of 40 blocks as long as one of 4, on any machine."""
    seen = Counter()
    for name in ("__init__", "forward"):
        stock = getattr(WanTransformerBlock, name)

        def noted(block, *args, name=name, stock=stock, **kwargs):
            seen[name] += 1
            return stock(block, *args, **kwargs)

        monkeypatch.setattr(WanTransformerBlock, name, noted)

    def counted(layers: int) -> dict[str, int]:
        monkeypatch.setattr(flops, "_counted", {})
        flex = FlexTransformer(tiny_transformer(num_layers=layers), ["1x4x4"], "snr")
        add_lora(flex, rank=4)
        seen.clear()
        costs = FlopCounter(flex).costs(forward_inputs())
        assert seen == {"__init__": 1, "forward": 2}, layers  # at two patch sizes
        return costs | {mixed: costs[mixed] for mixed in ("1x2x2+1x4x4@0.35",)}

    few, more, most = (counted(layers) for layers in (2, 3, 7))
    assert {name: cost + 4 * (cost - few[name]) for name, cost in more.items()} == most


def test_the_class_stays_as_it_is():
    stock = tiny_transformer(num_layers=3)
    twin = without_weights(stock)
    assert twin.config == stock.config and isinstance(twin, WanTransformer3DModel)
    assert len(set(twin.blocks)) == 1 and len(twin.blocks) == 3
    assert len(set(tiny_transformer(num_layers=3).blocks)) == 3


@pytest.mark.parametrize("name", ["mochi", "hunyuan-video", "latte"])
def test_only_what_is_alike_is_one(name):
    """Mochi's last block is another, HunyuanVideo's and Latte's are of two kinds."""
    shapes = [[(key, weight.shape) for key, weight in part.state_dict().items()] for part in (tiny(name), twin(name))]
    assert shapes[0] == shapes[1]


def twin(name: str) -> nn.Module:
    return without_weights(tiny(name))


def test_what_flexivid_hangs_onto_is_never_skipped():
    """Embedder, head and positions are others at another patch size."""
    flex = FlexTransformer(tiny_transformer(), ["1x4x4"], "snr")
    transformer, free = flex.transformer, without_hooks(flex.transformer)
    assert transformer.blocks[0] in free and transformer.condition_embedder in free
    assert {transformer, transformer.rope, flex.embedder, flex.head}.isdisjoint(free)


def test_a_block_runs_anew_for_other_inputs():
    class Block(nn.Module):
        runs = 0

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4, device="meta")

        def forward(self, x, twice=False, more=()):
            self.runs += 1
            return self.layer(self.layer(x)) if twice else self.layer(x)

    block, x = Block(), torch.empty(3, 4, device="meta")
    one = 2 * 3 * 4 * 4
    with flop_counter_mode() as counter, each_once([block], counter, {}) as spent:
        for given, kind, runs, cost in (
            ((x,), {}, 1, one),
            ((x.clone(),), {}, 1, 2 * one),
            ((x,), {"twice": True}, 2, 4 * one),
            ((x,), {"twice": 1}, 3, 6 * one),
            ((x[:1],), {}, 4, 6 * one + one // 3),
            ((x,), {"more": [x]}, 5, 7 * one + one // 3),
            ((x,), {"more": [x[:2]]}, 6, 8 * one + one // 3),
            ((x,), {"more": object()}, 7, 9 * one + one // 3),
        ):
            block(*given, **kind)
            assert (block.runs, spent()) == (runs, cost)
    assert "forward" not in vars(block)
