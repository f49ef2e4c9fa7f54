"""Models that people have, whose costs docs/models.md counts: what differs from the defaults of their classes."""

from dataclasses import dataclass, field

from flexivid.patches.folding import Size3
from flexivid.published import ARCHITECTURES


@dataclass(frozen=True)
class Published:
    """A model that people have: its transformer's configuration, its usual size in pixels and in latents (T, H, W)."""

    name: str
    transformer_class: str
    pixels: Size3
    latents: Size3
    text_length: int
    config: dict = field(default_factory=dict)
    frames_a_latent: float | None = None  # where that is no whole number


def _transformer(hub_id: str) -> dict:
    return ARCHITECTURES[hub_id].parts["transformer"][1]


PUBLISHED = (
    Published(
        "Wan2.1-T2V-1.3B",
        "WanTransformer3DModel",
        (81, 480, 832),
        (21, 60, 104),
        512,
        _transformer("Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
    ),
    Published("Wan2.1-T2V-14B, Wan2.2-A14B", "WanTransformer3DModel", (81, 480, 832), (21, 60, 104), 512),
    Published("Wan2.1-T2V-14B, Wan2.2-A14B", "WanTransformer3DModel", (81, 720, 1280), (21, 90, 160), 512),
    Published(
        "Wan2.1-I2V-14B",
        "WanTransformer3DModel",
        (81, 480, 832),
        (21, 60, 104),
        512,
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    Published(
        "Wan2.2-TI2V-5B",
        "WanTransformer3DModel",
        (121, 704, 1280),
        (31, 44, 80),
        512,
        _transformer("Wan-AI/Wan2.2-TI2V-5B-Diffusers"),
    ),
    Published(
        "Wan2.1-VACE-1.3B",
        "WanVACETransformer3DModel",
        (81, 480, 832),
        (21, 60, 104),
        512,
        _transformer("Wan-AI/Wan2.1-VACE-1.3B-diffusers"),
    ),
    Published("Wan2.1-VACE-14B", "WanVACETransformer3DModel", (81, 480, 832), (21, 60, 104), 512),
    Published(
        "Wan2.2-Animate-14B",
        "WanAnimateTransformer3DModel",
        (77, 720, 1280),
        (21, 90, 160),
        512,
        {"added_kv_proj_dim": 5120},
    ),
    Published(
        "ChronoEdit-14B",
        "ChronoEditTransformer3DModel",
        (5, 720, 1280),
        (2, 90, 160),
        512,
        {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
    ),
    Published(  # as diffusers' scripts/convert_anyflow_to_diffusers.py makes it: of Wan2.1's sizes
        "AnyFlow-Wan2.1-T2V-1.3B",
        "AnyFlowTransformer3DModel",
        (81, 480, 832),
        (21, 60, 104),
        512,
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    ),
    Published(
        "SkyReels-V2-14B",
        "SkyReelsV2Transformer3DModel",
        (97, 544, 960),
        (25, 68, 120),
        512,
        {"num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
    ),
    Published("Helios 14B, a chunk", "HeliosTransformer3DModel", (33, 384, 640), (9, 48, 80), 512),
    Published("LTX-Video 2B", "LTXVideoTransformer3DModel", (161, 512, 704), (21, 16, 22), 128),
    Published("LTX-2 19B", "LTX2VideoTransformer3DModel", (121, 512, 768), (16, 16, 24), 1024),
    Published(
        "MiniMax-H3",
        "MiniMaxH3Transformer3DModel",
        (124, 768, 1344),
        (37, 48, 84),
        256,
        frames_a_latent=17 / 5,
    ),
    Published("CogVideoX-2B", "CogVideoXTransformer3DModel", (49, 480, 720), (13, 60, 90), 226),
    Published(
        "CogVideoX-5B",
        "CogVideoXTransformer3DModel",
        (49, 480, 720),
        (13, 60, 90),
        226,
        _transformer("zai-org/CogVideoX-5b"),
    ),
    Published(
        "CogVideoX1.5-5B",
        "CogVideoXTransformer3DModel",
        (81, 768, 1360),
        (22, 96, 170),
        226,
        {
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
            "patch_size_t": 2,
            "patch_bias": False,
        },
    ),
    Published(  # the sizes of CogVideoX-5B, from which it is made, and the face's by default
        "ConsisID",
        "ConsisIDTransformer3DModel",
        (49, 480, 720),
        (13, 60, 90),
        226,
        _transformer("zai-org/CogVideoX-5b") | {"in_channels": 32, "is_train_face": True},
    ),
    Published("HunyuanVideo", "HunyuanVideoTransformer3DModel", (129, 720, 1280), (33, 90, 160), 256),
    Published(
        "HunyuanVideo Framepack, a section",
        "HunyuanVideoFramepackTransformer3DModel",
        (33, 720, 1280),
        (9, 90, 160),
        256,
        {"has_image_proj": True, "has_clean_x_embedder": True},
    ),
    Published("HunyuanVideo-1.5", "HunyuanVideo15Transformer3DModel", (121, 720, 1280), (31, 45, 80), 1000),
    Published(
        "Kandinsky 5.0 Lite",
        "Kandinsky5Transformer3DModel",
        (121, 512, 768),
        (31, 64, 96),
        512,
        {
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "model_dim": 1792,
            "ff_dim": 7168,
            "visual_cond": True,
        },
    ),
    Published(
        "Kandinsky 6.0 Pro",
        "Kandinsky6Transformer3DModel",
        (121, 512, 768),
        (31, 64, 96),
        1024,
        {
            "in_audio_dim": 40,
            "out_audio_dim": 40,
            "model_dim_a": 2048,
            "ff_dim_a": 7168,
            "ca_rope": True,
            "cross_gates": True,
            "fix_modulation": True,
            "visual_token_type_num_embeddings": 2,
        },
    ),
    Published("Mochi 1", "MochiTransformer3DModel", (163, 480, 848), (28, 60, 106), 256),
    Published("Allegro", "AllegroTransformer3DModel", (88, 720, 1280), (22, 90, 160), 512),
    Published(  # its class's defaults, which come to its 12 B parameters
        "EasyAnimate 5.1 12B",
        "EasyAnimateTransformer3DModel",
        (49, 512, 512),
        (13, 64, 64),
        256,
        {"in_channels": 16, "out_channels": 16, "patch_size": 2},
    ),
    Published("Sana-Video 2B", "SanaVideoTransformer3DModel", (81, 480, 832), (21, 60, 104), 300),
    Published(
        "Latte-1",
        "LatteTransformer3DModel",
        (16, 512, 512),
        (16, 64, 64),
        120,
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "cross_attention_dim": 1152,
            "sample_size": 64,
            "patch_size": 2,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 4096,
            "video_length": 16,
        },
    ),
    Published("DiT-XL/2", "DiTTransformer2DModel", (1, 256, 256), (1, 32, 32), 0, {"out_channels": 8}),
    Published(
        "PixArt-Σ XL",
        "PixArtTransformer2DModel",
        (1, 1024, 1024),
        (1, 128, 128),
        300,
        {"sample_size": 128, "caption_channels": 4096, "use_additional_conditions": False},
    ),
)
