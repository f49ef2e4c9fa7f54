"""With quantisers that people may have: an int8 base (torchao), an 8-bit optimiser (bitsandbytes)."""

import signal

import pytest
import torch
from conftest import forward_inputs, tiny_transformer
from diffusers import TorchAoConfig, WanTransformer3DModel
from training_runs import ONE, losses, run, start_and_signal, write

import flexivid
from flexivid.model.flexible import FlexTransformer
from flexivid.model.hooks import attached
from flexivid.model.lora import add_lora
from flexivid.model.weak_mode import dense_weight

quantization = pytest.importorskip("torchao.quantization", reason="torchao is missing: make test-quantised")
pytest.importorskip("bitsandbytes", reason="bitsandbytes is missing: make test-quantised")


@pytest.fixture
def settings(training_config):
    return training_config | {"steps": 8, "save_every": 3, "optim": {"name": "adamw8bit", "warmup": 2, "ema": 0.9}}


def quantised(folder, dtype=torch.float32):
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    return WanTransformer3DModel.from_pretrained(folder, quantization_config=config, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_as_numbers(tmp_path, dtype):
    tiny_transformer(num_attention_heads=4).save_pretrained(tmp_path)
    head = quantised(tmp_path, dtype).proj_out
    assert type(head.weight) is not torch.nn.Parameter
    with torch.no_grad():
        head.bias.fill_(2.0)
        torch.testing.assert_close(dense_weight(head), head.weight.dequantize().to(dtype), atol=1e-4, rtol=1e-2)


@torch.no_grad()
def test_an_int8_base(tmp_path):
    stock = tiny_transformer(num_attention_heads=4)
    stock.save_pretrained(tmp_path)
    transformer, call = quantised(tmp_path), forward_inputs()
    before = transformer(**call, return_dict=False)[0]
    outputs = []
    for model in (stock, transformer):
        flexivid.enable(model, schedule="1x4x4")
        outputs.append(model(**call, return_dict=False)[0])
    # A rounding of 8 bits, no more.
    assert (outputs[0] - outputs[1]).abs().max() < 0.05 * outputs[0].std()
    flex = attached(transformer)
    add_lora(flex, rank=4)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.fill_(0.05)
    assert not torch.equal(transformer(**call, return_dict=False)[0], outputs[1])
    with pytest.raises(ValueError, match="these are quantised: enable without it"):
        flex.lora.merge(["1x4x4"])
    flexivid.disable(transformer)
    assert torch.equal(transformer(**call, return_dict=False)[0], before)


def test_gradients_reach_lora_on_an_int8_base(tmp_path):
    tiny_transformer(num_attention_heads=4).save_pretrained(tmp_path)
    transformer = quantised(tmp_path).requires_grad_(False)
    flex = FlexTransformer(transformer, ["1x4x4"], "snr")
    add_lora(flex, rank=4)
    flex.fix("1x4x4")
    lora = {name: p.requires_grad_(True) for name, p in transformer.named_parameters() if "lora_" in name}
    transformer(**forward_inputs(), return_dict=False)[0].square().mean().backward()
    assert lora and all(p.grad is not None and p.grad.any() for name, p in lora.items() if "lora_B" in name)


def test_an_8_bit_optimiser_goes_on_after_a_kill(tmp_path, settings):
    settings["distill"] |= {"rank": 64}  # smaller matrices stay in 32 bits
    whole, whole_output = write(tmp_path, "whole", settings)
    run(ONE, whole)
    killed, output = write(tmp_path, "killed", settings)
    start_and_signal(ONE, killed, output, after=4, number=signal.SIGKILL)
    run(ONE, killed)
    assert losses(output) == losses(whole_output)
