"""The core on tiny real transformers: exactness, positions, gradients, LoRA, adapters."""

import json
import math

import pytest
import torch
from conftest import forward_inputs, tiny_transformer
from families import randomise_adapter, upsampled
from peft import LoraConfig

import flexivid
from flexivid.model.adapter import AdapterConfig, load_adapter, read_config, save_adapter
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora, remove_lora
from flexivid.patches.folding import folding_for
from flexivid.sampling.clock import Position
from flexivid.sampling.flops import FlopCounter, flop_counter_mode
from flexivid.sampling.forwards import Forwards
from flexivid.sampling.mixing import Mixing
from flexivid.sampling.run import Run
from flexivid.sampling.schedule import Schedule

WEAK = ["1x4x4", "2x2x2", "2x4x4"]


def run(transformer, **inputs):
    with torch.no_grad():
        return transformer(**inputs, return_dict=False)[0]


def attach(transformer, parametrisation="snr", patch_sizes=WEAK, rank=4) -> FlexTransformer:
    flex = FlexTransformer(transformer, patch_sizes, parametrisation)
    add_lora(flex, rank)
    randomise_adapter(flex)
    return flex


class RunInOrder:
    """A runner that makes the forwards of a schedule in an order of (step, branch)."""

    def __init__(self, flex: FlexTransformer, steps, order):
        schedule, forwards = Schedule(tuple(steps)), Forwards(tuple(len(step) for step in steps))
        self.run_ = Run(schedule, flex.powerful, flex.diffusion, forwards, Mixing(1.0, is_batched=False))
        self.order, self.steps = iter(order), len(steps)
        self.run_.summary.steps.append([])  # whatever branch comes first

    def run(self, flex, call):
        step, call.branch = next(self.order)
        costs = dict.fromkeys(flex.patch_sizes, 1)
        return self.run_.forward(flex, call, Position(step, call.branch, self.steps, None), costs)


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_idle_powerful_mode_is_bit_identical_also_after_weak_forwards(transformer, parametrisation):
    inputs = forward_inputs()
    stock, keys = run(transformer, **inputs), list(transformer.state_dict())
    flex = attach(transformer, parametrisation)
    assert torch.equal(run(transformer, **inputs), stock)
    for patch_size in WEAK:
        flex.fix(patch_size)
        assert not torch.equal(run(transformer, **inputs), stock)
        flex.fix(flex.powerful)
        assert torch.equal(run(transformer, **inputs), stock)
    flex.remove()
    remove_lora(flex)
    assert torch.equal(run(transformer, **inputs), stock)
    assert list(transformer.state_dict()) == keys


def test_a_users_lora_stays_active_in_every_mode_and_after_disable(transformer):
    inputs = forward_inputs()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    styled, keys = run(transformer, **inputs), list(transformer.state_dict())
    flex = attach(transformer)
    assert torch.equal(run(transformer, **inputs), styled)
    flex.fix("1x4x4")
    with_style = run(transformer, **inputs)
    assert transformer.active_adapters() == ["style"]  # between forwards ours are idle
    transformer.set_adapters(["style"], [0.0])
    assert not torch.equal(run(transformer, **inputs), with_style)
    transformer.set_adapters(["style"], [1.0])
    flex.remove()
    remove_lora(flex)
    assert transformer.active_adapters() == ["style"]
    assert torch.equal(run(transformer, **inputs), styled)
    assert list(transformer.state_dict()) == keys


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
@pytest.mark.parametrize("size", [(1, 2, 2), (5, 6, 10), (4, 14, 2), (2, 8, 8)])
@pytest.mark.parametrize("batch", [1, 3])
def test_odd_sizes_run_and_keep_their_shape(transformer, parametrisation, size, batch):
    flex = attach(transformer, parametrisation)
    inputs = forward_inputs(batch, *size)
    for patch_size in WEAK:
        flex.fix(patch_size)
        output = run(transformer, **inputs)
        assert output.shape == inputs["hidden_states"].shape and output.isfinite().all()


