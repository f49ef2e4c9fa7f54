"""Latents and conditions of training clips, computed once and kept in shards that survive a kill.

Conditions are text embeddings and whatever else the model's pipeline gives to its transformer (`conditions.py`).
What is encoded is a folder of captioned clips, or, with no data at all, the teacher's own samples for a list of
prompts.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import align_num_frames
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from safetensors import safe_open
from tqdm import tqdm

from flexivid.model.families import family_of
from flexivid.model.family import Family
from flexivid.published import load_index, load_part
from flexivid.text import read_prompts
from flexivid.training.config import ClipsConfig, Config
from flexivid.training.data.buckets import Bucket
from flexivid.training.data.captions import CaptionedClip, find_clips
from flexivid.training.data.conditions import of_clips
from flexivid.training.data.held_out import Places, choose_held_out, split
from flexivid.training.data.media import CONTROL, taken_by
from flexivid.training.data.shards import Encode, Place, filled, is_made_from, read_places, write_shard
from flexivid.training.data.sources import empty_conditions, encoders_of, made_with, of_captions, of_files, of_teacher
from flexivid.training.objective import ALL
from flexivid.training.parallel.launch import from_main

SHARD = 32  # clips a file: what a kill loses at most
TRAINED_CLIPS = 8  # that errors are measured on where none is held out


class LatentCache:
    """Random access to (latents, conditions) of clips.

    folder: where the shards lie; every process makes its share of them. made_with: whatever else latents depend on.
    empty_conditions: bucket -> conditions of the empty caption, tensors of one clip and whatever is the same for all.
    family: says which of them a clip has whatever its caption, and which all clips of a size have.
    held_out_contents: what an earlier part of the run has held out, None to choose.
    """

    def __init__(
        self,
        folder: Path,
        clips: list[CaptionedClip],
        made_with: dict,
        encode: Encode,
        empty_conditions: Callable[[Bucket], dict],
        family: Family,
        config: ClipsConfig,
        accelerator: Accelerator,
        held_out_contents: list[str] | None = None,
    ):
        self.config, self.of_clips, self.of_size = config, of_clips(family), family.of_size
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
                write_shard(path, start, part, made_with, encode)
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
        self.empty = {bucket: empty_conditions(Bucket.parse(bucket)) for bucket in usable}
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
        stored = [name for name, value in empty.items() if torch.is_tensor(value) and name not in self.of_size]
        latents, rows = [], {name: [] for name in stored}
        for place, without in zip(places, dropped, strict=True):
            with safe_open(place.shard, "pt") as shard:
                latents.append(shard.get_slice(f"{bucket}.latents")[place.row])
                for name, values in rows.items():
                    is_empty = without and name not in self.of_clips
                    values.append(empty[name] if is_empty else shard.get_slice(f"{bucket}.{name}")[place.row])
        self._bucket_of[latents[0].shape] = bucket
        conditions = {name: torch.stack([filled(v, empty[name]) for v in values]) for name, values in rows.items()}
        # Copied, since rows that share memory cannot be pinned.
        same = {name: torch.stack([empty[name]] * len(places)) for name in self.of_size if name in empty}
        return torch.stack(latents).float(), empty | same | conditions

    def unconditional(self, x_0: torch.Tensor, conditions: dict) -> dict:
        """The conditions of these clips with the empty caption."""
        empty = self.empty[self._bucket_of[x_0.shape[1:]]]
        of_text = {name: value for name, value in empty.items() if name not in self.of_clips}
        rows = {name: filled(value, value) for name, value in of_text.items() if torch.is_tensor(value)}
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


def check_sequence(config: Config, pipe: DiffusionPipeline) -> None:
    """Raises ValueError for clips that a model of one sequence, MiniMax-H3, does not make, and for guidance of them."""
    if family_of(pipe.transformer).sequence is None:
        return
    clips = config.clips
    for section, name in (("clips", "teacher_guidance"), ("validation", "guidance_scale")):
        if name in getattr(config, section).model_fields_set:
            raise ValueError(f"{section}.{name} would do nothing: guidance is in the model's weights; leave it out")
    if clips.drop_caption:
        raise ValueError(
            f"clips.drop_caption is {clips.drop_caption}: guidance is in the model's weights, and a caption of no "
            f"tokens cannot be encoded; set it to 0"
        )
    if clips.fps != pipe.fps:
        raise ValueError(f"clips.fps is {clips.fps:g}: the model makes clips of {pipe.fps} frames a second")
    for bucket in map(Bucket.parse, clips.buckets):
        aligned = align_num_frames(bucket.frames, pipe.vae_frames_per_chunk, pipe.vae_latents_per_chunk)
        if aligned != bucket.frames or not pipe.min_duration <= aligned / pipe.fps <= pipe.max_duration:
            raise ValueError(
                f"the bucket {bucket} does not fit the model: {pipe.vae_latents_per_chunk} + a multiple of "
                f"{pipe.vae_frames_per_chunk} frames, {pipe.min_duration:g} to {pipe.max_duration:g} seconds of them"
            )


def check_text_length(base: str | Path, length: int) -> None:
    """Raises ValueError for text of a length that the model cannot have.

    LTX-2 puts learned tokens where a prompt leaves its text free, all of them as often as they go into it.
    """
    if load_index(base).get("connectors", [None])[0] is None:
        return
    config = load_part(base, "connectors", LTX2TextConnectors)
    for stream in ("video", "audio"):
        tokens = config.get(f"{stream}_connector_num_learnable_registers", 128)
        if tokens and length % tokens:
            raise ValueError(f"clips.max_sequence_length is {length}: for {base} it must be a multiple of {tokens}")


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
    device, clips, encoders = accelerator.device, clips_of(config), encoders_of(pipe)
    if taken_by(type(pipe)) != CONTROL:  # what the clips have beside them is not read, and may change
        clips = [replace(clip, control=None, mask=None) for clip in clips]
    for part in encoders.values():
        part.to(device)
    facts = from_main(accelerator, lambda: made_with(config, pipe, captions_only))  # hashes all weights
    pipe.set_progress_bar_config(disable=True)
    if captions_only:
        encode = of_captions(config, pipe)
        accelerator.print(f"{len(clips)} captions of {config.folder or config.prompts}")
    elif config.folder is not None:
        encode = of_files(config, pipe, device)
        accelerator.print(f"{len(clips)} clips in {config.folder}, {config.fps:g} frames a second, {config.buckets}")
    else:
        pipe.transformer.to(device)
        encode = of_teacher(config, pipe)
        accelerator.print(f"{len(clips)} prompts, sampled by the teacher in {config.teacher_steps} steps")
    name = hashlib.sha256(json.dumps([facts, str(config.folder or config.prompts)]).encode()).hexdigest()[:12]
    empty, family = partial(empty_conditions, pipe, config=config), family_of(pipe.transformer)
    folder = config.cache / name
    cache = LatentCache(folder, clips, facts, encode, empty, family, config, accelerator, held_out)
    if cache.broken:
        accelerator.print(f"{len(cache.broken)} of {len(clips)} clips are skipped:\n{cache.report()}")
    if cache.held_out:
        names = [place.name for row in cache.held_out_places.values() for place in row]
        accelerator.print(f"{len(names)} of them are held out, never trained on: {', '.join(sorted(names))}")
    for part in encoders.values():
        part.to("cpu")
    clear_device_cache()
    return cache
