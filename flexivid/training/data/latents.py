"""Latents and conditions of training clips, computed once and kept: shards of safetensors that survive a kill.

Conditions are text embeddings and whatever else the model's pipeline gives to its transformer (`conditions.py`).
What is encoded is a folder of captioned clips, or, with no data at all, the teacher's own samples for a list of
prompts. A shard remembers what it was made from: the encoders, the sizes, the captions, and a checksum of every file.
It is made again when any of these has changed.
"""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from flexivid.model.families import family_of
from flexivid.shapes.build import encode, latent_statistics
from flexivid.shapes.data import fingerprint
from flexivid.text import read_prompts
from flexivid.training.config import ClipsConfig
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.data.captions import CaptionedClip, find_clips
from flexivid.training.data.clips import load_clip
from flexivid.training.data.conditions import clip_arguments, conditions_of
from flexivid.training.noise import on_rows

SHARD = 32  # clips a file: what a kill loses at most

# (number of the clip, clip) -> its bucket and latents (C, T, H, W); raises BrokenClip.
Encode = Callable[[int, CaptionedClip], tuple[Bucket, torch.Tensor]]


@dataclass(frozen=True)
class Source:
    """A file as a shard remembers it. Size and time of change are looked at first: hashing reads the whole file."""

    size: int
    changed: int
    digest: str

    @classmethod
    def of(cls, path: Path) -> "Source":
        if not path.is_file():
            return cls(-1, 0, "")
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(path.stat().st_size, path.stat().st_mtime_ns, digest)

    def still_is(self, path: Path) -> bool:
        if path.is_file() and (path.stat().st_size, path.stat().st_mtime_ns) == (self.size, self.changed):
            return True
        return Source.of(path).digest == self.digest


class LatentCache:
    """Random access to (latents, conditions) of clips.

    folder: where the shards lie; every process makes its share of them. made_with: whatever else latents depend on.
    encode_text: caption -> arguments of the transformer, tensors of one clip and whatever is the same for all.
    """

    def __init__(
        self,
        folder: Path,
        clips: list[CaptionedClip],
        made_with: dict,
        encode_clip: Encode,
        encode_text: Callable[[str], dict],
        config: ClipsConfig,
        accelerator: Accelerator,
    ):
        self.config = config
        self.places: dict[str, list[tuple[Path, int]]] = {}
        self.broken: list[tuple[str, str]] = []
        folder.mkdir(parents=True, exist_ok=True)
        shards = {
            folder / f"{start // SHARD:05d}.safetensors": (start, clips[start : start + SHARD])
            for start in range(0, len(clips), SHARD)
        }
        own = list(shards)[accelerator.process_index :: accelerator.num_processes]
        for path in tqdm(own, desc="latents", unit="shard", disable=not accelerator.is_main_process):
            start, part = shards[path]
            if not _is_made_from(path, part, made_with):
                _write_shard(path, start, part, made_with, encode_clip, encode_text)
        accelerator.wait_for_everyone()
        for path, (_, part) in shards.items():
            if path not in own and not _is_made_from(path, part, made_with):
                raise ValueError(f"{path} of another process is not here: clips.cache must be shared by all machines")
            with safe_open(path, "pt") as shard:
                self.broken += json.loads(shard.metadata()["broken"])
                for name in shard.keys():
                    if name.endswith(".latents"):
                        count = shard.get_slice(name).get_shape()[0]
                        bucket = name.removesuffix(".latents")
                        self.places.setdefault(bucket, []).extend((path, row) for row in range(count))
        self.empty = {bucket: encode_text("", Bucket.parse(bucket)) for bucket in self.places}
        if not self.places:
            raise ValueError(f"none of the {len(clips)} clips can be used:\n{self.report()}")

    def report(self) -> str:
        """A line per clip that was skipped, with the reason."""
        return "\n".join(f"  {path}: {reason}" for path, reason in self.broken)

    def batch(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, dict]:
        """Latents (count, C, T, H, W) of one bucket, which is drawn by its share of the clips, and their conditions.

        Conditions that differ from clip to clip have a row each; tables and sizes are those of the bucket.
        """
        names = sorted(self.places)
        shares = torch.tensor([float(len(self.places[name])) for name in names])
        bucket = names[torch.multinomial(shares, 1, generator=generator).item()]
        places, empty = self.places[bucket], self.empty[bucket]
        picks = torch.randint(len(places), (count,), generator=generator).tolist()
        dropped = torch.rand(count, generator=generator) < self.config.drop_caption
        latents, rows = [], {name: [] for name, value in empty.items() if torch.is_tensor(value)}
        for pick, without in zip(picks, dropped.tolist(), strict=True):
            path, row = places[pick]
            with safe_open(path, "pt") as shard:
                latents.append(shard.get_slice(f"{bucket}.latents")[row])
                for name, values in rows.items():
                    values.append(empty[name] if without else shard.get_slice(f"{bucket}.{name}")[row])
        conditions = {name: torch.stack([_filled(v, empty[name]) for v in values]) for name, values in rows.items()}
        return torch.stack(latents).float(), empty | conditions

    def empty_text(self, length: int) -> torch.Tensor:
        """The embedding of the empty caption, (1, length, dim)."""
        return next(iter(self.empty.values()))["encoder_hidden_states"][None, :length].float()


