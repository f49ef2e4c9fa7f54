"""Captioned clips in a folder: finding them, reading them at one frame rate, fitting them to buckets of sizes.

A folder holds one of
- `metadata.csv`, `metadata.json` or `metadata.jsonl`: `file_name`, `media_path` or `video`, and `caption`, `text` or
  `prompt`;
- `videos.txt` and `prompts.txt`, line by line;
- `a.mp4` beside `a.txt`, in subfolders too.
"""

import csv
import json
from dataclasses import dataclass
from pathlib import Path

import av
import decord
import numpy as np
import torch
from torch.nn.functional import interpolate

from flexivid.training.data.buckets import Bucket

PATH_KEYS, CAPTION_KEYS = ("file_name", "media_path", "video"), ("caption", "text", "prompt")
EXTENSIONS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}


class BrokenClip(Exception):
    """A clip that cannot be trained on; the message says why."""


@dataclass(frozen=True)
class CaptionedClip:
    path: Path
    caption: str


def find_clips(folder: Path) -> list[CaptionedClip]:
    """The clips that `folder` lists, in its order. None is opened yet.

    Raises ValueError for a folder without captions, with two lists, for a line that is not complete, and for a path
    that leaves the folder.
    """
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist")
    lists = [path for path in (folder / f"metadata.{kind}" for kind in ("csv", "json", "jsonl")) if path.exists()]
    if (folder / "videos.txt").exists():
        lists.append(folder / "videos.txt")
    if len(lists) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in lists)}; keep one of them")
    if not lists:
        pairs = _pairs(folder)
    elif lists[0].name == "videos.txt":
        pairs = _aligned_lines(folder)
    else:
        pairs = _metadata(lists[0])
    root = folder.resolve()
    for name, caption in pairs:
        if not (root / name).resolve().is_relative_to(root):
            raise ValueError(f"{name} leaves the data folder {folder}; clips must lie in it")
        if not caption.strip():
            raise ValueError(f"{name} has an empty caption")
    if not pairs:
        raise ValueError(f"no clips in {folder}: it needs metadata.csv, videos.txt and prompts.txt, or a.mp4 and a.txt")
    return [CaptionedClip(root / name, caption.strip()) for name, caption in pairs]


def _pairs(folder: Path) -> list[tuple[str, str]]:
    clips = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if missing := [path for path in clips if not path.with_suffix(".txt").exists()]:
        raise ValueError(f"{len(missing)} clips have no caption, for example {missing[0]}: write it to a .txt beside")
    return [(str(path.relative_to(folder)), path.with_suffix(".txt").read_text()) for path in clips]


def _aligned_lines(folder: Path) -> list[tuple[str, str]]:
    if not (folder / "prompts.txt").exists():
        raise ValueError(f"{folder} has videos.txt and no prompts.txt")
    names, captions = ((folder / name).read_text().splitlines() for name in ("videos.txt", "prompts.txt"))
    if len(names) != len(captions):
        raise ValueError(f"{folder}: videos.txt has {len(names)} lines, prompts.txt {len(captions)}; one each a clip")
    return list(zip(names, captions, strict=True))


def _metadata(path: Path) -> list[tuple[str, str]]:
    text = path.read_text()
    try:
        if path.suffix == ".csv":
            rows = list(csv.DictReader(text.splitlines()))
        elif path.suffix == ".json":
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must be a list with an object per clip")

    def value(row: dict, number: int, keys: tuple[str, ...]) -> str:
        found = [row[key] for key in keys if row.get(key)]
        if len(found) != 1 or not isinstance(found[0], str):
            raise ValueError(
                f"{path}, clip {number}: needs one of {', '.join(keys)}, and has {', '.join(map(str, row))}"
            )
        return found[0]

    return [(value(row, number, PATH_KEYS), value(row, number, CAPTION_KEYS)) for number, row in enumerate(rows, 1)]


