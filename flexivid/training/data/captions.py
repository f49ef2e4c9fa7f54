"""Which clips a folder lists, and their captions. It holds one of

- `metadata.csv`, `metadata.json` or `metadata.jsonl`: `file_name`, `media_path` or `video`, and `caption`, `text` or
  `prompt`;
- `videos.txt` and `prompts.txt`, line by line;
- `a.mp4` beside `a.txt`, in subfolders too.

For models that take a control video, `a.control.mp4` and `a.mask.mp4` lie beside `a.mp4`, or are named in `control` and
`mask` of the metadata.
"""

import csv
import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from flexivid.text import read_lines, read_text

PATH_KEYS, CAPTION_KEYS = ("file_name", "media_path", "video"), ("caption", "text", "prompt")
EXTENSIONS = {".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v"}
BESIDE = ("control", "mask")


@dataclass(frozen=True)
class CaptionedClip:
    """problem: why its caption cannot be read, which is then empty. control: a video of what is to be seen in it. mask:
    one of where (white) it is to be made anew."""

    path: Path
    caption: str
    problem: str = ""
    control: Path | None = None
    mask: Path | None = None

    @property
    def beside(self) -> list[Path]:
        """The control video and the mask, as far as there are."""
        return [path for path in (self.control, self.mask) if path is not None]


def find_clips(folder: Path) -> list[CaptionedClip]:
    """The clips that `folder` lists, in its order. None is opened yet.

    Raises ValueError for a folder without captions, with two lists, for a line that is not complete, for a path that
    leaves the folder, and if no caption can be read.
    """
    if not folder.is_dir():
        raise ValueError(f"the data folder {folder} does not exist")
    lists = [path for path in (folder / f"metadata.{kind}" for kind in ("csv", "json", "jsonl")) if path.exists()]
    if (folder / "videos.txt").exists():
        lists.append(folder / "videos.txt")
    if len(lists) > 1:
        raise ValueError(f"{folder} has {' and '.join(path.name for path in lists)}; keep one of them")
    root = folder.resolve()
    if not lists:
        clips = _pairs(root)
    else:
        rows = _aligned_lines(folder) if lists[0].name == "videos.txt" else _metadata(lists[0])
        # macOS puts a file ._a.mp4 beside a.mp4 on other disks, and scripts that list a folder list it too.
        clips = [
            CaptionedClip(root / name, text.strip(), **{kind: root / path for kind, path in named.items()})
            for name, text, named in rows
            if not Path(name).name.startswith("._")
        ]
    clips = [_with_those_beside(clip) for clip in clips]
    for clip in clips:
        for path in (clip.path, *clip.beside):
            if not path.resolve().is_relative_to(root):
                raise ValueError(f"{path} leaves the data folder {folder}; clips must lie in it")
        if not clip.caption and not clip.problem:
            raise ValueError(f"{clip.path.relative_to(root)} has an empty caption")
    if not clips:
        raise ValueError(f"no clips in {folder}: it needs metadata.csv, videos.txt and prompts.txt, or a.mp4 and a.txt")
    if all(clip.problem for clip in clips):
        raise ValueError(f"none of the captions in {folder} can be read: {clips[0].problem}")
    return clips


def _with_those_beside(clip: CaptionedClip) -> CaptionedClip:
    """With the control video and the mask that bear its name, unless the metadata names others."""
    found = {}
    for kind in BESIDE:
        # Not glob, for which names may be patterns.
        names = (clip.path.with_name(f"{clip.path.stem}.{kind}{suffix}") for suffix in sorted(EXTENSIONS))
        if getattr(clip, kind) is None and (there := [path for path in names if path.exists()]):
            found[kind] = there[0]
    return replace(clip, **found)


def _is_beside(path: Path, videos: set[Path]) -> bool:
    """Whether it is the control video or the mask of another one."""
    clip, kind = Path(path.stem).stem, Path(path.stem).suffix[1:]
    return kind in BESIDE and any(path.with_name(clip + suffix) in videos for suffix in EXTENSIONS)


