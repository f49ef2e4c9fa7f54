"""Steps whose loss or gradient is not finite: they change nothing, and too many of them in a row end the run."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor


class TrainingFailed(Exception):
    """A run that cannot go on; the message says at which step, why, and what is left of it."""


@dataclass(frozen=True)
class StepResult:
    """What a step has computed, before anything is changed. losses, gradient_norms: of every process."""

    losses: list[float]
    gradient_norms: list[float]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)

    @property
    def gradient_norm(self) -> float:
        return max(self.gradient_norms)

    @property
    def finite(self) -> bool:
        """The same in every process, so that all of them step or none."""
        return all(map(math.isfinite, self.losses + self.gradient_norms))

    def fault(self) -> str:
        """What is not finite, and in which of several processes."""
        values, name = self.losses, "loss"
        if all(map(math.isfinite, values)):
            values, name = self.gradient_norms, "gradient norm"
        process = next(number for number, value in enumerate(values) if not math.isfinite(value))
        where = f" on process {process}" if len(values) > 1 else ""
        return f"the {name} is {values[process]}{where}"


def first_not_finite(named: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """The name of the first tensor that is not finite; of a sharded one, this process's part is looked at."""
    for name, tensor in named:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if part.is_floating_point() and not part.isfinite().all():
            return name
    return None


def likely_cause(model: torch.nn.Module, result: StepResult) -> str:
    broken = first_not_finite(model.named_parameters())
    if broken is not None:
        trained = model.get_parameter(broken).requires_grad
        return f"the weight {broken} is not finite: " + ("lower optim.lr" if trained else "the base is broken")
    if all(map(math.isfinite, result.losses)):
        return "gradients overflow: lower optim.lr, or train in float32"
    return "activations overflow, or a clip is broken: lower optim.lr, train in float32, or look at the clips"


class Watch:
    """Counts the steps that were not finite, in a row."""

    def __init__(self, most_in_a_row: int):
        self.most, self.in_a_row, self.any_finite = most_in_a_row, 0, False

    def finite(self) -> None:
        self.in_a_row, self.any_finite = 0, True

    def not_finite(self, step: int, result: StepResult, model: torch.nn.Module) -> str:
        """A sentence on a step that is left out. Raises TrainingFailed if there have been too many in a row."""
        self.in_a_row += 1
        sentence = f"step {step}: {result.fault()}. Likely cause: {likely_cause(model, result)}"
        if self.in_a_row < self.most:
            return f"{sentence}. The step is left out"
        raise TrainingFailed(
            f"{sentence}. That makes {self.in_a_row} such steps in a row (max_nonfinite_steps), and the run stops; "
            "none of them has changed weights, averages or the last checkpoint"
        )

    def check_end(self, step: int) -> None:
        """Raises TrainingFailed if the run is over and none of its steps has changed anything."""
        if self.in_a_row and not self.any_finite:
            raise TrainingFailed(f"none of the {self.in_a_row} steps up to step {step} was finite: nothing is learned")


def check_weights(step: int, trainable: dict[str, torch.Tensor], averaged: list[torch.Tensor], accelerator) -> None:
    """Raises TrainingFailed in all processes if a trained weight or its average is not finite in any of them."""
    broken = first_not_finite(trainable.items()) or first_not_finite(
        (f"the average of {name}", tensor) for name, tensor in zip(trainable, averaged, strict=True)
    )
    anywhere = accelerator.reduce(torch.tensor(float(broken is not None), device=accelerator.device))
    if anywhere:
        name = broken or "one of another process"
        raise TrainingFailed(
            f"after step {step} a trained weight is not finite ({name}): lower optim.lr; nothing was written, so that "
            "the last checkpoint is whole"
        )
