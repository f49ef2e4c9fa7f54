"""Kandinsky 6: sound is a stream of its own beside the video, and an image is a frame behind it."""

import math
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch
from diffusers.models.transformers.transformer_kandinsky6 import Kandinsky6TransformerOutput

from flexivid.model.family import Same
from flexivid.model.rows.kandinsky import KANDINSKY5, centred_rotations
from flexivid.patches.folding import Folding

# Latents of sound, of which a second has so many, and frames a latent frame.
SOUND_A_SECOND, STRIDE = 44100 / 1024, 4


def _kandinsky6_rope(module, stock, folding: Folding, places, scale_factor) -> torch.Tensor:
    """places: those of the base grid, which the pipeline passes with an image; else the forward counts its tokens."""
    if tuple(map(len, places)) != folding.grid:
        places = [torch.arange(tokens, device=places[0].device) for tokens in folding.grid]
    return centred_rotations(stock(places, scale_factor), folding)


def _given_behind(call: dict) -> int:
    """An image is a latent frame behind the clip, and has a type of its own."""
    return int(call.get("visual_token_type_ids") is not None)


def _kandinsky6_levels(call: dict, timestep: torch.Tensor) -> dict:
    """The forward takes one timestep, and knows by its type and its mask which frame is given."""
    if timestep.ndim < 2:
        return {}
    types, before = call["visual_token_type_ids"], timestep.shape[1] - 1
    return {
        "timestep": timestep.amax(1),
        "visual_token_type_ids": torch.cat([types[:, :before], types[:, -1:]], 1),
    }


@contextmanager
def _sound_at_its_own_level(transformer, folding: Folding, call: dict):
    """One timestep is told of both, to a module each: that of the coarse grid is the video's alone."""
    embeddings = transformer.audio_time_embeddings
    stock = embeddings.forward
    with mock.patch.object(embeddings, "forward", lambda timestep: stock(call["timestep"])):
        yield


def _kandinsky6_example(config, size, length):
    call = KANDINSKY5.example(config, size, length)
    del call["text_rope_pos"], call["visual_rope_pos"]
    sounds = math.ceil((STRIDE * (size[0] - 1) + 1) / KANDINSKY6.fps * SOUND_A_SECOND)
    call["audio_hidden_states"] = torch.empty(1, sounds, config["in_audio_dim"], device="meta")
    call["encoder_attention_mask"] = torch.empty(1, length, dtype=torch.bool, device="meta")
    return call


def _check_kandinsky6(call: dict) -> None:
    latents = call["hidden_states"]
    if latents.shape[-1] % 2 == 0 or latents.is_meta:  # no mask behind the latents
        return
    given = latents[..., -1].flatten(2).any(2).any(0)
    if given[:-1].any() or bool(given[-1]) != bool(_given_behind(call)):
        raise ValueError(
            "Kandinsky 6 is given an image as its pipeline gives it: in the last latent frame, which the mask and "
            "visual_token_type_ids both name, and in no other"
        )


KANDINSKY6 = replace(
    KANDINSKY5,
    name="kandinsky6",
    transformer_class="Kandinsky6Transformer3DModel",
    centred=_kandinsky6_rope,
    lora_targets=(
        r"visual_transformer_blocks\.\d+\.video_dec_block\."
        r"(self_attention\.(to_query|to_key|to_value|out_layer)|feed_forward\.net\.(0\.proj|2))"
    ),
    example=_kandinsky6_example,
    for_all_clips=("visual_rope_pos",),
    frame_timesteps="b t",
    given_behind=_given_behind,
    levels=_kandinsky6_levels,
    streams=("audio_hidden_states",),
    output_class=Kandinsky6TransformerOutput,
    bare_output=False,
    around=_sound_at_its_own_level,
    unsupported=(),
    # Distilled models predict several velocities of each latent, for places on the way to the next step.
    required=(("out_visual_dim", Same("in_visual_dim")),),
    check=_check_kandinsky6,
    untrained="makes sound, of whose VAE training has no encoder",
)
