"""The command line of a sweep: what it means, and what is wrong with it."""

import argparse
import hashlib
import platform
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from flexivid.command_line import (
    Parser,
    add_batch,
    add_device,
    add_prompts,
    add_rounds,
    budget_share,
    count,
    guidance_scale,
    patch_size,
    seed,
)
from flexivid.inputs import SHAPES_SETS, check_output_folder, read_json, read_prompts
from flexivid.sampling.schedule import read_schedule
from flexivid.shapes.embedded import ADAPTER, MODEL, USUAL
from flexivid.stock_pipelines import usual_arguments
from flexivid.sweep.arms import METHODS
from flexivid.sweep.rivals import RIVALS
from flexivid.sweep.sampling import Clip
from flexivid.sweep.vbench import DIMENSIONS, standard_prompts

TUNING_CLIPS = 4
# The methods that use --adapter.
ADAPTED = (
    "adapter",
    "interleaved",
    "adapter-same",
    "weak-first",
    "adapter-half-steps",
    "adapter-fbcache",
    "calibrated",
)


def parse_arguments(description: str, argv: list[str]) -> argparse.Namespace:
    parser = Parser(prog="flexivid sweep", description=description)
    add = parser.add_argument
    add("--model", help="folder or hub id in diffusers format; the embedded model by default")
    add("--adapter", help="flexivid adapter, folder or hub id; the embedded model's by default")
    add("--direct-adapter", help="an adapter of the direct parametrisation, for the method `direct`")
    add("--few-adapters", type=Path, nargs="+", default=[], help="few-step adapter folders, for the method `few`")
    add("--modes", type=patch_size, nargs="+", help="weak patch sizes of training-free arms; the family's by default")
    add(
        "--schedules", type=Path, nargs="+", default=[], help="files of flexivid calibrate, for the method `calibrated`"
    )
    add("--budgets", type=budget_share, nargs="+", default=[1.0, 0.6, 0.4, 0.25], help="shares of the full run's FLOPs")
    methods = "; ".join(f"{name}: {meaning}" for name, meaning in METHODS.items())
    add("--methods", nargs="+", choices=METHODS, help=methods)
    add("--rivals", nargs="*", choices=["steps", *RIVALS], help="beside flexivid, instead of every one of them")
    add("--arms", nargs="+", help="only these of the methods' arms, beside the full run, such as steps-10 reuse-0.1")
    add_prompts(parser, sets="vbench (VBench's own), ")
    add("--max-prompts", type=count, help="only the first so many")
    add("--videos-per-prompt", type=count, default=2, help="clips of each prompt; %(default)s by default")
    add("--steps", type=count, help="at full compute")
    add("--guidance-scale", type=guidance_scale, help="of classifier-free guidance; the pipeline's own by default")
    add("--guidance", choices=["kept", "same", "weak-uncond"], help="of flexivid's arms, as in flexivid.enable")
    add("--frames", type=count, help="of a clip; the pipeline's own by default")
    add("--height", type=count, help="in pixels; the pipeline's own by default")
    add("--width", type=count, help="in pixels; the pipeline's own by default")
    add("--seed", type=seed, default=0, help="of the first clip, one more for each other; %(default)s by default")
    add_rounds(parser, "--timed-rounds", default=3)
    add_batch(parser, default=16)
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of the transformer")
    add_device(parser)
    add("--cpu", dest="device", action="store_const", const=torch.device("cpu"), help="--device cpu")
    add("--dimensions", nargs="*", default=[], help="of VBench: names, or all that the prompts allow")
    add("--vbench-cache", type=Path, help="folder of VBench's weights; ~/.cache/vbench by default")
    add("--report-prompts", type=count, default=6, help="prompts whose clips are in report.html")
    add("--output", type=Path, default=Path("outputs/sweep"), help="folder; %(default)s by default")
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
    arguments.budgets = sorted({budget for budget in arguments.budgets if budget < 1}, reverse=True)
    if not arguments.budgets:
        raise ValueError("nothing to compare the full run with: give --budgets below 1")
    _check_methods(arguments)
    _check_dimensions(arguments)
    if arguments.prompts in SHAPES_SETS and (arguments.height or 64) != (arguments.width or 64):
        raise ValueError("the shapes world is square: give one size as --height and --width")
    check_output_folder(arguments.output)


def _check_methods(arguments: argparse.Namespace) -> None:
    arguments.names_rivals = arguments.methods is not None or arguments.rivals is not None
    if arguments.methods is None:
        rivals = ["steps", *RIVALS] if arguments.rivals is None else arguments.rivals
        own = ["adapter", "training-free", "reuse"] if arguments.adapter else ["training-free", "reuse"]
        arguments.methods = [*own, *rivals]
    elif arguments.rivals is not None:
        raise ValueError("--methods names the rivals too; give one of --methods and --rivals")
    for method in arguments.methods:
        if method == "calibrated" and not arguments.schedules:
            raise ValueError("the method calibrated needs --schedules, files that flexivid calibrate wrote")
        if method == "direct" and arguments.direct_adapter is None:
            raise ValueError("the method direct needs --direct-adapter")
        if method == "few" and not arguments.few_adapters:
            raise ValueError("the method few needs --few-adapters, folders of adapters that have a recipe")
        if method in ADAPTED and arguments.adapter is None:
            raise ValueError(f"the method {method} needs --adapter")


