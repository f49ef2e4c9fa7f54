"""Architectures of the models that configs/ names, so that a dry run asks no network for them.

Only what differs from the defaults of diffusers 0.42 classes is written down, as those are the published values: the
scripts convert_*_to_diffusers.py of diffusers made the published folders from them. Compared with these scripts:
transformers and VAEs of Wan2.1, LTX-Video, LTX-2, CogVideoX and HunyuanVideo, and Mochi's transformer; with public
copies of its config: transformer and VAE of Wan2.2-TI2V-5B. Compared with nothing, since the folders could not be read:
the schedulers' shifts, the scheduler of CogVideoX-5b, Mochi's VAE, and the boundaries of Wan2.2's A14B models, which
are those of its paper's code; of MiniMax-H3 nothing. A dry run depends on the architectures only.
"""

from dataclasses import dataclass, field
from pathlib import Path

from diffusers import ConfigMixin, DiffusionPipeline, ModularPipeline


@dataclass(frozen=True)
class Architecture:
    """pipeline: its class. parts: class and configuration of transformers, VAE and scheduler. settings: of the
    pipeline itself."""

    pipeline: str
    parts: dict[str, tuple[str, dict]]
    settings: dict = field(default_factory=dict)

    def index(self) -> dict:
        """What model_index.json holds of it."""
        parts = {name: ["diffusers", class_name] for name, (class_name, _) in self.parts.items()}
        return {"_class_name": self.pipeline, **self.settings, **parts}


def _wan(
    transformer: dict, vae: dict, flow_shift: float, *more: str, kind: str = "", image: bool = False, **settings
) -> Architecture:
    """more: other transformers of the same configuration. kind: of the class, `VACE` or none."""
    scheduler = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": flow_shift}
    parts = {name: (f"Wan{kind}Transformer3DModel", transformer) for name in ("transformer", *more)}
    parts |= {"vae": ("AutoencoderKLWan", vae), "scheduler": ("UniPCMultistepScheduler", scheduler)}
    return Architecture(f"Wan{'ImageToVideo' if image else kind}Pipeline", parts, settings)


# fmt: off
WAN_2_2_VAE = {
    "base_dim": 160, "decoder_base_dim": 256, "z_dim": 48, "is_residual": True, "in_channels": 12, "out_channels": 12,
    "patch_size": 2, "scale_factor_spatial": 16,
    "latents_mean": [
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
        0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
        -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ],
    "latents_std": [
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
        0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
        0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ],
}
# fmt: on
EULER = "FlowMatchEulerDiscreteScheduler"
LTX_SHIFT = {
    "use_dynamic_shifting": True,
    "base_shift": 0.95,
    "max_shift": 2.05,
    "base_image_seq_len": 1024,
    "shift_terminal": 0.1,
}
ARCHITECTURES = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": _wan({"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, {}, 3.0),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": _wan({}, {}, 3.0),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": _wan({}, {}, 3.0, "transformer_2", boundary_ratio=0.875),
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": _wan(
        {"in_channels": 36}, {}, 3.0, "transformer_2", image=True, boundary_ratio=0.9
    ),
    "Wan-AI/Wan2.1-VACE-1.3B-diffusers": _wan(
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30, "vace_layers": list(range(0, 30, 2))},
        {},
        3.0,
        kind="VACE",
    ),
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": _wan(
        {"in_channels": 48, "out_channels": 48, "num_attention_heads": 24, "ffn_dim": 14336, "num_layers": 30},
        WAN_2_2_VAE,
        5.0,
        expand_timesteps=True,
    ),
    "Lightricks/LTX-Video": Architecture(
        "LTXPipeline",
        {
            "transformer": ("LTXVideoTransformer3DModel", {}),
            "vae": ("AutoencoderKLLTXVideo", {}),
            "scheduler": (EULER, LTX_SHIFT),
        },
    ),
    "Lightricks/LTX-2": Architecture(
        "LTX2Pipeline",
        {
            "transformer": ("LTX2VideoTransformer3DModel", {}),
            "vae": (
                "AutoencoderKLLTX2Video",
                {"decoder_causal": False, "spatial_compression_ratio": 32, "temporal_compression_ratio": 8},
            ),
            "connectors": ("LTX2TextConnectors", {}),
            "scheduler": (EULER, LTX_SHIFT),
        },
    ),
    "zai-org/CogVideoX-5b": Architecture(
        "CogVideoXPipeline",
        {
            "transformer": (
                "CogVideoXTransformer3DModel",
                {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
            ),
            "vae": ("AutoencoderKLCogVideoX", {"scaling_factor": 0.7}),
            "scheduler": (
                "CogVideoXDPMScheduler",
                {
                    "snr_shift_scale": 1.0,
                    "prediction_type": "v_prediction",
                    "rescale_betas_zero_snr": True,
                    "timestep_spacing": "trailing",
                },
            ),
        },
    ),
    "hunyuanvideo-community/HunyuanVideo": Architecture(
        "HunyuanVideoPipeline",
        {
            "transformer": ("HunyuanVideoTransformer3DModel", {}),
            "vae": ("AutoencoderKLHunyuanVideo", {}),
            "scheduler": (EULER, {"shift": 7.0}),
        },
    ),
    "hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v": Architecture(
        "HunyuanVideo15Pipeline",
        {
            "transformer": ("HunyuanVideo15Transformer3DModel", {"task_type": "t2v"}),
            "vae": ("AutoencoderKLHunyuanVideo15", {}),
            "scheduler": (EULER, {"shift": 5.0}),
        },
    ),
    "MiniMaxAI/MiniMax-H3": Architecture(
        "MiniMaxH3ModularPipeline",
        {
            "transformer": ("MiniMaxH3Transformer3DModel", {}),
            "vae": ("AutoencoderKLMiniMaxH3", {}),
            "scheduler": ("MiniMaxH3Scheduler", {}),
            "audio_scheduler": ("MiniMaxH3Scheduler", {"shift": 3.0}),
        },
    ),
    "genmo/mochi-1-preview": Architecture(
        "MochiPipeline",
        {
            "transformer": ("MochiTransformer3DModel", {}),
            "vae": ("AutoencoderKLMochi", {}),
            "scheduler": (EULER, {"invert_sigmas": True}),
        },
    ),
}


def _known(model: str | Path) -> Architecture | None:
    return None if Path(model).exists() else ARCHITECTURES.get(str(model))


def load_index(model: str | Path) -> dict:
    """model_index.json of a folder or a hub id, or of a modular pipeline, which is named otherwise.

    Raises OSError if there is none, or no network for one not known.
    """
    if known := _known(model):
        return known.index()
    try:
        return DiffusionPipeline.load_config(str(model))
    except OSError as error:
        try:
            return ModularPipeline.load_config(str(model))
        except OSError:
            raise error from None


def load_part(model: str | Path, part: str, component: type[ConfigMixin]) -> dict:
    """The configuration of a part, such as `vae`, which may leave out defaults. Raises as `load_index`."""
    known = _known(model)
    return known.parts[part][1] if known else component.load_config(str(model), subfolder=part)
