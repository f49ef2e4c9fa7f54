"""Captions, prompts and settings as people save them: byte order marks, line ends, other encodings, cells of csv."""

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from conftest import tiny_pipeline, write_clip

from flexivid.commands import sample as t2v
from flexivid.sampling.schedule import read_schedule
from flexivid.sweep import settings
from flexivid.text import read_lines, read_text
from flexivid.training.config import ClipsConfig, load_config
from flexivid.training.data import latents
from flexivid.training.data.captions import find_clips
from flexivid.training.data.latents import clips_of

RARE = {"U+2028": "\u2028", "U+2029": "\u2029", "NEL": "\x85", "VT": "\x0b", "FF": "\x0c", "FS": "\x1c"}
LATIN = "a caf\xe9 at night".encode("latin-1")


def prompts_of_t2v(path) -> list[str]:
    return t2v.prompts_of(t2v.parse_arguments(["--prompts", str(path), "--device", "cpu"]))


def prompts_of_sweep(path) -> list[str]:
    return settings.prompts_of(SimpleNamespace(prompts=str(path), max_prompts=None, dimensions=[]))


def prompts_of_training(path) -> list[str]:
    return [clip.caption for clip in clips_of(ClipsConfig(prompts=path))]


PROMPTS = [prompts_of_t2v, prompts_of_sweep, prompts_of_training]