def _check_dimensions(arguments: argparse.Namespace) -> None:
    if unknown := set(arguments.dimensions) - {*DIMENSIONS, "all"}:
        raise ValueError(f"VBench has no dimension {unknown.pop()}; it has {', '.join(DIMENSIONS)}")
    fitting = [name for name, d in DIMENSIONS.items() if d.any_prompt or arguments.prompts == "vbench"]
    if "all" in arguments.dimensions:
        arguments.dimensions = fitting
    if unfit := [name for name in arguments.dimensions if name not in fitting]:
        raise ValueError(f"{unfit[0]} can be scored on VBench's own prompts only: --prompts vbench")
    if arguments.vbench_cache is not None and not arguments.vbench_cache.is_dir():
        raise ValueError(f"--vbench-cache must be a folder, and {arguments.vbench_cache} is none")


def _all_prompts(arguments: argparse.Namespace) -> list[str]:
    return standard_prompts(arguments.dimensions) if arguments.prompts == "vbench" else read_prompts(arguments.prompts)


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    return _all_prompts(arguments)[: arguments.max_prompts]


def tuning_clips(arguments: argparse.Namespace, clips: list[Clip]) -> list[Clip]:
    """What rivals are tuned on, which no arm is measured on. clips: of the sweep.

    The last captions of shapes-unjudged, in the embedded world, or those that --max-prompts leaves out. Where the sweep
    has all there are, its own with other seeds.
    """
    in_world = arguments.prompts in SHAPES_SETS
    captions = read_prompts("shapes-unjudged") if in_world else _all_prompts(arguments)
    measured = {clip.prompt for clip in clips}
    others = [caption for caption in captions if caption not in measured] or captions
    first = arguments.seed + len(clips)
    return [Clip(caption, 0, first + k) for k, caption in enumerate(others[-TUNING_CLIPS:])]


def pipeline_call(arguments: argparse.Namespace, empty: DiffusionPipeline) -> dict:
    """How clips are sampled, by the names of `stock_pipelines.ARGUMENTS`; the same for every arm but for the steps.

    empty: the pipeline without weights.
    """
    of_this_world = arguments.model is None or arguments.prompts in SHAPES_SETS
    call = dict(USUAL) if of_this_world else usual_arguments(empty)
    given = {name: getattr(arguments, name, None) for name in call}
    return call | {name: value for name, value in given.items() if value is not None}


def device_of(state: PartialState, asked: torch.device) -> torch.device:
    """The device of this process. Raises ValueError for one device that several processes would share."""
    if asked.index is None and asked.type == state.device.type:
        return state.device
    if state.num_processes > 1:
        raise ValueError(
            f"--device {asked} is one device, and there are {state.num_processes} processes: --device {asked.type}"
        )
    return asked


CONTENT = (".safetensors", ".json", ".model", ".txt")  # weights, configurations, vocabularies


def digest_of(source: str | Path) -> str:
    """What a model or an adapter is, wherever its folder lies: the files in it, and what they hold. A hub id is a name.

    What is hidden in the folder, such as the records of a download, does not count.
    """
    folder, digest = Path(source), hashlib.sha256()
    if not folder.is_dir():
        return hashlib.sha256(str(source).encode()).hexdigest()
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix in CONTENT and path.is_file() and not any(part.startswith(".") for part in inside.parts):
            with path.open("rb") as file:
                digest.update(f"{inside.as_posix()} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


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
    """What every clip and figure of a sweep depends on: a folder holds one sweep only.

    None, or nothing, for an adapter that no method uses: the rivals may be sampled while it is still trained.
    """
    sources = {
        "model": arguments.model or MODEL,
        "adapter": arguments.adapter if set(arguments.methods) & set(ADAPTED) else None,
        "direct_adapter": arguments.direct_adapter if "direct" in arguments.methods else None,
    }
    sources |= {f"few_adapter {folder.name}": folder for folder in arguments.few_adapters if "few" in arguments.methods}
    return {
        **{name: source and digest_of(source) for name, source in sources.items()},
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


def check_identity(path: Path, identity: dict) -> dict:
    """What the folder of `path`, sweep.json, is to hold. Raises ValueError if it holds another sweep."""
    before = read_json(path) if path.exists() else identity
    adapters = {key for key in before | identity if "adapter" in key}
    unknown = {key for key in adapters if None in (before.get(key), identity.get(key))}
    if differing := [key for key in identity if key not in unknown and before.get(key) != identity[key]]:
        raise ValueError(
            f"{path.parent} holds a sweep with another {', '.join(differing)}; give another --output, or delete it"
        )
    return identity | {key: identity.get(key) or before.get(key) for key in unknown}