def _pairs(root: Path) -> list[CaptionedClip]:
    videos = {path for path in root.rglob("*") if path.suffix.lower() in EXTENSIONS}
    shown = (path for path in videos if not any(part[0] == "." for part in path.relative_to(root).parts))
    paths = sorted(path for path in shown if not _is_beside(path, videos))
    if missing := [path for path in paths if not path.with_suffix(".txt").exists()]:
        raise ValueError(f"{len(missing)} clips have no caption, for example {missing[0]}: write it to a .txt beside")
    clips = []
    for path in paths:
        try:
            clips.append(CaptionedClip(path, read_text(path.with_suffix(".txt")).strip()))
        except ValueError as error:
            clips.append(CaptionedClip(path, "", str(error)))
    return clips


Row = tuple[str, str, dict[str, str]]  # file, caption, and the files beside it by what they are


def _aligned_lines(folder: Path) -> list[Row]:
    if not (folder / "prompts.txt").exists():
        raise ValueError(f"{folder} has videos.txt and no prompts.txt")
    names, captions = (read_lines(folder / name) for name in ("videos.txt", "prompts.txt"))
    if len(names) != len(captions):
        raise ValueError(f"{folder}: videos.txt has {len(names)} lines, prompts.txt {len(captions)}; one each a clip")
    return [(name.strip(), caption, {}) for name, caption in zip(names, captions, strict=True)]


def _metadata(path: Path) -> list[Row]:
    text = read_text(path)
    try:
        rows = {".csv": _csv_rows, ".json": _json, ".jsonl": _json_lines}[path.suffix](text)
    except ValueError as error:
        raise ValueError(f"{path} {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must be a list with an object per clip")

    def value(row: dict, number: int, keys: tuple[str, ...]) -> str:
        found = [row[key] for key in keys if row.get(key)]
        if len(found) != 1 or not isinstance(found[0], str):
            raise ValueError(
                f"{path}, clip {number}: needs one of {', '.join(keys)}, and has {', '.join(map(str, row))}"
            )
        return found[0]

    found = []
    for number, row in enumerate(rows, 1):
        named = {kind: value(row, number, (kind,)) for kind in BESIDE if row.get(kind)}
        found.append((value(row, number, PATH_KEYS), value(row, number, CAPTION_KEYS), named))
    return found


def _csv_rows(text: str) -> list[dict[str, str]]:
    """A caption in the last column may hold commas without being quoted. Raises ValueError, as the other two."""
    # Not splitlines: line breaks in quotes are part of a caption, and so are the rarer ones of Unicode.
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, names = [], []
    try:
        for cells in reader:
            while len(cells) > len(names) and cells and not cells[-1].strip():
                cells.pop()  # spreadsheets fill rows up to the longest
            if not names:
                names = [cell.strip() for cell in cells]
            elif len(cells) > len(names) and names[-1] not in CAPTION_KEYS:
                raise ValueError(
                    f"has {len(cells)} values for {len(names)} columns in the row that ends in line "
                    f'{reader.line_num}, "{cells[0]}": write a caption with commas in double quotes'
                )
            elif cells:
                last = len(names) - 1
                rows.append(dict(zip(names, [*cells[:last], ",".join(cells[last:])], strict=False)))
    except csv.Error as error:
        raise ValueError(f"is not CSV: {error} in line {reader.line_num}") from None
    return rows


def _json(text: str):
    try:
        return json.loads(text, strict=False)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None


def _json_lines(text: str) -> list:
    """One object after the other; line breaks within one do no harm."""
    decoder, rows, start = json.JSONDecoder(strict=False), [], 0
    try:
        while start < len(text := text.rstrip()):
            row, start = decoder.raw_decode(text, re.compile(r"\s*").match(text, start).end())
            rows.append(row)
    except json.JSONDecodeError as error:
        raise ValueError(f"is not JSON: {error}") from None
    return rows
