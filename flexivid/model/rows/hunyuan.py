"""HunyuanVideo (arXiv 2412.03603) and Motif-Video."""

from dataclasses import replace

import torch

from flexivid.model.family import Family
from flexivid.model.rows.common import example_tensors, of_latents


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
)


MOTIF_VIDEO = replace(  # huggingface.co/Motif-Technologies/Motif-Video-2B
    HUNYUAN_VIDEO,
    name="motif-video",
    transformer_class="MotifVideoTransformer3DModel",
    guidance="separate",
    example=lambda config, size, length: example_tensors(config, size, length, "text_embed_dim", mask=True),
)
