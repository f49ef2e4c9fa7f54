"""Latents and conditions of training clips, computed once and kept in shards that survive a kill.

Conditions are text embeddings and whatever else the model's pipeline gives to its transformer (`conditions.py`).
What is encoded is a folder of captioned clips, or, with no data at all, the teacher's own samples for a list of
prompts.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from safetensors import safe_open
from tqdm import tqdm

from flexivid.model.families import family_of
from flexivid.tensors import fingerprint, on_rows
from flexivid.text import read_prompts
from flexivid.training.config import ClipsConfig
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.data.captions import CaptionedClip, find_clips
from flexivid.training.data.clips import load_clip
from flexivid.training.data.conditions import clip_arguments, conditions_of
from flexivid.training.data.encoding import encode, latent_statistics
from flexivid.training.data.held_out import Places, choose_held_out, split
from flexivid.training.data.shards import Encode, Place, filled, is_made_from, read_places, write_shard
from flexivid.training.objective import ALL
from flexivid.training.parallel.launch import from_main

SHARD = 32  # clips a file: what a kill loses at most
TRAINED_CLIPS = 8  # that errors are measured on where none is held out


class LatentCache:
    """Random access to (latents, conditions) of clips.

    folder: where the shards lie; every process makes its share of them. made_with: whatever else latents depend on.
    encode_text: caption -> arguments of the transformer, tensors of one clip and whatever is the same for all.
    held_out_contents: what an earlier part of the run has held out, None to choose.
    """

    def __init__(
        self,
        folder: Path,
        clips: list[CaptionedClip],
        made_with: dict,
        encode_clip: Encode,
        encode_text: Callable[[str, Bucket], dict],
        config: ClipsConfig,
        accelerator: Accelerator,
        held_out_contents: list[str] | None = None,
    ):
        self.config = config
        self.broken: list[tuple[str, str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        shards = {
            folder / f"{start // SHARD:05d}.safetensors": (start, clips[start : start + SHARD])
            for start in range(0, len(clips), SHARD)
        }
        own = list(shards)[accelerator.process_index :: accelerator.num_processes]
        for path in tqdm(own, desc="latents", unit="shard", disable=not accelerator.is_main_process):
            start, part = shards[path]
            if not is_made_from(path, part, made_with):
                write_shard(path, start, part, made_with, encode_clip, encode_text)
        accelerator.wait_for_everyone()
        usable: Places = {}
        for path, (_, part) in shards.items():
            if path not in own and not is_made_from(path, part, made_with):
                raise ValueError(f"{path} of another process is not here: clips.cache must be shared by all machines")
            places, broken = read_places(path)
            self.broken += broken
            for bucket, row in places.items():
                usable.setdefault(bucket, []).extend(row)
        if not usable:
            raise ValueError(f"none of the {len(clips)} clips can be used:\n{self.report()}")
        self.held_out_contents = held_out_contents
        if held_out_contents is None:
            self.held_out_contents = choose_held_out(usable, config.held_out)
        self.places, self.held_out_places = split(usable, self.held_out_contents)
        self.empty = {bucket: encode_text("", Bucket.parse(bucket)) for bucket in usable}
        self._bucket_of: dict[torch.Size, str] = {}  # by the size of latents, as they are read

    def report(self) -> str:
        """A line per clip that was skipped, with the reason."""
        return "\n".join(f"  {path}: {reason}" for path, reason in self.broken)

    @property
    def held_out(self) -> int:
        """How many clips are never trained on."""
        return sum(map(len, self.held_out_places.values()))

    def batch(self, count: int, generator: torch.Generator, rows: slice = ALL) -> tuple[torch.Tensor, dict]:
        """Latents (B, C, T, H, W) of one bucket, which is drawn by its share of the clips, and their conditions.

        `count` clips are drawn, and these rows of them are read. Conditions that differ from clip to clip have a row
        each; tables and sizes are those of the bucket.
        """
        names = sorted(self.places)
        shares = torch.tensor([float(len(self.places[name])) for name in names])
        bucket = names[torch.multinomial(shares, 1, generator=generator).item()]
        picks = torch.randint(len(self.places[bucket]), (count,), generator=generator).tolist()
        dropped = torch.rand(count, generator=generator) < self.config.drop_caption
        return self._read(bucket, [self.places[bucket][pick] for pick in picks[rows]], dropped[rows].tolist())

    def validation(self) -> list[tuple[torch.Tensor, dict]]:
        """All held-out clips, a batch a bucket; if there are none, a batch of clips that are trained on."""
        if not self.held_out_places:
            return [self.batch(TRAINED_CLIPS, torch.Generator().manual_seed(2**31))]
        rows = sorted(self.held_out_places.items())
        return [self._read(bucket, places, [False] * len(places)) for bucket, places in rows]

    def _read(self, bucket: str, places: list[Place], dropped: list[bool]) -> tuple[torch.Tensor, dict]:
        """What a shard holds of some clips; dropped: of which the caption is empty."""
        empty = self.empty[bucket]
        latents, rows = [], {name: [] for name, value in empty.items() if torch.is_tensor(value)}
        for place, without in zip(places, dropped, strict=True):
            with safe_open(place.shard, "pt") as shard:
                latents.append(shard.get_slice(f"{bucket}.latents")[place.row])
                for name, values in rows.items():
                    values.append(empty[name] if without else shard.get_slice(f"{bucket}.{name}")[place.row])
        self._bucket_of[latents[0].shape] = bucket
        conditions = {name: torch.stack([filled(v, empty[name]) for v in values]) for name, values in rows.items()}
        return torch.stack(latents).float(), empty | conditions

    def unconditional(self, x_0: torch.Tensor, conditions: dict) -> dict:
        """The conditions of these clips with the empty caption."""
        empty = self.empty[self._bucket_of[x_0.shape[1:]]]
        rows = {name: filled(value, value) for name, value in empty.items() if torch.is_tensor(value)}
        return conditions | {name: value.expand(len(x_0), *value.shape) for name, value in rows.items()}

    def empty_text(self, length: int) -> torch.Tensor:
        """The embedding of the empty caption, (1, length, dim)."""
        return next(iter(self.empty.values()))["encoder_hidden_states"][None, :length].float()


def clips_of(config: ClipsConfig) -> list[CaptionedClip]:
    """The clips of `config.folder`, or one a line of `config.prompts`. Raises ValueError if they are not there."""
    if config.folder is not None:
        return find_clips(config.folder)
    if not config.prompts.is_file():
        raise ValueError(
            f"clips.prompts must be a text file with a prompt a line, and there is no file {config.prompts}"
        )
    prompts = read_prompts(config.prompts)
    if not prompts:
        raise ValueError(f"no prompts in {config.prompts}")
    return [CaptionedClip(Path(f"sample-{number}"), prompt) for number, prompt in enumerate(prompts)]


def check_buckets(config: ClipsConfig, temporal_factor: int, side: int, patch_frames: int = 1) -> None:
    """Raises ValueError for a size that the model cannot have. side: pixels of a token; patch_frames: p_t."""
    for bucket in map(Bucket.parse, config.buckets):
        if (bucket.frames - 1) % temporal_factor or bucket.height % side or bucket.width % side:
            raise ValueError(
                f"the bucket {bucket} does not fit the model: 1 + a multiple of {temporal_factor} frames, sides that "
                f"are multiples of {side}"
            )
        if ((bucket.frames - 1) // temporal_factor + 1) % patch_frames:
            raise ValueError(
                f"the bucket {bucket} does not fit the model, which joins {patch_frames} latent frames: give it "
                f"{temporal_factor} frames more"
            )


def encoders_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The VAE and the text encoders, which training needs only once."""
    named = {name: part for name, part in pipe.components.items() if name.startswith(("vae", "text_encoder"))}
    return {name: part for name, part in named.items() if isinstance(part, torch.nn.Module)}


