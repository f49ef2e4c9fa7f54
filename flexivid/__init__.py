"""flexivid: run a pretrained video diffusion transformer with large patches on most steps, its own on a few."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from flexivid.public import *  # noqa: F403
else:

    def __getattr__(name: str):
        # torch and diffusers take seconds to import, which `flexivid --help` does not need.
        if not name.startswith("__") or name == "__all__":
            public = importlib.import_module("flexivid.public")
            if name == "__all__" or name in public.__all__:
                return getattr(public, name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *importlib.import_module("flexivid.public").__all__})
