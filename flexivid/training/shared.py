"""Objective `shared`: all weights learn, at every patch size (FlexiDiT, section 3.1: one model for all of them).

A patch size is drawn per step, the model's own among them. The loss is flow matching on the data, and the distance to
what the frozen original predicts at its own patch size. The powerful mode is then no longer that of the original, so
that the result is a model of its own, `result/model`, with the adapter for it in `result/adapter`.
"""

import copy

import torch

from flexivid.training.batches import own_rows, step_generator
from flexivid.training.distill import DistillObjective
from flexivid.training.noise import State
from flexivid.training.parallel.launch import autocast
from flexivid.training.student import Student, predict, unfrozen_student


class SharedObjective(DistillObjective):
    def build_model(self) -> Student:
        transformer = self.pipeline.transformer
        self.original = copy.deepcopy(transformer).requires_grad_(False).to(self.accelerator.device)
        return unfrozen_student(transformer, self.config.distill)

    def draw(self, step):
        config, generator = self.config, step_generator(self.config.seed, step)
        patch_sizes = [self.flex.powerful, *config.distill.modes]
        patch_size = patch_sizes[torch.randint(len(patch_sizes), (1,), generator=generator).item()]
        rows = own_rows(self.accelerator, config, config.batch_size)
        x_0, conditions = self.data.batch(config.batch_size, generator, rows)
        noise = torch.randn(config.batch_size, *x_0.shape[1:], generator=generator)
        u = torch.rand(config.batch_size, generator=generator)
        return patch_size, (x_0, conditions, noise[rows], u[rows])

    def flops(self, step):
        patch_size, values = self.batches.of(step)
        costs = self.costs.learning(values, patch_size) + self.costs.forward(values, self.flex.powerful)
        return costs * self.config.batch_size

    def predict_original(self, state: State) -> torch.Tensor:
        with torch.no_grad(), autocast(self.accelerator):
            return predict(self.original, self.flex.family, state.x_t, state.timestep, state.conditions)

    def loss(self, model, step, micro_batch):
        """|| x0 - x0_true ||^2 + w || x0 - x0_original ||^2 at the patch size of this step."""
        settings, diffusion = self.config.distill, self.flex.diffusion
        patch_size, (x_0, conditions, noise, u) = self.part(step, micro_batch)
        state = self.levels.state(x_0, noise, self.levels.drawn(u, settings.sigma_range), conditions)
        original = self.predict_original(state)
        (output,) = model([patch_size], state.x_t, state.timestep, conditions)
        matching = (state.x0_of(diffusion, output) - x_0).square().mean()
        distance = state.x0_difference(diffusion, output - original)
        return matching + settings.teacher_weight * distance.square().mean()

    def errors(self, patch_sizes, state):
        original, diffusion = self.predict_original(state), self.flex.diffusion
        outputs = self.model(patch_sizes, state.x_t, state.timestep, state.conditions)
        return torch.stack([state.x0_difference(diffusion, output - original) for output in outputs])

    def save(self, folder):
        super().save(folder / "adapter", model="../model")
        self.pipeline.to(dtype=torch.float16).save_pretrained(folder / "model")
