"""Small clips of every kind that people have, and what a player shows of each.

Every frame shows its own number as a pattern of bits, so that a frame that is read can be told from all others, and
from itself turned or shifted.
"""

import os
import struct
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

HEIGHT, WIDTH, FRAMES = 48, 64, 30
TURNED = {  # how a player turns: a b c d of the display matrix, and how the frame (H, W, 3) has to be stored
    "90": ((0, 1, -1, 0), lambda shown: np.rot90(shown)),
    "180": ((-1, 0, 0, -1), lambda shown: np.rot90(shown, 2)),
    "270": ((0, -1, 1, 0), lambda shown: np.rot90(shown, -1)),
    "mirrored": ((-1, 0, 0, 1), lambda shown: shown[:, ::-1]),
    "mirrored and 90": ((0, 1, 1, 0), lambda shown: shown.transpose(1, 0, 2)),
}


@dataclass(frozen=True)
class Kind:
    """How a clip is written, and what of it is shown.

    times: of its frames, in `time_base`. edits: (duration, media time) in movie and media ticks, of an mp4. turned: one
    of TURNED. shown: (seconds after the first, number) of the frames that a player shows; all of them by default.
    """

    ending: str = "mp4"
    codec: str = "libx264"
    times: tuple[int, ...] = tuple(range(FRAMES))
    time_base: Fraction = Fraction(1, 10)
    nominal: int = 10
    size: tuple[int, int] = (HEIGHT, WIDTH)
    pixels: str = "yuv420p"
    options: dict = field(default_factory=dict)
    container: dict = field(default_factory=dict)
    edits: tuple[tuple[int, int], ...] = ()
    turned: str = ""
    sound: float = 0.0
    cover: bool = False
    aspect: Fraction | None = None
    shown: tuple[tuple[float, int], ...] = ()

    def truth(self) -> list[tuple[float, int]]:
        return list(self.shown) or [
            (float((time - self.times[0]) * self.time_base), number) for number, time in enumerate(self.times)
        ]


def picture(number: int, kind: Kind) -> np.ndarray:
    """The frame as it is shown, (H, W, 3) uint8."""
    height, width = kind.size
    if kind.turned in ("90", "270", "mirrored and 90"):
        height, width = width, height
    return _pattern(number, height, round(width * (kind.aspect or 1)))


