"""A pipeline, and what is given to its transformer, without values: on the meta device."""

import math
import warnings

import torch
from diffusers import DiffusionPipeline

from flexivid.diffusion import Level
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.patches.folding import token_grid
from flexivid.stock_pipelines import without_weights
from flexivid.training.config import Config
from flexivid.training.data.buckets import Bucket
from flexivid.training.data.media import gives_clean_frame, trained_class
from flexivid.training.noise import STREAM_TIMESTEP, TEXT_LENGTH, State


def meta_pipeline(config: Config) -> DiffusionPipeline:
    """The pipeline on the meta device, the transformer that is trained as its only one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of copies between tensors that have no data
        pipe = without_weights(config.base, trained_class(config))
    pipe.register_modules(transformer=getattr(pipe, config.component))
    return pipe


def meta_call(config: Config, pipe: DiffusionPipeline, clips: int, dtype: torch.dtype) -> dict:
    """Arguments of a forward of `clips` clips of the largest bucket, on the meta device."""
    if config.clips is None:
        bucket, length = Bucket(config.data.frames, config.data.size, config.data.size), max(config.data.text_lengths)
    else:
        bucket = max((Bucket.parse(text) for text in config.clips.buckets), key=lambda b: b.frames * b.height * b.width)
        length = config.clips.max_sequence_length
    family = family_of(pipe.transformer)
    size = family.latent_size(pipe, bucket.frames, bucket.height, bucket.width)

    def repeated(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name in family.for_all_clips:
            return torch.empty_like(tensor, device="meta")
        # HunyuanVideo-1.5 computes in the precision of its timestep.
        is_cast = tensor.is_floating_point() and (tensor.ndim > 1 or tensor is call["timestep"])
        kind = dtype if is_cast else tensor.dtype
        return torch.empty(clips, *tensor.shape[1:], dtype=kind, device="meta")

    call = family.example(pipe.transformer.config, size, length)
    if family.sequence is not None:
        call = family.completed(call)  # which reads values
    if gives_clean_frame(pipe):  # every token has a timestep of its own, and sound that of the step
        per_token = torch.empty(1, math.prod(token_grid(size, patch_size_of(pipe.transformer.config))), device="meta")
        call |= dict.fromkeys(family.timesteps_beside, call["timestep"]) | {"timestep": per_token}
    return {name: repeated(name, value) if torch.is_tensor(value) else value for name, value in call.items()}


def meta_state(pipe: DiffusionPipeline, call: dict) -> State:
    family = family_of(pipe.transformer)
    conditions = {name: value for name, value in call.items() if name not in ("hidden_states", "timestep")}
    timestep = call["timestep"]
    level = torch.empty(len(timestep), device="meta")
    if family.sequence is not None:  # values that layouts are made of
        text, timestep = call["encoder_hidden_states"], torch.zeros(len(timestep))
        conditions = {name: call[name] for name in ("encoder_hidden_states", *family.streams)}
        conditions |= {TEXT_LENGTH: torch.full((len(text), 1), text.shape[1]), STREAM_TIMESTEP: timestep + 1}
    return State(family.latents(call), timestep, Level(level, level), conditions, unconditional=conditions)
