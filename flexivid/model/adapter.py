"""Adapter folders: `flexivid_config.json`, `flexivid.safetensors`, `pytorch_lora_weights.safetensors`.

A few-step recipe, `recipe` in the config, has a LoRA for the powerful patch size too, active in its runs only.

Beside the weak modes `flexivid.safetensors` holds the stock embedder and head that they were trained beside, as
`<component>.stock.embedder.weight` and so on, so that a LoRA that is fused into these reaches the weak modes. A folder
from before takes those of the model that it is enabled on: there, fuse a LoRA that touches them after `enable`.

The LoRA file carries diffusers' key names and metadata under the prefix `<component>.<patch size>`, so that
`transformer.load_lora_adapter(folder, prefix="transformer.1x4x4")` reads it too.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from flexivid.files import replacing
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora
from flexivid.model.recipe import Recipe
from flexivid.patches.sizes import GUIDED
from flexivid.tensors import whole

CONFIG_NAME = "flexivid_config.json"
WEIGHTS_NAME = "flexivid.safetensors"
LORA_NAME = "pytorch_lora_weights.safetensors"


class AdapterError(ValueError):
    """An adapter folder that cannot be used; the message says why and what would be right."""


class AdapterConfig(BaseModel):
    """The contents of `flexivid_config.json`."""

    model_config = ConfigDict(extra="forbid")

    format: int = Field(1, ge=1, le=1)
    patch_sizes: list[str] = Field(
        description="weak patch sizes, as 1x4x4, or guided, as 1x4x4-guided; none only with a recipe"
    )
    guidance_scale: float | None = Field(None, gt=1, description="of classifier-free guidance, that guided ones give")
    parametrisation: str
    lora_rank: int = Field(ge=0, description="0: no LoRA, all weights of the model were trained with the modes")
    components: list[str] = Field(min_length=1, description="pipeline components that are adapted")
    base_model: str = Field(description="id or path of the model it was trained on")
    transformer_class: str
    transformer_shape: dict[str, int | list[int]] = Field(description="config values that must agree with the model")
    max_sequence_length: int | None = Field(None, description="padded text length that the adapter was trained for")
    recipe: Recipe | None = Field(None, description="few steps without guidance that the adapter was trained for")
    training: dict = Field(default_factory=dict, description="facts about the training run")

    @classmethod
    def of(cls, flex: FlexTransformer, **more) -> "AdapterConfig":
        """That of a transformer's weak modes: what is to be seen of them is read off, the other fields are given."""
        guided = any(mode.endswith(GUIDED) for mode in flex.weak_modes)
        return cls(
            patch_sizes=list(flex.weak_modes),
            guidance_scale=flex.guidance_scale if guided else None,
            parametrisation=flex.parametrisation,
            transformer_class=type(flex.transformer).__name__,
            transformer_shape=transformer_shape(flex),
            **more,
        )

    @model_validator(mode="after")
    def _something_is_adapted(self):
        if not self.patch_sizes and self.recipe is None:
            raise ValueError("patch_sizes is empty, and there is no recipe")
        if self.recipe is not None and not self.lora_rank:
            raise ValueError("a recipe needs LoRA, and lora_rank is 0")
        return self

    def loras(self, flex: FlexTransformer) -> list[str]:
        """The names of its LoRAs: the weak patch sizes, and the powerful one where the recipe runs it.

        Raises AdapterError if the recipe runs another one.
        """
        steps = self.recipe.patch_sizes if self.recipe is not None else []
        if unknown := [name for name in steps if name not in (*self.patch_sizes, flex.powerful)]:
            raise AdapterError(f"the adapter's recipe runs {unknown[0]}, which it has no weights for")
        return [*flex.weak_modes, *([flex.powerful] if flex.powerful in steps else [])]


def transformer_shape(flex: FlexTransformer) -> dict[str, int | list[int]]:
    """The config values that an adapter depends on."""
    config = flex.transformer.config
    names = ["patch_size", "patch_size_t", "in_channels", "out_channels"]
    names += ["num_attention_heads", "attention_head_dim", "ffn_dim", "num_layers", "num_single_layers"]
    found = {name: config[name] for name in names if config.get(name) is not None}
    return {name: list(value) if isinstance(value, (tuple, list)) else value for name, value in found.items()}


