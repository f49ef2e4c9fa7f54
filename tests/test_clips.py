"""Real clips: listings, reading at one frame rate, buckets, broken files, and latents that are kept."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_pipeline, write_clip

from flexivid.training.config import ClipsConfig
from flexivid.training.data import latents, sources
from flexivid.training.data.buckets import Bucket
from flexivid.training.data.clips import (
    BrokenClip,
    Reader,
    choose_bucket,
    find_clips,
    fit,
    frame_indices,
    load_clip,
)
from flexivid.training.data.encoding import encode


class TestListings:
    def test_all_of_them_name_the_same_clips(self, tmp_path):
        for name in ("pairs", "csv", "json", "jsonl", "lines"):
            write_clip(tmp_path / name / "sub" / "a.mp4")
            write_clip(tmp_path / name / "b.mp4")
        rows = [("b.mp4", "two, with a comma"), ("sub/a.mp4", "one")]
        (tmp_path / "pairs/b.txt").write_text(rows[0][1] + "\n")
        (tmp_path / "pairs/sub/a.txt").write_text(rows[1][1])
        (tmp_path / "csv/metadata.csv").write_text('file_name,text\nb.mp4,"two, with a comma"\nsub/a.mp4,one\n')
        (tmp_path / "json/metadata.json").write_text(json.dumps([{"video": v, "prompt": c} for v, c in rows]))
        lines = [json.dumps({"media_path": v, "caption": c}) for v, c in rows]
        (tmp_path / "jsonl/metadata.jsonl").write_text("\n".join(lines) + "\n")
        (tmp_path / "lines/videos.txt").write_text("\n".join(v for v, _ in rows))
        (tmp_path / "lines/prompts.txt").write_text("\n".join(c for _, c in rows))
        for name in ("pairs", "csv", "json", "jsonl", "lines"):
            clips = find_clips(tmp_path / name)
            root = (tmp_path / name).resolve()
            assert [(str(clip.path.relative_to(root)), clip.caption) for clip in clips] == rows, name

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "no clips in"),
            ({"a.mp4": ""}, "1 clips have no caption"),
            ({"videos.txt": "a.mp4\nb.mp4", "prompts.txt": "one"}, "has 2 lines, prompts.txt 1"),
            ({"videos.txt": "a.mp4"}, "no prompts.txt"),
            ({"videos.txt": "a.mp4", "metadata.csv": "video,text"}, "keep one of them"),
            ({"metadata.csv": "video,text\n../a.mp4,one"}, "leaves the data folder"),
            ({"metadata.csv": "video,text\n/etc/passwd,one"}, "leaves the data folder"),
            ({"metadata.jsonl": '{"video": "a.mp4"}'}, "clip 1: needs one of caption"),
            ({"metadata.json": '{"video": "a.mp4"}'}, "a list with an object"),
            ({"metadata.jsonl": "{"}, "not JSON"),
            ({"metadata.csv": "video,text\na.mp4, "}, "empty caption"),
        ],
    )
    def test_what_is_wrong_is_said(self, tmp_path, files, message):
        for name, text in files.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            find_clips(tmp_path)

    def test_a_link_out_of_the_folder_is_refused(self, tmp_path):
        (tmp_path / "data").mkdir()
        write_clip(tmp_path / "outside.mp4")
        os.symlink(tmp_path / "outside.mp4", tmp_path / "data/a.mp4")
        (tmp_path / "data/a.txt").write_text("one")
        with pytest.raises(ValueError, match="leaves the data folder"):
            find_clips(tmp_path / "data")


class TestReading:
    @pytest.mark.parametrize("without_decord", [False, True])
    def test_frames_are_those_of_the_file(self, tmp_path, without_decord, monkeypatch):
        path = write_clip(tmp_path / "a.mp4")
        if without_decord:
            monkeypatch.setattr("decord.VideoReader", None)
        reader = Reader(path)
        assert (reader.count, reader.fps, reader.size) == (20, 10.0, (32, 48))
        frames = reader.read(np.array([0, 7, 19]))
        assert frames.shape == (3, 32, 48, 3)
        assert np.abs(frames.mean((1, 2, 3)) - [0, 70, 190]).max() < 3

    def test_frame_rates_are_brought_to_one(self):
        assert frame_indices(30, 30.0, 5, 10.0, 0.0).tolist() == [0, 3, 6, 9, 12]
        assert frame_indices(30, 30.0, 5, 10.0, 1.0).tolist() == [17, 20, 23, 26, 29]
        assert frame_indices(5, 8.0, 9, 16.0, 0.5).tolist() == [0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert frame_indices(12, 30.0, 5, 10.0, 0.0) is None

    def test_the_longest_bucket_that_fits_and_of_those_the_nearest_in_shape(self):
        buckets = [Bucket.parse(text) for text in ("9x32x32", "9x32x64", "5x32x32")]
        assert choose_bucket(20, 10.0, (100, 200), buckets, 10.0) == Bucket(9, 32, 64)
        assert choose_bucket(20, 10.0, (100, 110), buckets, 10.0) == Bucket(9, 32, 32)
        assert choose_bucket(6, 10.0, (100, 200), buckets, 10.0) == Bucket(5, 32, 32)
        with pytest.raises(BrokenClip, match="too short: 3 frames"):
            choose_bucket(3, 10.0, (100, 200), buckets, 10.0)

    def test_the_middle_is_cut_out_and_nothing_is_squeezed(self):
        frames = np.zeros((2, 20, 60, 3), np.uint8)
        frames[:, :, 20:40] = 255
        clip = fit(frames, 40, 40)
        assert clip.shape == (3, 2, 40, 40)
        assert clip[..., 3:-3].min() > 0.95 and clip.min() > -0.5  # the white square, and where it ends

    def test_a_bucket_is_three_numbers(self):
        for text in ("81x480", "0x8x8", "axbxc"):
            with pytest.raises(ValueError, match="frames x height x width"):
                Bucket.parse(text)

    @pytest.mark.slow
    def test_a_config_is_read_without_a_video_decoder(self):
        script = "import sys, flexivid.training.config; print(sorted({'decord', 'av'} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
        assert done.stdout.strip() == "[]", done.stdout + done.stderr


def settings(folder, **more) -> ClipsConfig:
    sizes = {"buckets": ["5x16x32", "5x32x16"], "fps": 10, "max_sequence_length": 16, "drop_caption": 0.0}
    return ClipsConfig(folder=folder, cache=folder.parent / "cache", **{**sizes, **more})


class TestLatents:
    def test_broken_clips_are_skipped_and_listed(self, folder, capsys):
        cache = latents.build_cache(settings(folder), tiny_pipeline(), Accelerator(cpu=True))
        assert {name: len(places) for name, places in cache.places.items()} == {"5x16x32": 2, "5x32x16": 1}
        assert {os.path.basename(path) for path, _ in cache.broken} == {
            *("empty.mp4", "truncated.mp4", "audio.mp4", "text.mp4", "short.mp4")
        }
        printed = capsys.readouterr().out
        assert "5 of 8 clips are skipped" in printed and "too short: 1 frames" in printed and "no video" in printed

    def test_latents_and_texts_are_those_of_the_pipeline(self, folder):
        pipe = tiny_pipeline()
        cache = latents.build_cache(settings(folder), pipe, Accelerator(cpu=True))
        x_0, conditions = cache.batch(6, torch.Generator().manual_seed(1))
        text = conditions["encoder_hidden_states"]
        assert x_0.shape[0] == 6 and text.shape[:2] == (6, 16)
        bucket, frames = load_clip(folder / "b.mp4", [Bucket(5, 16, 32)], 10.0)
        expected = encode(pipe.vae, frames[None])
        captions = ["a striped blue square growing", "a red circle"]
        embeddings = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=16)[0]
        found = 0
        for latent, row in zip(x_0, text, strict=True):
            distances = [(row - embedding).abs().max().item() for embedding in embeddings]
            assert min(distances) < 2e-3
            if distances[0] < 2e-3:
                assert torch.allclose(latent, expected[0], atol=5e-3)
                found += 1
        assert found

    def test_a_batch_depends_on_its_generator_only(self, folder):
        cache = latents.build_cache(settings(folder), tiny_pipeline(), Accelerator(cpu=True))
        one, two = (cache.batch(4, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(one[0], two[0]) and torch.equal(*(batch[1]["encoder_hidden_states"] for batch in (one, two)))

    def test_what_is_there_is_not_made_again_unless_its_source_has_changed(self, folder, monkeypatch):
        made = []
        load = sources.load_clip
        monkeypatch.setattr(sources, "load_clip", lambda path, *rest: made.append(path.name) or load(path, *rest))
        monkeypatch.setattr(latents, "SHARD", 4)

        def build():
            made.clear()
            return latents.build_cache(settings(folder), tiny_pipeline(), Accelerator(cpu=True))

        build()
        assert len(made) == 8
        assert build().places and made == []
        os.utime(folder / "a.mp4")  # another time, the same contents
        build()
        assert made == []
        write_clip(folder / "a.mp4", frames=15)
        build()
        assert sorted(made) == ["a.mp4", "audio.mp4", "b.mp4", "empty.mp4"]
        (folder / "tall.txt").write_text("another caption")
        build()
        assert len(made) == 4 and "tall.mp4" in made

    def test_without_a_usable_clip_it_stops(self, tmp_path):
        write_clip(tmp_path / "data/a.mp4", frames=1)
        (tmp_path / "data/a.txt").write_text("one")
        with pytest.raises(ValueError, match="none of the 1 clips can be used"):
            latents.build_cache(settings(tmp_path / "data"), tiny_pipeline(), Accelerator(cpu=True))

    def test_no_data_at_all_the_teacher_samples(self, tmp_path):
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red circle\n\na blue square\n")
        config = ClipsConfig(
            prompts=prompts, cache=tmp_path / "cache", buckets=["5x16x32"], max_sequence_length=16, teacher_steps=3
        )
        pipe = tiny_pipeline()
        cache = latents.build_cache(config, pipe, Accelerator(cpu=True))
        x_0, _ = cache.batch(8, torch.Generator().manual_seed(0))
        own = pipe(
            "a blue square",
            num_frames=5,
            height=16,
            width=32,
            num_inference_steps=3,
            guidance_scale=5.0,
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        ).frames[0]
        assert min((latent - own).abs().max().item() for latent in x_0) < 1e-2

    @pytest.mark.parametrize("bucket", ["4x16x24", "5x18x24", "5x16x20"])
    def test_sizes_that_the_model_cannot_have_are_refused(self, folder, bucket):
        with pytest.raises(ValueError, match="1 \\+ a multiple of 4 frames, sides that are multiples of 8"):
            latents.check_buckets(settings(folder, buckets=[bucket]), temporal_factor=4, side=8)

    def test_one_source(self, tmp_path):
        for given in ({}, {"folder": tmp_path, "prompts": tmp_path / "prompts.txt"}):
            with pytest.raises(ValueError, match="one of them"):
                ClipsConfig(**given)
