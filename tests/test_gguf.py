"""Transformers from GGUF files, as people quantise them: bases of weak modes, and what `flexivid sample` takes."""

import json

import numpy as np
import pytest
import torch
from conftest import forward_inputs
from diffusers import GGUFQuantizationConfig, LTXVideoTransformer3DModel, WanPipeline, WanTransformer3DModel
from families import inputs, tiny
from test_single_file import base_in, original, wide_transformer
from test_t2v import frames_of
from test_user_lora import on_embedder, saved_adapter

import flexivid
from flexivid.commands import sample
from flexivid.model.flexible import FlexTransformer
from flexivid.model.hooks import attached
from flexivid.model.lora import add_lora
from flexivid.model.stock_layer import dense_weights
from flexivid.model.weak_mode import dense_weight
from flexivid.shapes.build import TEXT_DIM
from flexivid.single_file import check_single_file
from flexivid.stock_pipelines import without_weights

gguf = pytest.importorskip("gguf", reason="gguf is missing: make test-quantised")
from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter  # noqa: E402

QUANTISED = {"Q8_0": 0.02, "Q4_0": 0.3}  # and by how much a prediction may then differ, in standard deviations


def write_gguf(path, tensors: dict[str, torch.Tensor], kind: str = "Q8_0"):
    """Quantises what is a matrix with rows of whole blocks, as converters do; the rest is in float32."""
    writer, quantisation = gguf.GGUFWriter(str(path), "wan"), gguf.GGMLQuantizationType[kind]
    for name, tensor in tensors.items():
        array = tensor.float().numpy()
        if name.endswith("weight") and array.ndim == 2 and array.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, quantisation), raw_dtype=quantisation)
        else:
            writer.add_tensor(name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def loaded(folder, kind: str = "Q8_0", dtype=torch.float32):
    """(stock transformer, the same from a GGUF file of it in the names of Wan's own code)."""
    stock = wide_transformer()
    stock.save_pretrained(folder / "transformer")
    path = write_gguf(folder / "model.gguf", {original(name): p for name, p in stock.state_dict().items()}, kind)
    settings = {"quantization_config": GGUFQuantizationConfig(compute_dtype=dtype), "dtype": dtype}
    settings |= {"config": str(folder), "subfolder": "transformer"}
    return stock, WanTransformer3DModel.from_single_file(str(path), **settings)


def predicted(model, call=None) -> torch.Tensor:
    return model(**(call or forward_inputs()), return_dict=False)[0]


def is_quantised(layer) -> bool:
    return hasattr(layer.weight, "quant_type")


@pytest.mark.parametrize("kind", QUANTISED)
@torch.no_grad()
def test_a_base_from_a_gguf_file(tmp_path, kind):
    stock, transformer = loaded(tmp_path, kind)
    assert is_quantised(transformer.proj_out) and not is_quantised(transformer.patch_embedding)
    before = predicted(transformer)
    flexivid.enable(transformer, schedule="1x2x2", modes=["1x4x4"])
    assert torch.equal(predicted(transformer), before)
    flexivid.enable(transformer, schedule="1x4x4")
    flexivid.enable(stock, schedule="1x4x4")
    weak, expected = predicted(transformer), predicted(stock)
    assert 0 < (weak - expected).abs().max() < QUANTISED[kind] * expected.std()
    with pytest.raises(ValueError, match="these are quantised: enable without it"):
        add_lora(attached(transformer), rank=4)
        attached(transformer).lora.merge(["1x4x4"])
    flexivid.disable(transformer)
    assert torch.equal(predicted(transformer), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_as_numbers(tmp_path, dtype):
    _, transformer = loaded(tmp_path, dtype=dtype)
    head, weight = transformer.proj_out, dense_weight(transformer.proj_out)
    expected = torch.from_numpy(gguf.quants.dequantize(head.weight.as_tensor().numpy(), head.weight.quant_type))
    assert weight.dtype == dtype
    torch.testing.assert_close(weight.float(), expected, atol=1e-4, rtol=1e-2)


def test_a_layer_without_bias():
    """Such as the embedder of Cosmos: nothing beside its bytes tells what it computes in."""
    stored = gguf.quants.quantize(torch.randn(64, 32).numpy(), gguf.GGMLQuantizationType.Q8_0)
    layer = GGUFLinear(32, 64, compute_dtype=torch.bfloat16)
    layer.weight = GGUFParameter(torch.from_numpy(stored), quant_type=gguf.GGMLQuantizationType.Q8_0)
    weight, bias = dense_weights(layer)
    assert weight.dtype == bias.dtype == torch.bfloat16 and not bias.any()
    expected = torch.from_numpy(gguf.quants.dequantize(stored, layer.weight.quant_type))
    torch.testing.assert_close(weight.float(), expected, atol=1e-4, rtol=1e-2)


@torch.no_grad()
def test_a_linear_embedder_that_is_quantised(tmp_path):
    """LTX-Video's. The file has the names of diffusers, as diffusers itself writes them."""
    stock = tiny("ltx", in_channels=32, out_channels=32, attention_head_dim=32, cross_attention_dim=64)
    stock.save_pretrained(tmp_path / "transformer")
    path = write_gguf(tmp_path / "model.gguf", stock.state_dict())
    settings = {"quantization_config": GGUFQuantizationConfig(compute_dtype=torch.float32)}
    transformer = LTXVideoTransformer3DModel.from_single_file(
        str(path), config=str(tmp_path), subfolder="transformer", **settings
    )
    assert is_quantised(transformer.proj_in) and is_quantised(transformer.proj_out)
    call = inputs(stock, (5, 4, 6))
    before = predicted(transformer, call)
    for model in (stock, transformer):
        flexivid.enable(model, schedule="1x2x2")
    expected = predicted(stock, call)
    assert (predicted(transformer, call) - expected).abs().max() < QUANTISED["Q8_0"] * expected.std()
    flexivid.disable(transformer)
    assert torch.equal(predicted(transformer, call), before)


@torch.no_grad()
def test_an_adapter_and_a_users_lora_beside_it(tmp_path):
    stock, transformer = loaded(tmp_path)
    saved = saved_adapter(tmp_path / "adapter", num_attention_heads=4, text_dim=TEXT_DIM)
    outputs = []
    for model in (stock, transformer):
        model.add_adapter(on_embedder(), "style")
        with_style = predicted(model)
        flexivid.enable(model, adapter=saved, schedule="1x4x4")
        outputs.append(predicted(model))
        attached(model).fix("1x2x2")
        assert torch.equal(predicted(model), with_style)
        model.delete_adapters("style")
        attached(model).fix("1x4x4")
        assert (predicted(model) - outputs[-1]).abs().max() > 0.05
    assert (outputs[0] - outputs[1]).abs().max() < QUANTISED["Q8_0"] * outputs[0].std()


def test_gradients_reach_lora_beside_it(tmp_path):
    _, transformer = loaded(tmp_path)
    flex = FlexTransformer(transformer.requires_grad_(False), ["1x4x4"], "snr")
    add_lora(flex, rank=4)
    flex.fix("1x4x4")
    lora = {name: p.requires_grad_(True) for name, p in transformer.named_parameters() if "lora_" in name}
    predicted(transformer).square().mean().backward()
    assert lora and all(p.grad is not None and p.grad.any() for name, p in lora.items() if "lora_B" in name)


@pytest.mark.parametrize("change", [lambda whole: whole[: len(whole) // 2], lambda whole: b"text" + whole[4:]])
def test_a_file_that_is_broken(tmp_path, change):
    one_file = base_in(tmp_path / "base")
    empty = without_weights(one_file.base, WanPipeline)
    path = write_gguf(tmp_path / "model.gguf", one_file.tensors)
    check_single_file(path, empty)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match="model.gguf is not a whole GGUF file"):
        check_single_file(path, empty)


def test_a_clip_of_one(tmp_path):
    one_file = base_in(tmp_path / "base")
    path = write_gguf(tmp_path / "model.gguf", one_file.tensors)
    assert sample.main(one_file.command(path, tmp_path)) == 0
    assert frames_of(tmp_path / "clip.mp4").shape == (9, 32, 32, 3)
    record = json.loads((tmp_path / "clip.json").read_text())
    assert record["model"] == str(path) and record["flops"]["ratio"] <= 0.8