def read_config(folder: Path) -> AdapterConfig:
    """Raises AdapterError if the folder is not an adapter or its config is not valid."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"{folder} is not a flexivid adapter: it has no {CONFIG_NAME}")
    try:
        return AdapterConfig.model_validate(json.loads(path.read_text()))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise AdapterError(f"{path} is not JSON: {error}") from None
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise AdapterError(f"{path}: {problems}") from None


def check_matches(config: AdapterConfig, component: str, flex: FlexTransformer) -> None:
    """Raises AdapterError if the adapter was made for another model, naming what differs."""
    name = type(flex.transformer).__name__
    if config.transformer_class != name:
        raise AdapterError(f"the adapter is for {config.transformer_class}, but this model's {component} is {name}")
    shape = transformer_shape(flex)
    differing = [
        f"{key} {config.transformer_shape.get(key)} != {shape[key]}"
        for key in shape
        if config.transformer_shape.get(key) != shape[key]
    ]
    if differing:
        raise AdapterError(
            f"the adapter was made for {config.base_model}; this model's {component} differs: {', '.join(differing)}"
        )
    if component not in config.components:
        raise AdapterError(f"the adapter has weights for {', '.join(config.components)}, but none for {component}")


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise AdapterError(f"the adapter is incomplete: {path} is missing") from None
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}") from None


def load_adapter(
    folder: Path, config: AdapterConfig, flexes: dict[str, FlexTransformer], more: Iterable[str] = ()
) -> None:
    """Fills the weak modes and LoRA of `flexes`, by pipeline component, from an adapter folder.

    more: names of LoRAs that are added beside, and start at nothing unless the adapter has them.
    Raises AdapterError for missing, corrupt or foreign files; the caller then takes the hooks off again.
    """
    for component, flex in flexes.items():
        check_matches(config, component, flex)
        flex.guidance_scale = config.guidance_scale
    weights = _read_tensors(folder / WEIGHTS_NAME)
    lora = _read_tensors(folder / LORA_NAME) if config.lora_rank else {}

    def under(tensors, prefix):
        found = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        if not found:
            raise AdapterError(f"the adapter in {folder} has no weights under {prefix}")
        return found

    def stored(patch_size: str, flex: FlexTransformer) -> str | None:
        """A guided mode that is to be trained starts from the one without guidance, None for the stock model."""
        unguided = patch_size.removesuffix(GUIDED)
        if patch_size in config.patch_sizes or patch_size == unguided:
            return patch_size
        return None if unguided == flex.powerful else unguided

    for component, flex in flexes.items():
        for patch_size, mode in flex.weak_modes.items():
            if stored(patch_size, flex) is None:
                continue
            try:
                mode.load_state_dict(under(weights, f"{component}.{stored(patch_size, flex)}."))
            except RuntimeError as error:
                raise AdapterError(f"{folder / WEIGHTS_NAME} does not fit the model: {error}") from None
        for stock, (weight, bias) in zip(flex.stock_layers, stock_names(component), strict=True):
            if weight not in weights and bias not in weights:
                continue  # a folder from before they were kept
            try:
                stock.trained_beside((weights[weight], weights[bias]))
            except (KeyError, ValueError) as error:
                raise AdapterError(f"{folder / WEIGHTS_NAME} does not fit the model: {error}") from None
        if not config.lora_rank:
            continue
        starts = {name: stored(name, flex) for name in config.loras(flex)}
        loras = {name: under(lora, f"{component}.{start}.") for name, start in starts.items() if start is not None}
        names = starts | dict.fromkeys(more)
        add_lora(flex, config.lora_rank, [name for name in names if name not in flex.weak_modes])
        for patch_size, state in loras.items():
            _fill_lora(flex, patch_size, state, folder / LORA_NAME)


def _fill_lora(flex: FlexTransformer, patch_size: str, state: dict[str, torch.Tensor], path: Path) -> None:
    """Raises AdapterError if the tensors, which are of `path`, are not those of the LoRA that was added."""
    name = flex.lora.name_of(patch_size)
    own = get_peft_model_state_dict(flex.transformer, adapter_name=name)
    differing = {
        key
        for key in own.keys() | state.keys()
        if key not in own or key not in state or own[key].shape != state[key].shape
    }
    if differing:
        raise AdapterError(
            f"{path} does not fit the model: {len(differing)} tensors of {patch_size} "
            f"are missing, unknown or of another shape, for example {min(differing)}"
        )
    set_peft_model_state_dict(flex.transformer, state, adapter_name=name)


def stock_names(component: str) -> list[tuple[str, str]]:
    """The names in `flexivid.safetensors` of the stock weights that a component's weak modes were trained beside."""
    return [(f"{component}.stock.{layer}.weight", f"{component}.stock.{layer}.bias") for layer in ("embedder", "head")]


