"""Latents and text embeddings of training clips, computed once and kept: shards of safetensors that survive a kill.

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
from diffusers import WanPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from flexivid.training.clips import BrokenClip, Bucket, CaptionedClip, find_clips, load_clip
from flexivid.training.config import ClipsConfig
from flexivid.training.embedded import encode
from flexivid.training.shapes_data import fingerprint

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
    """Random access to (latents, text embeddings) of clips.

    folder: where the shards lie; every process makes its share of them. made_with: whatever else latents depend on.
    encode_text: caption -> (length, dim).
    """

    def __init__(
        self,
        folder: Path,
        clips: list[CaptionedClip],
        made_with: dict,
        encode_clip: Encode,
        encode_text: Callable[[str], torch.Tensor],
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
        self.empty = encode_text("")
        if not self.places:
            raise ValueError(f"none of the {len(clips)} clips can be used:\n{self.report()}")

    def report(self) -> str:
        """A line per clip that was skipped, with the reason."""
        return "\n".join(f"  {path}: {reason}" for path, reason in self.broken)

    def batch(self, count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Latents (count, C, T, H, W) of one bucket, which is drawn by its share of the clips; text (count, L, dim)."""
        names = sorted(self.places)
        shares = torch.tensor([float(len(self.places[name])) for name in names])
        bucket = names[torch.multinomial(shares, 1, generator=generator).item()]
        places = self.places[bucket]
        picks = torch.randint(len(places), (count,), generator=generator).tolist()
        dropped = torch.rand(count, generator=generator) < self.config.drop_caption
        latents, texts = [], []
        for pick, without in zip(picks, dropped.tolist(), strict=True):
            path, row = places[pick]
            with safe_open(path, "pt") as shard:
                latents.append(shard.get_slice(f"{bucket}.latents")[row])
                length = int(shard.get_slice(f"{bucket}.text_lengths")[row])
                texts.append(self.empty if without else shard.get_slice(f"{bucket}.text")[row, :length])
        padded = torch.zeros(count, self.config.max_sequence_length, texts[0].shape[-1])
        for row, text in enumerate(texts):
            padded[row, : len(text)] = text.float()
        return torch.stack(latents).float(), padded

    def empty_text(self, length: int) -> torch.Tensor:
        """The embedding of the empty caption, (1, length, dim)."""
        return torch.nn.functional.pad(self.empty[None].float(), (0, 0, 0, length - len(self.empty)))


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
    groups: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
    broken = []
    # Before the clips are read: one that is still being copied is then seen to have changed.
    sources = [list(vars(Source.of(clip.path)).values()) for clip in clips]
    for number, clip in enumerate(clips, start):
        try:
            bucket, latents = encode_clip(number, clip)
        except BrokenClip as error:
            broken.append([str(clip.path), str(error)])
            continue
        groups.setdefault(str(bucket), []).append((latents.half().cpu(), encode_text(clip.caption).half().cpu()))
    tensors = {}
    for bucket, rows in groups.items():
        latents, texts = zip(*rows, strict=True)
        tensors[f"{bucket}.latents"] = torch.stack(latents)
        tensors[f"{bucket}.text"] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        tensors[f"{bucket}.text_lengths"] = torch.tensor([len(text) for text in texts])
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
    prompts = [line.strip() for line in config.prompts.read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"no prompts in {config.prompts}")
    return [CaptionedClip(Path(f"sample-{number}"), prompt) for number, prompt in enumerate(prompts)]


def check_buckets(config: ClipsConfig, temporal_factor: int, side: int) -> None:
    """Raises ValueError for a size that the model cannot have. side: pixels of a token."""
    for bucket in map(Bucket.parse, config.buckets):
        if (bucket.frames - 1) % temporal_factor or bucket.height % side or bucket.width % side:
            raise ValueError(
                f"the bucket {bucket} does not fit the model: 1 + a multiple of {temporal_factor} frames, sides that "
                f"are multiples of {side}"
            )


def build_cache(config: ClipsConfig, pipe: WanPipeline, accelerator: Accelerator) -> LatentCache:
    """Encodes `config.folder`, or samples the teacher for `config.prompts`, with the pipeline's VAE and text encoder.

    Both are on the accelerator's device meanwhile, and on the CPU afterwards. Raises ValueError if the folder or the
    file is not what it should be, or no clip can be used.
    """
    device, clips = accelerator.device, clips_of(config)
    buckets = [Bucket.parse(text) for text in config.buckets]
    pipe.vae.to(device)
    pipe.text_encoder.to(device)
    made_with = {
        "vae": [fingerprint(part) for part in (pipe.vae.encoder, pipe.vae.quant_conv)],
        "latents": [list(pipe.vae.config.latents_mean), list(pipe.vae.config.latents_std)],
        "text_encoder": fingerprint(pipe.text_encoder),
        "buckets": config.buckets,
        "fps": config.fps,
        "max_sequence_length": config.max_sequence_length,
    }

    @torch.no_grad()
    def encode_text(caption: str) -> torch.Tensor:
        embeddings, _ = pipe.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=config.max_sequence_length, device=device
        )
        length = int(embeddings[0].abs().sum(-1).nonzero().max()) + 1  # behind the text there are zeros
        return embeddings[0, :length].cpu()

    def encode_file(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor]:
        bucket, frames = load_clip(clip.path, buckets, config.fps)
        return bucket, encode(pipe.vae, frames[None].to(device, pipe.vae.dtype))[0]

    def sample_teacher(number: int, clip: CaptionedClip) -> tuple[Bucket, torch.Tensor]:
        bucket = buckets[number % len(buckets)]
        latents = pipe(
            clip.caption,
            num_frames=bucket.frames,
            height=bucket.height,
            width=bucket.width,
            num_inference_steps=config.teacher_steps,
            guidance_scale=config.teacher_guidance,
            max_sequence_length=config.max_sequence_length,
            generator=torch.Generator().manual_seed(number),
            output_type="latent",
        ).frames
        return bucket, latents[0]

    encode_clip = encode_file
    if config.folder is not None:
        accelerator.print(f"{len(clips)} clips in {config.folder}, {config.fps:g} frames a second, {config.buckets}")
    else:
        encode_clip = sample_teacher
        pipe.set_progress_bar_config(disable=True)
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
    for part in (pipe.vae, pipe.text_encoder):
        part.to("cpu")
    clear_device_cache()
    return cache
