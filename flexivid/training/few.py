"""Objective `few`: a few steps without guidance, each at its patch size (DMD2, arXiv 2405.14867).

The student runs its own steps from noise. Its clips are noised again, and go down the difference of two scores there:
that of the student's clips, which a fake score learns, and that of the frozen teacher with guidance. So it needs no
clips, and not the teacher's own clip for a noise either: what counts is that clips of both are of one distribution.
A step trains the fake score `few.fake_updates` times out of one more, and then the student.
"""

from functools import partial
from pathlib import Path

import torch

from flexivid.model.adapter import AdapterConfig, save_adapter
from flexivid.sampling.few_steps import FewStepRunner
from flexivid.stock_pipelines import latent_channels_of
from flexivid.training.batches import own_rows, step_generator
from flexivid.training.data.latents import build_cache
from flexivid.training.distill import DistillObjective
from flexivid.training.few_report import Looks, sample_prompts, write_few_card
from flexivid.training.few_runs import Runs, distribution_gradient
from flexivid.training.few_student import FAKE, STUDENT, FewStudent, build_few_student
from flexivid.training.few_warmup import TeacherRuns
from flexivid.training.noise import State
from flexivid.training.objective import ALL, Data
from flexivid.training.parallel.launch import autocast
from flexivid.training.report import public_name, push

WARMUP = "warm-up"


