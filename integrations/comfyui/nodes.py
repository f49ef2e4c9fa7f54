"""Two nodes: one loads a video pipeline in diffusers format, the other samples it at a share of its FLOPs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

import flexivid
from flexivid.inputs import check_model, check_sizes
from flexivid.model.adapter import read_config
from flexivid.model.hub import locate_adapter
from flexivid.shapes.embedded import MODEL
from flexivid.stock_pipelines import call_arguments, load, pipeline_class, set_guidance_scale, usual_arguments

EMBEDDED = "the small model that ships with flexivid"


def models() -> dict[str, Path]:
    """The pipelines below ComfyUI's folders of diffusers models, by their path there, and the embedded one."""
    found = {}
    for root in folder_paths.get_folder_paths("diffusers"):
        for folder, _, files in os.walk(root, followlinks=True):
            if "model_index.json" in files:
                found[os.path.relpath(folder, root)] = Path(folder)
    return {**dict(sorted(found.items())), EMBEDDED: MODEL}


class FlexividLoad:
    CATEGORY = "flexivid"
    FUNCTION = "load"
    RETURN_TYPES = ("FLEXIVID_PIPELINE",)
    RETURN_NAMES = ("pipeline",)
    DESCRIPTION = "A video pipeline in diffusers format, from models/diffusers."

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        offload = "keep on the device only what is at work: less memory, more seconds"
        return {
            "required": {
                "model": (list(models()),),
                "dtype": (["bfloat16", "float16", "float32"],),
                "offload": ("BOOLEAN", {"default": False, "tooltip": offload}),
            }
        }

    def load(self, model: str, dtype: str, offload: bool) -> tuple[DiffusionPipeline]:
        folder = models()[model]
        check_model(folder)
        comfy.model_management.unload_all_models()
        pipe = load(folder, pipeline_class(folder, with_image=False), getattr(torch, dtype))
        device = comfy.model_management.get_torch_device()
        if offload:
            pipe.enable_model_cpu_offload(device=device)
        else:
            pipe.to(device)
        return (pipe,)


class Progress(tqdm):
    """A pipeline's progress bar that ComfyUI shows too, and through which its user cancels."""

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self.shown = comfy.utils.ProgressBar(self.total)

    def update(self, steps: int = 1) -> None:
        super().update(steps)
        self.shown.update(steps)
        comfy.model_management.throw_exception_if_processing_interrupted()


@contextmanager
def watched(pipe: DiffusionPipeline) -> Iterator[list[torch.Tensor]]:
    """Within it the pipeline can be followed and cancelled, and what its VAE decodes is put into the list."""
    latents, decode = [], pipe.vae.decode

    def see(z: torch.Tensor, *args, **settings):
        latents.append(z.float().cpu())
        return decode(z, *args, **settings)

    pipe.progress_bar = lambda iterable=None, total=None: Progress(iterable, total=total)
    pipe.vae.decode = see
    try:
        yield latents
    finally:
        del pipe.progress_bar, pipe.vae.decode


class FlexividSample:
    CATEGORY = "flexivid"
    FUNCTION = "sample"
    RETURN_TYPES = ("IMAGE", "LATENT", "FLOAT", "STRING")
    RETURN_NAMES = ("frames", "latents", "fps", "summary")
    DESCRIPTION = (
        "A clip at a share of the transformer's FLOPs. Cancelled or not, the pipeline is the stock one after it."
    )

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        def whole(default: int, least: int, step: int = 1) -> tuple:
            return "INT", {"default": default, "min": least, "max": 1 << 14, "step": step}

        budget = "share of the transformer's FLOPs; 0 runs the few-step recipe of the adapter"
        adapter = "folder or hub id of a flexivid adapter; none if empty"
        return {
            "required": {
                "pipeline": ("FLEXIVID_PIPELINE",),
                "prompt": ("STRING", {"multiline": True}),
                "negative_prompt": ("STRING", {"multiline": True}),
                "budget": ("FLOAT", {"default": 0.5, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": budget}),
                "steps": whole(50, 1),
                "guidance_scale": ("FLOAT", {"default": 5.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "frames": whole(81, 1),
                "height": whole(480, 16, 16),
                "width": whole(832, 16, 16),
                "seed": ("INT", {"default": 0, "min": 0, "max": (1 << 63) - 1}),
            },
            "optional": {"adapter": ("STRING", {"default": "", "tooltip": adapter})},
        }

    def sample(
        self, pipeline, prompt, negative_prompt, budget, steps, guidance_scale, frames, height, width, seed, adapter=""
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], float, str]:
        """Frames (T, H, W, 3) from 0 to 1, latents as the VAE takes them, frames a second, and what ran."""
        check_sizes(pipeline, frames, height, width)
        usual = usual_arguments(pipeline)
        sizes = {"frames": frames, "height": height, "width": width, "steps": steps}
        values = {**usual, **sizes, "guidance_scale": guidance_scale}
        folder = None
        if adapter:
            folder = locate_adapter(adapter)
            values["text_length"] = read_config(folder).max_sequence_length or values["text_length"]
        call = call_arguments(pipeline, **values)
        if negative_prompt:
            call["negative_prompt"] = negative_prompt
        set_guidance_scale(pipeline, guidance_scale)
        comfy.model_management.unload_all_models()
        flexivid.enable(pipeline, adapter=folder, budget=budget or None)
        try:
            with watched(pipeline) as latents:
                generator = torch.Generator().manual_seed(seed)
                clip = pipeline(prompt=prompt, **call, generator=generator, output_type="np").frames[0]
            summary = str(flexivid.summary(pipeline))
        finally:
            flexivid.disable(pipeline)
        return torch.from_numpy(clip).float(), {"samples": latents[-1]}, float(usual["fps"]), summary