def _pattern(number: int, height: int, width: int) -> np.ndarray:
    bits = np.array([[number >> 3 * row + column & 1 for column in range(3)] for row in range(2)], np.uint8)
    rows, columns = np.arange(height) * 2 // height, np.arange(width) * 3 // width
    shades = 40 + 160 * bits[rows][:, columns]
    shades[: height // 6, : width // 6] = 110  # which corner is which
    return np.repeat(shades[..., None], 3, axis=2)


def number_of(frame: np.ndarray, kind: Kind) -> int | None:
    """Which frame this is, or None if it is none of the clip's."""
    pictures = [picture(number, kind) for number in range(len(kind.times))]
    if frame.shape != pictures[0].shape:
        return None
    errors = [np.abs(frame.astype(float) - shown).mean() for shown in pictures]
    return int(np.argmin(errors)) if min(errors) < 12 else None


def _stored(number: int, kind: Kind) -> np.ndarray:
    """The frame as it lies in the file: a player turns it."""
    if kind.aspect:
        return _pattern(number, *kind.size)
    shown = picture(number, kind)
    return np.ascontiguousarray(TURNED[kind.turned][1](shown)) if kind.turned else shown


def write(kind: Kind, folder: Path) -> Path:
    """Writes the clip and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"clip.{kind.ending}"
    policy = (os.sched_getscheduler(0), os.sched_getparam(0)) if hasattr(os, "sched_setscheduler") else None
    with av.open(str(path), "w", container_options=kind.container) as container:
        if kind.cover:
            cover = container.add_stream("mjpeg", rate=1)
            cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
            cover.disposition = av.stream.Disposition.attached_pic
        stream = container.add_stream(kind.codec, rate=kind.nominal, options={"threads": "1", **kind.options})
        stream.height, stream.width = kind.size
        stream.pix_fmt, stream.time_base = kind.pixels, kind.time_base
        stream.codec_context.time_base = kind.time_base
        if kind.aspect:
            stream.codec_context.sample_aspect_ratio = kind.aspect
        if kind.sound:
            audio = container.add_stream("aac" if kind.ending != "webm" else "libopus", rate=48000)
        if kind.cover:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 77, np.uint8), format="rgb24")
            for packet in [*cover.encode(frame), *cover.encode()]:
                container.mux(packet)
        for number, time in enumerate(kind.times):
            frame = av.VideoFrame.from_ndarray(_stored(number, kind), format="rgb24")
            frame.pts, frame.time_base = time, kind.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if kind.sound:
            for start in range(0, int(kind.sound * 48000), 960):
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
                frame.rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    if policy is not None:
        # As root libsvtav1 leaves the calling thread at real-time priority, and with it every process started later: on
        # the one core that a test worker has, those wait for each other for ever.
        os.sched_setscheduler(0, *policy)
    if kind.edits or kind.turned:
        content = path.read_bytes()
        if kind.turned:
            content = _with_matrix(content, TURNED[kind.turned][0], kind.size)
        if kind.edits:
            content = _with_edits(content, kind.edits)
        path.write_bytes(content)
    return path


def _boxes(content: bytes, start: int, end: int) -> dict[bytes, tuple[int, int]]:
    """Of the boxes of an mp4 between two bytes: name -> (first byte, byte after the last)."""
    found = {}
    while start < end:
        size, name = struct.unpack(">I4s", content[start : start + 8])
        found.setdefault(name, (start, start + size))
        start += size
    return found


def _with_edits(content: bytes, edits: tuple[tuple[int, int], ...]) -> bytes:
    """The mp4 with this edit list in its first track; its moov is the last box, so that nothing else moves."""
    moov = _boxes(content, 0, len(content))[b"moov"]
    trak = _boxes(content, moov[0] + 8, moov[1])[b"trak"]
    inside = _boxes(content, trak[0] + 8, trak[1])
    entries = b"".join(struct.pack(">IiI", duration, time, 0x10000) for duration, time in edits)
    elst = struct.pack(">I4sII", 16 + len(entries), b"elst", 0, len(edits)) + entries
    edts = struct.pack(">I4s", 8 + len(elst), b"edts") + elst
    at = inside[b"edts"] if b"edts" in inside else (inside[b"tkhd"][1],) * 2
    more = len(edts) - (at[1] - at[0])
    content = bytearray(content[: at[0]] + edts + content[at[1] :])
    for box in (moov, trak):
        content[box[0] : box[0] + 4] = struct.pack(">I", box[1] - box[0] + more)
    return bytes(content)


def _with_matrix(content: bytes, matrix: tuple[int, int, int, int], size: tuple[int, int]) -> bytes:
    moov = _boxes(content, 0, len(content))[b"moov"]
    trak = _boxes(content, moov[0] + 8, moov[1])[b"trak"]
    tkhd = _boxes(content, trak[0] + 8, trak[1])[b"tkhd"][0]
    a, b, c, d = matrix
    x, y = (size[1] if a < 0 or c < 0 else 0), (size[0] if b < 0 or d < 0 else 0)
    values = [a << 16, b << 16, 0, c << 16, d << 16, 0, x << 16, y << 16, 1 << 30]
    at = tkhd + 8 + 4 + 20 + 16
    return content[:at] + struct.pack(">9i", *values) + content[at + 36 :]


def _rates(*spans: tuple[int, int]) -> tuple[int, ...]:
    """Times of frames that follow each other at (how many, ticks apart)."""
    return tuple(np.cumsum([0, *[ticks for count, ticks in spans for _ in range(count)]])[:-1].tolist())


def _part(first: int, end: int, after: float = 0.0) -> tuple[tuple[float, int], ...]:
    """Frames at ten a second, from `after` seconds on."""
    return tuple((after + place / 10, number) for place, number in enumerate(range(first, end)))


BFRAMES = {"bf": "3", "b-adapt": "0", "g": "10"}
IN_ORDER = {"bf": "0", "g": "10"}
AV1 = {"preset": "8", "crf": "10", "svtav1-params": "lp=1"}
HEVC = "log-level=none:pools=1:keyint=10:min-keyint=10:bframes=3"
MS = Fraction(1, 1000)
UNEVEN = {"times": _rates((15, 10), (15, 60)), "time_base": Fraction(1, 600), "nominal": 60}
KINDS = {
    "constant rate": Kind(options=IN_ORDER),
    "variable rate": Kind(**UNEVEN, options=IN_ORDER),
    "QuickTime, variable rate": Kind(ending="mov", codec="mpeg4", **UNEVEN),
    "B-frames": Kind(options=BFRAMES),
    "B-frames, variable rate": Kind(options=BFRAMES, **UNEVEN),
    "B-frames, no edit list": Kind(options=BFRAMES, container={"use_editlist": "0"}),
    "B-frames, MPEG-4": Kind(codec="mpeg4", options={"bf": "2", "g": "10"}),
    "open GOP": Kind(options={**BFRAMES, "x264-params": "open-gop=1"}),
    "open GOP, HEVC": Kind(codec="libx265", options={"x265-params": HEVC}),
    "fragments": Kind(options=BFRAMES, container={"movflags": "frag_keyframe+empty_moov"}),
    "Matroska": Kind(ending="mkv", time_base=MS, times=_rates((30, 33)), nominal=30, options=IN_ORDER),
    "Matroska, another average": Kind(
        ending="mkv", options=BFRAMES, time_base=MS, times=_rates((10, 33), (20, 150)), nominal=30
    ),
    "webm of a browser": Kind(
        ending="webm", codec="libvpx", time_base=MS, nominal=1000, times=_rates((9, 21), (9, 48), (12, 34))
    ),
    "AVI": Kind(ending="avi", codec="mpeg4", options={"bf": "2"}),
    "edit list, cut": Kind(edits=((1300, 7168),), options=BFRAMES, shown=_part(5, 18)),  # what B-frames add: 2048
    "edit list, begins later": Kind(edits=((500, -1), (3000, 0)), options=IN_ORDER),
    "edit list, two parts": Kind(
        edits=((500, 20480), (1000, 0)), options=IN_ORDER, shown=_part(20, 25) + _part(0, 10, after=0.5)
    ),
    "negative start": Kind(times=tuple(range(-3, 27)), options=IN_ORDER, shown=_part(3, 30)),
    "negative start, Matroska": Kind(
        ending="mkv",
        time_base=MS,
        times=tuple(range(-250, 2750, 100)),
        options=IN_ORDER,
        container={"avoid_negative_ts": "disabled"},
    ),
    "turned by 90": Kind(turned="90", options=IN_ORDER),
    "turned by 90, narrow": Kind(turned="90", size=(64, 36), options=IN_ORDER),
    "turned by 180": Kind(turned="180", options=IN_ORDER),
    "turned by 270": Kind(turned="270", options=IN_ORDER),
    "mirrored": Kind(turned="mirrored", options=IN_ORDER),
    "mirrored and turned": Kind(turned="mirrored and 90", options=IN_ORDER),
    "AV1": Kind(codec="libsvtav1", options=AV1, size=(64, 96)),
    "AV1, turned by 90": Kind(codec="libsvtav1", options=AV1, size=(64, 96), turned="90"),
    "10 bit": Kind(pixels="yuv420p10le", options=IN_ORDER),
    "10 bit, HEVC": Kind(codec="libx265", pixels="yuv420p10le", options={"x265-params": f"{HEVC}:open-gop=0"}),
    "odd size": Kind(
        ending="webm",
        codec="libvpx-vp9",
        size=(47, 65),
        time_base=MS,
        times=_rates((30, 100)),
        options={"cpu-used": "8"},
    ),
    "odd size, 4:4:4": Kind(pixels="yuv444p", size=(47, 65), options=IN_ORDER),
    "wide pixels": Kind(aspect=Fraction(4, 3), options=IN_ORDER),
    "sound longer than video": Kind(sound=5.0, options=IN_ORDER),
    "cover": Kind(cover=True, options=IN_ORDER),
}
