"""Published architectures that can be timed without their weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING

# What Wan users usually ask for.
WAN_SAMPLING = {
    "num_frames": 81,
    "height": 480,
    "width": 832,
    "num_inference_steps": 50,
    "guidance_scale": 5.0,
    "max_sequence_length": 512,
}
# Wan's text encoder: UMT5-XXL.
TEXT_ENCODER = dict(
    vocab_size=256384, d_model=4096, d_ff=10240, d_kv=64, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu"
)


@dataclass(frozen=True)
class Architecture:
    """transformer: arguments of WanTransformer3DModel, empty for the embedded model. sampling: the usual call.

    modes: weak patch sizes. adapter: whose LoRA is merged into the arms with a budget; random weights have none, and
    with a merged LoRA a weak forward costs what it costs without.
    """

    transformer: dict
    sampling: dict
    modes: tuple[str, ...]
    adapter: Path | None = None


ARCHITECTURES = {
    "embedded": Architecture({}, SAMPLING, ("1x4x4", "2x2x2", "2x4x4"), ADAPTER),
    "wan2.1-1.3b": Architecture(
        dict(num_attention_heads=12, ffn_dim=8960, num_layers=30), WAN_SAMPLING, ("1x4x4", "2x2x2", "2x4x4")
    ),
    "wan2.1-14b": Architecture(
        dict(num_attention_heads=40, ffn_dim=13824, num_layers=40), WAN_SAMPLING, ("1x4x4", "2x2x2", "2x4x4")
    ),
}


def random_weights(build, dtype: torch.dtype, device: torch.device) -> torch.nn.Module:
    """What `build` returns, made in the dtype and on the device where it will run: the largest fit only once."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return build().eval()
    finally:
        torch.set_default_dtype(before)


def build_pipeline(architecture: Architecture, dtype: torch.dtype, device: torch.device) -> WanPipeline:
    """A pipeline that denoises; of a real architecture it has no text encoder and no VAE."""
    if not architecture.transformer:
        pipe = WanPipeline.from_pretrained(MODEL, dtype={"default": torch.float32, "transformer": dtype}).to(device)
    else:
        transformer = random_weights(lambda: WanTransformer3DModel(**architecture.transformer), dtype, device)
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        parts = {"tokenizer": None, "text_encoder": None, "vae": None}
        pipe = WanPipeline(transformer=transformer, scheduler=scheduler, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe
