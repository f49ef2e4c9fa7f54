"""What users do around a call, in the pipeline of every family: it stays right, or is refused in one sentence."""

from contextlib import nullcontext

import pytest
import torch
from diffusers import ModularPipeline
from families import STEPS, TINY, coarse_patch_sizes, every, family_named, tiny, tiny_pipeline
from peft import LoraConfig
from test_family_pipelines import sample

import flexivid
from flexivid.model.adapter import AdapterConfig, save_adapter
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora

PIPELINES = [name for name in TINY if name != "wan-i2v"]
every_pipeline = every(PIPELINES)
TRAINED = [name for name in PIPELINES if family_named(name).lora_targets is not None]
QUERIES = (".to_q", ".to_query")
# Whose pipelines call the transformer once a branch; that of Motif-Video, which does too, asks its guider.
SEPARATE = ["wan", "skyreels-v2"]
BATCHED = ["ltx"]  # the stock pipelines of the others cannot end it


@every(TRAINED)
def test_powerful_steps_are_stock_after_adapters_are_deleted_and_made_active(name, tmp_path):
    pipe, call = tiny_pipeline(name)
    flex = FlexTransformer(tiny(name), coarse_patch_sizes(pipe.transformer)[:1], "snr")
    add_lora(flex, 4)
    with torch.no_grad():
        for parameter_name, parameter in flex.transformer.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.3)
    config = AdapterConfig.of(
        flex,
        lora_rank=4,
        components=["transformer"],
        base_model="tiny",
    )
    save_adapter(tmp_path, config, {"transformer": flex})
    stock = sample(pipe, call)
    flexivid.enable(pipe, adapter=tmp_path, budget=1.0)
    transformer = pipe.transformer
    targets = [
        part
        for part, _ in transformer.named_modules()
        if part.endswith((*QUERIES, *(f"{query}.base_layer" for query in QUERIES)))
    ]
    style = LoraConfig(r=2, target_modules=[part.removesuffix(".base_layer") for part in targets])
    transformer.add_adapter(style, "style")
    transformer.delete_adapters("style")
    assert torch.equal(sample(pipe, call), stock)
    transformer.set_adapter(list(transformer.peft_config))
    assert torch.equal(sample(pipe, call), stock)
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


@every_pipeline
def test_another_scheduler_after_enable(name):
    def other(pipe):
        config = dict(pipe.scheduler.config)
        change = {"beta_end": 0.016} if "beta_end" in config else {}
        change |= {key: 2.0 for key in ("shift", "flow_shift") if key in config}
        if config.get("use_dynamic_shifting"):  # by the size of the latents, beside which there is no shift
            change = {"time_shift_type": "linear"}
        change |= {"sigma_max": 50.0} if config.get("sigma_max") else {}
        return type(pipe.scheduler).from_config(config, **change)

    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    before = sample(pipe, call)
    pipe.scheduler = other(pipe)
    changed = sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    assert torch.equal(sample(pipe, call), changed) and not torch.equal(changed, before)


@every_pipeline
def test_a_pipeline_that_shares_the_transformer_is_refused(name):
    pipe, call = tiny_pipeline(name)
    other, _ = tiny_pipeline(name)
    replace = other.update_components if isinstance(other, ModularPipeline) else other.register_modules
    replace(transformer=pipe.transformer)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    expected = sample(pipe, call)
    for action in (
        lambda: sample(other, call),
        lambda: flexivid.enable(other, budget=0.6, order="interleaved"),
        lambda: flexivid.disable(other),
        lambda: flexivid.summary(other),
    ):
        with pytest.raises(ValueError, match="another pipeline that shares it"):
            action()
    assert torch.equal(sample(pipe, call), expected) and len(flexivid.summary(pipe).steps) == STEPS


@every_pipeline
def test_no_cache_context_is_needed(name, monkeypatch):
    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    expected, steps = sample(pipe, call), flexivid.summary(pipe).steps
    monkeypatch.setattr(type(pipe.transformer), "cache_context", lambda *_, **more: nullcontext(), raising=False)
    assert torch.equal(sample(pipe, call), expected) and flexivid.summary(pipe).steps == steps


def ends_after(last: int, batched: bool):
    """A callback that ends guidance, as the guide of diffusers has it: embeddings of both branches are one batch."""
    told = ["prompt_embeds", "prompt_attention_mask"] if batched else []

    def end(pipe, index, timestep, tensors):
        if index == last:
            pipe._guidance_scale = 0.0
            return {key: value.chunk(2)[-1] for key, value in tensors.items() if value is not None}
        return {}

    return end, told


@pytest.mark.parametrize("order", ["interleaved", "weak-first", "reuse"])
@pytest.mark.parametrize("name", [*SEPARATE, *BATCHED])
def test_a_callback_ends_guidance(name, order):
    pipe, call = tiny_pipeline(name)
    end, told = ends_after(3, name in BATCHED)
    told = [key for key in told if key in pipe._callback_tensor_inputs]
    call |= {"callback_on_step_end": end, "callback_on_step_end_tensor_inputs": told}
    sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order=order)
    clip, summary = sample(pipe, call), flexivid.summary(pipe)
    assert clip.isfinite().all() and len(summary.steps) == STEPS and summary.ratio <= 0.6
    if name in SEPARATE:
        assert [len(step) for step in summary.steps] == [2] * 4 + [1] * 4