def _made_with(
    config: ClipsConfig, pipe: DiffusionPipeline, encoders: dict[str, torch.nn.Module], captions_only: bool
) -> dict:
    """All that latents and conditions depend on beside the clips, as JSON."""
    made_with = {}
    if not captions_only:
        of_vae = [pipe.vae.encoder, *filter(None, [getattr(pipe.vae, "quant_conv", None)])]
        made_with["vae"] = [fingerprint(part) for part in of_vae]
        made_with["latents"] = [value.flatten().tolist() for value in latent_statistics(pipe.vae)]
    made_with |= {
        **{name: fingerprint(part) for name, part in encoders.items() if name != "vae"},
        "buckets": config.buckets,
        "fps": config.fps,
        "max_sequence_length": config.max_sequence_length,
    }
    if config.folder is None and not captions_only:
        made_with |= {
            "teacher": fingerprint(pipe.transformer),
            "scheduler": json.dumps(dict(pipe.scheduler.config), default=str),
            "steps": config.teacher_steps,
            "guidance": config.teacher_guidance,
        }
    return made_with


def _teacher_sampler(config: ClipsConfig, pipe: DiffusionPipeline, buckets: list[Bucket]) -> Encode:
    """Samples the teacher for a prompt, the buckets in turn; the number of the prompt is the seed."""
    family = family_of(pipe.transformer)

    @torch.no_grad()
    def sample_teacher(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor]:
        bucket = buckets[number % len(buckets)]
        settings = {"steps": config.teacher_steps, "guidance_scale": config.teacher_guidance}
        call = clip_arguments(pipe, bucket, config, **settings)
        generator = torch.Generator().manual_seed(number)
        latents = pipe(prompt=clip.caption, **call, generator=generator, output_type="latent").frames
        size = family.latent_size(pipe, bucket.frames, bucket.height, bucket.width)
        named = family.arguments_for(torch.empty(1, 1, *size, device="meta"))
        return bucket, family.latents(named | {"hidden_states": latents})[0]

    return sample_teacher


