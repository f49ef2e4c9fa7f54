"""Writing clips and pictures of clips: beside, then renamed, so that nothing half-written is left."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from flexivid.files import replacing

LABEL_HEIGHT = 16
LAYOUTS = {1: "mono", 2: "stereo"}


@dataclass(frozen=True)
class Sound:
    """samples: (channels, samples) float32 from -1 to 1, of one channel or two. rate: samples a second."""

    samples: np.ndarray
    rate: int


@dataclass(frozen=True)
class Clip:
    """frames: (T, H, W, 3) uint8. sound: what the model makes beside them, if it does."""

    frames: np.ndarray
    sound: Sound | None = None

    @property
    def sounds(self) -> tuple[Sound, ...]:
        return () if self.sound is None else (self.sound,)


def write_mp4(
    frames: Iterable[np.ndarray], path: Path, fps: int | Fraction, crf: int = 10, sounds: Sequence[Sound] = ()
) -> None:
    """frames: (H, W, 3) uint8 each, with even H and W, as h264; crf: its quality, smaller is better and larger.
    sounds: as AAC, a track each, of which players play the first unless told otherwise."""
    frames = iter(frames)
    first = next(frames)
    with replacing(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": str(crf)})
        stream.height, stream.width, stream.pix_fmt = *first.shape[:2], "yuv420p"
        tracks = [container.add_stream("aac", rate=sound.rate, layout=LAYOUTS[len(sound.samples)]) for sound in sounds]
        for frame in chain([first], frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
        for track, sound in zip(tracks, sounds, strict=True):
            container.mux(track.encode(_as_audio(sound)))
            container.mux(track.encode())


def _as_audio(sound: Sound) -> av.AudioFrame:
    samples = np.ascontiguousarray(sound.samples.clip(-1, 1), dtype=np.float32)
    audio = av.AudioFrame.from_ndarray(samples, format="fltp", layout=LAYOUTS[len(samples)])
    audio.sample_rate, audio.pts, audio.time_base = sound.rate, 0, Fraction(1, sound.rate)
    return audio


def enlarge(frames: np.ndarray, least_side: int = 256) -> np.ndarray:
    """Whole-number enlargement by repeating pixels, so that small clips can be seen and stay what they are.

    frames: (T, H, W, 3). least_side: of the shorter of H and W.
    """
    factor = max(1, -(-least_side // min(frames.shape[1:3])))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def labelled(frames: np.ndarray, text: str) -> np.ndarray:
    """The frames with a line of text above them: (T, H + LABEL_HEIGHT, W, 3)."""
    label = Image.new("RGB", (frames.shape[2], LABEL_HEIGHT), "white")
    ImageDraw.Draw(label).text((3, 2), text, fill="black")
    strip = np.broadcast_to(np.asarray(label), (len(frames), LABEL_HEIGHT, frames.shape[2], 3))
    return np.concatenate([strip, frames], axis=1)


def write_side_by_side(arms: dict[str, Clip], path: Path, fps: int) -> None:
    """Clips of equal size next to each other, each under its label, as one mp4, with their sounds in this order."""
    columns = [labelled(enlarge(clip.frames), label) for label, clip in arms.items()]
    sounds = [sound for clip in arms.values() for sound in clip.sounds]
    write_mp4(np.concatenate(columns, axis=2), path, fps, sounds=sounds)


def write_picture(arms: dict[str, np.ndarray], path: Path, columns: int = 5) -> None:
    """One PNG: a row a clip under its label, `columns` frames evenly spaced over its length."""
    rows = []
    for label, frames in arms.items():
        picked = enlarge(frames[np.linspace(0, len(frames) - 1, min(columns, len(frames))).round().astype(int)], 128)
        rows.append(labelled(np.concatenate(list(picked), axis=1)[None], label)[0])
    with replacing(path) as partial:
        Image.fromarray(np.concatenate(rows)).save(partial, format="png")
