"""Wan (arXiv 2503.20314) and SkyReels-V2."""

from dataclasses import replace

import torch

from flexivid.model.family import Family, Loose
from flexivid.model.rows.common import example_tensors, of_latents


def _wan_example(config, size, length):
    call = example_tensors(config, size, length, "text_dim")
    if config["image_dim"] is not None:  # Wan2.1 image-to-video: the tokens of CLIP, of image and text
        # With positions for them, those of the first and of the last frame are two rows.
        positions = config.get("pos_embed_seq_len")
        rows, tokens = (1, 257) if positions is None else (2, positions // 2)
        call["encoder_hidden_states_image"] = torch.empty(rows, tokens, config["image_dim"], device="meta")
    return call


WAN = Family(
    name="wan",
    transformer_class="WanTransformer3DModel",
    embedder="patch_embedding",
    head="proj_out",
    channels_last=True,
    positions="rope",
    centred=of_latents(token_axis=1),
    positions_of_sizes=True,
    prediction="flow",
    guidance="separate",
    lora_targets=r"blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))",
    example=_wan_example,
    loose=Loose("blocks"),
)
SKYREELS_V2 = replace(  # arXiv 2504.13074
    WAN,
    name="skyreels-v2",
    transformer_class="SkyReelsV2Transformer3DModel",
    fps=24,
    loose=Loose("blocks", {"enable_diffusion_forcing": True}),  # a timestep a frame, and so a token
)