class FewObjective(DistillObjective):
    """world: what captions are taken from where the config has no clips."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        settings = self.config.few
        self.recipe = settings.recipe(self.config.flow_shift)
        self.runs = Runs(self.flex, self.levels, self.recipe, settings.guidance_scale)
        self.channels = latent_channels_of(self.pipeline.vae)
        self.teacher_runs = TeacherRuns(self.model, self.runs, self.texts, self.config, self.accelerator)
        self.looks = Looks(self.model, self.runs, self.texts, self.config, self.accelerator)

    def build_model(self) -> FewStudent:
        return build_few_student(self.pipeline.transformer, self.config.few)

    def load_data(self) -> tuple[Data, dict]:
        config, accelerator = self.config, self.accelerator
        if config.clips is not None:
            settings = config.clips.model_copy(update={"drop_caption": 0.0, "held_out": 0})
            return build_cache(settings, self.pipeline, accelerator, captions_only=True), {}
        settings = config.data.model_copy(update={"drop_caption": 0.0})
        return self.world.captions(settings, self.pipeline), {}

    def texts(
        self, count: int, generator: torch.Generator, rows: slice = ALL
    ) -> tuple[tuple[int, ...], dict, dict | None]:
        """(C, T, H, W) of the latents, the conditions of clips, and these without captions, if that guides.

        count, rows: as in `Data.batch`.
        """
        latents, conditions = self.data.batch(count, generator, rows)
        size, embedded = (self.channels, *latents.shape[2:]), self.flex.family.guidance == "embedded"
        return size, conditions, None if embedded else self.data.unconditional(latents, conditions)

    def loss_name(self, step: int) -> str:
        """What a step trains: WARMUP and STUDENT the student, FAKE the fake score."""
        after = step - self.config.few.warmup_steps
        if after < 0:
            return WARMUP
        return STUDENT if after % (self.config.few.fake_updates + 1) == self.config.few.fake_updates else FAKE

    def draw(self, step):
        """((what is trained, the step where the student's run ends), tensors and conditions as in `distill`)."""
        count, generator = self.config.batch_size, step_generator(self.config.seed, step)
        rows = own_rows(self.accelerator, self.config, count)
        stop = int(torch.randint(self.recipe.steps, (1,), generator=generator))
        chosen = self.loss_name(step), stop
        if chosen[0] == WARMUP:
            return chosen, partial(self.teacher_runs.batch, step, count, stop, generator, rows)
        size, conditions, empty = self.texts(count, generator, rows)
        noise, noise_again = (torch.randn(count, *size, generator=generator)[rows] for _ in range(2))
        return chosen, (noise, noise_again, torch.rand(count, generator=generator)[rows], conditions, empty or {})

    def flops(self, step):
        (trained, stop), values = self.batches.of(step)
        costs, powerful, sizes = self.costs, self.flex.powerful, self.recipe.patch_sizes

        def student(patch_size: str, of=costs.forward) -> int:
            return of(values, patch_size, powerful if patch_size == powerful else None)

        learning = student(sizes[stop], costs.learning)
        if trained == WARMUP:
            return learning * self.config.batch_size
        before = sum(map(student, sizes[:stop]))
        if trained == FAKE:
            run = before + student(sizes[stop])
            return (run + costs.learning(values, powerful, FAKE)) * self.config.batch_size
        guided = self.runs.guidance_scale != 1 and values[-1]  # by the conditions without captions
        scores = costs.forward(values, powerful, FAKE) + costs.forward(values, powerful) * (2 if guided else 1)
        return (before + learning + scores) * self.config.batch_size

    def loss(self, model, step, micro_batch):
        (trained, stop), values = self.part(step, micro_batch)
        if trained == WARMUP:
            x_t, x_0, conditions = values
            return (self.runs.student_step(model, x_t, conditions, stop)[0] - x_0).square().mean()
        noise, noise_again, u, conditions, empty = values
        with torch.set_grad_enabled(trained == STUDENT and torch.is_grad_enabled()):
            x_0 = self.runs.student(model, noise, conditions, stop)
        timestep = self.levels.drawn(u, self.config.few.sigma_range)
        again = self.levels.state(x_0.detach(), noise_again, timestep, conditions)
        if trained == FAKE:
            return self.fake_loss(model, x_0, again)
        with torch.no_grad():
            fake, real = (
                again.x0_of(self.flex.diffusion, output)
                for output in (self.runs.fake(model, again), self.runs.guided(model, again, empty or None))
            )
            gradient = distribution_gradient(x_0, fake, real)
        # Where blocks are checkpointed they run once more in the backward pass, with what is active then.
        self.flex.lora.switch(self.recipe.patch_sizes[stop])
        # Its gradient is `gradient`.
        return 0.5 * (x_0 - (x_0 - gradient).detach()).square().mean()

    def fake_loss(self, model: torch.nn.Module, x_0: torch.Tensor, state: State) -> torch.Tensor:
        """Flow matching on the student's clips x_0, of which `state` is noised."""
        return (self.runs.fake(model, state) - state.output_of(self.flex.diffusion, x_0)).square().mean()

    @torch.no_grad()
    def sample(self, path):
        """A picture of clips by the recipe, and what few-step students are known to lose, against the teacher's."""
        found = self.looks.record(self.done)
        self.accelerator.log(found, step=self.done)
        runner = FewStepRunner(self.pipeline, {"transformer": self.flex}, self.recipe)
        try:
            with autocast(self.accelerator):
                if self.config.clips is not None:
                    sample_prompts(self.pipeline, self.recipe, self.config, self.accelerator, path)
                else:
                    main = self.accelerator.is_main_process
                    shares = self.world.judge(
                        self.pipeline, path if main else None, self.recipe.steps, guidance_scale=1
                    )
                    self.accelerator.print(f"\nadherence in {self.recipe.steps} steps", shares, "->", path)
        finally:
            runner.detach()

    def save(self, folder: Path):
        config, settings = self.config, self.config.few
        facts = {
            "objective": config.objective,
            "steps": config.steps,
            "clips_per_step": config.batch_size,
            "guidance_scale": settings.guidance_scale,
            "fake_updates": settings.fake_updates,
            "warmup_steps": settings.warmup_steps,
            "learning_rate": config.optim.lr,
            "learning_rate_of_the_fake_score": settings.fake_lr,
            "seed": config.seed,
        }
        adapter = AdapterConfig.of(
            self.flex,
            lora_rank=settings.rank,
            components=["transformer"],
            base_model=public_name(config.base),
            max_sequence_length=self.max_sequence_length,
            recipe=self.recipe,
            training=facts,
        )
        main = self.accelerator.is_main_process
        save_adapter(folder, adapter, {"transformer": self.flex}, main)
        if main:
            write_few_card(folder, adapter, config, self.looks.last)
            if config.push_to_hub is not None:
                push(folder, config.push_to_hub)
