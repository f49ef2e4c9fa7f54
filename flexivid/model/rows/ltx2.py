"""LTX-2 and LTX-2.3 (arXiv 2601.03233): sound is a stream of its own, whose few tokens stay as they are."""

import math
from dataclasses import replace

import torch
from diffusers.models.transformers.transformer_ltx2 import AudioVisualModelOutput

from flexivid.model.family import Tables
from flexivid.model.rows.common import example_tensors
from flexivid.model.rows.ltx import LTX
from flexivid.patches import positions
from flexivid.patches.folding import Folding


def _ltx2_rope(module, stock, folding: Folding, coordinates: torch.Tensor, device=None) -> Tables:
    """Of (B, axes, tokens, start and end): as in LTX-Video positions are averaged, not angles."""
    of_tokens = coordinates.movedim(2, 0).unflatten(0, folding.grid)
    return stock(positions.middle(of_tokens, folding.centres).flatten(0, 2).movedim(0, 2), device=device)


def _ltx2_levels(call: dict, timestep: torch.Tensor) -> dict:
    """The video is told its coarse noise level, sound its own. sigma: of the noisiest token."""

    def given(name: str, otherwise: str):
        return call[otherwise] if call.get(name) is None else call[name]

    levels = {"audio_timestep": given("audio_timestep", "timestep")}
    if call.get("sigma") is not None:
        levels["sigma"] = timestep.amax(1) if timestep.ndim == 2 else timestep
        levels["audio_sigma"] = given("audio_sigma", "sigma")
    return levels


def _ltx2_completed(call: dict) -> dict:
    for name in ("video_self_attention_mask", "video_keyframes_mask"):
        if call.get(name) is not None:
            raise ValueError(f"{name} names single tokens of the base patch size, which weak modes have not: leave it")
    coordinates = call.get("video_coords")
    if coordinates is None:
        return LTX.completed(call)
    return LTX.completed(call | {"video_coords": coordinates[..., 0]}) | {"video_coords": coordinates}


def _ltx2_example(config, size, length):
    call = example_tensors(config, size, length, "caption_channels", mask=True)
    if not config["use_prompt_embeddings"]:  # from LTX-2.3 on the pipeline's connectors project text
        call["encoder_hidden_states"] = torch.empty(1, length, config["cross_attention_dim"], device="meta")
    seconds = (config["vae_scale_factors"][0] * (size[0] - 1) + 1) / LTX2.fps
    rate = config["audio_sampling_rate"] / config["audio_hop_length"] / config["audio_scale_factor"]
    sounds = max(round(seconds * rate), 1)
    sound_text = config["caption_channels" if config["use_prompt_embeddings"] else "audio_cross_attention_dim"]
    call |= {
        "audio_hidden_states": torch.empty(1, sounds, config["audio_in_channels"], device="meta"),
        "audio_encoder_hidden_states": torch.empty(1, length, sound_text, device="meta"),
        "audio_encoder_attention_mask": call["encoder_attention_mask"],
        "sigma": call["timestep"],
        "video_coords": torch.empty(1, 3, math.prod(size), 2, device="meta"),
        "audio_num_frames": sounds,
        "use_cross_timestep": True,
    }
    return call | LTX2.arguments_for(call["hidden_states"])


LTX2 = replace(
    LTX,
    name="ltx-2",
    transformer_class="LTX2VideoTransformer3DModel",
    centred=_ltx2_rope,
    more_positions=("cross_attn_rope",),
    example=_ltx2_example,
    fps=24,
    frames=121,
    completed=_ltx2_completed,
    without_last_step=(),
    levels=_ltx2_levels,
    timesteps_beside=("audio_timestep", "sigma", "audio_sigma"),
    streams=("audio_hidden_states",),
    of_size=("video_coords", "audio_coords"),
    raw_latents=True,
    output_class=AudioVisualModelOutput,
    loose="sound stands beside the video in its blocks, which take both and more",
    more_forwards=("do_spatio_temporal_guidance", "do_modality_isolation_guidance"),
)