def save_adapter(folder: Path, config: AdapterConfig, flexes: dict[str, FlexTransformer], write: bool = True) -> None:
    """Writes an adapter folder in half precision; each file beside, then renamed.

    write: no for the processes that only hold a part of the weights, and have to give it.
    """
    weights: dict[str, torch.Tensor] = {}
    lora: dict[str, torch.Tensor] = {}
    metadata: dict[str, object] = {}
    for component, flex in flexes.items():
        for stock, names in zip(flex.stock_layers, stock_names(component), strict=True):
            weights |= zip(names, stock.to_train_beside(), strict=True)
        for patch_size, mode in flex.weak_modes.items():
            prefix = f"{component}.{patch_size}."
            weights |= {prefix + name: tensor for name, tensor in mode.state_dict().items()}
        for lora_name in config.loras(flex) if config.lora_rank else ():
            prefix, name = f"{component}.{lora_name}.", flex.lora.name_of(lora_name)
            state = get_peft_model_state_dict(flex.transformer, adapter_name=name)
            lora |= {prefix + key: tensor for key, tensor in state.items()}
            facts = flex.transformer.peft_config[name].to_dict()
            metadata |= {prefix + key: facts[key] for key in ("r", "lora_alpha", "target_modules")}

    weights, lora = ({name: whole(tensor) for name, tensor in tensors.items()} for tensors in (weights, lora))
    if write:
        _write(folder, config, weights, lora if config.lora_rank else None, metadata)


def _write(folder: Path, config: AdapterConfig, weights: dict, lora: dict | None, metadata: dict) -> None:
    """The files of an adapter, in half precision; each beside, then renamed."""
    folder.mkdir(parents=True, exist_ok=True)

    def halved(tensors):
        return {name: tensor.detach().half().contiguous().cpu() for name, tensor in tensors.items()}

    files = {WEIGHTS_NAME: lambda path: save_file(halved(weights), path, {"format": "pt"})}
    if lora is not None:
        facts = {"format": "pt", "lora_adapter_metadata": json.dumps(metadata, sort_keys=True)}
        files[LORA_NAME] = lambda path: save_file(halved(lora), path, facts)
    # What it does not have, versions before do not have to know.
    files[CONFIG_NAME] = lambda path: path.write_text(config.model_dump_json(indent=2, exclude_none=True) + "\n")
    for name, write in files.items():
        with replacing(folder / name) as partial:
            write(partial)


def merge_adapters(sources: list[Path], output: Path) -> None:
    """Joins adapters for different components of one pipeline, such as the two transformers of Wan2.2-A14B.

    Raises AdapterError if they are no adapters, differ in modes, parametrisation, rank or model, or share a component.
    """
    configs = [read_config(source) for source in sources]
    shared = ["patch_sizes", "parametrisation", "lora_rank", "transformer_class", "transformer_shape"]
    shared += ["base_model", "max_sequence_length", "guidance_scale", "recipe"]
    first = configs[0]
    for source, config in zip(sources[1:], configs[1:], strict=True):
        if differing := [name for name in shared if getattr(config, name) != getattr(first, name)]:
            raise AdapterError(f"{source} and {sources[0]} differ in {', '.join(differing)}")
    components = [component for config in configs for component in config.components]
    if twice := {component for component in components if components.count(component) > 1}:
        raise AdapterError(f"both have weights for {', '.join(sorted(twice))}")
    names = [WEIGHTS_NAME, LORA_NAME] if first.lora_rank else [WEIGHTS_NAME]
    tensors = {name: {k: v for source in sources for k, v in _read_tensors(source / name).items()} for name in names}
    facts = {config.components[0]: config.training for config in configs}
    merged = first.model_copy(update={"components": components, "training": facts})
    metadata: dict[str, object] = {}
    for source in sources if first.lora_rank else []:
        with safe_open(source / LORA_NAME, "pt") as file:
            facts_of_lora = (file.metadata() or {}).get("lora_adapter_metadata")
        if facts_of_lora is None:
            raise AdapterError(f"{source / LORA_NAME} is no LoRA of flexivid: it has no lora_adapter_metadata")
        metadata |= json.loads(facts_of_lora)
    _write(output, merged, tensors[WEIGHTS_NAME], tensors.get(LORA_NAME), metadata)
