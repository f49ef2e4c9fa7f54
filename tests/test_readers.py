"""Clips of every kind are read as a player shows them, and docs/readers.md says what readers make of them alone."""

import gc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from clip_kinds import BFRAMES, KINDS, Kind, number_of, write
from raw_readers import READERS, installed, verdict

from flexivid.training.data import readers
from flexivid.training.data.buckets import BrokenClip, Bucket, choose_bucket, frame_indices
from flexivid.training.data.readers import Reader

PAGE = (Path(__file__).parents[1] / "docs/readers.md").read_text()
TABLE = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.split("\n") if line.startswith("| ")]


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("kinds")
    return {name: write(kind, root / str(number)) for number, (name, kind) in enumerate(KINDS.items())}


def on_screen(kind: Kind, start: float, end: float) -> set[int]:
    """Numbers of the frames that a player shows at some moment of an interval, in seconds."""
    truth = kind.truth()
    ends = [second for second, _ in truth[1:]] + [np.inf]
    return {number for (second, number), until in zip(truth, ends, strict=True) if second < end and until > start}


@pytest.mark.parametrize("name", KINDS)
class TestEveryKind:
    def test_what_is_read_is_what_is_on_screen(self, clips, name):
        kind, reader = KINDS[name], Reader(clips[name])
        length = kind.truth()[-1][0]
        assert (reader.count - 1) / reader.fps == pytest.approx(length, abs=1 / reader.fps)
        rng = np.random.default_rng(0)
        some = [np.sort(rng.choice(reader.count, 6, replace=False)) for _ in range(4)]
        for indices in (np.arange(reader.count), *some):
            numbers = [number_of(frame, kind) for frame in Reader(clips[name]).read(indices)]
            for index, number in zip(indices, numbers, strict=True):
                assert number in on_screen(kind, index / reader.fps, (index + 1) / reader.fps), f"{index}: {numbers}"

    @pytest.mark.parametrize("start", [0.0, 0.5, 1.0])
    def test_time_runs_as_it_does_for_a_player(self, clips, name, start):
        kind, reader, rate = KINDS[name], Reader(clips[name]), 8.0
        frames = 5 if kind.truth()[-1][0] < 1.3 else 9
        indices = frame_indices(reader.count, reader.fps, frames, rate, start)
        first = start * max(kind.truth()[-1][0] - (frames - 1) / rate, 0)
        for place, frame in enumerate(reader.read(indices)):
            wanted, slack = first + place / rate, 1 / reader.fps
            assert number_of(frame, kind) in on_screen(kind, wanted - slack, wanted + slack), place

    def test_the_page_says_what_readers_make_of_it_alone(self, clips, name, monkeypatch):
        columns = [cell.split(" ")[0] for cell in TABLE[0]]
        row = dict(zip(columns, next(row for row in TABLE if row[0] == name), strict=True))
        for reader in installed():
            assert verdict(reader, clips[name], KINDS[name]) == row[reader]
        used = []
        monkeypatch.setattr(readers, "_pick", lambda *given, pick=readers._pick: used.append("av") or pick(*given))
        Reader(clips[name]).read(np.arange(3))
        assert (used or ["decord"])[0] == row["used"]
        assert row["used"] == "av" or row["decord"] == "right"


def test_the_page_has_a_row_for_every_kind_and_a_column_for_every_reader():
    assert [row[0] for row in TABLE[1:]] == list(KINDS)
    assert [cell.split(" ")[0] for cell in TABLE[0]] == ["kind", *READERS, "used"]


def test_a_browsers_clip_is_not_too_short(tmp_path):
    times = tuple(np.cumsum(np.random.default_rng(0).integers(20, 50, 60)).tolist())
    kind = Kind(ending="webm", codec="libvpx", time_base=Fraction(1, 1000), nominal=1000, times=times)
    reader = Reader(write(kind, tmp_path))
    assert choose_bucket(reader.count, reader.fps, reader.size, [Bucket(17, 32, 64)], 16.0) == Bucket(17, 32, 64)
    with pytest.raises(BrokenClip, match="too short"):
        choose_bucket(reader.count, reader.fps, reader.size, [Bucket(49, 32, 64)], 16.0)


def test_a_reader_that_jumps_too_far_is_sent_back_to_the_beginning(clips, monkeypatch):
    pick, calls = readers._pick, []

    def too_far(frames, *rest):
        for _ in range(0 if calls else 12):
            next(frames)
        calls.append(rest)
        return pick(frames, *rest)

    monkeypatch.setattr(readers, "_pick", too_far)
    kind = KINDS["B-frames"]
    assert [number_of(frame, kind) for frame in Reader(clips["B-frames"]).read(np.array([3, 8]))] == [3, 8]
    assert len(calls) == 2


def test_a_clip_that_was_not_copied_to_its_end_is_never_frozen(tmp_path):
    kind = Kind(options=BFRAMES, container={"movflags": "faststart"})
    path = write(kind, tmp_path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 4 // 5])
    reader, numbers = Reader(path), []
    for index in range(reader.count):
        try:
            numbers.append(number_of(reader.read(np.array([index]))[0], kind))
        except BrokenClip:
            break
    assert 10 < len(numbers) < 30 and numbers == list(range(len(numbers)))
    with pytest.raises(BrokenClip):
        reader.read(np.array([3, 29]))


def test_frames_that_are_not_wanted_are_not_held(tmp_path, monkeypatch):
    path = tmp_path / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10, options={"g": "100"})
        stream.height, stream.width = 96, 128
        for number in range(100):
            shade = np.full((96, 128, 3), 2 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    held, stack = [], np.stack

    def frames_in_memory() -> int:
        return sum(type(thing) is av.VideoFrame for thing in gc.get_objects())

    def counted(pictures):  # each of which holds the frame that it is of
        held.append(frames_in_memory() - before)
        return stack(pictures)

    monkeypatch.setattr("decord.VideoReader", None)
    monkeypatch.setattr(np, "stack", counted)
    before = frames_in_memory()
    frames = Reader(path).read(np.array([0, 50, 99]))
    assert np.abs(frames.mean((1, 2, 3)) - [0, 100, 198]).max() < 4
    assert max(held) < 10
