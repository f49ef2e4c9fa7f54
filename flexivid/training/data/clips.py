"""Captioned clips: read at one frame rate, fitted to buckets of sizes."""

from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate

from flexivid.training.data.buckets import BrokenClip, Bucket, choose_bucket, frame_indices
from flexivid.training.data.captions import CaptionedClip, find_clips
from flexivid.training.data.readers import Reader, read_sound

__all__ = [
    "BrokenClip",
    "Bucket",
    "CaptionedClip",
    "Reader",
    "choose_bucket",
    "find_clips",
    "fit",
    "frame_indices",
    "load_beside",
    "load_clip",
    "load_sound",
]


def fit(frames: np.ndarray, height: int, width: int) -> torch.Tensor:
    """Frames (T, H, W, 3) uint8 -> (3, T, height, width) in [-1, 1]: resized until they cover, the middle cut out."""
    clip = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    scale = max(height / clip.shape[2], width / clip.shape[3])
    covering = [max(low, round(side * scale)) for low, side in zip((height, width), clip.shape[2:], strict=True)]
    clip = interpolate(clip, covering, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((side - low) // 2 for side, low in zip(covering, (height, width), strict=True))
    return clip[:, :, top : top + height, left : left + width].transpose(0, 1)


def load_beside(path: Path, clip: Path, bucket: Bucket, fps: float) -> torch.Tensor:
    """The frames of a control video or a mask that are shown with those of `load_clip`, in the same form.

    Raises BrokenClip also if it has not the clip's frames, rate and shape.
    """
    try:
        own, reader = Reader(clip), Reader(path)
    except BrokenClip as error:
        raise BrokenClip(f"{path.name}: {error}") from None
    (height, width), (own_height, own_width) = reader.size, own.size
    in_step = (reader.count, round(reader.fps, 2)) == (own.count, round(own.fps, 2))
    if not in_step or abs(height * own_width / (width * own_height) - 1) > 0.02:
        raise BrokenClip(
            f"{path.name} has {reader.count} frames at {reader.fps:.4g} a second, {height}x{width}, and the clip "
            f"{own.count} at {own.fps:.4g}, {own_height}x{own_width}: both must have the same frames and shape"
        )
    return load_clip(path, [bucket], fps)[1]


def load_clip(path: Path, buckets: list[Bucket], fps: float, start: float = 0.5) -> tuple[Bucket, torch.Tensor]:
    """The bucket of a clip and its frames, (3, frames, height, width) in [-1, 1]. Raises BrokenClip."""
    reader = Reader(path)
    bucket = choose_bucket(reader.count, reader.fps, reader.size, buckets, fps)
    frames = reader.read(frame_indices(reader.count, reader.fps, bucket.frames, fps, start))
    return bucket, fit(frames, bucket.height, bucket.width)


def load_sound(path: Path, bucket: Bucket, fps: float, rate: int, start: float = 0.5) -> torch.Tensor:
    """What is heard with the frames of `load_clip`, (2, samples) at `rate` a second. Raises BrokenClip."""
    reader = Reader(path)
    first = frame_indices(reader.count, reader.fps, bucket.frames, fps, start)[0]
    return torch.from_numpy(read_sound(path, reader.begins + first / reader.fps, bucket.frames / fps, rate))