def frame_indices(count: int, source_fps: float, frames: int, fps: float, start: float) -> np.ndarray | None:
    """Which of `count` source frames make a clip of `frames` at `fps`, or None if they are too few.

    start: where the clip begins, 0 (at the first frame) to 1 (as late as it can).
    """
    offsets = np.arange(frames) * source_fps / fps
    spare = count - 1 - offsets[-1]
    if spare < -0.5:
        return None
    return np.minimum(np.floor(offsets + start * max(spare, 0.0) + 0.5).astype(int), count - 1)


class Reader:
    """One clip: decord first, av for what decord cannot open. Raises BrokenClip where both fail.

    count: frames; fps: frames a second; size: (height, width).
    """

    def __init__(self, path: Path):
        if not path.exists():
            raise BrokenClip("there is no such file")
        self.path = path
        try:
            self._decord = decord.VideoReader(str(path), num_threads=1)
            self.count, self.fps = len(self._decord), float(self._decord.get_avg_fps())
            self.size = tuple(self._decord[0].shape[:2])
        except Exception:  # decord raises its own, and RuntimeError, for what is broken and for what it does not know
            self._decord = None
            self._frames = self._all_frames()
            self.count, self.size = len(self._frames), self._frames[0].shape[:2]

    def _all_frames(self) -> list[np.ndarray]:
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise BrokenClip("it has no video")
                stream = container.streams.video[0]
                self.fps = float(stream.average_rate or 0)
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        except av.FFmpegError as error:
            raise BrokenClip(str(error.strerror or error)) from None
        if not frames or not self.fps:
            raise BrokenClip("it has no frames")
        return frames

    def read(self, indices: np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8. Raises BrokenClip if the frames are not there."""
        if self._decord is not None:
            try:
                return self._decord.get_batch(indices.tolist()).asnumpy()
            except Exception:  # decord 0.6 also fails on whole files, where a row of pixels is not what it aligns to
                self._decord, self._frames = None, self._all_frames()
        if indices[-1] >= len(self._frames):
            raise BrokenClip(f"{len(self._frames)} of {self.count} frames can be decoded")
        return np.stack([self._frames[index] for index in indices])


def choose_bucket(count: int, source_fps: float, size: tuple[int, int], buckets: list[Bucket], fps: float) -> Bucket:
    """The bucket of a clip: of those that it is long enough for, the longest, and of these the nearest in its shape.

    Raises BrokenClip if it is too short for all.
    """
    fitting = [bucket for bucket in buckets if frame_indices(count, source_fps, bucket.frames, fps, 0.0) is not None]
    if not fitting:
        shortest = min(bucket.frames for bucket in buckets)
        raise BrokenClip(f"too short: {count} frames at {source_fps:.4g} a second, {shortest} at {fps:g} are needed")
    longest = max(bucket.frames for bucket in fitting)

    def stretch(bucket: Bucket) -> float:
        return abs(np.log(bucket.width / bucket.height) - np.log(size[1] / size[0]))

    return min((bucket for bucket in fitting if bucket.frames == longest), key=lambda b: (stretch(b), -b.height))


def fit(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Frames (T, H, W, 3) uint8 -> (3, T, height, width) in [-1, 1]: resized until they cover, the middle cut out."""
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(height / clip.shape[2], width / clip.shape[3])
    covering = [max(low, round(side * scale)) for low, side in zip((height, width), clip.shape[2:], strict=True)]
    clip = interpolate(clip, covering, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((side - low) // 2 for side, low in zip(covering, (height, width), strict=True))
    return clip[:, :, top : top + height, left : left + width].transpose(0, 1)


def load_clip(path: Path, buckets: list[Bucket], fps: float, start: float = 0.5) -> tuple[Bucket, torch.Tensor]:
    """The bucket of a clip and its frames, (3, frames, height, width) in [-1, 1]. Raises BrokenClip."""
    reader = Reader(path)
    bucket = choose_bucket(reader.count, reader.fps, reader.size, buckets, fps)
    frames = reader.read(frame_indices(reader.count, reader.fps, bucket.frames, fps, start))
    return bucket, fit(frames, bucket.height, bucket.width)
