"""HunyuanVideo (arXiv 2412.03603), HunyuanVideo-1.5 (arXiv 2511.18870) and Motif-Video."""

from dataclasses import replace

import torch
from torch.overrides import TorchFunctionMode

from flexivid.model.family import Family
from flexivid.model.rows.common import ONE_TIMESTEP, example_tensors, of_latents


def _hunyuan_example(config, size, length):
    call = example_tensors(config, size, length, "text_embed_dim", mask=True)
    call["pooled_projections"] = torch.empty(1, config["pooled_projection_dim"], device="meta")
    if config["guidance_embeds"]:
        call["guidance"] = torch.empty(1, device="meta")
    return call


HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    transformer_class="HunyuanVideoTransformer3DModel",
    embedder="x_embedder.proj",
    head="proj_out",
    channels_last=False,
    positions="rope",
    centred=of_latents(token_axis=0),
    positions_of_sizes=True,
    prediction="flow",
    guidance="embedded",
    lora_targets=(
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))|"
        r"single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)"
    ),
    example=_hunyuan_example,
    fps=24,
    unsupported=(("image_condition_type", "token_replace"),),
    loose=ONE_TIMESTEP,
)


# Tokens that HunyuanVideo-1.5 sees beside its prompt: of glyphs to draw, and of an image, which may be none.
GLYPH_TOKENS, IMAGE_TOKENS = 256, 729


class _MasksOnMeta(TorchFunctionMode):
    """HunyuanVideo-1.5 sorts text tokens by their masks, which have no values on the meta device: all count there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and torch.is_tensor(args[0]) and args[0].is_meta:
            if func is torch.Tensor.__bool__:  # whether there is no image
                return True
            if func is torch.Tensor.__invert__:  # which tokens are padding: none
                return args[0].new_zeros(0, dtype=torch.bool)
            if func is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) is torch.bool:
                return args[0][: len(args[1])]
        return func(*args, **(kwargs or {}))


def _hunyuan_15_example(config, size, length):
    call = example_tensors(config, size, length, "text_embed_dim", mask=True)
    glyphs = example_tensors(config, size, GLYPH_TOKENS, "text_embed_2_dim", mask=True)
    call |= {f"{name}_2": value for name, value in glyphs.items() if name.startswith("encoder")}
    return call | {"image_embeds": torch.empty(1, IMAGE_TOKENS, config["image_embed_dim"], device="meta")}


def _hunyuan_15_levels(call: dict, timestep: torch.Tensor) -> dict:
    """Its forward computes in the precision of its timestep, which pipelines give in that of the latents."""
    return {"timestep": timestep.to(call["hidden_states"].dtype)}


HUNYUAN_VIDEO_15 = replace(
    HUNYUAN_VIDEO,
    name="hunyuan-video-1.5",
    transformer_class="HunyuanVideo15Transformer3DModel",
    guidance="separate",
    lora_targets=r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
    example=_hunyuan_15_example,
    counting=_MasksOnMeta,
    levels=_hunyuan_15_levels,
    unsupported=(),
    destination="timestep_r",  # of models with use_meanflow; None of others
)


MOTIF_VIDEO = replace(  # huggingface.co/Motif-Technologies/Motif-Video-2B
    HUNYUAN_VIDEO,
    name="motif-video",
    transformer_class="MotifVideoTransformer3DModel",
    guidance="separate",
    unsupported=(),
    example=lambda config, size, length: example_tensors(config, size, length, "text_embed_dim", mask=True),
)
