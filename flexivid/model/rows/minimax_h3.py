"""MiniMax-H3 (huggingface.co/MiniMaxAI/MiniMax-H3): text, video and sound are one sequence of tokens.

Its pipeline packs them, and says by indices which of the tokens are what, where each stands, and how noisy it is. Of a
weak pass the sequence is shorter: the clip alone has coarse tokens, and all that names tokens is made anew for them.
Text, sound, and frames that are given beside the clip stay as they are.
"""

import math

import torch
from diffusers.models.transformers.transformer_minimax_h3 import MiniMaxH3TransformerOutput
from diffusers.modular_pipelines.minimax_h3.before_denoise import (
    MiniMaxH3PrepareLayoutStep,
    MiniMaxH3SetTimestepsStep,
)
from einops import rearrange

from flexivid.model.family import Family, Sequence
from flexivid.model.rows.common import grid_of
from flexivid.patches import positions
from flexivid.patches.folding import Folding, token_grid

PATCH = (1, 2, 2)
# Its VAE encodes 17 frames at a time as 5 latent ones, of which the first is of one frame: a clip of its own.
CHUNK_FRAMES, CHUNK = 17, 5
LEAST_FRAMES, LEAST = 5, 2  # which every clip has behind its chunks
VIDEO, TEXT, SOUND = 0, 1, 2  # how tokens are tagged
SOUND_CHANNELS, SOUNDS_A_SECOND = 2, 40
NAMING = ("token_tags", "position_ids", "timestep_indices", "video_indices", "audio_indices", "text_indices")
# What completed arguments have beside those of `forward`, whose timesteps are those of all that there is.
OWN = ("num_frames", "height", "width", "given_tokens", "first_token", "timesteps", "audio_timesteps")


def _completed(call: dict) -> dict:
    """first_token: of the clip, in the sequence; given_tokens (B, tokens, channels): frames that are given.

    The clip is what comes last of the video, without a gap in the sequence or another noise level in between.
    """
    if "given_tokens" in call:
        return call
    tokens, timesteps, levels = call["hidden_states"], call["timestep"], call["timestep_indices"]
    video = call["video_indices"].cpu()
    of_video = levels.cpu()[video]
    breaks = ((video.diff() != 1) | (of_video.diff() != 0)).nonzero()
    given = int(breaks[-1]) + 1 if len(breaks) else 0
    first, count = int(video[given]), len(video) - given
    times, height, width = grid_of(call["position_ids"][first : first + count].cpu().T)
    chunks, rest = divmod(len(times), CHUNK)

    def told(which: torch.Tensor) -> torch.Tensor:
        return timesteps.index_select(0, which.to(timesteps.device))

    return call | {
        "hidden_states": _unpacked(tokens[:, given:], height, width),
        "num_frames": (CHUNK,) * chunks + ((rest,) if rest else ()),
        "height": height * PATCH[1],
        "width": width * PATCH[2],
        "given_tokens": tokens[:, :given],
        "first_token": first,
        "timestep": told(levels[first : first + 1]).expand(len(tokens)),
        "timesteps": timesteps,
        "audio_timesteps": told(levels.index_select(0, call["audio_indices"]))[None, :, None],
    }


def _packed(latents: torch.Tensor) -> torch.Tensor:
    return rearrange(latents, "b c t (h i) (w j) -> b (t h w) (c i j)", i=PATCH[1], j=PATCH[2])


