"""Adapters, each a folder or a hub id.

flexivid adapters list                                 the embedded one, and those in the hub's cache
flexivid adapters list runs                            and those below a folder
flexivid adapters inspect runs/mine/result             what it was made for, and what it holds
flexivid adapters check someone/adapter                whether it is whole and fits the model that it was made for
flexivid adapters check runs/mine/result --model Wan-AI/Wan2.1-T2V-1.3B-Diffusers        or another one
flexivid adapters merge HIGH LOW --output BOTH         joins those of the two transformers of a pipeline
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound
from safetensors import SafetensorError, safe_open

import flexivid
from flexivid.command_line import Parser, command
from flexivid.inputs import check_output_folder, empty_pipeline
from flexivid.model.adapter import (
    CONFIG_NAME,
    LORA_NAME,
    WEIGHTS_NAME,
    AdapterConfig,
    AdapterError,
    merge_adapters,
    read_config,
)
from flexivid.model.family import patch_size_of, transformer_of
from flexivid.model.hub import locate_adapter
from flexivid.patches.sizes import format_patch_size
from flexivid.shapes.embedded import ADAPTER, FEW_ADAPTER
from flexivid.shipped import shipped_path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="flexivid adapters", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    named = commands.add_parser("list", help="the embedded one, those in the hub's cache, and those below folders")
    named.add_argument("folders", type=Path, nargs="*", help="folders that are searched too")
    inspect = commands.add_parser("inspect", help="what it was made for, and what it holds")
    check = commands.add_parser("check", help="whether it is whole and fits a model")
    check.add_argument("--model", help="folder or hub id of the pipeline; what the adapter was made for by default")
    for one in (inspect, check):
        one.add_argument("adapter", help="folder or hub id")
        one.add_argument("--revision", help="branch, tag or commit of a hub id")
        one.add_argument("--subfolder", help="in which the adapter lies")
    merge = commands.add_parser("merge", help="joins adapters for the two transformers of a pipeline")
    merge.add_argument("adapters", type=Path, nargs="+", help="adapter folders")
    merge.add_argument("--output", type=Path, required=True, help="folder of the joined adapter, new or empty")
    return parser.parse_args(argv)


def found(folders: list[Path]) -> Iterator[tuple[str, Path]]:
    """Names and folders of adapters: the embedded one, those in the hub's cache, those below some folders."""
    for folder in (ADAPTER, FEW_ADAPTER):
        yield f"flexivid/assets/{folder.name}", folder
    try:
        cached = scan_cache_dir().repos
    except CacheNotFound:
        cached = frozenset()
    files = [(repo, file) for repo in cached for revision in repo.revisions for file in revision.files]
    for repo, file in sorted(files, key=lambda pair: (pair[0].repo_id, str(pair[1].file_path))):
        if file.file_name == CONFIG_NAME:
            yield repo.repo_id, file.file_path.parent
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"there is no folder {folder}")
        yield from ((str(path.parent), path.parent) for path in sorted(folder.rglob(CONFIG_NAME)))


def print_list(folders: list[Path]) -> None:
    """A line an adapter; of one that cannot be read, why."""
    for name, folder in found(folders):
        try:
            config = read_config(folder)
            steps = "" if config.recipe is None else f", {config.recipe.steps} steps"
            print(f"{name}: {', '.join(config.patch_sizes)}{steps}; for {config.base_model}")
        except AdapterError as error:
            print(f"{name}: {error}")


def tensors_of(folder: Path) -> Iterator[tuple[Path, str, Any]]:
    """File, name and lazy content of every tensor of an adapter. Raises AdapterError for a file that is cut."""
    for path in (folder / WEIGHTS_NAME, folder / LORA_NAME):
        if path.is_file():
            try:
                with safe_open(path, "pt") as file:
                    yield from ((path, name, file.get_slice(name)) for name in file.keys())
            except SafetensorError as error:
                raise AdapterError(f"{path} is not a whole safetensors file: {error}") from None


def sizes_of(folder: Path) -> dict[str, int]:
    """How many numbers an adapter holds, by component and patch size, as `transformer.1x4x4`."""
    sizes = Counter()
    for _, name, tensor in tensors_of(folder):
        component, patch_size, _ = name.split(".", 2)
        sizes[f"{component}.{patch_size}"] += prod(tensor.get_shape())
    return dict(sizes)


def print_config(folder: Path, config: AdapterConfig) -> None:
    facts = config.model_dump(exclude_none=True, exclude={"format", "recipe", "training", "transformer_shape"})
    if config.recipe is not None:
        steps = zip(config.recipe.patch_sizes, config.recipe.sigmas, strict=True)
        facts["recipe"] = [f"{patch_size} at {sigma:g}" for patch_size, sigma in steps]
    facts |= {"shape": config.transformer_shape, "training": config.training}
    facts["numbers"] = {name: f"{number / 1e6:.3g} M" for name, number in sizes_of(folder).items()}
    for name, value in facts.items():
        if isinstance(value, dict):
            value = [f"{key} {entry}" for key, entry in value.items()]
        print(f"{name.replace('_', ' '):<22}{', '.join(value) if isinstance(value, list) else value}")


def check_numbers(folder: Path) -> None:
    """Raises AdapterError if something in an adapter is no finite number."""
    for path, name, tensor in tensors_of(folder):
        if not torch.isfinite(tensor[...]).all():
            raise AdapterError(f"{path}: {name} holds what is no finite number")


def check_fit(folder: Path, model: str) -> None:
    """Raises ValueError or OSError if the adapter is not whole or does not fit a model, of which configs are read."""
    with warnings.catch_warnings(action="ignore"):  # of copies between tensors that have no data
        pipe = empty_pipeline(model)
        powerful = format_patch_size(patch_size_of(transformer_of(pipe).config))
        flexivid.enable(pipe, adapter=folder, schedule=powerful)


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    if arguments.command == "list":
        print_list(arguments.folders)
    elif arguments.command == "merge":
        check_output_folder(arguments.output)
        if arguments.output.is_dir() and any(arguments.output.iterdir()):
            raise ValueError(f"{arguments.output} is not empty; give another --output, or delete it")
        merge_adapters(arguments.adapters, arguments.output)
        print(arguments.output)
    else:
        folder = locate_adapter(arguments.adapter, arguments.revision, arguments.subfolder)
        config = read_config(folder)
        if arguments.command == "inspect":
            print_config(folder, config)
            return
        model = arguments.model or str(shipped_path(Path(config.base_model)))
        check_fit(folder, model)
        check_numbers(folder)
        print(f"{arguments.adapter} is whole and fits {arguments.model or config.base_model}")