@pytest.mark.parametrize("patch_size", WEAK)
def test_direct_coarse_pass_over_upsampled_latents_is_the_base_pass_at_coarse_positions(transformer, patch_size):
    """A coarse pass over R x equals R of the base pass over x, when the base run is given the coarse positions."""
    flex = FlexTransformer(transformer, WEAK, "direct")
    mode = flex.weak_modes[patch_size]
    small = forward_inputs(1, 3, 4, 6)
    x = small["hidden_states"]
    coarse_patch = tuple(m * p for m, p in zip(mode.multiple, (1, 2, 2), strict=True))
    large = upsampled(x, (1, 2, 2), coarse_patch)
    # Not causal here: every base frame became m_t frames, none of which stands alone.
    object.__setattr__(flex, "family", _not_causal(flex.family))
    flex.fix(patch_size)
    coarse = run(transformer, **{**small, "hidden_states": large})

    folding = folding_for(tuple(large.shape[2:]), mode.multiple, (1, 2, 2), False)
    flex.mode, flex.folding = mode, folding
    tables = transformer.rope(folding.fold(large))
    flex.remove()
    transformer.rope.forward = lambda hidden_states: tables
    assert torch.allclose(coarse, upsampled(run(transformer, **small), (1, 2, 2), coarse_patch), atol=1e-4)


def _not_causal(family):
    import dataclasses

    return dataclasses.replace(family, causal=False)


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_guidance_of_a_mixed_step_is_the_difference_of_two_weak_predictions(transformer, parametrisation):
    flex = attach(transformer, parametrisation)
    conditional, unconditional = forward_inputs(), forward_inputs()
    unconditional["encoder_hidden_states"] = torch.zeros_like(unconditional["encoder_hidden_states"])
    predictions = {}
    for patch_size in ("1x2x2", "1x4x4"):
        flex.fix(patch_size)
        predictions[patch_size] = [run(transformer, **inputs) for inputs in (conditional, unconditional)]
    flex.runner = RunInOrder(flex, [("1x2x2", "1x4x4")], [(0, 0), (0, 1)])
    powerful, mixed = [run(transformer, **inputs) for inputs in (conditional, unconditional)]
    assert torch.equal(powerful, predictions["1x2x2"][0])
    weak_conditional, weak_unconditional = predictions["1x4x4"]
    assert torch.allclose(powerful - mixed, weak_conditional - weak_unconditional, atol=1e-5)


def test_kept_guidance_is_that_of_the_powerful_step_in_x0(transformer):
    flex = attach(transformer)
    later = {"timestep": torch.full((2,), 600.0)}
    conditional, unconditional = forward_inputs(), forward_inputs()
    unconditional["encoder_hidden_states"] = torch.zeros_like(unconditional["encoder_hidden_states"])
    calls = [conditional, unconditional, *(forward_inputs(seed=1) | later for _ in range(2))]
    steps = [("1x2x2", "1x2x2"), ("1x4x4", "kept")]
    flex.runner = RunInOrder(flex, steps, [(0, 0), (0, 1), (1, 0), (1, 1)])
    counter = flop_counter_mode()
    powerful, powerful_unconditional, weak = [run(transformer, **x) for x in calls[:3]]
    with counter:
        kept = run(transformer, **calls[3])
    assert counter.get_total_flops() == 0
    # x0 = x_t - sigma v
    guidance = -0.8 * (powerful - powerful_unconditional)
    assert guidance.abs().max() > 1e-3
    assert torch.allclose(-0.6 * (weak - kept), guidance, atol=1e-5)