def listing(folder, name: str, content: bytes) -> list[str]:
    """The captions of a folder with this list; `prompts.txt` goes with a video.txt, `a.txt` with a clip."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.mp4").touch()
    (folder / name).write_bytes(content)
    if name == "prompts.txt":
        (folder / "videos.txt").write_bytes(b"\xef\xbb\xbfa.mp4\r\n")
    clips = find_clips(folder)
    assert all(clip.path.exists() for clip in clips)
    return [clip.caption for clip in clips]


def lists_of(caption: str) -> dict[str, str]:
    row = {"file_name": "a.mp4", "text": caption}
    return {
        "metadata.csv": f"file_name,text\r\na.mp4,{caption}\r\n",
        "metadata.json": json.dumps([row], ensure_ascii=False),
        "metadata.jsonl": json.dumps(row, ensure_ascii=False) + "\r\n",
        "prompts.txt": f"{caption}\r\n",
        "a.txt": f"{caption}\r\n",
    }


class TestText:
    @pytest.mark.parametrize("name", lists_of(""))
    def test_a_byte_order_mark_is_none_of_the_caption(self, tmp_path, name):
        assert listing(tmp_path, name, lists_of("a red car")[name].encode("utf-8-sig")) == ["a red car"]

    @pytest.mark.parametrize("rare", RARE)
    @pytest.mark.parametrize("name", lists_of(""))
    def test_only_line_ends_end_a_line_of_a_list(self, tmp_path, name, rare):
        caption = f"a man walks{RARE[rare]}slowly"
        assert listing(tmp_path, name, lists_of(caption)[name].encode()) == [caption]

    @pytest.mark.parametrize("read", PROMPTS)
    def test_prompts_end_at_line_ends_only(self, tmp_path, read):
        expected = [f"a man walks{character}slowly" for character in RARE.values()]
        for end in ("\n", "\r\n", "\r"):
            (tmp_path / "prompts.txt").write_bytes(end.join(["", *expected, "", " "]).encode("utf-8-sig"))
            assert read(tmp_path / "prompts.txt") == expected

    @pytest.mark.parametrize("read", [*PROMPTS, read_schedule, load_config])
    @pytest.mark.parametrize("content", [LATIN, "a red car".encode("utf-16"), b"a red\0car"])
    def test_another_encoding_is_said_of_which_file(self, tmp_path, read, content):
        (tmp_path / "mine.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"mine.txt is .*save it as UTF-8"):
            read(tmp_path / "mine.txt")

    def test_where_it_is_said(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"one\ntwo\n" + LATIN)
        with pytest.raises(ValueError, match="byte 0xe9 in line 3"):
            read_text(tmp_path / "a.txt")

    def test_lines(self, tmp_path):
        for content, lines in ((b"", []), (b"a", ["a"]), (b"a\n", ["a"]), (b"a\r\n\rb", ["a", "", "b"])):
            (tmp_path / "a.txt").write_bytes(content)
            assert read_lines(tmp_path / "a.txt") == lines

    def test_settings_and_schedules_may_have_the_mark_too(self, tmp_path):
        (tmp_path / "a.json").write_bytes('{"schedule": [["1x2x2"]]}'.encode("utf-8-sig"))
        assert read_schedule(tmp_path / "a.json").to_text()
        (tmp_path / "a.yaml").write_bytes("objective: vae\noutput: runs/a\n".encode("utf-8-sig"))
        assert load_config(tmp_path / "a.yaml").objective == "vae"


class TestCells:
    @pytest.mark.parametrize(
        ("text", "captions"),
        [
            ('file_name,text\na.mp4,"A man walks.\nThe camera pans."\n', ["A man walks.\nThe camera pans."]),
            ('file_name,text\r\na.mp4,"A man walks.\r\n\r\nIt rains."\r\n', ["A man walks.\r\n\r\nIt rains."]),
            ("file_name,text\na.mp4,a man walks, slowly, at night\n", ["a man walks, slowly, at night"]),
            ('file_name,text\na.mp4,a man, "very" slowly\n', ['a man, "very" slowly']),
            ("file_name,fps,caption\na.mp4,24,a man walks, slowly\n", ["a man walks, slowly"]),
            ("file_name,text,,\na.mp4,a man walks,,\n", ["a man walks"]),
            (" file_name , text \na.mp4,a man walks\n\n", ["a man walks"]),
            ('text,file_name\n"a man, slowly",a.mp4\n', ["a man, slowly"]),
        ],
    )
    def test_captions_are_whole(self, tmp_path, text, captions):
        assert listing(tmp_path, "metadata.csv", text.encode()) == captions

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("text,file_name\na man walks, slowly,a.mp4\n", r'metadata.csv has 3 values for 2 .*line 2, "a man walks"'),
            ("file_name,text,fps\nb.mp4,a man,24\na.mp4,a man, slowly,24\n", "has 4 values for 3 columns .*line 3"),
            ('file_name,text\na.mp4,"a man walks\nb.mp4,a red car\n', "metadata.csv is not CSV: .* in line 3"),
        ],
    )
    def test_what_cannot_be_told_is_refused(self, tmp_path, text, message):
        with pytest.raises(ValueError, match=message):
            listing(tmp_path, "metadata.csv", text.encode())

    def test_line_breaks_in_quotes_of_jsonl(self, tmp_path):
        rows = '{"file_name": "a.mp4", "text": "a man\nwalks"}\n{"file_name":\n "a.mp4",\n "text": "two"}\n\n'
        assert listing(tmp_path, "metadata.jsonl", rows.encode()) == ["a man\nwalks", "two"]


class TestOtherFiles:
    @pytest.mark.parametrize("name", ["metadata.csv", "metadata.json", "metadata.jsonl", "prompts.txt", "videos.txt"])
    def test_a_list_in_another_encoding_is_named(self, tmp_path, name):
        (tmp_path / "videos.txt").write_text("a.mp4") if name == "prompts.txt" else None
        (tmp_path / "prompts.txt").write_text("one") if name == "videos.txt" else None
        (tmp_path / name).write_bytes(LATIN)
        with pytest.raises(ValueError, match=rf"{name} is not UTF-8 text: byte 0xe9 in line 1; save it as UTF-8"):
            find_clips(tmp_path)

    def test_one_caption_in_another_encoding_is_skipped_and_named(self, folder, capsys):
        (folder / "b.txt").write_bytes(LATIN)
        config = ClipsConfig(folder=folder, cache=folder.parent / "cache", buckets=["5x16x32"], fps=10)
        config.max_sequence_length = 16
        cache = latents.build_cache(config, tiny_pipeline(), Accelerator(cpu=True))
        assert len(cache.places["5x16x32"]) == 2
        assert "b.txt is not UTF-8 text" in capsys.readouterr().out

    def test_no_caption_that_can_be_read(self, tmp_path):
        with pytest.raises(ValueError, match="none of the captions in .*a.txt is not UTF-8"):
            listing(tmp_path, "a.txt", LATIN)

    def test_hidden_files_and_companions_are_left_out(self, tmp_path):
        write_clip(tmp_path / "a.mp4", frames=2)
        (tmp_path / "a.txt").write_text("one")
        (tmp_path / ".trash").mkdir()
        for name in ("._a.mp4", "._a.txt", ".b.mp4", ".trash/c.mp4"):
            (tmp_path / name).write_bytes(b"\0\5\x16\7")
        assert [clip.caption for clip in find_clips(tmp_path)] == ["one"]
        (tmp_path / "metadata.jsonl").write_text(
            '{"video": "a.mp4", "text": "one"}\n{"video": "._a.mp4", "text": "one"}\n'
        )
        assert [clip.path.name for clip in find_clips(tmp_path)] == ["a.mp4"]
