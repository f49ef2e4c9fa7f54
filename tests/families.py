"""A tiny random transformer of every family in the table, out of its real diffusers class."""

import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

from flexivid.families import family_of, patch_size_of
from flexivid.flexible import FlexTransformer

CHANNELS, TEXT = 4, 16

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT,
    "freq_dim": 16,
    "ffn_dim": 64,
    "num_layers": 2,
}
COGVIDEOX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "time_embed_dim": 8,
    "text_embed_dim": TEXT,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 8,
    "sample_frames": 17,
    "max_text_seq_length": 7,
}
# name: (class, config)
TINY = {
    "wan": (WanTransformer3DModel, WAN),
    "wan-i2v": (
        WanTransformer3DModel,
        WAN | {"in_channels": 2 * CHANNELS + 4, "image_dim": 8, "added_kv_proj_dim": 48},
    ),
    "ltx": (
        LTXVideoTransformer3DModel,
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 18,
            "cross_attention_dim": 36,
            "num_layers": 2,
            "caption_channels": TEXT,
        },
    ),
    "cogvideox-2b": (CogVideoXTransformer3DModel, COGVIDEOX),
    "cogvideox-5b": (CogVideoXTransformer3DModel, COGVIDEOX | {"use_rotary_positional_embeddings": True}),
    "cogvideox-1.5": (
        CogVideoXTransformer3DModel,
        COGVIDEOX | {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    ),
    "hunyuan-video": (
        HunyuanVideoTransformer3DModel,
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": TEXT,
            "pooled_projection_dim": 8,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    "mochi": (
        MochiTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": CHANNELS,
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "max_sequence_length": 7,
        },
    ),
}


def tiny(name: str, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    transformer_class, config = TINY[name]
    transformer = transformer_class(**(config | overrides)).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():  # zero at the start, such as Mochi's rotary frequencies: nothing would be tested
                parameter.normal_(std=0.3)
    return transformer


def inputs(
    transformer, batch: int = 2, size: tuple[int, int, int] = (5, 8, 12), length: int = 7, seed: int = 0
) -> dict:
    """Arguments of one forward, random: those of the row's example, filled."""
    generator = torch.Generator().manual_seed(0)
    family = family_of(transformer)

    def fill(name, value):
        if isinstance(value, tuple):  # rotary tables: cos and sin of some angles
            angles = torch.rand(value[0].shape, generator=generator)
            return angles.cos(), angles.sin()
        if not isinstance(value, torch.Tensor):
            return value
        shape = (batch, *value.shape[1:])
        if value.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        if name == "timestep":
            return torch.full(shape, 800.0)
        return torch.randn(shape, generator=generator)

    call = family.example(transformer.config, size, length)
    return {name: fill(name, value) for name, value in call.items()}


def attach(transformer, patch_sizes: list[str], parametrisation: str = "snr") -> FlexTransformer:
    flex = FlexTransformer(transformer, patch_sizes, parametrisation)
    flex.alphas_cumprod = torch.linspace(0.999, 0.001, 1000)
    return flex


def coarse_patch_sizes(transformer) -> list[str]:
    t, h, w = patch_size_of(transformer.config)
    return [f"{t}x{2 * h}x{2 * w}", f"{2 * t}x{h}x{w}", f"{2 * t}x{2 * h}x{2 * w}"]


STEPS = 8
UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}


def _embeds(mask: bool, negative: bool = True, pooled: int | None = None) -> dict:
    """Prompt embeddings as pipelines take them, so that no text encoder is needed."""
    generator, call = torch.Generator().manual_seed(1), {}
    for side in ("", "negative_") if negative else ("",):
        call[f"{side}prompt_embeds"] = torch.randn(1, 7, TEXT, generator=generator)
        if mask:
            call[f"{side}prompt_attention_mask"] = torch.tensor([[1] * 5 + [0] * 2], dtype=torch.bool)
        if pooled:
            call[f"{side}pooled_prompt_embeds"] = torch.randn(1, pooled, generator=generator)
    return call


def tiny_pipeline(name: str, scheduler=None):
    """(stock pipeline without text encoder and VAE, arguments of a call): latents come out."""
    without = {"tokenizer": None, "text_encoder": None, "vae": None}
    common = {"num_frames": 17, "height": 64, "width": 96, "num_inference_steps": STEPS, "output_type": "latent"}
    transformer = tiny(name)
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if name == "wan":
        pipe = WanPipeline(**without, transformer=transformer, scheduler=scheduler or UniPCMultistepScheduler(**UNIPC))
        call = _embeds(mask=False) | {"guidance_scale": 3.0}
    elif name == "ltx":
        pipe = LTXPipeline(**without, transformer=transformer, scheduler=scheduler or euler)
        call = _embeds(mask=True) | {"guidance_scale": 3.0, "height": 256, "width": 384}
    elif name.startswith("cogvideox"):
        scheduler = scheduler or CogVideoXDDIMScheduler(
            prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0
        )
        pipe = CogVideoXPipeline(**without, transformer=transformer, scheduler=scheduler)
        call = _embeds(mask=False) | {"guidance_scale": 3.0}
    elif name == "hunyuan-video":
        pipe = HunyuanVideoPipeline(
            **without, text_encoder_2=None, tokenizer_2=None, transformer=transformer, scheduler=scheduler or euler
        )
        call = _embeds(mask=True, negative=False, pooled=8) | {"guidance_scale": 6.0}
    else:
        pipe = MochiPipeline(
            **without,
            transformer=transformer,
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        )
        call = _embeds(mask=True) | {"guidance_scale": 3.0, "num_frames": 19}
    pipe.set_progress_bar_config(disable=True)
    return pipe, common | call
