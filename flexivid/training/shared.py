"""Objective `shared`: all weights learn, at every patch size (FlexiDiT, section 3.1: one model for all of them).

A patch size is drawn per step, the model's own among them. The loss is flow matching on the data, and the distance to
what the frozen original predicts at its own patch size. The powerful mode is then no longer that of the original, so
that the result is a model of its own, `result/model`, with the adapter for it in `result/adapter`.
"""

import copy

import torch

from flexivid.flexible import FlexTransformer
from flexivid.training.distill import DistillObjective, Student, uniform_steps_sigma
from flexivid.training.loop import step_generator


class SharedObjective(DistillObjective):
    def build_model(self) -> Student:
        transformer, settings = self.pipeline.transformer, self.config.distill
        self.original = copy.deepcopy(transformer).requires_grad_(False).to(self.accelerator.device)
        return Student(FlexTransformer(transformer.requires_grad_(True), settings.modes, settings.parametrisation))

    def draw(self, step):
        config, generator = self.config, step_generator(self.config.seed, step)
        patch_sizes = [self.flex.powerful, *config.distill.modes]
        patch_size = patch_sizes[torch.randint(len(patch_sizes), (1,), generator=generator).item()]
        x_0, text = self.data.batch(config.batch_size, generator)
        noise = torch.randn(x_0.shape, generator=generator)
        return patch_size, (x_0, text, noise, torch.rand(config.batch_size, generator=generator))

    def predict_original(self, x_t, sigma, text) -> torch.Tensor:
        with torch.no_grad(), self.accelerator.autocast():
            return self.original(x_t, sigma * 1000, text, return_dict=False)[0].float()

    def loss(self, model, step, micro_batch):
        """|| x0 - x0_true ||^2 + w || x0 - x0_original ||^2 at the patch size of this step."""
        config = self.config
        patch_size, (x_0, text, noise, u) = self.part(step, micro_batch)
        sigma = uniform_steps_sigma(u, config.distill.sigma_range, config.flow_shift)
        level = sigma.view(-1, 1, 1, 1, 1)
        x_t = (1 - level) * x_0 + level * noise
        v_original = self.predict_original(x_t, sigma, text)
        (v,) = model([patch_size], x_t, sigma * 1000, text)
        # A difference of velocities is sigma times one of x0.
        matching = (level * (v - (noise - x_0))).square().mean()
        return matching + config.distill.teacher_weight * (level * (v - v_original)).square().mean()

    def errors(self, patch_sizes, x_t, sigma, text):
        v_original = self.predict_original(x_t, sigma, text)
        v_weak = torch.stack(self.model(patch_sizes, x_t, sigma * 1000, text))
        return sigma.view(-1, 1, 1, 1, 1) * (v_original - v_weak)

    def save(self, folder):
        super().save(folder / "adapter", base_model=str(folder / "model"))
        self.pipeline.to(dtype=torch.float16).save_pretrained(folder / "model")
