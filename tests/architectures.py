"""Folders of published models without weights: their public configurations, which is all that a dry run reads."""

import json
from pathlib import Path

import diffusers

from flexivid.models import PUBLISHED

# Name in PUBLISHED: pipeline, VAE and its settings, scheduler and its settings.
PARTS = {
    "Wan2.1-T2V-1.3B": ("WanPipeline", "AutoencoderKLWan", {}, "UniPCMultistepScheduler", {"flow_shift": 3.0}),
    "Wan2.1-T2V-14B, Wan2.2-A14B": (
        "WanPipeline",
        "AutoencoderKLWan",
        {},
        "UniPCMultistepScheduler",
        {"flow_shift": 3.0},
    ),
    "Wan2.2-TI2V-5B": (
        "WanPipeline",
        "AutoencoderKLWan",
        {"z_dim": 48, "scale_factor_spatial": 16, "latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
        "UniPCMultistepScheduler",
        {"flow_shift": 5.0},
    ),
    "LTX-Video 2B": (
        "LTXPipeline",
        "AutoencoderKLLTXVideo",
        {},
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
    ),
    "CogVideoX-5B": ("CogVideoXPipeline", "AutoencoderKLCogVideoX", {}, "CogVideoXDPMScheduler", {}),
    "HunyuanVideo": (
        "HunyuanVideoPipeline",
        "AutoencoderKLHunyuanVideo",
        {},
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 7.0},
    ),
    "Mochi 1": ("MochiPipeline", "AutoencoderKLMochi", {}, "FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
}


def write_architecture(name: str, folder: Path, **index) -> Path:
    """A folder such as diffusers saves, without weights, tokenizers and text encoders.

    index: what model_index.json holds beside.
    """
    pipeline, vae, vae_settings, scheduler, scheduler_settings = PARTS[name]
    model = next(model for model in PUBLISHED if model.name == name)
    parts = {
        "transformer": (model.transformer_class, model.config),
        "vae": (vae, vae_settings),
        "scheduler": (scheduler, scheduler_settings),
    }
    if "transformer_2" in index:
        parts["transformer_2"] = parts["transformer"]
    for part, (class_name, settings) in parts.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        file = "scheduler_config.json" if part == "scheduler" else "config.json"
        (folder / part / file).write_text(json.dumps({"_class_name": class_name, **settings}))
    named = {part: ["diffusers", class_name] for part, (class_name, _) in parts.items()}
    whole = {"_class_name": pipeline, "_diffusers_version": diffusers.__version__, **index, **named}
    (folder / "model_index.json").write_text(json.dumps(whole))
    return folder
