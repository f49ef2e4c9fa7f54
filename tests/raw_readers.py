"""What readers make of every kind of clip by themselves: the table of docs/readers.md.

    python tests/raw_readers.py                     # of the readers that are installed

decord2 is imported as decord, so that it has to be installed instead of it.
"""

import importlib.util
import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import av
import numpy as np
from clip_kinds import KINDS, Kind, number_of, write

ROUNDS = 8  # jumps to some frames of a file that has just been opened

os.environ["SVT_LOG"] = "-2"


def _jumps(count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [sorted(rng.choice(count, min(count, 6), replace=False).tolist()) for _ in range(ROUNDS)]


def by_decord(path: Path):
    import decord

    for indices in _jumps(len(decord.VideoReader(str(path)))):
        reader = decord.VideoReader(str(path), num_threads=1)
        times = reader.get_frame_timestamp(list(range(len(reader))))[:, 0]
        yield indices, reader.get_batch(indices).asnumpy(), times


def by_av(path: Path):
    with av.open(str(path)) as container:
        frames = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
    times, pictures = zip(*frames, strict=True)
    yield list(range(len(frames))), pictures, np.array(times, float)


def by_torchcodec(path: Path):
    from torchcodec.decoders import VideoDecoder

    for indices in _jumps(len(VideoDecoder(path))):
        decoder = VideoDecoder(path)
        every = decoder.get_frames_at(list(range(len(decoder))))
        yield indices, decoder.get_frames_at(indices).data.permute(0, 2, 3, 1).numpy(), every.pts_seconds.numpy()


READERS = {"decord": by_decord, "decord2": by_decord, "av": by_av, "torchcodec": by_torchcodec}


def installed() -> list[str]:
    found = []
    for name in READERS:
        try:
            version(name)
        except PackageNotFoundError:
            continue
        if importlib.util.find_spec(name.removesuffix("2")):
            found.append(name)
    return found


def verdict(reader: str, path: Path, kind: Kind) -> str:
    """`right`, or what is wrong: `fails`, `count`, `frames` or `times`."""
    truth = kind.truth()
    seconds, numbers = np.array([second for second, _ in truth]), [number for _, number in truth]
    try:
        for indices, pictures, times in READERS[reader](path):
            if len(times) != len(truth):
                return "count"
            if [number_of(picture, kind) for picture in pictures] != [numbers[index] for index in indices]:
                return "frames"
            if not np.abs(times - times[0] - seconds).max() < 2e-3:  # and not a number
                return "times"
    except Exception:  # each raises its own
        return "fails"
    return "right"


if __name__ == "__main__":
    names = sys.argv[1:] or installed()
    print("| kind |", " | ".join(f"{name} {version(name)}" for name in names), "|")
    for title, kind in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            path = write(kind, Path(folder))
            print(f"| {title} |", " | ".join(verdict(name, path, kind) for name in names), "|", flush=True)
