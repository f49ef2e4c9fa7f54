"""Reads a clip as a player shows it: which frames, when, and which way up.

decord jumps to frames by their numbers, av goes through a file by the times that are in it. docs/readers.md says which
of them is right for which kind of file.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import av
import decord
import numpy as np
from av.sidedata.sidedata import Type as SideData

from flexivid.training.data.buckets import BrokenClip

UPRIGHT = (1 << 16, 0, 0, 1 << 16)
JUMP = 0.05  # seconds by which parts of a sound may be apart and still follow each other
FINEST = 240  # frames a second at most, of a clip whose frames come at any time


@contextmanager
def _opened(path: Path) -> Iterator[tuple]:
    """The file and its video. What ffmpeg says of a broken file becomes BrokenClip."""
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")  # not the picture of a cover
            if stream is None:
                raise BrokenClip("it has no video")
            yield container, stream
    except av.FFmpegError as error:
        raise BrokenClip(str(error.strerror or error)) from None


def _matrix(frame: av.VideoFrame) -> tuple[int, int, int, int]:
    """How a player turns or mirrors a frame: the pixel at (x, y) is shown at (ax + cy, bx + dy)."""
    for data in frame.side_data:
        if data.type == SideData.DISPLAYMATRIX:
            a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
            return a, b, c, d
    return UPRIGHT


def _picture(frame: av.VideoFrame, aspect: float) -> np.ndarray:
    """A frame as a player shows it, (H, W, 3) uint8. aspect: width of a pixel to its height."""
    picture = frame.to_ndarray(format="rgb24", width=max(1, round(frame.width * aspect)), height=frame.height)
    a, b, c, d = _matrix(frame)
    if abs(b) > abs(a):
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]


def _pick(frames: Iterator[tuple[int, av.VideoFrame]], moments: list[int], aspect: float) -> list[np.ndarray]:
    """The pictures that are shown at `moments`, which ascend: none if frames begin later, fewer if they end before.

    Of the frames one is held at a time.
    """
    pictures: list[np.ndarray] = []
    shown, since = None, None
    for time, frame in frames:
        while shown is not None and len(pictures) < len(moments) and moments[len(pictures)] < time:
            pictures.append(_picture(shown, aspect))
        if len(pictures) == len(moments) or (shown is None and time > moments[0]):
            return pictures
        shown, since = frame, time
    while shown is not None and len(pictures) < len(moments) and moments[len(pictures)] <= since:
        pictures.append(_picture(shown, aspect))
    return pictures


def _constant_rate(seconds: np.ndarray, nominal: float) -> tuple[int, float]:
    """How many frames at how many a second show all that is shown at `seconds`, the first of them 0."""
    if len(seconds) == 1:
        return 1, nominal
    fps = (len(seconds) - 1) / float(seconds[-1])
    if np.abs(seconds * fps - np.arange(len(seconds))).max() < 0.25:
        return len(seconds), fps
    fps = min(1 / float(np.diff(seconds).min()), FINEST)
    return int(seconds[-1] * fps + 0.5) + 1, fps


class Reader:
    """One clip. Raises BrokenClip if there is none in the file.

    count, fps: frames, and how many a second. A clip of variable rate is read as one of constant rate, whose frames are
    as close as its closest two. begins: when the first is shown, in seconds of the file. size: (height, width) as it is
    shown, in square pixels.
    """

    def __init__(self, path: Path):
        if not path.exists():
            raise BrokenClip("there is no such file")
        self.path = path
        with _opened(path) as (container, stream):
            packets = [packet for packet in container.demux(stream) if packet.size]
            rate, tick, self._aspect = stream.average_rate, stream.time_base, float(stream.sample_aspect_ratio or 1)
        with _opened(path) as (container, stream):
            first = next(container.decode(stream), None)
        written = [packet.pts for packet in packets if not packet.is_discard]
        if not written or first is None:
            raise BrokenClip("it has no frames")
        self._timed = None not in written
        if not self._timed:
            if not rate:
                raise BrokenClip("it does not say when its frames are shown")
            written, tick = list(range(len(written))), 1 / rate
        self._times = np.unique(written)  # when frames are shown, in ticks
        self._seconds = (self._times - self._times[0]) * float(tick)
        self.begins = float(self._times[0] * tick) if self._timed else 0.0
        self.count, self.fps = _constant_rate(self._seconds, float(rate or 1))
        self.size = _picture(first, self._aspect).shape[:2]
        # decord counts frames that are not shown, and takes others where they are stored in another order.
        as_stored = self._timed and len(written) == len(packets) and written == self._times.tolist()
        self._for_decord = as_stored and written[0] == 0 and self._aspect == 1 and _matrix(first) == UPRIGHT

    def read(self, indices: np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8: what is shown at `indices`, which ascend. Raises BrokenClip if it cannot be decoded."""
        # Half a frame on, so that times may be rounded.
        wanted = np.searchsorted(self._seconds, (indices + 0.5) / self.fps, side="right") - 1
        frames = self._by_decord(wanted) if self._for_decord else None
        return self._by_av(self._times[wanted]) if frames is None else frames

    def _by_decord(self, wanted: np.ndarray) -> np.ndarray | None:
        try:
            reader = decord.VideoReader(str(self.path), num_threads=1)
            frames = reader.get_batch(wanted.tolist()).asnumpy()
        except Exception:  # decord raises its own, and RuntimeError, for what it does not know
            return None
        # It takes the padding of a row for a fourth channel.
        return frames if len(reader) == len(self._times) and frames.shape[1:] == (*self.size, 3) else None

    def _by_av(self, wanted: np.ndarray) -> np.ndarray:
        moments, back = np.unique(wanted, return_inverse=True)
        pictures: list[np.ndarray] = []
        for start in (moments[0], None):  # some files send one who jumps to a frame too far
            with _opened(self.path) as (container, stream):
                if start is not None and self._timed:
                    container.seek(int(start), stream=stream)
                frames = container.decode(stream)
                timed = ((frame.pts, frame) for frame in frames) if self._timed else enumerate(frames)
                pictures = _pick(timed, moments.tolist(), self._aspect)
            if len(pictures) == len(moments):
                return np.stack(pictures)[back]
        raise BrokenClip(f"{len(pictures)} of the {len(moments)} frames that are needed can be decoded")


