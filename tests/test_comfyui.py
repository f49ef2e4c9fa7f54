"""The nodes for ComfyUI, loaded and run as ComfyUI does it, with what they use of it in miniature."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from families import assert_same_clip

from flexivid.model.hooks import attached
from flexivid.shapes.embedded import ADAPTER

NODES = Path(__file__).parents[1] / "integrations/comfyui"
CALL = {"steps": 6, "guidance_scale": 4.0, "frames": 9, "height": 32, "width": 32, "seed": 3}
PROMPT = "a dotted green cross growing on a black background"


class Interrupted(Exception):
    """ComfyUI's InterruptProcessingException."""


@pytest.fixture
def comfy(monkeypatch, tmp_path):
    """What the nodes import of ComfyUI. shown: steps of its progress bars. cancel_at: the one at which one cancels."""
    state = SimpleNamespace(shown=[], cancel_at=None, unloaded=0, folder=tmp_path / "diffusers")

    class ProgressBar:
        def __init__(self, total):
            self.total, self.done = total, 0

        def update(self, value):
            self.done += value
            state.shown.append((self.done, self.total))

    def interrupt():
        if state.cancel_at == len(state.shown):
            raise Interrupted

    def unload():
        state.unloaded += 1

    management = ModuleType("comfy.model_management")
    management.get_torch_device = lambda: torch.device("cpu")
    management.unload_all_models = unload
    management.throw_exception_if_processing_interrupted = interrupt
    utils = ModuleType("comfy.utils")
    utils.ProgressBar = ProgressBar
    package = ModuleType("comfy")
    package.model_management, package.utils = management, utils
    folder_paths = ModuleType("folder_paths")
    folder_paths.get_folder_paths = lambda name: [str(state.folder)] if name == "diffusers" else []
    for module in (package, management, utils, folder_paths):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return state


@pytest.fixture
def nodes(comfy, monkeypatch):
    """The classes by name, from a folder of custom nodes, whose module has the name of its path."""
    name = str(NODES).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, NODES / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    for part in ("", ".nodes"):
        monkeypatch.setitem(sys.modules, name + part, module)
    del sys.modules[f"{name}.nodes"]
    spec.loader.exec_module(module)
    return module.NODE_CLASS_MAPPINGS


def run(node, **values):
    """As ComfyUI's executor: what INPUT_TYPES names and no more, in inference mode, one output for each type."""
    inputs = node.INPUT_TYPES()
    declared = {**inputs["required"], **inputs.get("optional", {})}
    assert inputs["required"].keys() <= values.keys() <= declared.keys()
    with torch.inference_mode():
        outputs = getattr(node(), node.FUNCTION)(**values)
    assert len(outputs) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return outputs


@pytest.fixture
def pipe(nodes):
    model = nodes["FlexividLoad"].INPUT_TYPES()["required"]["model"][0][-1]
    return run(nodes["FlexividLoad"], model=model, dtype="float32", offload=False)[0]


def sample(nodes, pipe, **changed):
    return run(
        nodes["FlexividSample"], **{"pipeline": pipe, "prompt": PROMPT, "negative_prompt": "", **CALL, **changed}
    )


def test_widgets_have_a_type_and_a_default_within_their_limits(nodes):
    for node in nodes.values():
        for name, (kind, *options) in {
            **node.INPUT_TYPES()["required"],
            **node.INPUT_TYPES().get("optional", {}),
        }.items():
            assert isinstance(kind, list) or kind == kind.upper()
            if kind in ("INT", "FLOAT"):
                assert options[0]["min"] <= options[0]["default"] <= options[0]["max"], name


def test_a_clip_of_a_folder_at_a_budget(nodes, comfy, pipe, tmp_path):
    pipe.save_pretrained(comfy.folder / "mine/shapes")
    loader = nodes["FlexividLoad"]
    assert loader.INPUT_TYPES()["required"]["model"][0][0] == "mine/shapes"
    ours = run(loader, model="mine/shapes", dtype="float32", offload=False)[0]
    frames, latents, fps, summary = sample(nodes, ours, budget=0.5, adapter=str(ADAPTER))
    assert frames.shape == (9, 32, 32, 3) and frames.dtype == torch.float32
    assert 0 <= frames.min() < frames.max() <= 1
    assert latents["samples"].shape == (1, 16, 3, 8, 8)
    assert fps == 16 and "saved" in summary
    assert comfy.shown == [(step, 6) for step in range(1, 7)] and comfy.unloaded
    # Not to the last bit: where weights of a file lie in memory, and so how they are multiplied, its header decides.
    assert_same_clip(frames, sample(nodes, pipe, budget=0.5, adapter=str(ADAPTER))[0])
    assert not torch.equal(frames, sample(nodes, pipe, budget=1.0)[0])


def test_cancel_and_mistakes_leave_the_stock_pipeline(nodes, comfy, pipe):
    stock = sample(nodes, pipe, budget=1.0)[0]
    bar, decode = pipe.progress_bar, pipe.vae.decode
    comfy.shown.clear()
    comfy.cancel_at = 2
    with pytest.raises(Interrupted):
        sample(nodes, pipe, budget=0.5, adapter=str(ADAPTER))
    assert len(comfy.shown) == 2 and attached(pipe.transformer) is None
    assert (pipe.progress_bar, pipe.vae.decode) == (bar, decode)
    comfy.cancel_at = None
    with pytest.raises(ValueError, match="a multiple of 8, such as 40"):
        sample(nodes, pipe, budget=0.5, height=36)
    with pytest.raises(ValueError, match="neither a folder nor a hub id"):
        sample(nodes, pipe, budget=0.5, adapter="nowhere")
    with torch.inference_mode():
        arguments = {"num_frames": 9, "height": 32, "width": 32, "num_inference_steps": 6, "guidance_scale": 4.0}
        generator = torch.Generator().manual_seed(3)
        again = pipe(PROMPT, **arguments, generator=generator, output_type="np").frames[0]
    assert torch.equal(torch.from_numpy(again), stock)
