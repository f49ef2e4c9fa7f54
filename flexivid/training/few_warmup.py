"""The warm start of a few-step student: the ends of the teacher's runs, from where these were at its noise levels."""

import torch
from accelerate import Accelerator

from flexivid.tensors import on_rows
from flexivid.training.batches import clips_per_part, step_generator
from flexivid.training.config import Config
from flexivid.training.few_runs import Runs
from flexivid.training.objective import ALL
from flexivid.training.parallel.launch import autocast


class TeacherRuns:
    """A pool of runs of the guided teacher, made anew every `few.warmup_every` steps; the same in every process.

    texts: (count, generator) -> (size of the latents, conditions, conditions without captions).
    """

    def __init__(self, model: torch.nn.Module, runs: Runs, texts, config: Config, accelerator: Accelerator):
        self.model, self.runs, self.texts, self.config, self.accelerator = model, runs, texts, config, accelerator
        self.block = None

    def batch(self, step: int, count: int, stop: int, generator: torch.Generator, rows: slice = ALL) -> tuple:
        """(x_t at the noise level of the student's step `stop`, x0, conditions), of these rows of `count` clips."""
        block = step // self.config.few.warmup_every
        if block != self.block:
            self.pool, self.conditions = self._sample(block)
            self.block = block
        picks = torch.randint(self.pool.shape[1], (count,), generator=generator)[rows]
        conditions = on_rows(self.conditions, lambda tensor: tensor[picks])
        return self.pool[stop, picks], self.pool[-1, picks], conditions

    def _sample(self, block: int) -> tuple[torch.Tensor, dict]:
        settings, generator = self.config.few, step_generator(self.config.seed + 1, block)
        size, conditions, empty = self.texts(settings.warmup_clips, generator)
        noise = torch.randn(settings.warmup_clips, *size, generator=generator)
        return in_parts(self.teacher_run, self.config, self.accelerator, noise, conditions, empty), conditions

    def teacher_run(self, noise: torch.Tensor, conditions: dict, empty: dict | None) -> torch.Tensor:
        return self.runs.teacher(self.model, noise, conditions, empty, self.config.validation.steps)


@torch.no_grad()
def in_parts(run, config: Config, accelerator: Accelerator, noise: torch.Tensor, *conditions: dict | None):
    """What `run` gives, (..., B, C, T, H, W) on the CPU, for noise and conditions: a micro-batch of clips at a time."""
    size, done = clips_per_part(config, config.batch_size, accelerator.num_processes), []
    for start in range(0, len(noise), size):

        def here(tensor: torch.Tensor, start=start) -> torch.Tensor:
            return tensor[start : start + size].to(accelerator.device)

        with autocast(accelerator):
            part = run(here(noise), *(values and on_rows(values, here) for values in conditions))
        done.append(part.float().cpu())
    return torch.cat(done, dim=-5)
