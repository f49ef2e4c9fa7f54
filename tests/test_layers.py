"""The rooms of the package: imports point down only, files and functions stay small."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Bottom up; what stands in one line may import each other.
LAYERS = [
    {"files", "text", "published", "support", "tensors", "devices", "video", "shipped"},
    {"patches"},
    {"diffusion"},
    {"model"},
    {"sampling"},
    {
        "api",
        "targets",
        "running",
        "patch_grid",
        "stock_pipelines",
        "single_file",
        "models",
        "published",
        "published_sizes",
        "public",
        "__init__",
    },
    {"training"},
    {"shapes"},
    {"inputs", "command_line"},  # what scripts share
    {"sweep"},
    {"train", "commands", "app"},
    {"__main__"},
]
HEIGHT = {room: height for height, rooms in enumerate(LAYERS) for room in rooms}
FILES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "flexivid").rglob("*.py"))}
SCRIPTS = {
    str(path.relative_to(ROOT)): path
    for name in ("eval", "pipelines", "integrations")
    for path in (ROOT / name).rglob("*.py")
}
# Still being worked on.
UNFINISHED: set[str] = set()


def room(module: str) -> str:
    """`flexivid.training.data.clips` -> `training`; what is imported from `flexivid` itself -> `__init__`."""
    return (module.split(".") + ["__init__"])[1]


def imports(tree: ast.Module, package: list[str]) -> Iterator[str]:
    """Modules of flexivid that a file imports, anywhere in it. package: that of the file, for relative imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from flexivid import api` names a room, `from flexivid import enable` does not.
            names = [f"{module}.{alias.name}" if alias.name in HEIGHT else module for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "flexivid")


def pointing_up(source: str, file: str) -> list[str]:
    parts = Path(file).with_suffix("").parts
    own = HEIGHT[room(".".join(parts))]
    return [name for name in imports(ast.parse(source), list(parts[:-1])) if HEIGHT[room(name)] > own]


@pytest.mark.parametrize("file", [file for file in FILES if file not in UNFINISHED])
def test_imports_point_down(file):
    assert pointing_up(FILES[file].read_text(), file) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from flexivid.shapes.world import all_scenes", ["flexivid.shapes.world"]),
        ("def late():\n    import flexivid.train", ["flexivid.train"]),
        ("from ..shapes import world", ["flexivid.shapes"]),
        ("from flexivid import shapes", ["flexivid.shapes"]),
        ("from flexivid.training.config import Config\nfrom flexivid import tensors, enable\nimport torch", []),
    ],
)
def test_an_import_that_points_up_is_found(source, found):
    assert pointing_up(source, "flexivid/training/loop.py") == found


def long_functions(source: str) -> list[str]:
    functions = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f"{f.name}: {f.end_lineno - f.lineno + 1}" for f in functions if f.end_lineno - f.lineno + 1 > 60]


@pytest.mark.parametrize("file", [file for file in FILES | SCRIPTS if file not in UNFINISHED])
def test_files_and_functions_stay_small(file):
    source = (FILES | SCRIPTS)[file].read_text()
    assert len(source.splitlines()) < 300 and long_functions(source) == []


def test_a_long_function_is_found():
    assert long_functions("def long():\n" + "    pass\n" * 60 + "def short():\n" + "    pass\n" * 59) == ["long: 61"]
    assert long_functions("class A:\n    async def late(self):\n" + "        pass\n" * 60) == ["late: 61"]
