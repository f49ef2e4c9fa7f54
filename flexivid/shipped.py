"""What ships with the package beside its code: configs by name, the embedded model and its adapter by their paths."""

from pathlib import Path

PACKAGE = Path(__file__).parent
# A wheel has the configs in the package, a checkout beside it.
CONFIGS = (PACKAGE / "configs", PACKAGE.parent / "configs")


def shipped_path(path: Path) -> Path:
    """A path such as `flexivid/assets/shapes`, as configs and adapters name it, in any folder; others as they are."""
    ours = path.parts[:2] == ("flexivid", "assets") and not path.exists()
    return PACKAGE.parent / path if ours else path


def find_config(name: str | Path) -> Path:
    """A file, or the one that ships under a name such as `shapes-flex`. Raises ValueError if there is neither."""
    path = Path(name)
    if path.exists():
        return path
    there = {file.stem: file for folder in CONFIGS for file in sorted(folder.glob("*.yaml"))}
    if path.name != str(name) or path.stem not in there:
        raise ValueError(f"no config file at {name}, and none of that name ships with flexivid: {', '.join(there)}")
    return there[path.stem]
