"""Latents from the student's own sampling runs, against exposure bias.

In training x_t is noised data, in sampling it is what the model itself has made of noise. FlexiDiT leaves that gap;
here some of the x_t are taken from runs of the present student, at the budget that it will be used at.
"""

import torch
from accelerate import Accelerator
from diffusers import WanPipeline

from flexivid.model.flexible import FlexTransformer
from flexivid.sampling.runner import PipelineRunner
from flexivid.training.batches import step_generator
from flexivid.training.config import Config
from flexivid.training.objective import ALL, Data
from flexivid.training.parallel.launch import autocast


class RollOuts:
    """A pool of (x_t, timestep, text), sampled anew every `on_policy_every` steps: every state of one batch's run.

    Every process samples the same pool, from the same weights.
    """

    def __init__(self, pipe: WanPipeline, flex: FlexTransformer, data: Data, config: Config, accelerator: Accelerator):
        self.pipe, self.flex, self.data, self.config, self.accelerator = pipe, flex, data, config, accelerator
        self.block = None

    def batch(
        self, step: int, count: int, generator: torch.Generator, rows: slice = ALL
    ) -> tuple[torch.Tensor, torch.Tensor, dict]:
        """(x_t (B, C, T, H, W), timestep (B,), conditions): these rows of `count`, drawn from the pool of this step."""
        block = step // self.config.distill.on_policy_every
        if block != self.block:
            self.pool = self._sample(block)
            self.block = block
        picks = torch.randint(len(self.pool[1]), (count,), generator=generator)[rows]
        x_t, timestep, text = (values[picks] for values in self.pool)
        return x_t, timestep, {"encoder_hidden_states": text}

    @torch.no_grad()
    def _sample(self, block: int) -> tuple[torch.Tensor, ...]:
        config, settings, pipe, device = self.config, self.config.distill, self.pipe, self.accelerator.device
        generator = step_generator(config.seed + 1, block)
        x_0, conditions = self.data.batch(settings.on_policy_clips, generator)
        text = conditions["encoder_hidden_states"]
        noise = torch.randn(x_0.shape, generator=generator)
        empty = self.data.empty_text(text.shape[1]).expand_as(text)
        flexes, budget = {"transformer": self.flex}, settings.on_policy_budget
        PipelineRunner(pipe, flexes, budget=budget, schedule=None, order="interleaved")
        states, sigmas = [], []

        def keep(pipe, index: int, timestep, tensors: dict) -> dict:
            states.append(tensors["latents"].float().cpu())
            sigmas.append(float(pipe.scheduler.sigmas[index + 1]))
            return {}

        pipe.set_progress_bar_config(disable=True)
        with autocast(self.accelerator):
            pipe(
                prompt_embeds=text.to(device),
                negative_prompt_embeds=empty.to(device),
                num_frames=(x_0.shape[2] - 1) * pipe.vae_scale_factor_temporal + 1,
                height=x_0.shape[3] * pipe.vae_scale_factor_spatial,
                width=x_0.shape[4] * pipe.vae_scale_factor_spatial,
                latents=noise.to(device),
                num_inference_steps=config.validation.steps,
                guidance_scale=config.validation.guidance_scale,
                callback_on_step_end=keep,
                output_type="latent",
            )
        del states[-1], sigmas[-1]  # the clip itself, without noise
        timesteps = (torch.tensor(sigmas) * self.flex.family.time_scale).repeat_interleave(len(text))
        return torch.cat(states), timesteps, text.repeat(len(states), 1, 1)
