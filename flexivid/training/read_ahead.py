"""The batch of the next step is read while a step runs.

A batch depends on the seed and the step alone, so that reading it earlier changes nothing: not the order of the clips,
not their noise, and a run that is killed and goes on is the same run.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Later(Generic[Batch]):
    """A batch that the model has a part in, at its present weights: it is made when its step wants it."""

    make: Callable[[], Batch]


class ReadAhead(Generic[Batch]):
    """Batches by step. Within `with`, one thread makes the batch of step + 1 once the one of `step` has been taken.

    read: step -> its batch, or a `Later`; it must not touch the model, which is running meanwhile. What it raises is
    raised at the step that wants the batch. steps: of the run, none is read past them.
    current: the step whose batch was taken last, None before. waited: seconds for which steps had to wait for theirs.
    """

    def __init__(self, read: Callable[[int], Batch | Later[Batch]], steps: int):
        self.read, self.steps = read, steps
        self.current: int | None = None
        self.waited = 0.0
        self._batch: Batch | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._next: tuple[int, Future] | None = None

    def __enter__(self) -> "ReadAhead[Batch]":
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        return self

    def __exit__(self, *error) -> None:
        self._reader.shutdown(cancel_futures=True)  # waits for a batch that is half read
        self._reader, self._next = None, None

    def of(self, step: int) -> Batch:
        """The batch of a step, the same object for all its micro-batches."""
        if self.current != step:
            began = time.perf_counter()
            self._batch, self.current = None, None  # two batches are in memory, never three
            batch = self._read_by_now(step)
            self.waited += time.perf_counter() - began
            # Before the next one is read: a pool of clips that the model makes is drawn from the data, too.
            self._batch = batch.make() if isinstance(batch, Later) else batch
            self.current = step
            if self._reader is not None and step + 1 < self.steps:
                self._next = step + 1, self._reader.submit(self.read, step + 1)
        return self._batch

    def _read_by_now(self, step: int) -> Batch | Later[Batch]:
        if self._next is None:
            return self.read(step)
        (number, future), self._next = self._next, None
        # Another step than the next one is asked for by nobody but tests; its batch is right all the same.
        return future.result() if number == step else self.read(step)


def on_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copies to a device. To CUDA from pinned memory, so that neither this thread nor the GPU waits for the copy."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
