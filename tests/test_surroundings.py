"""Offloading to disk, an `enable` that fails, torch.compile: what is around a transformer stays as it was."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.group_offloading import (
    GroupOffloadingConfig,
    ModuleGroup,
    _apply_group_offloading,
    _get_top_level_group_offload_hook,
)
from families import assert_same_clip, attach, randomise_adapter, tiny, tiny_pipeline
from peft import LoraConfig
from test_family_pipelines import sample
from test_flexible import config_of

import flexivid
from flexivid.model.adapter import save_adapter
from flexivid.model.lora import add_lora

CPU = torch.device("cpu")


def small(name: str = "wan"):
    """A tiny pipeline and the arguments of a short call of few tokens."""
    pipe, call = tiny_pipeline(name)
    sizes = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 4}
    return pipe, call | {argument: size for argument, size in sizes.items() if argument in call}


def two_transformers():
    """Wan2.2-A14B: one for the noisy steps, one for the others."""
    pipe, call = small()
    torch.manual_seed(7)
    low_noise = type(pipe.transformer).from_config(pipe.transformer.config).eval()
    settings = {"transformer_2": low_noise, "boundary_ratio": 0.9}
    both = WanPipeline(**{**pipe.components, **settings})
    both.set_progress_bar_config(disable=True)
    return both, call


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    flex = attach(tiny("wan"), ["1x4x4"])
    add_lora(flex, rank=4)
    randomise_adapter(flex, 0.3)
    save_adapter(folder, config_of(flex), {"transformer": flex})
    return folder


def corrupt(adapter, folder):
    """The same adapter, but half of its LoRA."""
    folder.mkdir()
    for file in adapter.iterdir():
        whole = file.read_bytes()
        (folder / file.name).write_bytes(whole[: len(whole) // 2] if "lora" in file.name else whole)
    return folder


def to_disk(pipe, folder, offload_type="block_level", component="transformer", **settings):
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    getattr(pipe, component).enable_group_offload(
        CPU, CPU, offload_type, offload_to_disk_path=str(folder), **{**blocks, **settings}
    )


class FakeStream:
    def synchronize(self): ...


@pytest.fixture
def streams(monkeypatch):
    """Streams where there is no accelerator: the order of what happens is that of one."""
    backend = SimpleNamespace(stream=nullcontext, current_stream=FakeStream, Stream=FakeStream)
    made = ModuleGroup.__init__

    def make(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self._torch_accelerator_module = backend

    monkeypatch.setattr(ModuleGroup, "__init__", make)
    monkeypatch.setattr("diffusers.hooks.group_offloading.TorchDeviceBackend", lambda device: backend)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, stream: None)


def streamed(transformer, offload_type="leaf_level", path=None, low_cpu_mem_usage=False):
    """`enable_group_offload(use_stream=True)`, which diffusers refuses on a CPU."""
    config = GroupOffloadingConfig(
        onload_device=CPU,
        offload_device=CPU,
        offload_type=offload_type,
        non_blocking=False,
        record_stream=False,
        low_cpu_mem_usage=low_cpu_mem_usage,
        num_blocks_per_group=1,
        offload_to_disk_path=path and str(path),
        stream=FakeStream(),
    )
    _apply_group_offloading(transformer, config)


def same(clip: torch.Tensor, other: torch.Tensor) -> None:
    """But for the order of sums, which depends on where in memory diffusers puts what it reads from disk."""
    torch.testing.assert_close(clip, other, atol=1e-5, rtol=1e-5)


class TestGroupOffloadToDisk:
    OFFLOADS = [("block_level", {}), ("block_level", {"num_blocks_per_group": 2}), ("leaf_level", {})]

    @pytest.mark.parametrize(("offload_type", "settings"), OFFLOADS)
    @pytest.mark.parametrize("name", ["wan", "cogvideox-5b"])
    def test_weak_modes_are_built_from_the_weights(self, name, offload_type, settings, tmp_path):
        pipe, call = small(name)
        stock = sample(pipe, call)
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        expected = sample(pipe, call)
        pipe, call = small(name)
        to_disk(pipe, tmp_path, offload_type, **settings)
        files = {file: file.read_bytes() for file in tmp_path.iterdir()}
        for _ in range(2):
            flexivid.enable(pipe, budget=0.6, order="interleaved")
            same(sample(pipe, call), expected)
        flexivid.disable(pipe)
        same(sample(pipe, call), stock)
        assert _get_top_level_group_offload_hook(pipe.transformer) is not None
        assert {file: file.read_bytes() for file in tmp_path.iterdir()} == files

    @pytest.mark.parametrize(("offload_type", "settings"), OFFLOADS[1:])
    @pytest.mark.parametrize("style", [False, True])
    def test_with_adapters(self, adapter, offload_type, settings, style, tmp_path):
        def pipeline():
            pipe, call = small()
            if style:
                pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
            return pipe, call

        pipe, call = pipeline()
        stock = sample(pipe, call)
        flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
        expected = sample(pipe, call)
        pipe, call = pipeline()
        to_disk(pipe, tmp_path, offload_type, **settings)
        for _ in range(2):
            flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
            same(sample(pipe, call), expected)
        with pytest.raises(ValueError, match="group offload to disk does not know the weights that merge_lora puts in"):
            flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved", merge_lora=True)
        same(sample(pipe, call), expected)
        flexivid.disable(pipe)
        same(sample(pipe, call), stock)

    def test_offloaded_after_enable(self, adapter, tmp_path):
        pipe, call = small()
        stock = sample(pipe, call)
        flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
        expected = sample(pipe, call)
        to_disk(pipe, tmp_path, "leaf_level")
        same(sample(pipe, call), expected)
        flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
        same(sample(pipe, call), expected)
        flexivid.disable(pipe)
        same(sample(pipe, call), stock)

    @pytest.mark.parametrize(
        ("offload_type", "called_before", "low_cpu_mem_usage"),
        [("block_level", True, False), ("leaf_level", False, True), ("leaf_level", True, False)],
    )
    def test_with_streams(self, streams, adapter, offload_type, called_before, low_cpu_mem_usage, tmp_path):
        pipe, call = small()
        stock = sample(pipe, call)
        flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
        expected = sample(pipe, call)
        pipe, call = small()
        streamed(pipe.transformer, offload_type, tmp_path, low_cpu_mem_usage)
        if called_before:  # prefetching begins once the order of the layers was seen
            same(sample(pipe, call), stock)
        for _ in range(2):
            flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
            same(sample(pipe, call), expected)
        flexivid.disable(pipe)
        same(sample(pipe, call), stock)
        same(sample(pipe, call), stock)

    def test_two_transformers_need_two_folders(self, tmp_path):
        pipe, call = two_transformers()
        stock = sample(pipe, call)
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        expected = sample(pipe, call)
        pipe, call = two_transformers()
        for component in ("transformer", "transformer_2"):
            to_disk(pipe, tmp_path / component, component=component)
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        same(sample(pipe, call), expected)
        flexivid.disable(pipe)
        same(sample(pipe, call), stock)
        pipe, call = two_transformers()
        for component in ("transformer", "transformer_2"):
            to_disk(pipe, tmp_path / "both", component=component)
        with pytest.raises(
            ValueError, match="transformer and transformer_2 are offloaded to one folder, .*both, where"
        ):
            flexivid.enable(pipe, budget=0.6, order="interleaved")

    def test_files_of_another_model_are_refused(self, tmp_path):
        pipe, _ = small()
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        to_disk(pipe, tmp_path)
        pipe, _ = small()
        to_disk(pipe, tmp_path)
        with pytest.raises(ValueError, match="does not hold the weights of transformer that group offload would read"):
            flexivid.enable(pipe, budget=0.6, order="interleaved")


class TestAFailedEnable:
    """leaves the pipeline as it was: the earlier enable, its LoRA, its schedule, and what is around it."""

    def check(self, pipe, call, fail):
        before, keys = sample(pipe, call), list(pipe.transformer.state_dict())
        steps = flexivid.summary(pipe).steps
        fail()
        assert flexivid.summary(pipe).steps == steps and list(pipe.transformer.state_dict()) == keys
        assert torch.equal(sample(pipe, call), before) and torch.equal(sample(pipe, call), before)

    @pytest.mark.parametrize("merge_lora", [False, True])
    @pytest.mark.parametrize("style", [False, True])
    def test_a_corrupt_adapter(self, adapter, merge_lora, style, tmp_path):
        pipe, call = small()
        if style:
            pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "style")
        stock = sample(pipe, call)
        bad = corrupt(adapter, tmp_path / "bad")
        flexivid.enable(pipe, adapter=adapter, merge_lora=merge_lora, schedule="1x2x2:1,1x4x4:3")

        def fail():
            with pytest.raises(flexivid.AdapterError, match="not a whole safetensors file"):
                flexivid.enable(pipe, adapter=bad, budget=0.6, order="interleaved")

        self.check(pipe, call, fail)
        flexivid.disable(pipe)
        assert torch.equal(sample(pipe, call), stock)

    @pytest.mark.parametrize("offload", ["model", "group", "disk"])
    def test_the_offload_stays(self, adapter, offload, tmp_path):
        pipe, call = small()
        if offload == "group":
            pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level")
        elif offload == "disk":
            to_disk(pipe, tmp_path / "disk")
        else:
            pipe.enable_model_cpu_offload(device="cpu")

        def offloaded():
            return hasattr(pipe.transformer, "_hf_hook") or bool(_get_top_level_group_offload_hook(pipe.transformer))

        bad = corrupt(adapter, tmp_path / "bad")
        flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")

        def fail():
            with pytest.raises(flexivid.AdapterError):
                flexivid.enable(pipe, adapter=bad, budget=0.6, order="interleaved")
            assert offloaded()
            parallel = SimpleNamespace(context_parallel_config="any")
            pipe.transformer._parallel_config, pipe.transformer._cp_plan = parallel, {"": {"hidden_states": None}}
            with pytest.raises(ValueError, match="splits its latents before they are folded"):
                flexivid.enable(pipe, budget=0.6, order="interleaved")
            del pipe.transformer._parallel_config, pipe.transformer._cp_plan
            assert offloaded()

        self.check(pipe, call, fail)

    def test_any_error_of_two_transformers(self, monkeypatch):
        pipe, call = two_transformers()
        flexivid.enable(pipe, schedule="1x2x2:1,1x4x4:3")

        def interrupt(*args):
            raise KeyboardInterrupt

        def fail():
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr("flexivid.api.PipelineRunner", interrupt)
                flexivid.enable(pipe, budget=0.6, order="interleaved")

        self.check(pipe, call, fail)


class TestStreamedGroupOffload:
    def test_merged_lora_is_refused_before_and_after(self, streams, adapter):
        pipe, call = small()
        stock = sample(pipe, call)
        flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
        expected = sample(pipe, call)
        flexivid.disable(pipe)
        streamed(pipe.transformer)
        flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved")
        assert torch.equal(sample(pipe, call), expected) and torch.equal(sample(pipe, call), expected)
        with pytest.raises(ValueError, match="group offload with use_stream does not know the weights that merge_lora"):
            flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved", merge_lora=True)
        assert torch.equal(sample(pipe, call), expected)
        flexivid.disable(pipe)
        assert torch.equal(sample(pipe, call), stock)
        pipe, call = small()
        flexivid.enable(pipe, adapter=adapter, budget=0.6, order="interleaved", merge_lora=True)
        merged = sample(pipe, call)
        streamed(pipe.transformer)
        with pytest.raises(ValueError, match="group offload with use_stream does not know the weights that merge_lora"):
            sample(pipe, call)
        flexivid.disable(pipe)
        assert torch.equal(sample(pipe, call), stock)
        assert torch.allclose(merged, expected, atol=1e-4)


def test_a_bare_transformer_of_an_offloaded_pipeline():
    """The pipeline takes its offload off after every call, and with it what the offload had been put around."""
    pipe, call = small()
    stock = sample(pipe, call)
    flexivid.enable(pipe.transformer, schedule="1x4x4")
    expected = sample(pipe, call)
    pipe, call = small()
    pipe.enable_model_cpu_offload(device="cpu")
    flexivid.enable(pipe.transformer, schedule="1x4x4")
    for _ in range(2):
        assert torch.equal(sample(pipe, call), expected)
    flexivid.disable(pipe.transformer)
    assert torch.equal(sample(pipe, call), stock) and torch.equal(sample(pipe, call), stock)


@pytest.mark.parametrize("bare", [False, True])
def test_sequential_offload_is_put_back(bare):
    """On a CPU accelerate cannot run it, so that only what is left when it is taken off is looked at."""
    pipe, call = small()
    stock = sample(pipe, call)
    target, settings = (pipe.transformer, {"schedule": "1x4x4"}) if bare else (pipe, {"budget": 0.6})
    flexivid.enable(target, **settings)
    expected = sample(pipe, call)
    flexivid.disable(target)
    pipe.enable_sequential_cpu_offload(device="cpu")
    for change, clip in (
        (lambda: flexivid.enable(target, **settings), expected),
        (lambda: flexivid.disable(target), stock),
    ):
        change()
        assert pipe.transformer.proj_out.weight.device.type == "meta"
        pipe.remove_all_hooks()
        assert torch.equal(sample(pipe, call), clip)
        pipe.enable_sequential_cpu_offload(device="cpu")


class Doubling(ModelHook):
    def new_forward(self, module, *args, **kwargs):
        return tuple(2 * part for part in self.fn_ref.original_forward(*args, **kwargs))


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_hooks_that_go_before_or_after_ours(order):
    """diffusers re-links past a hook with a forward of its own when the one inside it goes."""
    pipe, call = small()
    stock = sample(pipe, call)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    weak = sample(pipe, call)
    flexivid.disable(pipe)
    registry = HookRegistry.check_if_exists_or_initialize(pipe.transformer)
    if order == "inside":
        registry.register_hook(Doubling(), "theirs")
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        registry.remove_hook("theirs")
        assert torch.equal(sample(pipe, call), weak)
        flexivid.disable(pipe)
    else:
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        registry.register_hook(Doubling(), "theirs")
        flexivid.disable(pipe)
        assert not torch.equal(sample(pipe, call), stock)
        registry.remove_hook("theirs")
    assert torch.equal(sample(pipe, call), stock)


class TestTorchCompile:
    @pytest.fixture(autouse=True)
    def forgotten(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @staticmethod
    def backend(graphs: list):
        def compile_graph(graph, inputs):
            graphs.append(len(graph.graph.nodes))
            return graph.forward

        return compile_graph

    @pytest.mark.parametrize("how", ["wrapped", "in place", "in place, after"])
    def test_the_whole_transformer(self, how, monkeypatch):
        """Its stock forward is compiled, and nothing of ours is traced."""
        pipe, call = small()
        pipe.transformer = tiny("wan", num_layers=1)
        call["num_inference_steps"] = 3
        stock = sample(pipe, call)
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        weak = sample(pipe, call)
        flexivid.disable(pipe)
        graphs = []
        if how == "wrapped":
            pipe.transformer = torch.compile(pipe.transformer, backend=self.backend(graphs))
        elif how == "in place":
            pipe.transformer.compile(backend=self.backend(graphs), fullgraph=True)
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        if how == "in place, after":
            pipe.transformer.compile(backend=self.backend(graphs))
        flex = getattr(pipe.transformer, "_orig_mod", pipe.transformer)._diffusers_hook.get_hook("flexivid").flex
        chosen, costs = [], flex.runner.costs

        def planned(arguments):
            chosen.append(torch.compiler.is_compiling())
            return costs(arguments)

        monkeypatch.setattr(flex.runner, "costs", planned)
        assert_same_clip(sample(pipe, call), weak)
        assert chosen and not any(chosen)
        assert max(graphs) > 100, "the blocks are in one graph"
        compiled = len(graphs)
        assert_same_clip(sample(pipe, call), weak)
        assert len(graphs) == compiled, "nothing is compiled again"
        monkeypatch.undo()
        assert flexivid.summary(pipe).ratio <= 0.6
        flexivid.disable(pipe)
        assert_same_clip(sample(pipe, call), stock)

    def test_with_fullgraph_after_enable_the_reason_is_given(self):
        pipe, call = small()
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        pipe.transformer.compile(backend="eager", fullgraph=True)
        with pytest.raises(Exception, match="flexivid plans in Python"):
            sample(pipe, call)

    def test_blocks_stay_compiled(self):
        pipe, call = small()
        graphs = []
        pipe.transformer.compile_repeated_blocks(backend=self.backend(graphs), fullgraph=True, dynamic=False)
        flexivid.enable(pipe, budget=0.6, order="interleaved")
        sample(pipe, call)
        assert len(graphs) == 2, "one a patch size"
        sample(pipe, call)
        assert len(graphs) == 2
