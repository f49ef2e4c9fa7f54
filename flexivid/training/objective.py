"""What the training loop asks of an objective, and what an objective may be given."""

from pathlib import Path
from typing import Protocol

import torch
from diffusers import DiffusionPipeline

from flexivid.model.flexible import compile_blocks
from flexivid.training.config import Config, DataConfig
from flexivid.training.read_ahead import ReadAhead

ALL = slice(None)  # all rows of a batch


class Objective(Protocol):
    """What is trained. Batches are a pure function of the step, so that a resumed run repeats and loses nothing."""

    model: torch.nn.Module
    facts: dict  # what a checkpoint remembers of the run beside its config, as JSON
    batches: ReadAhead  # which `loss` takes its batches from; the loop begins and ends it

    def loss(self, model: torch.nn.Module, step: int, micro_batch: int) -> torch.Tensor: ...

    def flops(self, step: int) -> int:
        """FLOPs that the model needs for a step, over all processes; 0 where nothing is counted.

        Every forward, and of those that are learnt from the backward, with the gradients that training needs and no
        others: none of frozen weights. Not counted: what gradient checkpointing computes once more, pools of runs that
        batches are drawn from, optimisers. `step` is the last one that `loss` was asked for.
        """

    def sample(self, path: Path) -> None:
        """Draws a picture of where training stands."""

    def save(self, folder: Path) -> None:
        """Writes the result, from the averaged weights that are in `model` at that moment."""


class Data(Protocol):
    """Clips as latents (B, C, T, H, W), and the other arguments of the transformer for each."""

    held_out: int  # clips that are never trained on

    def batch(self, count: int, generator: torch.Generator, rows: slice = ALL) -> tuple[torch.Tensor, dict]:
        """Draws `count` clips, and reads these rows of them."""

    def validation(self) -> list[tuple[torch.Tensor, dict]]:
        """What errors are measured on: the held-out clips, or some that are trained on if there are none."""

    def unconditional(self, x_0: torch.Tensor, conditions: dict) -> dict:
        """The conditions of these clips with the empty caption."""

    def empty_text(self, length: int) -> torch.Tensor:
        """The embedding of the empty caption, (1, length, dim)."""


class World(Protocol):
    """A rendered world, for those who have no clips."""

    def data(self, config: DataConfig, pipeline: DiffusionPipeline) -> Data: ...

    def captions(self, config: DataConfig, pipeline: DiffusionPipeline) -> Data:
        """Its captions alone: `batch` gives latents of no channels, and nothing is validated on."""

    def judge(self, pipeline: DiffusionPipeline, path: Path | None, steps: int, **more: float) -> dict[str, float]:
        """Samples some prompts, draws them into a picture if there is a path, and returns how well they are met.

        more: other arguments of the pipeline's call than usual.
        """


def configure_speed(transformer: torch.nn.Module, config: Config) -> None:
    """Applies what changes the seconds of a step and not its result, beyond rounding.

    Raises ValueError for an attention backend that diffusers does not know.
    """
    if config.attention_backend is not None:
        transformer.set_attention_backend(config.attention_backend)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(transformer)
