"""The command line of a sweep: what it means, and what is wrong with it."""

import argparse
import hashlib
import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.utils import logging

from flexivid.sampling.schedule import read_schedule
from flexivid.shapes.embedded import ADAPTER, MODEL, USUAL
from flexivid.shapes.prompts import load_prompts
from flexivid.stock_pipelines import pipeline_class, usual_arguments, without_weights
from flexivid.text import read_prompts as prompts_of_file
from sweep.arms import METHODS
from sweep.rivals import CACHES
from sweep.sampling import Clip
from sweep.vbench import DIMENSIONS, standard_prompts

# The methods that use --adapter.
ADAPTED = ("adapter", "adapter-same", "weak-first", "adapter-half-steps", "adapter-fbcache", "calibrated")


def parse_arguments(description: str, argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder or hub id in diffusers format; the embedded model by default")
    add("--adapter", help="flexivid adapter, folder or hub id; the embedded model's by default")
    add("--direct-adapter", help="an adapter of the direct parametrisation, for the method `direct`")
    add("--modes", nargs="+", help="weak patch sizes of training-free arms; the family's by default")
    add("--schedules", type=Path, nargs="+", default=[], help="files of eval/calibrate.py, for the method `calibrated`")
    add("--budgets", type=float, nargs="+", default=[1.0, 0.6, 0.4, 0.25], help="shares of the full run's FLOPs")
    methods = "; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items())
    add("--methods", nargs="+", choices=METHODS, help=methods)
    add("--rivals", nargs="*", choices=["steps", *CACHES], help="beside flexivid, instead of every one of them")
    add("--prompts", help="shapes (the embedded world, for models of it), vbench, or a text file with one a line")
    add("--max-prompts", type=int, help="only the first so many")
    add("--videos-per-prompt", type=int, default=2)
    add("--steps", type=int, help="at full compute")
    add("--guidance-scale", type=float)
    add("--guidance", choices=["kept", "same", "weak-uncond"], help="of flexivid's arms, as in flexivid.enable")
    add("--frames", type=int)
    add("--height", type=int)
    add("--width", type=int)
    add("--seed", type=int, default=0)
    add("--timed-rounds", type=int, default=3, help="runs whose median is the seconds of an arm")
    add("--batch", type=int, default=16, help="clips that are sampled at once")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the transformer")
    add("--cpu", action="store_true", help="even if there is a GPU")
    add("--dimensions", nargs="*", default=[], help="of VBench: names, or all that the prompts allow")
    add("--vbench-cache", type=Path, help="folder of VBench's weights; ~/.cache/vbench by default")
    add("--report-prompts", type=int, default=6, help="prompts whose clips are in report.html")
    add("--output", type=Path, default=Path("outputs/sweep"))
    add("--dry-run", action="store_true", help="say what would be done and what is missing")
    return parser.parse_args(argv, argparse.Namespace(words=argv))


def check_arguments(arguments: argparse.Namespace) -> None:
    """Fills in what depends on other arguments. Raises ValueError that says what would be right."""
    embedded = arguments.model is None
    if arguments.prompts is None:
        if not embedded:
            raise ValueError(
                "a model of one's own needs --prompts: vbench, a text file, or shapes if it is of that world"
            )
        arguments.prompts = "shapes"
    if embedded and arguments.adapter is None:
        arguments.adapter = ADAPTER
    if embedded and arguments.modes is None:
        arguments.modes = ["1x4x4", "2x4x4"]
    if arguments.methods is None:
        rivals = ["steps", *CACHES] if arguments.rivals is None else arguments.rivals
        arguments.methods = ["adapter", "training-free", *rivals] if arguments.adapter else ["training-free", *rivals]
    elif arguments.rivals is not None:
        raise ValueError("--methods names the rivals too; give one of --methods and --rivals")
    for method in arguments.methods:
        if method == "calibrated" and not arguments.schedules:
            raise ValueError("the method calibrated needs --schedules, files that eval/calibrate.py wrote")
        if method == "direct" and arguments.direct_adapter is None:
            raise ValueError("the method direct needs --direct-adapter")
        if method in ADAPTED and arguments.adapter is None:
            raise ValueError(f"the method {method} needs --adapter")
    for budget in arguments.budgets:
        if not 0 < budget <= 1:
            raise ValueError(f"a budget is a share of the full FLOPs, above 0 and up to 1, not {budget}")
    arguments.budgets = sorted({budget for budget in arguments.budgets if budget < 1}, reverse=True)
    if not arguments.budgets:
        raise ValueError("nothing to compare the full run with: give --budgets below 1")
    if unknown := set(arguments.dimensions) - {*DIMENSIONS, "all"}:
        raise ValueError(f"VBench has no dimension {unknown.pop()}; it has {', '.join(DIMENSIONS)}")
    if arguments.prompts == "shapes" and (arguments.height or 64) != (arguments.width or 64):
        raise ValueError("the shapes world is square: give one size as --height and --width")
    fitting = [name for name, d in DIMENSIONS.items() if d.any_prompt or arguments.prompts == "vbench"]
    if "all" in arguments.dimensions:
        arguments.dimensions = fitting
    if unfit := [name for name in arguments.dimensions if name not in fitting]:
        raise ValueError(f"{unfit[0]} can be scored on VBench's own prompts only: --prompts vbench")
    for name in ("videos_per_prompt", "timed_rounds", "batch", "max_prompts", "steps", "frames", "height", "width"):
        if getattr(arguments, name) is not None and getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(arguments, name)}")


