"""FLOPs of the published architectures, on the meta device: the check values of the design."""

import pytest
import torch
from conftest import forward_inputs, tiny_transformer
from diffusers import WanTransformer3DModel

from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora
from flexivid.sampling import flops
from flexivid.sampling.flops import FlopCounter, flops_text


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
