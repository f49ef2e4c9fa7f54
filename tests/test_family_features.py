"""What people already turn on, together with flexivid, for every family whose cell in the support table says so."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import every_of
from diffusers import WanTransformer3DModel
from diffusers.hooks import FirstBlockCacheConfig
from families import TINY, assert_same_clip, attach, every, family_named, randomise_adapter, tiny, tiny_pipeline
from peft import LoraConfig
from safetensors.torch import load_file
from test_family_pipelines import PIPELINES, sample
from test_flexible import config_of
from training_runs import Launch, run, said_by

import flexivid
from flexivid.model.adapter import save_adapter
from flexivid.model.families import FAMILIES
from flexivid.model.lora import add_lora
from flexivid.models import cost_line, family_lines
from flexivid.published_sizes import PUBLISHED
from flexivid.support import FEATURES, SUPPORT

TESTS = Path(__file__).parent
PAGE = (TESTS.parent / "docs/models.md").read_text().splitlines()


NOT_COUNTED = {"motif-video", "cosmos"}


def supported(feature: str) -> list[str]:
    """The pipelines whose family has `yes` in the support table."""
    families = {name: family_named(name).name for name in PIPELINES}
    return [name for name in PIPELINES if SUPPORT[families[name]][FEATURES.index(feature)] == "yes"]


def test_the_page_is_the_table():
    assert list(SUPPORT) == [family.name for family in FAMILIES]
    counted = {model.transformer_class for model in PUBLISHED}
    assert {family.name for family in FAMILIES if family.transformer_class not in counted} == NOT_COUNTED
    lines = family_lines()
    assert PAGE[PAGE.index(lines[0]) :][: len(lines)] == lines, "python -m flexivid models > docs/models.md"
    assert sum(line.startswith(f"| {model.name} |") for model in PUBLISHED for line in PAGE) >= len(PUBLISHED)


@pytest.mark.parametrize("number", [0, 6])
def test_costs_on_the_page_are_counted(number):
    assert cost_line(PUBLISHED[number]) in PAGE, "python -m flexivid models > docs/models.md"


@every(supported("cache"))
def test_first_block_cache(name):
    pipe, call = tiny_pipeline(name)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # every step is skipped but the first of a kind
    cached = sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    both = sample(pipe, call)
    assert both.isfinite().all() and not torch.equal(both, cached)
    assert torch.equal(sample(pipe, call), both)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), cached)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    pipe.transformer.disable_cache()
    assert not torch.equal(sample(pipe, call), both)


@every_of(supported("compile"), quick=("wan", "ltx"))
def test_compiled_blocks_are_not_compiled_again(name):
    torch._dynamo.reset()
    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    eager = sample(pipe, call)
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager", dynamic=False)
    sample(pipe, call)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert_same_clip(sample(pipe, call), eager)
    torch._dynamo.reset()


@every(supported("user LoRA"))
def test_a_users_lora(name):
    pipe, call = tiny_pipeline(name)
    stock = sample(pipe, call)
    targets = r".*\.(to_q|to_query)"
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
    styled = sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    weak = sample(pipe, call)
    pipe.transformer.set_adapters(["style"], [0.0])
    assert not torch.equal(sample(pipe, call), weak)
    pipe.transformer.set_adapters(["style"], [1.0])
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), styled) and not torch.equal(styled, stock)


@every(name for name in supported("offload") if TINY[name][0]._supports_group_offloading)
@pytest.mark.parametrize("offload_type", ["block_level", pytest.param("leaf_level", marks=pytest.mark.slow)])
def test_group_offload(name, offload_type):
    pipe, call = tiny_pipeline(name)
    here = torch.device("cpu")
    settings = {"onload_device": here, "offload_device": here, "offload_type": offload_type}
    if offload_type == "block_level":
        settings["num_blocks_per_group"] = 1
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    expected = sample(pipe, call)
    pipe.transformer.enable_group_offload(**settings)
    assert torch.equal(sample(pipe, call), expected)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    assert torch.equal(sample(pipe, call), expected)
    flexivid.disable(pipe)
    stock, call = tiny_pipeline(name)
    assert torch.equal(sample(pipe, call), sample(stock, call))


@pytest.mark.slow
def test_context_parallel(tmp_path):
    run(Launch("context_parallel_on_cpu.py", 2), tmp_path / "no.yaml")
    assert said_by(tmp_path / "no.yaml").read_text().splitlines().count("equal") == 2


def test_context_parallel_that_splits_latents_is_refused():
    transformer = tiny("ltx")
    transformer._parallel_config = SimpleNamespace(context_parallel_config="any")
    with pytest.raises(ValueError, match="LTXVideoTransformer3DModel splits its latents before they are folded"):
        flexivid.enable(transformer, schedule="1x2x2")


@every(PIPELINES)
def test_an_attention_backend(name):
    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    expected = sample(pipe, call)
    if not hasattr(pipe.transformer, "set_attention_backend"):
        pytest.skip("its class has no attention backends")
    pipe.transformer.set_attention_backend("_native_math")
    assert_same_clip(sample(pipe, call), expected)


@pytest.mark.parametrize("users_lora", [False, True])
def test_a_model_is_saved_as_if_it_were_not_enabled(users_lora, tmp_path):
    adapter = tmp_path / "adapter"
    flex = attach(tiny("wan"), ["1x4x4"])
    add_lora(flex, rank=4)
    randomise_adapter(flex)
    save_adapter(adapter, config_of(flex), {"transformer": flex})
    pipe, call = tiny_pipeline("wan")
    stock = sample(pipe, call)
    if users_lora:
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        stock = sample(pipe, call)
    pipe.transformer.save_pretrained(tmp_path / "stock")
    flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
    weak = sample(pipe, call)
    pipe.transformer.save_pretrained(tmp_path / "enabled")
    assert torch.equal(sample(pipe, call), weak)
    name = "diffusion_pytorch_model.safetensors"
    before, after = (load_file(tmp_path / folder / name) for folder in ("stock", "enabled"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if not users_lora:
        pipe.save_pretrained(tmp_path / "pipeline")
        again = WanTransformer3DModel.from_pretrained(tmp_path / "pipeline/transformer")
        pipe.register_modules(transformer=again)
        assert torch.equal(sample(pipe, call), stock)
    flexivid.disable(pipe)
    assert "save_pretrained" not in vars(pipe.transformer) and torch.equal(sample(pipe, call), stock)


@every(supported("offload"))
def test_offload(name):
    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    expected = sample(pipe, call)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(sample(pipe, call), expected)
    flexivid.enable(pipe, budget=0.7, order="interleaved")
    assert not torch.equal(sample(pipe, call), expected)
    flexivid.disable(pipe)
    stock, call = tiny_pipeline(name)
    assert torch.equal(sample(pipe, call), sample(stock, call))
