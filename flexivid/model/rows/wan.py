"""Wan (arXiv 2503.20314), its models with a control video, ChronoEdit and SkyReels-V2."""

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
    media=("encoder_hidden_states_image",),
    loose=Loose("blocks"),
)
SKYREELS_V2 = replace(  # arXiv 2504.13074
    WAN,
    name="skyreels-v2",
    transformer_class="SkyReelsV2Transformer3DModel",
    fps=24,
    loose=Loose("blocks", {"enable_diffusion_forcing": True}),  # a timestep a frame, and so a token
)


def _wan_vace_example(config, size, length):
    control = torch.empty(1, config["vace_in_channels"], *size, device="meta")
    return _wan_example(config, size, length) | {"control_hidden_states": control}


WAN_VACE = replace(  # arXiv 2503.07598
    WAN,
    name="wan-vace",
    transformer_class="WanVACETransformer3DModel",
    lora_targets=r"(vace_)?" + WAN.lora_targets,
    example=_wan_vace_example,
    conditions=("control_hidden_states",),
    loose="blocks for its control video go beside its own, over the tokens of one patch size",
    for_all_clips=("control_hidden_states_scale",),
)


def _wan_animate_example(config, size, length):
    frames, *space = size
    side = config["motion_encoder_size"]
    return _wan_example(config, size, length) | {
        # Neither shows the reference image, which comes before the clip.
        "pose_hidden_states": torch.empty(1, config["latent_channels"], frames - 1, *space, device="meta"),
        "face_pixel_values": torch.empty(1, 3, 4 * (frames - 2) + 1, side, side, device="meta"),
    }


WAN_ANIMATE = replace(  # arXiv 2509.14055
    WAN,
    name="wan-animate",
    transformer_class="WanAnimateTransformer3DModel",
    example=_wan_animate_example,
    conditions=("pose_hidden_states",),
    loose="its tokens look at the face of their own frame, and are counted by frames",
    reference_frames=1,
    temporal=False,  # a face for each latent frame
)


def _check_chronoedit(call: dict) -> None:
    """An edit is a clip of two frames, of before and after; with temporal reasoning, frames between them at first."""
    if (frames := call["hidden_states"].shape[2]) != 2:
        raise ValueError(
            f"ChronoEdit with temporal reasoning goes from {frames} latent frames to 2 midway, which cannot be "
            f"planned: leave enable_temporal_reasoning out"
        )


CHRONOEDIT = replace(  # arXiv 2510.04290
    WAN,
    name="chronoedit",
    transformer_class="ChronoEditTransformer3DModel",
    check=_check_chronoedit,
    temporal=False,  # two latent frames have nothing to join
)