@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_a_weak_step_after_a_powerful_one_is_corrected(transformer, parametrisation):
    """At the latents of the comparison the correction gives back the powerful prediction; elsewhere it is carried."""
    flex = attach(transformer, parametrisation)
    first, second = forward_inputs(), forward_inputs(seed=1) | {"timestep": torch.full((2,), 600.0)}
    outputs = {}
    for patch_size in ("1x2x2", "1x4x4"):
        flex.fix(patch_size)
        outputs[patch_size] = [run(transformer, **inputs) for inputs in (first, second)]
    steps = [("1x2x2", "1x2x2"), *[("1x4x4", "1x4x4")] * 4]
    flex.runner = RunInOrder(flex, steps, [(0, 1), (1, 1), (2, 1), (3, 0)])
    powerful, same, other, uncorrected = [run(transformer, **x) for x in (first, first, second, second)]
    assert torch.equal(powerful, outputs["1x2x2"][0])
    assert torch.allclose(same, powerful, atol=1e-5)
    # x0 = x_t - sigma v: the same difference of x0 at another noise level.
    x_0_gain = -0.8 * (outputs["1x2x2"][0] - outputs["1x4x4"][0])
    assert torch.allclose(-0.6 * (other - outputs["1x4x4"][1]), x_0_gain, atol=1e-5)
    assert x_0_gain.abs().max() > 1e-3
    assert torch.equal(uncorrected, outputs["1x4x4"][1])  # the other guidance branch has no correction


@pytest.mark.parametrize("patch_size", ["1x4x4", "2x4x4"])
def test_snr_tells_the_network_the_truth_and_passes_the_unseen_noise_through(transformer, patch_size):
    """With a network that knows the answer: it is told sigma kappa / c, and the output stands for U D x0 exactly."""
    flex = FlexTransformer(transformer, [patch_size], "snr")
    flex.fix(patch_size)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 2, 4, 5, 8, 12, generator=generator)
    sigma = torch.tensor([0.9, 0.3])
    level = sigma.view(-1, 1, 1, 1, 1)
    x_t = (1 - level) * x_0 + level * noise
    multiple = flex.weak_modes[patch_size].multiple
    folding, blocks = folding_for((5, 8, 12), multiple, (1, 2, 2), True), math.prod(multiple)
    kappa = folding.kappa
    seen = {}

    def network(hidden_states, timestep, **_):
        seen.update(timestep=timestep, mean=hidden_states.unflatten(1, (-1, 4)).mean(1))
        # In every block x' = (1 - s') D x0 + s' e', so this velocity stands for D x0 there.
        own_level = level * kappa / (1 - level + level * kappa)
        velocity = (seen["mean"] - folding.block_mean(x_0)) / own_level
        return (torch.cat([velocity, torch.zeros_like(velocity).repeat(1, blocks, 1, 1, 1)], 1),)

    output = flex.forward(network, None, (x_t, 1000 * sigma, torch.zeros(2, 7, 64)), {"return_dict": False})[0]
    typical = blocks**-0.5
    assert torch.allclose(seen["timestep"], 1000 * sigma * typical / (1 - sigma + sigma * typical))
    assert torch.allclose(seen["mean"], folding.block_mean(x_t) / (1 - level + level * kappa), atol=1e-5)
    expected = (x_t - folding.upsample(folding.block_mean(x_0))) / level
    assert torch.allclose(output, expected, atol=1e-4)


def test_gradients_reach_every_trained_parameter_and_no_frozen_one(transformer):
    transformer.requires_grad_(False)
    flex = FlexTransformer(transformer, WEAK, "snr")
    add_lora(flex, 4)
    randomise_adapter(flex)
    for name, p in transformer.named_parameters():
        p.requires_grad_("lora_" in name)
    flex.weak_modes.requires_grad_(True)
    inputs = forward_inputs()
    for patch_size in WEAK:
        flex.fix(flex.powerful)
        with torch.no_grad():
            target = transformer(**inputs, return_dict=False)[0]
        flex.fix(patch_size)
        output = transformer(**inputs, return_dict=False)[0]
        (output - target).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in flex.weak_modes[patch_size].parameters())
        for name, p in transformer.named_parameters():
            if f"flexivid-{patch_size}" in name:
                assert p.grad is not None and p.grad.abs().sum() > 0, name
    assert all(p.grad is None for name, p in transformer.named_parameters() if "lora_" not in name)