def _captions_alone(pipe: DiffusionPipeline, buckets: list[Bucket]) -> Encode:
    """Latents of no channels, which take no room and have the size of the clip; the buckets in turn."""
    family = family_of(pipe.transformer)

    def encode_nothing(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor]:
        if clip.problem:
            raise BrokenClip(clip.problem)
        bucket = buckets[number % len(buckets)]
        return bucket, torch.empty(0, *family.latent_size(pipe, bucket.frames, bucket.height, bucket.width))

    return encode_nothing


def build_cache(
    config: ClipsConfig,
    pipe: DiffusionPipeline,
    accelerator: Accelerator,
    held_out: list[str] | None = None,
    captions_only: bool = False,
) -> LatentCache:
    """Encodes `config.folder`, or samples the teacher for `config.prompts`, with the pipeline's own parts.

    They are on the accelerator's device meanwhile, and on the CPU afterwards. held_out: what an earlier part of the run
    has held out. captions_only: no clips are read or sampled, and latents have no channels. Raises ValueError if the
    folder or the file is not what it should be, or no clip can be used.
    """
    device, clips = accelerator.device, clips_of(config)
    buckets, encoders = [Bucket.parse(text) for text in config.buckets], encoders_of(pipe)
    for part in encoders.values():
        part.to(device)
    made_with = from_main(accelerator, lambda: _made_with(config, pipe, encoders, captions_only))  # hashes all weights

    def encode_text(caption: str, bucket: Bucket) -> dict:
        conditions = conditions_of(pipe, caption, bucket, config)
        return on_rows(conditions, lambda tensor: tensor[0].cpu())

    def encode_file(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor]:
        if clip.problem:
            raise BrokenClip(clip.problem)
        bucket, frames = load_clip(clip.path, buckets, config.fps)
        return bucket, encode(pipe.vae, frames[None].to(device, pipe.vae.dtype))[0]

    encode_clip = encode_file
    pipe.set_progress_bar_config(disable=True)
    if captions_only:
        encode_clip = _captions_alone(pipe, buckets)
        accelerator.print(f"{len(clips)} captions of {config.folder or config.prompts}")
    elif config.folder is not None:
        accelerator.print(f"{len(clips)} clips in {config.folder}, {config.fps:g} frames a second, {config.buckets}")
    else:
        pipe.transformer.to(device)
        encode_clip = _teacher_sampler(config, pipe, buckets)
        accelerator.print(f"{len(clips)} prompts, sampled by the teacher in {config.teacher_steps} steps")
    name = hashlib.sha256(json.dumps([made_with, str(config.folder or config.prompts)]).encode()).hexdigest()[:12]
    folder = config.cache / name
    cache = LatentCache(folder, clips, made_with, encode_clip, encode_text, config, accelerator, held_out)
    if cache.broken:
        accelerator.print(f"{len(cache.broken)} of {len(clips)} clips are skipped:\n{cache.report()}")
    if cache.held_out:
        names = [place.name for row in cache.held_out_places.values() for place in row]
        accelerator.print(f"{len(names)} of them are held out, never trained on: {', '.join(sorted(names))}")
    for part in encoders.values():
        part.to("cpu")
    clear_device_cache()
    return cache
