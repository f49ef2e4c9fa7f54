"""What scripts are given, looked at before anything is loaded: prompts, models, sizes, files and folders.

All raise ValueError or OSError that says what would be right.
"""

import json
import tempfile
import warnings
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, MiniMaxH3ModularPipeline, WanPipeline
from safetensors import SafetensorError, safe_open

import flexivid
from flexivid import text
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.shapes.prompts import load_prompts
from flexivid.shapes.world import Scene, all_scenes
from flexivid.single_file import is_single_file
from flexivid.stock_pipelines import pipeline_class, without_weights
from flexivid.training.modular import PARTS

SHAPES_SETS = ("shapes", "shapes-held-out", "shapes-unjudged")


def shapes_scenes(name: str) -> list[Scene]:
    """The scenes of one of SHAPES_SETS: the committed prompts, those of held-out combinations, and all the others."""
    judged = load_prompts()
    if name != "shapes-unjudged":
        return judged["seen" if name == "shapes" else "held_out"]
    scenes = [scene for scene in all_scenes() if scene not in {*judged["seen"], *judged["held_out"]}]
    return [scenes[k] for k in torch.randperm(len(scenes), generator=torch.Generator().manual_seed(1)).tolist()]


def read_prompts(source: str) -> list[str]:
    """The prompts that `--prompts` names: one of SHAPES_SETS, or a text file with one a line."""
    if source in SHAPES_SETS:
        return [scene.caption for scene in shapes_scenes(source)]
    path = Path(source)
    if not path.exists():
        raise ValueError(f"--prompts must be {', '.join(SHAPES_SETS)} or a text file, and there is no file {path}")
    if path.is_dir():
        raise ValueError(f"--prompts {path} is a folder; name a text file with one prompt a line")
    prompts = text.read_prompts(path)
    if not prompts:
        raise ValueError(f"{path} holds no prompt; write one a line")
    return prompts


def read_json(path: Path) -> dict:
    """The object that a JSON file holds."""
    try:
        content = json.loads(text.read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no object but {type(content).__name__}")
    return content


def check_output_folder(folder: Path) -> None:
    """Raises if the folder cannot be made or written into. Makes nothing."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ValueError(f"the output folder cannot be {folder}: {there} is a file")
    try:
        tempfile.TemporaryFile(dir=there).close()
    except OSError as error:
        raise ValueError(f"the output folder {folder} is not writable: {error.strerror}") from None


def check_output_file(path: Path, *endings: str) -> None:
    """Raises if there can be no file of that name, or if it has none of the endings."""
    if path.suffix not in endings:
        raise ValueError(f"the output must be an {' or '.join(endings)} file, not {path}")
    if path.is_dir():
        raise ValueError(f"the output {path} is a folder; name a file in it")
    check_output_folder(path.parent)


def check_model(model: str | Path, without: tuple[str, ...] = ()) -> None:
    """Raises unless it is a folder with a whole pipeline in diffusers format, or may be a hub id.

    without: parts whose weights come from elsewhere.
    """
    folder = Path(model)
    indices = [path for name in ("", "modular_") if (path := folder / f"{name}model_index.json").is_file()]
    if not indices:
        if folder.exists() or str(model).count("/") != 1:
            raise ValueError(f"no model in diffusers format at {model}: it has no model_index.json")
        return
    index, *_ = indices
    content = read_json(index)
    if "_class_name" not in content:
        raise ValueError(f"{index} names no pipeline: it has no _class_name")
    # A component is written as [library, class], and [null, null] where there is none.
    parts = [name for name, value in content.items() if isinstance(value, list) and len(value) == 2 and value[1]]
    if content["_class_name"] == MiniMaxH3ModularPipeline.__name__:
        parts = list(PARTS)
    for name in parts:
        if not (folder / name).is_dir():
            raise ValueError(f"{model} is incomplete: it has no folder {name}")
        if name in without:
            continue
        endings = {path.suffix for path in (folder / name).iterdir()}
        if (folder / name / "config.json").is_file() and ".safetensors" not in endings:
            if ".bin" in endings:
                raise ValueError(
                    f"the weights of {name} in {model} are .bin files, whose loading can run code; only safetensors "
                    f"are read, as save_pretrained of diffusers writes them"
                )
            raise ValueError(f"{model} is incomplete: {name} has no weights")
    for path in sorted(folder.rglob("*.safetensors")):
        try:
            safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def check_model_and_base(model: str | None, base: str | None) -> None:
    """Raises unless a pipeline may come of a folder or hub id, or of one file and the base that it belongs to."""
    is_file = model is not None and is_single_file(model)
    if is_file and base is None:
        raise ValueError(f"{model} is a transformer without its pipeline: give --base, the folder or hub id of that")
    if base is not None and not is_file:
        raise ValueError("--base is the pipeline of a --model that is one file, .gguf or .safetensors")
    if is_file and not Path(model).is_file():
        raise ValueError(f"there is no file {model}")
    if model is not None:
        check_model(base or model, without=("transformer",) if is_file else ())


def empty_pipeline(model: str | Path, with_image: bool = False) -> DiffusionPipeline:
    """The pipeline of a model on the meta device, without weights."""
    check_model(model)
    with warnings.catch_warnings(action="ignore"):  # of copies between tensors that have no data
        return without_weights(model, pipeline_class(model, with_image))


def empty_wan_pipeline(model: str | Path) -> WanPipeline:
    """That of a model which a script samples as it does the embedded one."""
    pipe = empty_pipeline(model)
    if type(pipe) is not WanPipeline:
        raise ValueError(f"{model} is a {type(pipe).__name__}; this script measures WanPipelines of the embedded world")
    return pipe


def check_sizes(pipe: DiffusionPipeline, frames: int, height: int, width: int) -> None:
    """Raises for sizes of a clip that the pipeline could only round. pipe: without weights will do."""
    family = family_of(pipe.transformer)
    stride, shrink = family.compression(pipe)
    patch = patch_size_of(pipe.transformer.config)
    for name, value, unit in (("height", height, patch[1] * shrink), ("width", width, patch[2] * shrink)):
        if value % unit:
            raise ValueError(f"{name} must be a multiple of {unit}, such as {-(-value // unit) * unit}, not {value}")
    if family.section_frames is None and frames % stride != 1 % stride:  # else they become whole sections
        raise ValueError(
            f"frames must be 1 + a multiple of {stride}, such as {frames // stride * stride + 1}, not {frames}"
        )


def check_arm(pipe: DiffusionPipeline, call: dict, **settings) -> None:
    """Raises what `flexivid.enable` with these settings, and a call of the pipeline, would raise.

    pipe: without weights. call: by the names of `stock_pipelines.ARGUMENTS`.
    """
    sizes = (call[name] for name in ("frames", "height", "width", "steps", "text_length"))
    with warnings.catch_warnings(action="ignore"):
        flexivid.enable(pipe, **settings)
        flexivid.plan(pipe, *sizes, guided=call["guidance_scale"] > 1)