def read_sound(path: Path, begins: float, seconds: float, rate: int) -> np.ndarray:
    """(2, samples) in [-1, 1] of what is heard with a clip, from `begins` seconds of the file on, at `rate` a second.

    Silence where there is none, and throughout if the file has no sound. Raises BrokenClip if it cannot be decoded.
    """
    heard, place = np.zeros((2, round(seconds * rate)), np.float32), None
    try:
        for samples, time in _sounds(path, rate):
            at = (place or 0) if time is None else round((time - begins) * rate)
            # Times may be rounded to milliseconds, which would tear the sound.
            place = at if place is None or abs(at - place) > JUMP * rate else place
            first, end = np.clip((place, place + samples.shape[1]), 0, heard.shape[1])
            heard[:, first:end] = samples[:, first - place : end - place]
            place += samples.shape[1]
            if place >= heard.shape[1]:
                break
    except (av.FFmpegError, ValueError) as error:  # ValueError: its format changes
        raise BrokenClip(f"its sound cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return heard


def _sounds(path: Path, rate: int) -> Iterator[tuple[np.ndarray, float | None]]:
    """Parts of a file's sound, (2, samples) each, and when they are heard, as far as it says so."""
    with av.open(str(path)) as container:
        stream = container.streams.best("audio")
        if stream is None:
            return
        # One channel is made two here: ffmpeg would make it softer.
        resampler = av.AudioResampler(format="fltp", layout="mono" if stream.channels == 1 else "stereo", rate=rate)
        for frame in chain(container.decode(stream), [None]):  # None: what is left
            for part in resampler.resample(frame):
                yield np.broadcast_to(part.to_ndarray(), (2, part.samples)), part.time