@pytest.mark.parametrize("patch_size", ["1x2x2", *WEAK])
def test_flops_on_the_meta_device_are_those_of_a_real_forward(transformer, patch_size):
    flex = attach(transformer)
    inputs = forward_inputs(3)
    flex.fix(patch_size)
    with flop_counter_mode() as counter:
        run(transformer, **inputs)
    assert counter.get_total_flops() == pytest.approx(3 * FlopCounter(flex).costs(inputs)[patch_size], rel=0.01)


def test_an_error_in_a_forward_leaves_the_stock_mode(transformer):
    inputs = forward_inputs()
    stock = run(transformer, **inputs)
    flex = attach(transformer)
    flex.fix("1x4x4")
    handle = transformer.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        run(transformer, **inputs)
    handle.remove()
    assert flex.mode is None and list(transformer.active_adapters()) == []
    flex.fix(flex.powerful)
    assert torch.equal(run(transformer, **inputs), stock)


def config_of(flex: FlexTransformer) -> AdapterConfig:
    return AdapterConfig.of(
        flex,
        lora_rank=4,
        components=["transformer"],
        base_model="tiny",
    )


class AtSigma:
    def run(self, flex, call):
        return call.output_of(flex.predict(call, "1x4x4", flex.diffusion, call.level(flex.diffusion, sigma=0.8)))


@pytest.fixture
def adapter_folder(tmp_path):
    flex = attach(tiny_transformer())
    with torch.no_grad():
        for p in [*flex.weak_modes.parameters(), *flex.transformer.parameters()]:
            p.copy_(p.half())
    save_adapter(tmp_path / "adapter", config_of(flex), {"transformer": flex})
    flex.fix("2x4x4")
    return tmp_path / "adapter", run(flex.transformer, **forward_inputs())


def test_adapter_round_trip_is_exact(adapter_folder):
    folder, expected = adapter_folder
    transformer = tiny_transformer()
    with torch.no_grad():
        for p in transformer.parameters():
            p.copy_(p.half())
    flexivid.enable(transformer, adapter=folder, schedule="2x4x4")
    assert torch.equal(run(transformer, **forward_inputs()), expected)


def test_whoever_may_read_a_new_file_may_read_an_adapter(adapter_folder, tmp_path):
    (tmp_path / "new").touch()
    assert {path.stat().st_mode for path in adapter_folder[0].iterdir()} == {(tmp_path / "new").stat().st_mode}


def test_merged_lora_predicts_the_same_costs_nothing_and_leaves_no_trace(adapter_folder):
    folder, _ = adapter_folder
    transformer, inputs = tiny_transformer(), forward_inputs()
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    keys, stock = list(transformer.state_dict()), run(transformer, **inputs)
    outputs, flops = {}, {}
    for merge_lora in (False, True):
        flexivid.enable(transformer, adapter=folder, schedule="1x4x4", merge_lora=merge_lora)
        with flop_counter_mode() as counter:
            outputs[merge_lora] = run(transformer, **inputs)
        flops[merge_lora] = counter.get_total_flops()
        flex = transformer._diffusers_hook.get_hook("flexivid").flex
        assert 2 * FlopCounter(flex).costs(inputs)["1x4x4"] == pytest.approx(flops[merge_lora], rel=0.02)
        flex.fix(flex.powerful)
        assert torch.equal(run(transformer, **inputs), stock)
    assert torch.allclose(outputs[False], outputs[True], atol=1e-5) and flops[True] < 0.95 * flops[False]
    flexivid.disable(transformer)
    assert torch.equal(run(transformer, **inputs), stock) and list(transformer.state_dict()) == keys
    with pytest.raises(ValueError, match="merge_lora is about an adapter"):
        flexivid.enable(transformer, schedule="1x4x4", merge_lora=True)


