"""Text files as people have them: with a byte order mark, with any line ends, and sometimes in another encoding."""

import os
import re
from pathlib import Path

MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_text(path: str | os.PathLike) -> str:
    """The text of a UTF-8 file without its byte order mark. Raises ValueError for a file in another encoding."""
    content = Path(path).read_bytes()
    if (encoding := MARKS.get(content[:2])) or b"\0" in content:
        raise ValueError(f"{path} is {encoding or 'UTF-16 or no text'}; save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{byte:02x} in line {line}; save it as UTF-8") from None


def read_lines(path: str | os.PathLike) -> list[str]:
    r"""Its lines, which end with \n, \r\n or \r only: a form feed or U+2028 is part of one. Raises as `read_text`."""
    lines = re.split("\r\n|\n|\r", read_text(path))
    return lines if lines[-1] else lines[:-1]


def read_prompts(path: str | os.PathLike) -> list[str]:
    """One prompt a line, without what is blank around it, and without blank lines. Raises as `read_text`."""
    return [line.strip() for line in read_lines(path) if line.strip()]
