"""docs/configuration.md, made from the configuration itself.

python -m flexivid.training.configuration_page > docs/configuration.md
"""

import types
from typing import Annotated, Literal, Union, get_args, get_origin

from pydantic_core import PydanticUndefined

from flexivid.training.config import Config, Section

HEAD = """# Configuration

Every setting of `flexivid/train.py`. It goes into the YAML file of `--config`, or on the command line after dots:
`--optim.lr 1e-4`. A setting that is not in these tables is an error. Made by
`python -m flexivid.training.configuration_page`.
"""
SIGNS = {"gt": ">", "ge": "≥", "le": "≤", "lt": "<", "min_length": "at least"}


def _type(annotation) -> str:
    """A type as people write it: `one of adamw, muon`, `list of str`, `int or none`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(map(str, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join("none" if part is type(None) else _type(part) for part in arguments)
    if origin is list:
        return f"list of {_type(arguments[0])}"
    if origin is tuple:
        return " and ".join(map(_type, arguments))
    if origin is dict:
        return f"{_type(arguments[0])}: {_type(arguments[1])}"
    return "path" if annotation.__name__ == "Path" else annotation.__name__


def _default(field) -> str:
    if field.default is PydanticUndefined:
        return "(needed)"
    return "none" if field.default is None else f"`{field.default}`"


def _section_of(annotation) -> type[Section] | None:
    for part in (annotation, *get_args(annotation)):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def page() -> str:
    """The whole page: a table of the settings at the top, one of every section."""
    tables, sections = [], [("", Config)]
    for prefix, section in sections:
        lines = [f"## {prefix or 'At the top'}", ""]
        if section.__doc__ and section.__doc__ != Section.__doc__:
            lines += [" ".join(section.__doc__.split()), ""]
        lines += ["| setting | type | default | what it is |", "|---|---|---|---|"]
        for name, field in section.model_fields.items():
            below = _section_of(field.annotation)
            if below is not None:
                sections.append((name, below))
                lines.append(
                    f"| `{name}` | section | {'none' if field.default is None else ''} | {field.description or ''} |"
                )
                continue
            # Constraints of an annotated type end up in the metadata.
            limits = [
                f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in SIGNS.items() if hasattr(m, key)
            ]
            kind = _type(field.annotation) + (f", {' and '.join(limits)}" if limits else "")
            lines.append(f"| `{name}` | {kind} | {_default(field)} | {field.description or ''} |")
        tables.append("\n".join(lines))
    return HEAD + "\n" + "\n\n".join(tables) + "\n"


if __name__ == "__main__":
    print(page(), end="")