def test_merged_weights_never_stay(adapter_folder):
    """Not after an error, not with gradients switched on, not after a change of dtype; and a fused LoRA is refused."""
    folder, _ = adapter_folder
    transformer, inputs = tiny_transformer(), forward_inputs()
    stock = run(transformer, **inputs)
    flexivid.enable(transformer, adapter=folder, schedule="1x4x4", merge_lora=True)
    flex = transformer._diffusers_hook.get_hook("flexivid").flex
    linear = transformer.blocks[0].attn1.to_q.get_base_layer()
    weight = linear.weight
    handle = transformer.blocks[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        transformer(**inputs)
    handle.remove()
    assert linear.weight is weight
    transformer(**inputs)
    assert linear.weight is weight
    transformer.to(torch.bfloat16)
    assert run(transformer, **{name: value.bfloat16() for name, value in inputs.items()}).isfinite().all()
    transformer.to(torch.float32)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
    transformer.fuse_lora(adapter_names=["style"])
    with pytest.raises(RuntimeError, match="fused"):
        run(transformer, **inputs)
    transformer.unfuse_lora()
    flex.fix(flex.powerful)
    flexivid.disable(transformer)
    transformer.unload_lora()
    assert torch.allclose(run(transformer, **inputs), stock, atol=0.05)


def test_diffusers_reads_the_lora_file(adapter_folder):
    folder, _ = adapter_folder
    transformer = tiny_transformer()
    transformer.load_lora_adapter(
        str(folder), prefix="transformer.1x4x4", adapter_name="plain", weight_name="pytorch_lora_weights.safetensors"
    )
    assert transformer.peft_config["plain"].r == 4
    assert any(p.abs().sum() > 0 for name, p in transformer.named_parameters() if "lora_B" in name)


def test_adapter_errors_name_what_is_wrong(adapter_folder, tmp_path):
    folder, _ = adapter_folder
    with pytest.raises(flexivid.AdapterError, match="num_layers 2 != 3"):
        flexivid.enable(tiny_transformer(num_layers=3), adapter=folder, schedule="1x4x4")
    (tmp_path / "empty").mkdir()
    with pytest.raises(flexivid.AdapterError, match="has no flexivid_config.json"):
        flexivid.enable(tiny_transformer(), adapter=tmp_path / "empty", schedule="1x4x4")
    config = json.loads((folder / "flexivid_config.json").read_text())
    (folder / "flexivid_config.json").write_text(json.dumps({**config, "colour": "red"}))
    with pytest.raises(flexivid.AdapterError, match="colour"):
        read_config(folder)
    (folder / "flexivid_config.json").write_text(json.dumps(config))
    for name in ("flexivid.safetensors", "pytorch_lora_weights.safetensors"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        transformer = tiny_transformer()
        keys, stock = list(transformer.state_dict()), run(transformer, **forward_inputs())
        with pytest.raises(flexivid.AdapterError, match="not a whole safetensors file"):
            flexivid.enable(transformer, adapter=folder, schedule="1x4x4")
        assert list(transformer.state_dict()) == keys
        assert torch.equal(run(transformer, **forward_inputs()), stock)
        (folder / name).write_bytes(whole)
    flex = FlexTransformer(tiny_transformer(), WEAK, "snr")
    load_adapter(folder, read_config(folder), {"transformer": flex})


def test_a_level_without_sigma_is_that_of_the_timestep(transformer):
    flex = attach(transformer)
    inputs = forward_inputs()
    flex.fix("1x4x4")
    from_timestep = run(transformer, **inputs)
    flex.runner = AtSigma()
    assert torch.allclose(run(transformer, **inputs), from_timestep)
