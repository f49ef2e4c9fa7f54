"""A transformer whose weights are one file, GGUF or safetensors, in the place of a pipeline's own."""

from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, GGUFQuantizationConfig, ModelMixin
from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES
from diffusers.utils import is_gguf_available
from safetensors import SafetensorError, safe_open

from flexivid.published import load_index

GGUF = ".gguf"
ENDINGS = (GGUF, ".safetensors")
# By which float8 files of other programs multiply their weights; `from_single_file` leaves that out.
SCALES = ("scale_weight", "weight_scale", "scaled_fp8")


def is_single_file(model: str | Path) -> bool:
    return Path(model).suffix in ENDINGS


def check_single_file(path: Path, pipe: DiffusionPipeline) -> None:
    """Raises ValueError or OSError if a file does not hold the transformer of a pipeline. Reads nothing but its header.

    pipe: without weights will do.
    """
    transformer = pipe.transformer
    class_name = type(transformer).__name__
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError(
            f"{path} is one transformer, and this {type(pipe).__name__} has two: load both in Python, each with "
            f"from_single_file, and enable the pipeline that they make"
        )
    if class_name not in SINGLE_FILE_LOADABLE_CLASSES:
        raise ValueError(f"diffusers reads no single files of a {class_name}: give --model the folder of a pipeline")
    found = _shapes(path)
    if scaled := next((name for name in found if name.rpartition(".")[2] in SCALES), None):
        raise ValueError(f"{path} holds scaled float8 weights ({scaled}), which diffusers does not read: take a GGUF")
    expected = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    if found.keys() != expected.keys():
        found = _converted(path, found, transformer)
    for name, shape in expected.items():
        if found.get(name) != shape:
            there = f"has shape {found[name]} there, and {shape}" if name in found else "is not there, and belongs"
            raise ValueError(f"{path} does not hold the {class_name} of the pipeline: {name} {there} in this model")


def _converted(path: Path, shapes: dict[str, tuple[int, ...]], transformer: ModelMixin) -> dict[str, tuple[int, ...]]:
    """The shapes of a file by the names of diffusers, as `from_single_file` makes them."""
    class_name = type(transformer).__name__
    convert = SINGLE_FILE_LOADABLE_CLASSES[class_name]["checkpoint_mapping_fn"]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    try:
        converted = convert(checkpoint=tensors, config=dict(transformer.config))
    except Exception as error:  # of a model that it was not written for
        raise ValueError(f"{path} is no checkpoint of a {class_name}: {error!r}") from None
    return {name: tuple(tensor.shape) for name, tensor in converted.items()}


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Of the tensors in a file, quantised ones as if they were not."""
    if path.suffix == GGUF:
        return _gguf_shapes(path)
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _gguf_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    if not is_gguf_available():
        raise ValueError(f"{path} needs the package gguf: pip install gguf")
    from gguf import GGUFReader

    try:
        tensors = GGUFReader(path).tensors  # maps the file, and reads no weights
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(f"{path} is not a whole GGUF file: {error}") from None
    return {tensor.name: tuple(map(int, reversed(tensor.shape))) for tensor in tensors}


def load_single_file(path: Path, base: str | Path, dtype: torch.dtype) -> ModelMixin:
    """The transformer that belongs to the pipeline of base. Quantised weights stay so; they compute in `dtype`."""
    component = getattr(diffusers, load_index(base)["transformer"][1])
    quantised = {"quantization_config": GGUFQuantizationConfig(compute_dtype=dtype)} if path.suffix == GGUF else {}
    return component.from_single_file(str(path), config=str(base), subfolder="transformer", dtype=dtype, **quantised)
