"""The command line of `flexivid sample`: what it means, and what is wrong with it before a model is loaded."""

import argparse
import warnings
from fractions import Fraction
from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import load_image

import flexivid
from flexivid.command_line import (
    Parser,
    add_device,
    add_prompts,
    budget_share,
    count,
    guidance_scale,
    patch_size,
    seed,
)
from flexivid.inputs import check_model_and_base, check_output_file, check_sizes, read_prompts
from flexivid.model.adapter import read_config
from flexivid.model.families import family_of
from flexivid.model.family import transformer_of
from flexivid.model.hub import locate_adapter
from flexivid.patches.sizes import is_mixed_size
from flexivid.sampling.few_steps import call_of, share_of_full
from flexivid.sampling.schedule import Schedule, read_schedule
from flexivid.shapes.embedded import ADAPTER, MODEL, USUAL
from flexivid.single_file import check_single_file
from flexivid.stock_pipelines import latent_channels_of, pipeline_class, usual_arguments, without_weights

DEFAULT_PROMPT = "a dotted green cross growing on a black background"
DEFAULT_BUDGET = 0.25


def parse_arguments(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    parser = Parser(prog="flexivid sample", description=description)
    _add_what(parser)
    _add_spent(parser)
    add_model(parser)
    _add_files(parser)
    return parser.parse_args(argv)


def _add_what(parser: Parser) -> None:
    add = parser.add_argument
    add("--prompt", action="append", help="what the clip shows; may be given several times, for a clip each")
    add_prompts(parser, "--prompt-file")
    add("--image", help="file or address of the first frame, for a model that continues images")
    add("--seed", type=seed, default=0, help="of the noise, the same for every prompt; %(default)s by default")


def _add_spent(parser: Parser) -> None:
    spent = parser.add_mutually_exclusive_group()
    spent.add_argument(
        "--budget",
        type=budget_share,
        help="share of the full FLOPs, above 0 and up to 1; 0.25 unless there is a --schedule, or a few-step --adapter",
    )
    spent.add_argument(
        "--schedule", help="instead of a budget, for example 2x4x4:35,1x2x2:5, or a .json file of flexivid calibrate"
    )


def add_model(parser: Parser) -> None:
    """What `flexivid app` asks for too: the model, what a budget buys, the sizes of a clip, the device."""
    add, usual = parser.add_argument, "the pipeline's own by default"
    add(
        "--model",
        help="folder or hub id in diffusers format, or a transformer's .gguf or .safetensors file with --base; the "
        "embedded model by default",
    )
    add("--base", help="folder or hub id of the pipeline whose transformer the file of --model is")
    add("--adapter", help="folder or hub id; 'none' for training-free; the embedded one with the embedded model")
    add("--adapter-revision", dest="revision", help="branch, tag or commit of an adapter on the hub")
    add("--adapter-subfolder", dest="subfolder", help="in which the adapter lies, of its folder or repository")
    add("--guidance", choices=["same", "kept", "weak-uncond"], help="of weak steps in a budget; see enable()")
    add("--order", choices=["reuse", "interleaved", "weak-first"], help="of the steps of a budget; see enable()")
    add("--modes", type=patch_size, nargs="+", help="weak patch sizes, as 1x4x4 2x4x4; the adapter's by default")
    add("--parametrisation", choices=["snr", "direct"], help="without an adapter; snr by default")
    add(
        "--merge-lora",
        action=argparse.BooleanOptionalAction,
        help="see enable(); yes for the embedded model without mixed patch sizes, else no",
    )
    add("--negative-prompt", default="", help="what the clip is guided away from; nothing by default")
    add("--guidance-scale", type=guidance_scale, help=f"of classifier-free guidance, off up to 1; {usual}")
    add("--steps", type=count, help=f"denoising steps; {usual}")
    add("--frames", type=count, help=f"of the clip; {usual}")
    add("--height", type=count, help=f"in pixels; {usual}")
    add("--width", type=count, help=f"in pixels; {usual}")
    add("--fps", type=count, help="frames a second; the usual ones of the model's family")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="float32 on a CPU, else bfloat16")
    add_device(parser)
    # What the full run has else than a few-step one, and the share of its FLOPs that these steps would cost at full.
    parser.set_defaults(text_length=None, recipe=None, full={}, share=Fraction(1))


def _add_files(parser: Parser) -> None:
    add = parser.add_argument
    add("--compare", action="store_true", help="full and fewer steps of the same cost and seed beside it")
    add("--show-patches", action="store_true", help="a second clip, the grid of the patches of each step drawn over it")
    add(
        "--enlarge",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write clips of fewer than 256 pixels a side larger, by repeating pixels; yes by default",
    )
    add("--output", type=Path, default=Path("outputs/clip.mp4"), help="an .mp4 file; %(default)s by default")


