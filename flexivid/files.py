"""Files that are whole or not there: each is written beside its place, then renamed."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` at the end, and goes if anything fails before.

    Who may read it is as for any new file.
    """
    path = Path(path)
    # The ending stays, as writers of pictures and clips look at it; several processes may write the same file.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors 0.8 lets nobody but the owner read what it saves
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, content) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