def read_prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompts == "shapes":
        prompts = [scene.caption for scene in load_prompts()["seen"]]
    elif arguments.prompts == "vbench":
        prompts = standard_prompts(arguments.dimensions)
    else:
        path = Path(arguments.prompts)
        if not path.exists():
            raise ValueError(f"--prompts must be shapes, vbench or a text file, and there is no file {path}")
        prompts = prompts_of_file(path)
    if not prompts:
        raise ValueError(f"no prompts in {arguments.prompts}")
    return prompts[: arguments.max_prompts]


def pipeline_call(arguments: argparse.Namespace) -> dict:
    """How clips are sampled, by the names of `stock_pipelines.ARGUMENTS`; the same for every arm but for the steps."""
    if arguments.model is None or arguments.prompts == "shapes":
        call = dict(USUAL)
    else:
        call = usual_arguments(without_weights(arguments.model, pipeline_class(arguments.model, with_image=False)))
    given = {name: getattr(arguments, name, None) for name in call}
    return call | {name: value for name, value in given.items() if value is not None}


def exit_status(run: Callable, arguments: argparse.Namespace) -> int:
    """Runs a command: 0, or 2 with one line on stderr for what is wrong with its arguments or files."""
    logging.set_verbosity_error()
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def add_weights(digest, folder: Path) -> None:
    """Updates a hash with every safetensors file of a folder."""
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.read_bytes())


CPU_FACTS = ("model name", "cpu family", "model\t")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    # The name alone may say no more than the maker.
    found = [next((x.split(":")[1].strip() for x in lines if x.startswith(key)), "") for key in CPU_FACTS]
    return " ".join(filter(None, found)) or platform.processor() or platform.machine()


def identity_of(arguments: argparse.Namespace, clips: list[Clip], call: dict, device: torch.device) -> dict:
    """What every clip and figure of a sweep depends on: a folder holds one sweep only."""
    weights = {}
    for name in ("model", "adapter", "direct_adapter"):
        source = getattr(arguments, name) or (MODEL if name == "model" else "")
        digest = hashlib.sha256(str(source).encode())
        if source:
            add_weights(digest, Path(source))  # a hub id has none here
        weights[name] = digest.hexdigest()
    return {
        **weights,
        "modes": arguments.modes,
        "guidance": arguments.guidance,
        "schedules": [read_schedule(path).to_text() for path in arguments.schedules],
        "call": call,
        "clips": hashlib.sha256("\n".join(clip.file_name for clip in clips).encode()).hexdigest(),
        "seed": arguments.seed,
        "batch": arguments.batch,
        "dtype": arguments.dtype,
        "device": device_name(device),
    }


def check_identity(path: Path, identity: dict) -> None:
    """Raises ValueError if the folder of `path`, sweep.json, holds another sweep."""
    before = json.loads(path.read_text()) if path.exists() else identity
    if differing := [key for key in identity if before.get(key) != identity[key]]:
        raise ValueError(
            f"{path.parent} holds a sweep with another {', '.join(differing)}; give another --output, or delete it"
        )