def _unpacked(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    sizes = {"h": height, "w": width, "i": PATCH[1], "j": PATCH[2]}
    return rearrange(tokens, "b (t h w) (c i j) -> b c t (h i) (w j)", **sizes)


def _latents(call: dict) -> torch.Tensor:
    tokens = call["hidden_states"]
    if tokens.ndim == 5:
        return tokens
    if "given_tokens" not in call:
        return _completed(call)["hidden_states"]
    height, width = (call[name] // patch for name, patch in zip(("height", "width"), PATCH[1:], strict=True))
    frames = call["num_frames"]
    count = (frames if isinstance(frames, int) else sum(frames)) * height * width
    return _unpacked(tokens[:, -count:], height, width)


def _stock(call: dict, folding: Folding | None) -> dict:
    if "given_tokens" not in call:
        return call
    given, tokens = call["given_tokens"], call["hidden_states"]
    tokens = _packed(tokens) if tokens.ndim == 5 else tokens
    given = torch.nn.functional.pad(given, (0, tokens.shape[-1] - given.shape[-1]))  # see `Sequence`, and its embedder
    stock = {name: value for name, value in call.items() if name not in OWN}
    stock["hidden_states"] = torch.cat([given.to(tokens.dtype), tokens], 1)
    return stock | ({"timestep": call["timesteps"]} if folding is None else _shorter(call, folding))


def _shorter(call: dict, folding: Folding) -> dict:
    """What names tokens, of a sequence in which the clip has coarse ones.

    They stand at the mean of the places of what they cover, which no two frames are equally far apart in. Text is told
    the noise level of the clip, as in the pipeline; sound and what is given keep theirs.
    """
    first, count, coarse = call["first_token"], math.prod(folding.grid), math.prod(folding.coarse_grid)
    behind = first + count
    tags, places, levels, video, sound, text = (call[name] for name in NAMING)

    def shorter(of_tokens: torch.Tensor, of_coarse: torch.Tensor) -> torch.Tensor:
        return torch.cat([of_tokens[:first], of_coarse, of_tokens[behind:]])

    def moved(indices: torch.Tensor) -> torch.Tensor:
        return torch.where(indices < behind, indices, indices - (count - coarse))

    centred = positions.middle(places[first:behind].unflatten(0, folding.grid), folding.centres).flatten(0, 2)
    timesteps, told = call["timesteps"], call["timestep"][:1]
    is_text = torch.zeros_like(levels, dtype=torch.bool).index_fill(0, text, True)
    levels = torch.where(is_text & (levels == levels[first]), len(timesteps), levels)
    given = video[: call["given_tokens"].shape[1]]
    return {
        "timestep": torch.cat([timesteps, told.to(timesteps)]),
        "timestep_indices": shorter(levels, levels.new_full((coarse,), len(timesteps))),
        "token_tags": shorter(tags, tags[first : first + 1].expand(coarse)),
        "position_ids": shorter(places, centred),
        "video_indices": torch.cat([moved(given), torch.arange(first, first + coarse, device=video.device)]),
        "audio_indices": moved(sound),
        "text_indices": moved(text),
    }


def _laid_out(latents: torch.Tensor, text: torch.Tensor, sound: torch.Tensor, timestep: float, of_sound: float) -> dict:
    sounds = sound.shape[1] // SOUND_CHANNELS
    tags = torch.full((text.shape[1],), TEXT)
    layout = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        tags, *latents.shape[2:], sounds, PATCH, SOUND_CHANNELS, SOUND, VIDEO
    )
    places, tags, video_indices, sound_indices, text_indices, *given = layout
    timesteps, levels = MiniMaxH3SetTimestepsStep.build_row_timesteps(
        video_indices, sound_indices, *given, text.shape[1], timestep, of_sound, 1.0, 1.0
    )
    return {
        "hidden_states": _packed(latents),
        "audio_hidden_states": sound,
        "encoder_hidden_states": text,
        "timestep": timesteps,
        "timestep_indices": levels,
        "token_tags": tags,
        "position_ids": places,
        "video_indices": video_indices,
        "audio_indices": sound_indices,
        "text_indices": text_indices,
    }


def _example(config, size, length):
    """Text, sound, and the clip, as in the pipeline, at the same noise level: as its first step is."""
    grid = token_grid(size, PATCH)
    chunks, rest = divmod(size[0], CHUNK)
    frames = CHUNK_FRAMES * chunks + (4 * rest - 3 if rest else 0)
    sounds = round(frames / MINIMAX_H3.fps * SOUNDS_A_SECOND)
    lengths = [length, SOUND_CHANNELS * sounds, math.prod(grid)]
    text, sound, video = torch.arange(sum(lengths)).split(lengths)
    places = torch.zeros(sum(lengths), 3, dtype=torch.float64)
    places[text, 0] = torch.arange(length).double()
    places[sound, 0] = length + torch.arange(sounds).repeat(SOUND_CHANNELS).double()
    places[video] = length + torch.cartesian_prod(*map(torch.arange, grid)).double()
    return {
        "hidden_states": torch.empty(1, len(video), config["in_channels"] * math.prod(PATCH), device="meta"),
        "audio_hidden_states": torch.empty(1, len(sound), config["audio_in_channels"], device="meta"),
        "encoder_hidden_states": torch.empty(1, length, config["text_dim"], device="meta"),
        "timestep": torch.empty(1, device="meta"),
        "timestep_indices": torch.zeros(sum(lengths), dtype=torch.long),
        "token_tags": torch.tensor([TEXT, SOUND, VIDEO]).repeat_interleave(torch.tensor(lengths)),
        "position_ids": places,
        "video_indices": video,
        "audio_indices": sound,
        "text_indices": text,
    }


def _latent_frames(frames: int, stride: int) -> int:
    return max(math.ceil((frames - LEAST_FRAMES) / CHUNK_FRAMES), 0) * CHUNK + LEAST


MINIMAX_H3 = Family(
    name="minimax-h3",
    transformer_class="MiniMaxH3Transformer3DModel",
    embedder="proj_in",
    head="proj_out",
    channels_last=False,
    positions="rope",
    centred=lambda module, stock, folding, places: stock(places),  # `_shorter` has centred them
    prediction="reversed_flow",
    time_scale=1.0,
    guidance="embedded",
    lora_targets=r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
    example=_example,
    vae_factors=(None, "vae_spatial_compression_ratio"),
    latent_frames=_latent_frames,
    fps=24,
    frames=124,
    sizes=(("t", "num_frames"), ("h", "height"), ("w", "width")),
    completed=_completed,
    sequence=Sequence(_stock, _latents, _packed, lambda call: call["given_tokens"].shape[1], _laid_out),
    streams=("audio_hidden_states",),
    stream_timestep="audio_timesteps",
    output_class=MiniMaxH3TransformerOutput,
    steps_without_forward=1,  # its scheduler counts the end of the noise levels
    for_all_clips=(*NAMING, "timesteps", "audio_timesteps"),
    required=(("patch_size", PATCH),),
    loose="text and sound stand beside the video in its sequence, and in its blocks",
)
