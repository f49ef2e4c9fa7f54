"""How a clip becomes latents and conditions: one of a file, the teacher's for a prompt, or none but its caption."""

import json

import torch
from diffusers import DiffusionPipeline

from flexivid.model.families import family_of
from flexivid.model.family import Family
from flexivid.stock_pipelines import latent_channels_of
from flexivid.tensors import fingerprint, on_rows
from flexivid.training.config import ClipsConfig
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.data.captions import CaptionedClip
from flexivid.training.data.clips import load_clip, load_sound
from flexivid.training.data.conditions import clip_arguments, conditions_in, conditions_of, first_call
from flexivid.training.data.encoding import encode, latent_statistics, normalised
from flexivid.training.data.media import blank_media, media_of, taken_by
from flexivid.training.data.shards import Encode
from flexivid.training.data.sound import encode_sound, packed_sound
from flexivid.training.noise import CLEAN


def encoders_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The VAEs and the encoders of text and images, which training needs only once."""
    kinds = ("vae", "audio_vae", "text_encoder", "connectors", "image_encoder")
    named = {name: part for name, part in pipe.components.items() if name.startswith(kinds)}
    return {name: part for name, part in named.items() if isinstance(part, torch.nn.Module)}


def made_with(config: ClipsConfig, pipe: DiffusionPipeline, captions_only: bool) -> dict:
    """All that latents and conditions depend on beside the clips, as JSON."""
    facts = {}
    if not captions_only:
        of_vae = [pipe.vae.encoder, *filter(None, [getattr(pipe.vae, "quant_conv", None)])]
        facts["vae"] = [fingerprint(part) for part in of_vae]
        facts["latents"] = [value.flatten().tolist() for value in latent_statistics(pipe.vae)]
    facts |= {
        **{name: fingerprint(part) for name, part in encoders_of(pipe).items() if name != "vae"},
        "buckets": config.buckets,
        "fps": config.fps,
        "max_sequence_length": config.max_sequence_length,
    }
    if config.folder is None and not captions_only:
        facts |= {
            "teacher": fingerprint(pipe.transformer),
            "scheduler": json.dumps(dict(pipe.scheduler.config), default=str),
            "steps": config.teacher_steps,
            "guidance": config.teacher_guidance,
        }
    if (of_sound := getattr(pipe, "audio_scheduler", None)) is not None:  # MiniMax-H3's
        of_latents = [pipe.audio_vae.config[name] for name in ("latents_mean", "latents_std")]
        facts["sound"] = [*of_latents, of_sound.config.shift]
    if taken_by(type(pipe)) is not None:
        processor = getattr(pipe, "image_processor", None)
        facts["media"] = [type(pipe).__name__, str(pipe.transformer.dtype), json.dumps(dict(pipe.config), default=str)]
        facts["image_processor"] = None if processor is None else processor.to_json_string()
    return facts


def _of_one_clip(conditions: dict) -> dict:
    return on_rows(conditions, lambda tensor: tensor[0].cpu())


def _to_store(family: Family, conditions: dict) -> dict:
    """Those of one clip, without those that all clips of its size have."""
    return _of_one_clip({name: value for name, value in conditions.items() if name not in family.of_size})


def empty_conditions(pipe: DiffusionPipeline, bucket: Bucket, config: ClipsConfig) -> dict:
    """Those of the empty caption, and of no clip. There is none in a sequence that needs text: then of a short one."""
    caption = "" if family_of(pipe.transformer).sequence is None else "."
    return _of_one_clip(conditions_of(pipe, caption, bucket, config, blank_media(taken_by(type(pipe)), bucket)))


def of_files(config: ClipsConfig, pipe: DiffusionPipeline, device: torch.device) -> Encode:
    """Latents that the pipeline gives to its transformer without noise are as it makes them, from one frame."""
    buckets, taken = [Bucket.parse(text) for text in config.buckets], taken_by(type(pipe))
    family = family_of(pipe.transformer)

    def encode_file(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor, dict]:
        if clip.problem:
            raise BrokenClip(clip.problem)
        bucket, frames = load_clip(clip.path, buckets, config.fps)
        latents = encode(pipe.vae, frames[None].to(device, pipe.vae.dtype))
        call = first_call(pipe, clip.caption, bucket, config, media_of(taken, clip, frames, bucket, config.fps))
        conditions = conditions_in(call, latent_channels_of(pipe.vae), config.max_sequence_length)
        if CLEAN in conditions:
            latents = torch.where(conditions[CLEAN], call.latents.to(latents), latents)
        for name in family.streams:
            sound = load_sound(clip.path, bucket, config.fps, pipe.audio_sampling_rate)
            conditions[name] = encode_sound(pipe, sound, conditions[name].shape[1])[None]
        return bucket, latents[0], _to_store(family, conditions)

    return encode_file


def of_teacher(config: ClipsConfig, pipe: DiffusionPipeline) -> Encode:
    """Samples the teacher for a prompt, the buckets in turn; the number of the prompt is the seed."""
    family, buckets = family_of(pipe.transformer), [Bucket.parse(text) for text in config.buckets]

    @torch.no_grad()
    def sample_teacher(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor, dict]:
        bucket = buckets[number % len(buckets)]
        settings = {"steps": config.teacher_steps, "guidance_scale": config.teacher_guidance}
        call = clip_arguments(pipe, bucket, config, **settings)
        generator = torch.Generator().manual_seed(number)
        output = pipe(prompt=clip.caption, **call, generator=generator, output_type="latent")
        if family.raw_latents:
            latents = normalised(pipe.vae, output.frames)
        else:
            size = family.latent_size(pipe, bucket.frames, bucket.height, bucket.width)
            named = family.arguments_for(torch.empty(1, 1, *size, device="meta"))
            latents = family.latents(named | {"hidden_states": output.frames})
        conditions = conditions_of(pipe, clip.caption, bucket, config)
        conditions |= {name: packed_sound(pipe, output.audio) for name in family.streams}
        return bucket, latents[0], _to_store(family, conditions)

    return sample_teacher


def of_captions(config: ClipsConfig, pipe: DiffusionPipeline) -> Encode:
    """Latents of no channels, which take no room and have the size of the clip; the buckets in turn."""
    family, buckets = family_of(pipe.transformer), [Bucket.parse(text) for text in config.buckets]

    def encode_nothing(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor, dict]:
        if clip.problem:
            raise BrokenClip(clip.problem)
        bucket = buckets[number % len(buckets)]
        latents = torch.empty(0, *family.latent_size(pipe, bucket.frames, bucket.height, bucket.width))
        return bucket, latents, _to_store(family, conditions_of(pipe, clip.caption, bucket, config))

    return encode_nothing
