"""A tiny random transformer of every family in the table, out of its real diffusers class."""

from dataclasses import replace
from functools import cache, partial

import torch
from conftest import every_of, tiny_vae
from diffusers import (
    AllegroPipeline,
    AllegroTransformer3DModel,
    AnyFlowPipeline,
    AnyFlowTransformer3DModel,
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    AutoencoderKLMagvit,
    AutoencoderKLMochi,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    Cosmos2_5_PredictBasePipeline,
    CosmosTransformer3DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    EulerAncestralDiscreteScheduler,
    FlowMapEulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    Kandinsky6TI2VAPipeline,
    Kandinsky6Transformer3DModel,
    LattePipeline,
    LatteTransformer3DModel,
    LTX2ImageToVideoPipeline,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXImageToVideoPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    LucyEditPipeline,
    MiniMaxH3ModularPipeline,
    MiniMaxH3Scheduler,
    MiniMaxH3Transformer3DModel,
    MMAudioVAE,
    MMAudioVocoder,
    MochiPipeline,
    MochiTransformer3DModel,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanAnimatePipeline,
    WanAnimateTransformer3DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed, get_3d_rotary_pos_embed_allegro
from diffusers.models.transformers import transformer_cosmos
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep
from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline  # diffusers' own name asks for OpenCV
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from PIL import Image
from transformers import (
    ByT5Tokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlamaModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

import flexivid
from flexivid.model.families import family_of
from flexivid.model.family import Family, patch_size_of
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora
from flexivid.model.rows import consisid, cosmos, hunyuan, kandinsky6
from flexivid.models import weak_patch_sizes
from flexivid.patches.resize import resize_matrix
from flexivid.shapes.build import build_tokenizer

CHANNELS, TEXT = 4, 16
# As many as there are of video, beside which coarse patches would save nothing.
hunyuan.GLYPH_TOKENS, hunyuan.IMAGE_TOKENS = 1, 4
consisid.FACE_TOKENS = 3
kandinsky6.SOUND_A_SECOND = 8000 / 1024
# In the place of torchvision's, which no test has: to the nearest pixel, too.
transformer_cosmos.transforms = cosmos.RESIZE_OF_TORCH

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
IMAGE = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": CHANNELS,
    "out_channels": 2 * CHANNELS,
    "num_layers": 2,
    "sample_size": 12,
    "patch_size": 2,
}
IMAGE_WITH_TEXT = IMAGE | {"caption_channels": TEXT, "cross_attention_dim": 24}
LTX2 = {
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "num_attention_heads": 2,
    "attention_head_dim": 18,
    "cross_attention_dim": 36,
    "audio_in_channels": 2 * 2,  # latent channels x mel bins of `ltx2_parts`
    "audio_out_channels": 2 * 2,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 6,
    "audio_cross_attention_dim": 12,
    "num_layers": 2,
    "caption_channels": TEXT,
    "perturbed_attn": True,
}
LTX23 = LTX2 | {
    "cross_attn_mod": True,
    "audio_cross_attn_mod": True,
    "gated_attn": True,
    "audio_gated_attn": True,
    "rope_type": "split",
    "use_prompt_embeddings": False,
}
HUNYUAN = {
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
}
KANDINSKY = {
    "in_visual_dim": CHANNELS,
    "out_visual_dim": CHANNELS,
    "in_text_dim": TEXT,
    "in_text_dim2": 8,
    "time_dim": 16,
    "model_dim": 32,
    "ff_dim": 64,
    "num_text_blocks": 1,
    "num_visual_blocks": 2,
    "axes_dims": (4, 6, 6),
    "visual_cond": True,
}
KANDINSKY6 = KANDINSKY | {
    "in_audio_dim": 2,
    "out_audio_dim": 2,
    "model_dim_a": 16,
    "ff_dim_a": 32,
    "ca_rope": True,  # these as of all that are published
    "cross_gates": True,
    "fix_modulation": True,
    "visual_token_type_num_embeddings": 2,
}
# name: (class, config)
TINY = {
    "wan": (WanTransformer3DModel, WAN),
    "wan-vace": (WanVACETransformer3DModel, WAN | {"vace_layers": [0, 1], "vace_in_channels": 2 * CHANNELS + 16}),
    "wan-animate": (
        WanAnimateTransformer3DModel,
        WAN
        | {
            "in_channels": 2 * CHANNELS + 4,
            "latent_channels": CHANNELS,
            "image_dim": 8,
            "added_kv_proj_dim": 48,
            "motion_encoder_channel_sizes": {"4": 2, "8": 2},
            "motion_encoder_size": 8,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
    ),
    "chronoedit": (
        ChronoEditTransformer3DModel,
        WAN | {"in_channels": 2 * CHANNELS + 4, "image_dim": 8, "added_kv_proj_dim": 48},
    ),
    "anyflow": (AnyFlowTransformer3DModel, WAN),
    "skyreels-v2": (SkyReelsV2Transformer3DModel, WAN),
    "helios": (HeliosTransformer3DModel, WAN | {"rope_dim": (8, 8, 8), "is_amplify_history": True}),
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
    "ltx-2": (LTX2VideoTransformer3DModel, LTX2),
    "minimax-h3": (
        MiniMaxH3Transformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "ffn_dim": 32,
            "text_dim": TEXT,
            "freq_dim": 16,
            "time_embed_hidden_dim": 16,
            "time_embed_dim": 8,
            "rope_freq_dim": 2,  # latents and sound have the channels that its pipeline counts on
        },
    ),
    "cogvideox-2b": (CogVideoXTransformer3DModel, COGVIDEOX),
    "cogvideox-5b": (CogVideoXTransformer3DModel, COGVIDEOX | {"use_rotary_positional_embeddings": True}),
    "cogvideox-1.5": (
        CogVideoXTransformer3DModel,
        COGVIDEOX | {"use_rotary_positional_embeddings": True, "patch_size_t": 2, "patch_bias": False},
    ),
    "consisid": (
        ConsisIDTransformer3DModel,
        COGVIDEOX
        | {
            "in_channels": 2 * CHANNELS,  # beside the latents those of an image
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "cross_attn_interval": 1,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 6,
            "LFE_vit_dim": 8,
            "LFE_depth": 2,
            "LFE_dim_head": 4,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 1,
            "LFE_num_querie": 2,
            "LFE_output_dim": 21,  # two thirds of the width, rounded down, as its blocks expect
            "LFE_ff_mult": 1,
            "LFE_num_scale": 2,
        },
    ),
    "cosmos": (
        CosmosTransformer3DModel,
        {
            "in_channels": CHANNELS + 1,  # beside the latents the mask of given frames
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 18,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": TEXT,
            "adaln_lora_dim": 4,
            "max_size": (32, 64, 64),
            "rope_scale": (1.0, 3.0, 3.0),
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
            "crossattn_proj_in_channels": TEXT,
            "encoder_hidden_states_channels": TEXT,
        },
    ),
    "hunyuan-video": (
        HunyuanVideoTransformer3DModel,
        HUNYUAN,
    ),
    "framepack": (
        HunyuanVideoFramepackTransformer3DModel,
        HUNYUAN | {"has_image_proj": True, "image_proj_dim": 8, "has_clean_x_embedder": True},
    ),
    "hunyuan-video-1.5": (
        HunyuanVideo15Transformer3DModel,
        {
            "in_channels": 2 * CHANNELS + 1,  # beside the latents those of an image, and its mask
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "text_embed_dim": TEXT,
            "text_embed_2_dim": 8,
            "image_embed_dim": 8,
            "target_size": 80,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    "motif-video": (
        MotifVideoTransformer3DModel,
        {
            "in_channels": 2 * CHANNELS + 1,  # beside the latents those of an image, and its mask
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": TEXT,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    "kandinsky5": (Kandinsky5Transformer3DModel, KANDINSKY),
    "kandinsky6": (Kandinsky6Transformer3DModel, KANDINSKY6),
    "mochi": (
        MochiTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 12,  # which its pipeline counts on
            "text_embed_dim": TEXT,
            "time_embed_dim": 8,
            "max_sequence_length": 7,
        },
    ),
    "allegro": (
        AllegroTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_layers": 2,
            "cross_attention_dim": 24,
            "caption_channels": TEXT,
        },
    ),
    "easyanimate": (
        EasyAnimateTransformer3DModel,
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "patch_size": 2,
            "num_layers": 2,
            "mmdit_layers": 1,
            "time_embed_dim": 8,
            "text_embed_dim": TEXT,
        },
    ),
    "sana-video": (
        SanaVideoTransformer3DModel,
        {
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 2,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": TEXT,
        },
    ),
    "latte": (
        LatteTransformer3DModel,
        IMAGE_WITH_TEXT | {"video_length": 5, "norm_type": "ada_norm_single", "norm_elementwise_affine": False},
    ),
    "dit": (DiTTransformer2DModel, IMAGE | {"num_embeds_ada_norm": 1000, "norm_num_groups": 2}),
    "pixart": (PixArtTransformer2DModel, IMAGE_WITH_TEXT | {"use_additional_conditions": False, "norm_num_groups": 2}),
}
TIMESTEPS = {"timestep": 800.0, "sigma": 800.0, "r_timestep": 500.0}
# They stand for the others in `make test`: guidance in calls apart, in one call and embedded; tokens that the pipeline
# packs; noise levels of flow matching, VP and backwards; rotary tables of the model's own, passed in and learned.
every = partial(every_of, quick=("wan", "ltx", "cogvideox-5b", "hunyuan-video", "mochi"))


@cache
def family_named(name: str) -> Family:
    """The row of a tiny model: many tests ask for it where they are collected."""
    return family_of(tiny(name))


# What their classes allow: one frame, square ones, frames as many as their table has.
IMAGES = ("dit", "pixart")
SQUARE = ("dit",)
EDITS = ("chronoedit",)  # clips of two latent frames


def tiny(name: str, **overrides) -> torch.nn.Module:
    torch.manual_seed(0)
    transformer_class, config = TINY[name]
    transformer = transformer_class(**(config | overrides)).eval()
    with torch.no_grad():
        for parameter in transformer.parameters():
            if not parameter.any():  # zero at the start, such as Mochi's rotary frequencies: nothing would be tested
                parameter.normal_(std=0.3)
    return transformer


def grid_for(transformer, height: int, width: int) -> tuple[int, int, int]:
    """A size of latents with so many rows and columns of tokens, and five frames of them, if its class allows that."""
    family, (p_t, p_h, p_w) = family_of(transformer), patch_size_of(transformer.config)
    width = height if family.name in SQUARE else width
    frames = 1 if family.name in IMAGES else 2 if family.name in EDITS else 5
    return frames * p_t, height * p_h, width * p_w


def allegro_rope(config, frames: int, space: list[int]) -> tuple:
    """As its pipeline makes it: tables of each axis, and the row of each that a token stands at."""
    scale = (config.interpolation_scale_t, config.interpolation_scale_h, config.interpolation_scale_w)
    *tables, t, h, w = get_3d_rotary_pos_embed_allegro(
        config.attention_head_dim, ((0, 0), space), space, frames, interpolation_scale=scale
    )
    rows = torch.cartesian_prod(t.long(), h.long(), w.long())
    return tuple(tables), tuple(rows.T[:, None])


def inputs(transformer, size: tuple[int, int, int], batch: int = 2, length: int = 7) -> dict:
    """Arguments of one forward, random: those of the row's example, filled."""
    generator = torch.Generator().manual_seed(0)
    family = family_of(transformer)

    def fill(name, value):
        if isinstance(value, tuple):  # rotary tables, as CogVideoX's pipeline makes them
            frames, *space = (n // p for n, p in zip(size, patch_size_of(transformer.config), strict=True))
            if family.name == "allegro":
                return allegro_rope(transformer.config, frames, space)
            return get_3d_rotary_pos_embed(value[0].shape[1], ((0, 0), space), space, frames)
        if name == "id_vit_hidden":
            return [fill(f"{name}.{index}", features) for index, features in enumerate(value)]
        if name == "padding_mask":
            return torch.ones(value.shape)
        if not isinstance(value, torch.Tensor) or name in family.for_all_clips:
            return value
        if name == "class_labels":
            return torch.arange(batch)
        shape = (batch * value.shape[0], *value.shape[1:])
        if value.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        if name in TIMESTEPS:
            return torch.full(shape, TIMESTEPS[name] * family.time_scale / 1000)
        if name == "condition_mask":  # no frame is given
            return torch.zeros(shape)
        if name == "video_coords":
            return transformer.rope.prepare_video_coords(batch, *size, device="cpu", fps=24.0)
        return torch.randn(shape, generator=generator)

    call = family.example(transformer.config, size, length)
    return {name: fill(name, value) for name, value in call.items()}


def attach(transformer, patch_sizes: list[str], parametrisation: str = "snr") -> FlexTransformer:
    flex = FlexTransformer(transformer, patch_sizes, parametrisation)
    flex.diffusion = replace(flex.diffusion, alphas_cumprod=torch.linspace(0.999, 0.001, 1000))
    return flex


def add_lora_if_possible(flex: FlexTransformer) -> int:
    """The rank: 0 where diffusers' class takes no adapters."""
    if flex.family.lora_targets is None:
        return 0
    add_lora(flex, rank=4)
    return 4


def coarse_patch_sizes(transformer) -> list[str]:
    return weak_patch_sizes(patch_size_of(transformer.config), family_of(transformer).temporal)


def randomise_adapter(flex: FlexTransformer, scale: float = 0.05) -> None:
    """An adapter that does something, so that being idle can be told from being absent."""
    torch.manual_seed(5)
    with torch.no_grad():
        for p in flex.weak_modes.parameters():
            p.add_(scale * torch.randn_like(p))
        for name, p in flex.transformer.named_parameters():
            if "lora_B.flexivid" in name:
                p.copy_(scale * torch.randn_like(p))


def clip_distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """How far two clips are apart, as a share of the second one's norm."""
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def assert_same_clip(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same clip up to rounding, which moves single values of a run by another share on every processor."""
    distance = clip_distance(found, expected)
    assert distance <= 5e-4, f"{distance:.1e} of the clip"


def upsampled(latents: torch.Tensor, base_patch, coarse_patch) -> torch.Tensor:
    """R on every base patch: (B, C, T, H, W) -> (B, C, T m_t, H m_h, W m_w)."""
    (p_t, p_h, p_w), matrix = base_patch, resize_matrix(base_patch, coarse_patch).float()
    patches = latents.unfold(2, p_t, p_t).unfold(3, p_h, p_h).unfold(4, p_w, p_w).flatten(5)
    large = (patches @ matrix.T).unflatten(-1, coarse_patch)
    return large.permute(0, 1, 2, 5, 3, 6, 4, 7).flatten(6).flatten(4, 5).flatten(2, 3)


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
    if name in ("wan", "skyreels-v2"):
        pipeline = WanPipeline if name == "wan" else SkyReelsV2Pipeline
        pipe = pipeline(**without, transformer=transformer, scheduler=scheduler or UniPCMultistepScheduler(**UNIPC))
        call = _embeds(mask=False) | {"guidance_scale": 3.0}
    elif name == "consisid":
        pipe, call = _consisid_pipeline(scheduler)
    elif name in ("wan-vace", "wan-animate", "chronoedit"):
        pipe, call = _conditioned_wan_pipeline(name, scheduler or UniPCMultistepScheduler(**UNIPC))
        common |= {"height": 32, "width": 48}
        if name == "wan-animate":
            call["segment_frame_length"] = common.pop("num_frames")
        elif name == "chronoedit":
            common |= {"num_frames": 5, "height": 64, "width": 96}
    elif name == "anyflow":
        scheduler = scheduler or FlowMapEulerDiscreteScheduler(shift=3.0)
        pipe = AnyFlowPipeline(**without, transformer=transformer, scheduler=scheduler)
        call = _embeds(mask=False) | {"guidance_scale": 3.0}
    elif name == "helios":
        scheduler = scheduler or HeliosScheduler(stages=1, stage_range=[0, 1], use_dynamic_shifting=True)
        without["vae"] = tiny_vae()  # it decodes every chunk
        pipe = HeliosPipeline(**without, transformer=transformer, scheduler=scheduler)
        call = _embeds(mask=False) | {"guidance_scale": 3.0, "height": 32, "width": 48}
    elif name == "cosmos":
        pipe = Cosmos2_5_PredictBasePipeline(
            **cosmos_parts(), transformer=transformer, scheduler=cosmos_scheduler(scheduler)
        )
        call = _embeds(mask=False) | {"guidance_scale": 3.0}
        common |= {"height": 32, "width": 48}
    elif name == "allegro":
        pipe = AllegroPipeline(
            **without, transformer=transformer, scheduler=scheduler or EulerAncestralDiscreteScheduler()
        )
        call = _embeds(mask=True) | {"guidance_scale": 3.0, "negative_prompt": None}
    elif name == "easyanimate":
        torch.manual_seed(3)
        sizes = {"block_out_channels": (8,) * 4, "latent_channels": CHANNELS, "layers_per_block": 1}
        without["vae"] = AutoencoderKLMagvit(**sizes, norm_num_groups=2).eval()  # it is asked for its channels
        pipe = EasyAnimatePipeline(**without, transformer=transformer, scheduler=scheduler or euler)
        call = _embeds(mask=True) | {"guidance_scale": 3.0}
    elif name == "sana-video":
        flow = DPMSolverMultistepScheduler(**UNIPC)
        pipe = SanaVideoPipeline(**without, transformer=transformer, scheduler=scheduler or flow)
        call = _embeds(mask=True) | {"frames": common.pop("num_frames"), "use_resolution_binning": False}
        call["negative_prompt"] = None
    elif name in ("latte", "dit", "pixart"):
        del common["num_frames"]
        common["width"] = common["height"] = 96
        if name == "latte":
            pipe = LattePipeline(**without, transformer=transformer, scheduler=scheduler or DDIMScheduler())
            call = _embeds(mask=False) | {"video_length": 5, "negative_prompt": None}
        elif name == "pixart":
            pipe = PixArtSigmaPipeline(
                **without, transformer=transformer, scheduler=scheduler or DPMSolverMultistepScheduler()
            )
            call = _embeds(mask=True) | {"use_resolution_binning": False, "negative_prompt": None}
        else:
            torch.manual_seed(3)
            vae = AutoencoderKL(block_out_channels=(8,), latent_channels=CHANNELS, norm_num_groups=2).eval()
            pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler or DDIMScheduler())
            common = {"num_inference_steps": STEPS, "output_type": "pt"}
            call = {"class_labels": [3]}
    elif name == "ltx":
        pipe = LTXPipeline(**without, transformer=transformer, scheduler=scheduler or euler)
        call = _embeds(mask=True) | {"guidance_scale": 3.0, "height": 256, "width": 384}
    elif name == "ltx-2":
        parts = without | ltx2_parts() | {"vocoder": None}
        pipe = LTX2Pipeline(**parts, transformer=transformer, scheduler=scheduler or euler)
        call = _embeds(mask=True) | LTX2_GUIDANCE
    elif name == "minimax-h3":
        pipe = minimax_h3_pipeline(MiniMaxH3CoreDenoiseStep(), transformer=transformer)
        call = minimax_h3_text() | {"num_frames": 22, "height": 256, "width": 384}
        common = {"num_inference_steps": STEPS + 1}  # the last of which is the end
    elif name.startswith("cogvideox"):
        scheduler = scheduler or cogvideox_scheduler()
        pipe = CogVideoXPipeline(**without, transformer=transformer, scheduler=scheduler)
        call = _embeds(mask=False) | {"guidance_scale": 3.0}
    elif name == "hunyuan-video":
        pipe = HunyuanVideoPipeline(
            **without, text_encoder_2=None, tokenizer_2=None, transformer=transformer, scheduler=scheduler or euler
        )
        call = _embeds(mask=True, negative=False, pooled=8) | {"guidance_scale": 6.0}
    elif name == "framepack":
        parts = without | {"vae": _hunyuan_vae(), "text_encoder_2": None, "tokenizer_2": None} | _siglip()
        pipe = HunyuanVideoFramepackPipeline(**parts, transformer=transformer, scheduler=scheduler or euler)
        call = _embeds(mask=True, negative=False, pooled=8) | {"guidance_scale": 6.0, "output_type": "pt"}
        call |= {"image": pictures(1, (96, 64))}
    elif name == "kandinsky5":
        pipe = Kandinsky5T2VPipeline(
            **without, text_encoder_2=None, tokenizer_2=None, transformer=transformer, scheduler=scheduler or euler
        )
        call = kandinsky_embeds() | {"guidance_scale": 3.0}
    elif name == "kandinsky6":
        pipe = kandinsky6_pipeline(without, transformer, scheduler or euler)
        call = _embeds(mask=False, pooled=8) | {"guidance_scale": 3.0}
    elif name == "hunyuan-video-1.5":
        pipe, call = _hunyuan_15_pipeline(HunyuanVideo15Pipeline, transformer, scheduler or euler)
        call |= {"height": 96, "width": 144}
    elif name == "motif-video":
        guider = ClassifierFreeGuidance(guidance_scale=3.0)
        without["vae"] = tiny_vae()
        pipe = MotifVideoPipeline(**without, transformer=transformer, scheduler=scheduler or euler, guider=guider)
        call = _embeds(mask=True)
    else:
        pipe = MochiPipeline(
            **without,
            transformer=transformer,
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        )
        call = _embeds(mask=True) | {"guidance_scale": 3.0, "num_frames": 19}
    pipe.set_progress_bar_config(disable=True)
    return pipe, common | call


class NoGuardrail(torch.nn.Module):
    """Cosmos asks for its guardrail, a package of its own; given prompt embeddings and latents it has nothing to do."""

    device, dtype = torch.device("cpu"), torch.float32


def cosmos_parts() -> dict:
    return {"tokenizer": None, "text_encoder": None, "vae": tiny_vae(), "safety_checker": NoGuardrail()}


def cosmos_scheduler(scheduler=None):
    """As its published models have it."""
    karras = {"use_karras_sigmas": True, "sigma_min": 0.01, "sigma_max": 200.0}
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    return scheduler or UniPCMultistepScheduler(**karras, **flow)


class ShortClips(MiniMaxH3ModularPipeline):
    """MiniMax-H3 makes clips of five seconds and more, whose sound is hundreds of tokens."""

    min_duration = 0.0


def minimax_h3_pipeline(blocks, **transformer) -> MiniMaxH3ModularPipeline:
    """From prompt embeddings to latents: it is a modular pipeline only."""
    pipe = ShortClips(blocks=blocks)
    schedulers = {"scheduler": MiniMaxH3Scheduler(shift=12.0), "audio_scheduler": MiniMaxH3Scheduler(shift=3.0)}
    pipe.update_components(**transformer, **schedulers)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def minimax_h3_text() -> dict:
    embeds = _embeds(mask=False, negative=False)
    return embeds | {"text_token_tags": torch.ones(embeds["prompt_embeds"].shape[1], dtype=torch.long)}


# Its default call: classifier-free guidance in one forward, a perturbed block in another, no sound in a third.
LTX2_GUIDANCE = {"guidance_scale": 3.0, "spatio_temporal_guidance_blocks": [1]}


def ltx2_parts(text_layers: int = 1, registers: int = 7) -> dict:
    """What its pipelines have around the transformer: VAEs of video (8 x in time and space), of sound, connectors.

    text_layers: hidden states of the text encoder, which embeddings of a prompt hold side by side. registers: of the
    connectors, into as many of which any text has to divide.
    """
    torch.manual_seed(3)
    video = AutoencoderKLLTX2Video(
        latent_channels=CHANNELS,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 3,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4,
        spatio_temporal_scaling=(True, True, True, False),
        downsample_type=("spatiotemporal",) * 4,
        upsample_residual=(False,) * 3,
        upsample_factor=(1,) * 3,
        patch_size=1,
    )
    sound = AutoencoderKLLTX2Audio(base_channels=4, num_res_blocks=1, latent_channels=2, mel_bins=8, resolution=8)
    heads = {
        f"{stream}_connector_{key}": value
        for stream in ("video", "audio")
        for key, value in {
            "num_attention_heads": 2,
            "attention_head_dim": TEXT // 2,
            "num_layers": 1,
            "num_learnable_registers": registers,
        }.items()
    }
    connectors = LTX2TextConnectors(caption_channels=TEXT, text_proj_in_factor=text_layers, **heads)
    return {"vae": video.eval(), "audio_vae": sound.eval(), "connectors": connectors.eval()}


SOUND_RATE = 8000


def ltx2_with_text_and_sound() -> LTX2Pipeline:
    """Whole, so that it can be saved: Gemma 3, and a vocoder of as many samples a frame as SOUND_RATE asks for."""
    pipe, tokenizer = tiny_pipeline("ltx-2")[0], build_tokenizer()
    layers = {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"hidden_size": TEXT, "head_dim": 8, "num_key_value_heads": 1, "vocab_size": len(tokenizer), **layers}
    vision = {"hidden_size": 8, "image_size": 28, "patch_size": 14, **layers}
    torch.manual_seed(4)
    parts = ltx2_parts(text_layers=2, registers=4) | {
        "tokenizer": tokenizer,
        "text_encoder": Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
        ).eval(),
        "vocoder": LTX2Vocoder(
            in_channels=2 * 8,  # channels x mel bins of what `audio_vae` gives
            hidden_channels=32,
            upsample_kernel_sizes=[16, 10],
            upsample_factors=[8, 10],  # a mel frame is 160 of 16000 samples
            resnet_kernel_sizes=[3],
            resnet_dilations=[[1, 3]],
            output_sampling_rate=SOUND_RATE,
        ).eval(),
    }
    return LTX2Pipeline(**pipe.components | parts)


def kandinsky_embeds() -> dict:
    generator, call = torch.Generator().manual_seed(1), {}
    for side in ("", "negative_"):
        call[f"{side}prompt_embeds_qwen"] = torch.randn(1, 7, TEXT, generator=generator)
        call[f"{side}prompt_embeds_clip"] = torch.randn(1, 8, generator=generator)
        call[f"{side}prompt_cu_seqlens"] = torch.tensor([0, 7])
    return call


def kandinsky6_pipeline(parts: dict, transformer, scheduler) -> Kandinsky6TI2VAPipeline:
    """parts: of VAE and text. Its own are those of sound, of as many latents as `kandinsky6.SOUND_A_SECOND` says."""
    torch.manual_seed(3)
    parts = parts | {"text_encoder_2": None, "tokenizer_2": None}
    bins, steps = 8, (8, 8, 8)  # 512 samples a mel frame, of which two are a latent
    sound = MMAudioVAE(bins, latent_channels=2, hidden_channels=4, layers_per_block=1, sample_rate=8000)
    vocoder = MMAudioVocoder(bins, 16, steps, (16, 16, 16), (3,), ((1,),))
    parts |= {"audio_vae": sound.eval(), "vocoder": vocoder.eval()}
    return Kandinsky6TI2VAPipeline(**parts, transformer=transformer, scheduler=scheduler)


@torch.no_grad()
def sample_with_sound(pipe, call: dict) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Video and sound."""
    return pipe(**call, generator=torch.Generator().manual_seed(0), return_dict=False)


def equal(one, other) -> list[bool]:
    """Of each part, bit for bit."""
    return [torch.equal(*pair) for pair in zip(one, other, strict=True)]


def check_sound_is_stock(pipe, call: dict, budget: float) -> None:
    """Video and sound are stock at budget 1 and after `disable`; below they are others, the same in two calls."""
    stock = sample_with_sound(pipe, call)
    flexivid.enable(pipe, budget=1.0)
    assert all(equal(sample_with_sound(pipe, call), stock))
    flexivid.enable(pipe, budget=budget, order="interleaved")
    weak = sample_with_sound(pipe, call)
    assert not any(equal(weak, stock)) and all(part.isfinite().all() for part in weak)
    assert all(equal(sample_with_sound(pipe, call), weak))
    flexivid.disable(pipe)
    assert all(equal(sample_with_sound(pipe, call), stock))


# Whose pipelines encode videos or images, in which FLOPs are spent too.
CONDITIONED = ("wan-vace", "wan-animate", "chronoedit", "consisid", "framepack")
# Whose pipelines decode, whatever is asked for.
DECODING = ("dit", "helios")


def pictures(count: int, size: tuple[int, int], seed: int = 2) -> list[Image.Image]:
    pixels = torch.randint(256, (count, size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    return [Image.fromarray(picture) for picture in pixels.to(torch.uint8).numpy()]


def _conditioned_wan_pipeline(name: str, scheduler):
    pipeline = {"wan-vace": WanVACEPipeline, "wan-animate": WanAnimatePipeline, "chronoedit": ChronoEditPipeline}[name]
    encoder = {} if name == "wan-vace" else _clip_encoder()
    parts = {"tokenizer": None, "text_encoder": None, "vae": tiny_vae(), "scheduler": scheduler, **encoder}
    call, size = _embeds(mask=False) | {"guidance_scale": 3.0}, (48, 32)
    if name == "wan-vace":
        mask = [Image.new("L", size, 255 * (frame > 0)) for frame in range(17)]  # the first frame is kept
        call |= {"video": pictures(17, size), "mask": mask}
    else:
        call["image"] = pictures(1, size)[0]
    if name == "wan-animate":
        call |= {"pose_video": pictures(17, size), "face_video": pictures(17, (8, 8), seed=3)}
    return pipeline(transformer=tiny(name), **parts), call


def _clip_encoder() -> dict:
    """257 tokens, as of the published one."""
    layers = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**layers, image_size=64, patch_size=4)
    processor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    return {"image_encoder": CLIPVisionModel(vision).eval(), "image_processor": processor}


def cogvideox_scheduler() -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=3.0)


def cogvideox_vae() -> AutoencoderKLCogVideoX:
    torch.manual_seed(3)
    return AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def _consisid_pipeline(scheduler):
    """With learned positions, as published, which have one size."""
    transformer = tiny("consisid", use_learned_positional_embeddings=True)
    parts = {"tokenizer": None, "text_encoder": None, "vae": cogvideox_vae()}
    pipe = ConsisIDPipeline(**parts, transformer=transformer, scheduler=scheduler or cogvideox_scheduler())
    generator, config = torch.Generator().manual_seed(4), transformer.config
    face = (1, consisid.FACE_TOKENS, config.LFE_vit_dim)
    call = {
        "image": pictures(1, (96, 64))[0],
        "id_cond": torch.randn(1, config.LFE_id_dim, generator=generator),
        "id_vit_hidden": [torch.randn(face, generator=generator) for _ in range(config.LFE_num_scale)],
    }
    return pipe, _embeds(mask=False) | call | {"guidance_scale": 3.0}


def _siglip() -> dict:
    """Four tokens, as `hunyuan.IMAGE_TOKENS`."""
    layers = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = SiglipVisionModel(SiglipVisionConfig(**layers, image_size=8, patch_size=4)).eval()
    return {"image_encoder": encoder, "feature_extractor": SiglipImageProcessor(size={"height": 8, "width": 8})}


def _hunyuan_15_pipeline(pipeline, transformer, scheduler, **parts):
    torch.manual_seed(3)
    vae = AutoencoderKLHunyuanVideo15(latent_channels=CHANNELS, block_out_channels=(8,) * 5, layers_per_block=1).eval()
    without = dict.fromkeys(("tokenizer", "text_encoder", "tokenizer_2", "text_encoder_2"))
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    pipe = pipeline(**without, **parts, vae=vae, transformer=transformer, scheduler=scheduler, guider=guider)
    pipe.vision_num_semantic_tokens = hunyuan.IMAGE_TOKENS
    generator, call = torch.Generator().manual_seed(1), {}
    for side in ("", "negative_"):
        for end, tokens, width in (("", 7, TEXT), ("_2", hunyuan.GLYPH_TOKENS, 8)):
            call[f"{side}prompt_embeds{end}"] = torch.randn(1, tokens, width, generator=generator)
            call[f"{side}prompt_embeds_mask{end}"] = torch.arange(tokens)[None] < 5
    return pipe, call


def with_text(pipe):
    """The pipeline with a tiny tokenizer and text encoder."""
    tokenizer = build_tokenizer()
    sizes = {"d_model": TEXT, "d_kv": 8, "num_heads": 2, "d_ff": 16, "num_layers": 1}
    pipe.register_modules(
        tokenizer=tokenizer, text_encoder=T5EncoderModel(T5Config(vocab_size=len(tokenizer), **sizes)).eval()
    )
    return pipe


IMAGE_PIPELINES = (
    "wan2.1-i2v",
    "wan2.2-ti2v",
    "anyflow-i2v",
    "cosmos-v2w",
    "ltx-i2v",
    "ltx2-i2v",
    "cogvideox-i2v",
    "lucy-edit",
    "hunyuan-video-1.5-i2v",
    "kandinsky6-i2v",
)


def tiny_image_pipeline(name: str, text_length: int = 7):
    """(stock image-to-video pipeline with a tiny VAE, arguments of a call): latents come out.

    text_length: of a CogVideoX with learned positions, which has one.
    """
    without = {"tokenizer": None, "text_encoder": None}
    call = {"num_frames": 9, "height": 64, "width": 96, "num_inference_steps": STEPS, "output_type": "latent"}
    call |= {"image": Image.new("RGB", (96, 64), (200, 40, 40)), "guidance_scale": 3.0}
    torch.manual_seed(3)
    if name == "lucy-edit":
        pipe = LucyEditPipeline(
            **without,
            vae=tiny_vae(),
            transformer=tiny("wan", in_channels=2 * CHANNELS),
            scheduler=UniPCMultistepScheduler(**UNIPC),
            expand_timesteps=True,
        )
        del call["image"]
        call |= _embeds(mask=False) | {"video": pictures(9, (96, 64))}
    elif name == "cosmos-v2w":
        pipe = Cosmos2_5_PredictBasePipeline(**cosmos_parts(), transformer=tiny("cosmos"), scheduler=cosmos_scheduler())
        del call["image"]
        call |= _embeds(mask=False) | {"height": 32, "width": 48, "video": pictures(5, (48, 32))}
    elif name == "anyflow-i2v":
        pipe = AnyFlowPipeline(
            **without, vae=tiny_vae(), transformer=tiny("anyflow"), scheduler=FlowMapEulerDiscreteScheduler(shift=3.0)
        )
        call |= _embeds(mask=False) | {"video": [call.pop("image")]}
    elif name.startswith("wan"):
        per_token = name == "wan2.2-ti2v"
        pipe = WanImageToVideoPipeline(
            **without,
            vae=tiny_vae(),
            transformer=tiny("wan" if per_token else "wan-i2v"),
            scheduler=UniPCMultistepScheduler(**UNIPC),
            expand_timesteps=per_token,
        )
        call |= _embeds(mask=False)
        if not per_token:
            pipe.register_modules(**_clip_encoder())
    elif name.startswith("hunyuan"):
        pipe, embeds = _hunyuan_15_pipeline(
            HunyuanVideo15ImageToVideoPipeline,
            tiny("hunyuan-video-1.5"),
            FlowMatchEulerDiscreteScheduler(shift=3.0),
            **_siglip(),
        )
        call = {key: call[key] for key in call if key not in ("height", "width", "guidance_scale")} | embeds
    elif name == "kandinsky6-i2v":
        euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        pipe = kandinsky6_pipeline(without | {"vae": _hunyuan_vae()}, tiny("kandinsky6"), euler)
        call |= _embeds(mask=False, pooled=8)
    elif name == "ltx-i2v":
        blocks = (8, 8, 8, 8)
        vae = AutoencoderKLLTXVideo(
            latent_channels=CHANNELS,
            block_out_channels=blocks,
            decoder_block_out_channels=blocks,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            decoder_inject_noise=(False,) * 5,
            upsample_residual=(False,) * 4,
            upsample_factor=(1,) * 4,
            patch_size=1,
        ).eval()
        pipe = LTXImageToVideoPipeline(
            **without, vae=vae, transformer=tiny("ltx"), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0)
        )
        call |= _embeds(mask=True)
    elif name == "ltx2-i2v":
        pipe = LTX2ImageToVideoPipeline(
            **without | ltx2_parts(),
            vocoder=None,
            transformer=tiny("ltx-2"),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )
        call |= _embeds(mask=True) | LTX2_GUIDANCE
    else:
        transformer = tiny(
            "cogvideox-5b",
            in_channels=2 * CHANNELS,
            use_learned_positional_embeddings=True,
            sample_frames=9,
            max_text_seq_length=text_length,
        )
        pipe = CogVideoXImageToVideoPipeline(
            **without,
            vae=cogvideox_vae(),
            transformer=transformer,
            scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True),
        )
        call |= _embeds(mask=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


TRAINABLE = ("wan2.2-ti2v", "skyreels-v2", "ltx", "ltx-2", "cogvideox-5b", "hunyuan-video", "mochi")


def tiny_trainable_pipeline(name: str):
    """A stock text-to-video pipeline with tiny text encoder and VAE, which can be saved and trained on clips."""
    if name == "mochi":
        torch.manual_seed(3)
        vae = AutoencoderKLMochi(
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1,) * 5,
        ).eval()
        pipe = tiny_pipeline(name)[0]
    elif name == "hunyuan-video":
        return _trainable_hunyuan_video()
    elif name == "ltx-2":
        return ltx2_with_text_and_sound()
    elif name == "skyreels-v2":
        vae, pipe = tiny_vae(), tiny_pipeline(name)[0]
    elif name == "cogvideox-5b":
        vae, pipe = tiny_image_pipeline("cogvideox-i2v")[0].vae, tiny_pipeline(name)[0]
    elif name == "ltx":
        vae, pipe = tiny_image_pipeline("ltx-i2v")[0].vae, tiny_pipeline(name)[0]
    else:
        pipe = WanPipeline.from_pipe(tiny_image_pipeline(name)[0])
        vae = pipe.vae
    return with_text(type(pipe)(**{**pipe.components, "vae": vae}, **_settings(pipe)))


def trainable_hunyuan_15() -> HunyuanVideo15Pipeline:
    """Its prompt follows 108 tokens of instructions, and is padded to 1000."""
    torch.manual_seed(3)
    tokenizer = build_tokenizer()
    tokenizer.chat_template = "{{ '<unk> ' * 108 }}{{ messages[1].content }}"
    layers = {"intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    glyphs = T5Config(vocab_size=384, d_model=8, d_kv=4, num_heads=2, d_ff=8, num_layers=1)
    pipe = tiny_pipeline("hunyuan-video-1.5")[0]
    pipe.register_modules(
        tokenizer=tokenizer,
        text_encoder=LlamaModel(LlamaConfig(hidden_size=TEXT, **layers)).eval(),
        tokenizer_2=ByT5Tokenizer(),
        text_encoder_2=T5EncoderModel(glyphs).eval(),
    )
    return pipe


def _settings(pipe) -> dict:
    return {"expand_timesteps": True} if isinstance(pipe, WanPipeline) else {}


def _hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """Of two channels: Framepack's pipeline decodes every section, which took ten times what its transformer takes."""
    torch.manual_seed(3)
    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(2, 2, 2, 2),
        layers_per_block=1,
        norm_num_groups=2,
    ).eval()


def _trainable_hunyuan_video() -> HunyuanVideoPipeline:
    tokenizer = build_tokenizer()
    layers = {"intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    clip = CLIPTextConfig(hidden_size=8, max_position_embeddings=77, eos_token_id=1, **layers)
    pipe = tiny_pipeline("hunyuan-video")[0]
    pipe.register_modules(
        vae=_hunyuan_vae(),
        tokenizer=tokenizer,
        text_encoder=LlamaModel(LlamaConfig(hidden_size=TEXT, **layers)).eval(),
        tokenizer_2=tokenizer,
        text_encoder_2=CLIPTextModel(clip).eval(),
    )
    return HunyuanVideoPipeline(**pipe.components)