def pipeline_of(arguments: argparse.Namespace) -> str | Path:
    """Folder or hub id of the pipeline, or of all but its transformer."""
    return arguments.base or arguments.model or MODEL


def fill(arguments: argparse.Namespace, values: dict) -> None:
    """Sets what the user has not given."""
    for name, value in values.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    prompts = list(arguments.prompt or [])
    if arguments.prompts:
        prompts += read_prompts(arguments.prompts)
    elif not prompts and not arguments.model:
        prompts = [DEFAULT_PROMPT]
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("the prompt is empty; give --prompt some words")
    return prompts


def check_arguments(arguments: argparse.Namespace) -> None:
    """Fills in what does not depend on the model. Raises ValueError or OSError for what is wrong without knowing it."""
    if arguments.schedule is not None and arguments.schedule.endswith(".json"):
        arguments.schedule = read_schedule(Path(arguments.schedule))
    check_output_file(arguments.output, ".mp4")
    if arguments.image and not arguments.model:
        raise ValueError("the embedded model takes no --image; give the --model of a pipeline that does")
    check_model_and_adapter(arguments)


def check_model_and_adapter(arguments: argparse.Namespace) -> None:
    """Fills in which adapter, and what it decides: its recipe, or the budget. Raises ValueError or OSError."""
    check_model_and_base(arguments.model, arguments.base)
    if arguments.adapter is None and not arguments.model:
        arguments.adapter = str(ADAPTER)
    elif arguments.adapter == "none":
        arguments.adapter = None
    if arguments.adapter:
        config = read_config(locate_adapter(arguments.adapter, arguments.revision, arguments.subfolder))
        fill(arguments, {"text_length": config.max_sequence_length})
        if arguments.budget is None and arguments.schedule is None:
            arguments.recipe = config.recipe
    if arguments.schedule is None and arguments.recipe is None:
        fill(arguments, {"budget": DEFAULT_BUDGET})


def enable(pipe: DiffusionPipeline, arguments: argparse.Namespace) -> None:
    names = ("adapter", "revision", "subfolder", "modes", "budget", "schedule", "guidance", "order", "parametrisation")
    merge_lora = arguments.merge_lora and arguments.adapter is not None
    flexivid.enable(pipe, **{name: getattr(arguments, name) for name in names}, merge_lora=merge_lora)


def sizes_of(arguments: argparse.Namespace) -> dict:
    """As `flexivid.plan` takes them."""
    names = ("frames", "height", "width", "steps", "text_length")
    return {name: getattr(arguments, name) for name in names} | {"guided": arguments.guidance_scale > 1}


def plan(pipe: DiffusionPipeline, arguments: argparse.Namespace) -> None:
    """Raises ValueError for sizes, modes, adapters, schedules and budgets that cannot work with this pipeline."""
    transformer = transformer_of(pipe)
    family = family_of(transformer)
    if family.makes_images:
        raise ValueError(f"{type(pipe).__name__} makes images, and this script videos")
    takes_image = family.image_by_timestep or pipe.config.get("expand_timesteps")
    if arguments.image and not takes_image and transformer.config["in_channels"] == latent_channels_of(pipe.vae):
        raise ValueError("this model was trained on text alone: it has no channels for an --image")
    enable(pipe, arguments)
    check_sizes(pipe, arguments.frames, arguments.height, arguments.width)
    flexivid.plan(pipe, **sizes_of(arguments))


def check_with_model(arguments: argparse.Namespace) -> DiffusionPipeline:
    """What can be wrong with the model or does not fit it, from its configs alone.

    Fills in what the pipeline does when it is not told. Returns the pipeline without weights, enabled.
    """
    model = pipeline_of(arguments)
    pipeline = pipeline_class(model, arguments.image is not None)
    with warnings.catch_warnings(action="ignore"):  # of copies between tensors that have no data
        empty = without_weights(model, pipeline)
        if arguments.base:
            check_single_file(Path(arguments.model), empty)
        usual = usual_arguments(empty) | ({} if arguments.model else USUAL)
        usual["merge_lora"] = not arguments.model and not _is_mixed(arguments.schedule)
        if arguments.recipe is not None:
            family = family_of(transformer_of(empty))
            fill(arguments, call_of(arguments.recipe, family))
            arguments.full = {name: usual[name] for name in ("steps", "guidance_scale")}
            arguments.share = share_of_full(arguments.recipe, family, **arguments.full)
        fill(arguments, usual)
        plan(empty, arguments)
    if arguments.image:
        arguments.image = load_image(arguments.image)
    return empty


def _is_mixed(schedule: Schedule | str | None) -> bool:
    """Whether a step has two patch sizes in one forward, which merged LoRA does not go with."""
    return schedule is not None and is_mixed_size(str(schedule))
