"""Checkpoints of a training run: whole tensors in safetensors, which survive a kill and any number of processes."""

import hashlib
import json
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from flexivid.files import replacing
from flexivid.tensors import whole
from flexivid.training.config import Config
from flexivid.training.parallel.sharding import part_like
from flexivid.training.parallel.zero import restore_zero

CHECKPOINTS = "checkpoint-*.safetensors"


def last_checkpoint(folder: Path) -> Path | None:
    return max(folder.glob(CHECKPOINTS), default=None)  # names sort as their steps do


def run_facts(config: Config) -> dict:
    """What a checkpoint is bound to: with other values it would be read into another run."""
    base = hashlib.sha256()
    for folder in (config.base, config.distill.adapter, config.few.adapter):
        if folder and not folder.is_dir():
            base.update(str(folder).encode())  # a hub id
        for path in sorted(folder.rglob("*.safetensors")) if folder else []:
            if path.parent.name != "text_encoder":  # which may be larger than all the rest, and is not trained
                with path.open("rb") as file:
                    base.update(hashlib.file_digest(file, "sha256").digest())
    section = {"vae": "vae", "pretrain": "transformer", "shared": "distill"}.get(config.objective, config.objective)
    bound = {"objective", "seed", "batch_size", "flow_shift", section}
    # What an adapter to go on from holds is part of the base; where it lies does not matter.
    facts = config.model_dump(mode="json", include=bound, exclude={section: {"adapter"}})
    if config.clips is None:
        data = {"data.clips": config.data.clips, "data.word_weights": config.data.word_weights}
    else:
        data = {"clips": config.clips.model_dump(mode="json", exclude={"cache"})}
    return facts | data | {"optim.name": config.optim.name, "base": base.hexdigest()}


def facts_of_last_checkpoint(folder: Path) -> dict:
    """What the last checkpoint remembers of its run, {} if there is none."""
    path = last_checkpoint(folder)
    if path is None:
        return {}
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["run"])


def check_checkpoint(config: Config) -> None:
    """Raises ValueError if `config.output` holds the checkpoint of another run, or of more steps than are asked for."""
    path = last_checkpoint(config.output)
    if path is None:
        return
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}; delete it to go on without it") from None
    if not {"run", "step"} <= metadata.keys():
        raise ValueError(f"{path} is no checkpoint of flexivid; give another --output")
    before, now = json.loads(metadata["run"]), json.loads(json.dumps(run_facts(config)))
    if differing := [key for key in now if before.get(key) != now[key]]:
        raise ValueError(
            f"{path} belongs to a run with another {', '.join(differing)}; give another --output, or delete it"
        )
    if int(metadata["step"]) > config.steps:
        raise ValueError(f"{path} is at step {metadata['step']}, past the {config.steps} steps that are asked for")


def flat(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """The state of a parameter, of which bitsandbytes has some in a dictionary of its own, as tensors by path."""
    tensors = {}
    for key, value in state.items():
        if isinstance(value, dict):
            tensors |= flat(value, f"{prefix}{key}/")
        else:
            tensors[prefix + key] = torch.as_tensor(value).clone()  # bitsandbytes shares some between parameters
    return tensors


def save_checkpoint(
    config: Config, step: int, trainable: dict, states: list[dict[int, dict]], ema: EMAModel, facts: dict, main: bool
) -> None:
    """Writes beside, then renames, so that a kill leaves the last whole one; then deletes those that are too many.

    states: of each optimiser, by number of parameter. Only the main process writes; with FSDP all have a part of what
    is written.
    """
    tensors = {f"model.{name}": p for name, p in trainable.items()}
    tensors |= {f"ema.{i}": p for i, p in enumerate(ema.shadow_params)}
    for k, of_optimizer in enumerate(states):
        for i, state in of_optimizer.items():
            tensors |= {f"optimizer.{k}.{i}.{key}": value for key, value in flat(state).items()}
    tensors = {name: whole(t.detach()).contiguous() for name, t in tensors.items()}
    if not main:
        return
    path = config.output / CHECKPOINTS.replace("*", f"{step:08d}")
    metadata = {"step": str(step), "ema_step": str(ema.optimization_step), "run": json.dumps(facts)}
    with replacing(path) as partial:
        save_file(tensors, partial, metadata=metadata)
    for old in sorted(config.output.glob(CHECKPOINTS))[: -config.keep_checkpoints]:
        old.unlink()


def load_checkpoint(folder: Path, trainable: dict, optimizers: list, ema: EMAModel, zero=None) -> int:
    """Restores the last checkpoint, if there is one. Returns the number of steps that it holds.

    zero: DeepSpeed's optimiser around the one of `optimizers`, if it holds the moments.
    """
    path = last_checkpoint(folder)
    if path is None:
        return 0
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in trainable.items():
            p.copy_(part_like(tensors[f"model.{name}"], p))
        for i, p in enumerate(ema.shadow_params):
            p.copy_(part_like(tensors[f"ema.{i}"], p))
    ema.optimization_step = int(metadata["ema_step"])
    if zero is not None:
        weights = list(trainable.values())
        restore_zero(zero, weights, optimizer_states(tensors, 0, weights))
    else:
        for k, optimizer in enumerate(optimizers):
            states = optimizer_states(tensors, k, optimizer.param_groups[0]["params"])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
    return int(metadata["step"])


def optimizer_states(tensors: dict, number: int, parameters: list[torch.nn.Parameter]) -> dict[int, dict]:
    """What a checkpoint holds of an optimiser, by number of parameter; with FSDP the parts of this process."""
    states: dict[int, dict] = {}
    for name, tensor in tensors.items():
        if name.startswith(f"optimizer.{number}."):
            i, key = name.removeprefix(f"optimizer.{number}.").split(".", 1)
            parameter, values = parameters[int(i)], states.setdefault(int(i), {})
            *outer, key = key.split("/")
            for name in outer:
                values = values.setdefault(name, {})
            if tensor.dtype == torch.int64 and not outer:
                tensor = tensor.item()  # bitsandbytes counts its steps so
            elif tensor.shape == parameter.shape and not outer:
                tensor = part_like(tensor, parameter)
            values[key] = tensor
    return states