def _filled(value: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A condition as long as `full`, in float32 if it is a float: rows of zeros at the end are not stored."""
    value = value.float() if value.is_floating_point() else value
    missing = len(full) - len(value) if full.ndim == 2 else 0
    return torch.nn.functional.pad(value, (0, 0, 0, missing)) if missing else value


def _without_zeros(value: torch.Tensor) -> torch.Tensor:
    """(length, dim) without the rows of zeros at the end; anything else as it is."""
    if value.ndim != 2 or not value.is_floating_point():
        return value
    used = value.abs().sum(-1).nonzero()
    return value[: int(used.max()) + 1 if len(used) else 1].half()


def _is_made_from(path: Path, clips: list[CaptionedClip], made_with: dict) -> bool:
    if not path.exists():
        return False
    with safe_open(path, "pt") as shard:
        metadata = shard.metadata()
    names = [[str(clip.path), clip.caption] for clip in clips]
    if json.loads(metadata["made_with"]) != made_with or json.loads(metadata["clips"]) != names:
        return False
    sources = [Source(*values) for values in json.loads(metadata["sources"])]
    return all(source.still_is(clip.path) for source, clip in zip(sources, clips, strict=True))


def _write_shard(path: Path, start: int, clips: list[CaptionedClip], made_with: dict, encode_clip, encode_text) -> None:
    """Encodes some clips into one file, grouped by bucket; a clip that is broken is left out and noted."""
    groups: dict[str, list[tuple[torch.Tensor, dict]]] = {}
    broken = []
    # Before the clips are read: one that is still being copied is then seen to have changed.
    sources = [list(vars(Source.of(clip.path)).values()) for clip in clips]
    for number, clip in enumerate(clips, start):
        try:
            bucket, latents = encode_clip(number, clip)
        except BrokenClip as error:
            broken.append([str(clip.path), str(error)])
            continue
        groups.setdefault(str(bucket), []).append((latents.half().cpu(), encode_text(clip.caption, bucket)))
    tensors = {}
    for bucket, rows in groups.items():
        latents, conditions = zip(*rows, strict=True)
        tensors[f"{bucket}.latents"] = torch.stack(latents)
        for name, value in conditions[0].items():
            if torch.is_tensor(value):
                values = [_without_zeros(condition[name]) for condition in conditions]
                equal = len({value.shape for value in values}) == 1
                stacked = torch.stack(values) if equal else torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
                tensors[f"{bucket}.{name}"] = stacked
    metadata = {
        "made_with": made_with,
        "clips": [[str(clip.path), clip.caption] for clip in clips],
        "sources": sources,
        "broken": broken,
    }
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    save_file(tensors, beside, {name: json.dumps(value) for name, value in metadata.items()})
    os.replace(beside, path)


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


def build_cache(config: ClipsConfig, pipe: DiffusionPipeline, accelerator: Accelerator) -> LatentCache:
    """Encodes `config.folder`, or samples the teacher for `config.prompts`, with the pipeline's own parts.

    They are on the accelerator's device meanwhile, and on the CPU afterwards. Raises ValueError if the folder or the
    file is not what it should be, or no clip can be used.
    """
    device, clips = accelerator.device, clips_of(config)
    buckets = [Bucket.parse(text) for text in config.buckets]
    encoders, family = encoders_of(pipe), family_of(pipe.transformer)
    for part in encoders.values():
        part.to(device)
    of_vae = [pipe.vae.encoder, *filter(None, [getattr(pipe.vae, "quant_conv", None)])]
    made_with = {
        "vae": [fingerprint(part) for part in of_vae],
        "latents": [value.flatten().tolist() for value in latent_statistics(pipe.vae)],
        **{name: fingerprint(part) for name, part in encoders.items() if name != "vae"},
        "buckets": config.buckets,
        "fps": config.fps,
        "max_sequence_length": config.max_sequence_length,
    }

    def encode_text(caption: str, bucket: Bucket) -> dict:
        conditions = conditions_of(pipe, caption, bucket, config)
        return on_rows(conditions, lambda tensor: tensor[0].cpu())

    def encode_file(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor]:
        if clip.problem:
            raise BrokenClip(clip.problem)
        bucket, frames = load_clip(clip.path, buckets, config.fps)
        return bucket, encode(pipe.vae, frames[None].to(device, pipe.vae.dtype))[0]

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

    encode_clip = encode_file
    pipe.set_progress_bar_config(disable=True)
    if config.folder is not None:
        accelerator.print(f"{len(clips)} clips in {config.folder}, {config.fps:g} frames a second, {config.buckets}")
    else:
        encode_clip = sample_teacher
        pipe.transformer.to(device)
        made_with |= {
            "teacher": fingerprint(pipe.transformer),
            "scheduler": json.dumps(dict(pipe.scheduler.config), default=str),
            "steps": config.teacher_steps,
            "guidance": config.teacher_guidance,
        }
        accelerator.print(f"{len(clips)} prompts, sampled by the teacher in {config.teacher_steps} steps")
    name = hashlib.sha256(json.dumps([made_with, str(config.folder or config.prompts)]).encode()).hexdigest()[:12]
    cache = LatentCache(config.cache / name, clips, made_with, encode_clip, encode_text, config, accelerator)
    if cache.broken:
        accelerator.print(f"{len(cache.broken)} of {len(clips)} clips are skipped:\n{cache.report()}")
    for part in encoders.values():
        part.to("cpu")
    clear_device_cache()
    return cache
