"""Clips that errors are measured on are never trained on: in no process, bucket or part of a run."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import tiny_pipeline

from flexivid.shapes.embedded import MODEL
from flexivid.training.config import ClipsConfig, Config
from flexivid.training.data import latents, sources
from flexivid.training.data.held_out import choose_held_out, usual_count
from flexivid.training.data.latents import build_cache
from flexivid.training.data.shards import Place
from flexivid.training.distill import DistillObjective
from flexivid.training.loop import train
from flexivid.training.report import public_name
from flexivid.video import write_mp4

BUCKETS = ["5x16x32", "5x32x16"]


def write_clips(folder, names, tall=()):
    """Clips that all differ, each of a noise of its own."""
    folder.mkdir(exist_ok=True)
    for name in names:
        size = (48, 32) if name in tall else (32, 48)
        noise = np.random.default_rng(zlib.crc32(name.encode())).integers(0, 256, (20, *size, 3), np.uint8)
        write_mp4(noise, folder / f"{name}.mp4", fps=10)
        (folder / f"{name}.txt").write_text(f"a clip called {name}")


@pytest.fixture
def clips(tmp_path):
    """Twelve clips of two shapes."""
    folder = tmp_path / "clips"
    write_clips(folder, [f"wide{i}" for i in range(8)] + [f"tall{i}" for i in range(4)], [f"tall{i}" for i in range(4)])
    return folder


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def settings(folder, **more) -> dict:
    sizes = {"buckets": BUCKETS, "fps": 10, "max_sequence_length": 16, "drop_caption": 0.0}
    return {"folder": str(folder), "cache": str(folder.parent / "cache"), **sizes, **more}


def drawn_by(cache, batches: int = 40) -> list[torch.Tensor]:
    """Latents of every clip that some batches hold."""
    generators = (torch.Generator().manual_seed(seed) for seed in range(batches))
    return [clip for generator in generators for clip in cache.batch(4, generator)[0]]


def overlap(trained: list[torch.Tensor], held_out: list[torch.Tensor]) -> bool:
    return any(torch.equal(a, b) for a in trained for b in held_out if a.shape == b.shape)


def test_held_out_clips_are_in_no_batch_of_any_process(clips, accelerator, monkeypatch):
    monkeypatch.setattr(latents, "SHARD", 4)
    monkeypatch.setattr(latents, "from_main", lambda accelerator, find: find())  # there is one process here
    config, pipe = ClipsConfig(**settings(clips, held_out=5)), tiny_pipeline()
    build_cache(config, pipe, accelerator)
    facts = {"device": accelerator.device, "num_processes": 2, "wait_for_everyone": lambda: None, "print": print}
    found = []
    for process in (0, 1):
        cache = build_cache(config, pipe, SimpleNamespace(**facts, process_index=process, is_main_process=process == 0))
        held_out = [clip for x_0, _ in cache.validation() for clip in x_0]
        trained = drawn_by(cache)
        assert len(held_out) == cache.held_out == 5 and not overlap(trained, held_out)
        assert {clip.shape for clip in trained} == {clip.shape for clip in held_out}, "a bucket is missing"
        assert len({clip.sum().item() for clip in trained}) == 7, "another clip is never trained on"
        found.append(cache.held_out_contents)
    assert found[0] == found[1]


def test_captions_of_held_out_clips_are_their_own(clips, accelerator):
    pipe = tiny_pipeline()
    cache = build_cache(ClipsConfig(**settings(clips, held_out=5, drop_caption=1.0)), pipe, accelerator)
    assert all(conditions["encoder_hidden_states"].abs().sum() > 0 for _, conditions in cache.validation())
    assert sum(len(x_0) for x_0, _ in cache.validation()) == 5


def test_by_default_a_few_and_of_few_clips_none(clips, accelerator, tmp_path, capsys):
    cache = build_cache(ClipsConfig(**settings(clips)), tiny_pipeline(), accelerator)
    assert cache.held_out == 1 and "1 of them are held out, never trained on: " in capsys.readouterr().out
    assert [usual_count(count) for count in (1, 4, 5, 12, 40, 10_000)] == [0, 0, 1, 1, 4, 8]
    write_clips(tmp_path / "four", ["a", "b", "c", "d"])
    cache = build_cache(ClipsConfig(**settings(tmp_path / "four")), tiny_pipeline(), accelerator)
    assert cache.held_out == 0 and [len(x_0) for x_0, _ in cache.validation()] == [latents.TRAINED_CLIPS]


def places(*rows: tuple[str, str]) -> dict[str, list[Place]]:
    """bucket and content of some clips, by bucket."""
    found = {}
    for number, (bucket, content) in enumerate(rows):
        found.setdefault(bucket, []).append(Place(None, number, content, f"{number}.mp4"))
    return found


def test_copies_of_a_clip_go_together_and_every_bucket_keeps_one():
    rows = [("a", str(i // 2)) for i in range(12)] + [("b", "only")]
    chosen = choose_held_out(places(*rows), 5)
    assert len(chosen) == 5 and "only" not in chosen
    assert choose_held_out(places(*reversed(rows)), 5) == chosen, "the order of the clips decides"
    with pytest.raises(ValueError, match="clips.held_out is 6, but of 7 clips at most 5 can be"):
        choose_held_out(places(*rows), 6)


def test_a_run_that_goes_on_keeps_its_split_and_shows_its_error_over_steps(tmp_path, clips, accelerator):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "base")

    def objective(steps: int) -> DistillObjective:
        config = Config(
            objective="distill",
            base=tmp_path / "base",
            output=tmp_path / "out",
            steps=steps,
            batch_size=2,
            save_every=2,
            sample_every=2,
            clips=settings(clips, held_out=3),
            distill={"modes": ["1x4x4"], "rank": 2},
        )
        return DistillObjective(config, accelerator)

    first = objective(2)
    train(first.config, first, accelerator)
    held_out, its_latents = first.data.held_out_contents, [clip for x_0, _ in first.data.validation() for clip in x_0]
    # Of another folder others would be chosen, among them some that have been trained on.
    names = [f"more{i}" for i in range(12)]
    write_clips(clips, names)
    gone = next(place.name for row in first.data.held_out_places.values() for place in row)
    (clips / gone.split("/")[-1]).unlink()
    second = objective(4)
    assert second.data.held_out_contents == held_out and second.data.held_out == 2
    assert not overlap(drawn_by(second.data), its_latents)
    train(second.config, second, accelerator)
    history = [json.loads(line) for line in (tmp_path / "out/validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in history] == [2, 4] and all(line["errors"]["1x4x4"] > 0 for line in history)
    assert [line["clips"] for line in history] == [f"on {count} clips that were held out" for count in (3, 2)]
    assert (tmp_path / "out/samples/000004-error.png").exists()
    card = (tmp_path / "out/result/README.md").read_text()
    assert "on 2 clips that were held out" in card and "base_model: base\n" in card and str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out/result/flexivid_config.json").read_text()


def test_latents_that_are_not_finite_are_no_clips(clips, accelerator, monkeypatch):
    encode, spoiled = sources.encode, iter([True] * 2 + [False] * 20)
    monkeypatch.setattr(sources, "encode", lambda *given: encode(*given) * (1e9 if next(spoiled) else 1))
    cache = build_cache(ClipsConfig(**settings(clips)), tiny_pipeline(), accelerator)
    assert [reason for _, reason in cache.broken] == ["its latents are not finite in half precision"] * 2
    assert len(drawn_by(cache, 1)) == 4


@pytest.mark.parametrize(
    ("base", "named", "expected"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", None, "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("models/copy", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        (
            "models/copy",
            "/home/me/hub/models--zai-org--CogVideoX-5b/snapshots/1a2b/transformer",
            "zai-org/CogVideoX-5b",
        ),
        ("hub/models--genmo--mochi-1-preview/snapshots/1a2b", None, "genmo/mochi-1-preview"),
        ("models/mine", "/home/me/mine/transformer", "mine"),
    ],
)
def test_the_public_name_of_a_base(tmp_path, monkeypatch, base, named, expected):
    monkeypatch.chdir(tmp_path)
    if expected != base:
        (tmp_path / base / "transformer").mkdir(parents=True)
        config = {} if named is None else {"_name_or_path": named}
        (tmp_path / base / "transformer/config.json").write_text(json.dumps(config))
    assert public_name(Path(base)) == expected


def test_the_public_name_of_the_embedded_model():
    assert public_name(MODEL) == "flexivid/assets/shapes"
