"""Shards of safetensors with the latents and conditions of some clips, which know what they were made from.

A shard remembers the encoders, the sizes, the captions, and a checksum of every file. It is made again when any of
these has changed.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from flexivid.files import replacing
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.data.captions import CaptionedClip

# (number of the clip, clip) -> its bucket, latents (C, T, H, W) and conditions; raises BrokenClip.
Encode = Callable[[int, CaptionedClip], tuple[Bucket, torch.Tensor, dict]]


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


class Place(NamedTuple):
    """Where a clip lies. content: the same for copies of a file, and for samples of one prompt."""

    shard: Path
    row: int
    content: str
    name: str


def is_made_from(path: Path, clips: list[CaptionedClip], made_with: dict) -> bool:
    if not path.exists():
        return False
    with safe_open(path, "pt") as shard:
        metadata = shard.metadata()
    if "rows" not in metadata:  # of an earlier version
        return False
    if json.loads(metadata["made_with"]) != made_with or json.loads(metadata["clips"]) != _names(clips):
        return False
    paths = [clip.path for clip in clips] + _beside(clips)
    sources = [Source(*values) for name in ("sources", "beside") for values in json.loads(metadata.get(name, "[]"))]
    return all(source.still_is(path) for source, path in zip(sources, paths, strict=True))


def _names(clips: list[CaptionedClip]) -> list[list[str]]:
    return [[str(clip.path), clip.caption, *map(str, clip.beside)] for clip in clips]


def _beside(clips: list[CaptionedClip]) -> list[Path]:
    return [path for clip in clips for path in clip.beside]


def read_places(path: Path) -> tuple[dict[str, list[Place]], list[tuple[str, str]]]:
    """The clips of a shard by bucket, and (file, reason) of those that were left out."""
    with safe_open(path, "pt") as shard:
        rows, clips, sources, broken = (
            json.loads(shard.metadata()[name]) for name in ("rows", "clips", "sources", "broken")
        )
    places = {}
    for bucket, numbers in rows.items():
        contents = [sources[number][2] or clips[number][1] for number in numbers]
        named = zip(contents, [clips[number][0] for number in numbers], strict=True)
        places[bucket] = [Place(path, row, content, name) for row, (content, name) in enumerate(named)]
    return places, [(name, reason) for name, reason in broken]


def write_shard(path: Path, start: int, clips: list[CaptionedClip], made_with: dict, encode: Encode) -> None:
    """Encodes some clips into one file, grouped by bucket; a clip that is broken is left out and noted."""
    groups: dict[str, list[tuple[torch.Tensor, dict]]] = {}
    broken, rows = [], {}
    # Before the clips are read: one that is still being copied is then seen to have changed.
    sources, beside = (
        [list(vars(Source.of(path)).values()) for path in paths]
        for paths in ([clip.path for clip in clips], _beside(clips))
    )
    for number, clip in enumerate(clips):
        try:
            bucket, *values = encode(start + number, clip)
            stored = _stored(*values)
        except BrokenClip as error:
            broken.append([str(clip.path), str(error)])
            continue
        groups.setdefault(str(bucket), []).append(stored)
        rows.setdefault(str(bucket), []).append(number)
    metadata = {
        "made_with": made_with,
        "clips": _names(clips),
        "sources": sources,
        "beside": beside,
        "broken": broken,
        "rows": rows,
    }
    with replacing(path) as partial:
        save_file(_stacked(groups), partial, {name: json.dumps(value) for name, value in metadata.items()})


def _stored(latents: torch.Tensor, conditions: dict) -> tuple[torch.Tensor, dict]:
    """As a shard holds them, in half precision. Raises BrokenClip for what is not finite there."""
    latents = latents.half().cpu()
    conditions = {name: _halved(value) for name, value in conditions.items() if torch.is_tensor(value)}
    for name, value in {"latents": latents, **conditions}.items():
        if not value.isfinite().all():
            raise BrokenClip(f"its {name} are not finite in half precision")
    return latents, conditions


def _stacked(groups: dict[str, list[tuple[torch.Tensor, dict]]]) -> dict[str, torch.Tensor]:
    """The tensors of a file by bucket and name, a row a clip."""
    tensors = {}
    for bucket, rows in groups.items():
        latents, conditions = zip(*rows, strict=True)
        tensors[f"{bucket}.latents"] = torch.stack(latents)
        for name in conditions[0]:
            values = [condition[name] for condition in conditions]
            equal = len({value.shape for value in values}) == 1
            stacked = torch.stack(values) if equal else torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
            tensors[f"{bucket}.{name}"] = stacked
    return tensors


def _halved(value: torch.Tensor) -> torch.Tensor:
    """In half precision, of (length, dim) without the rows of zeros at the end; numbers and masks as they are."""
    if value.ndim < 2 or not value.is_floating_point():
        return value
    if value.ndim > 2:
        return value.half()
    used = value.abs().sum(-1).nonzero()
    return value[: int(used.max()) + 1 if len(used) else 1].half()


def filled(value: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """A condition as long as `full`, in float32 if it is a float: rows of zeros at the end are not stored."""
    value = value.float() if value.is_floating_point() else value
    missing = len(full) - len(value) if full.ndim == 2 else 0
    return torch.nn.functional.pad(value, (0, 0, 0, missing)) if missing else value
