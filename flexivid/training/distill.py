"""Objective `distill`: weak modes learn to predict what the frozen powerful mode predicts (FlexiDiT, section 3.2)."""

import math
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from flexivid.model.adapter import AdapterConfig, save_adapter
from flexivid.patches.sizes import parse_mode
from flexivid.published import load_index
from flexivid.sampling.runner import PipelineRunner
from flexivid.tensors import on_rows
from flexivid.training.batches import clips_per_part, micro_batch_rows, on_values, own_rows, step_generator
from flexivid.training.checkpoints import facts_of_last_checkpoint
from flexivid.training.config import Config
from flexivid.training.costs import Costs
from flexivid.training.data.latents import build_cache
from flexivid.training.data.media import trained_class
from flexivid.training.noise import NoiseLevels, State, with_stream_noise
from flexivid.training.objective import Data, World, configure_speed
from flexivid.training.parallel.launch import autocast
from flexivid.training.read_ahead import Later, ReadAhead, on_device
from flexivid.training.report import draw_errors, error_clips, public_name, push, write_card
from flexivid.training.rollouts import RollOuts
from flexivid.training.student import (
    Student,
    build_student,
    corrected_distillation_loss,
    distillation_loss,
    weak_errors,
)
from flexivid.training.validation import SIGMAS, Errors, mean_errors, record_errors, sample_budgets


def load_base(config: Config) -> DiffusionPipeline:
    """The pipeline of a config's base, the transformer that is trained as its only one."""
    dtype = getattr(torch, config.base_dtype)
    # LTX-2's connectors take what the text encoder gives as it is.
    parts = ("transformer", "transformer_2", "text_encoder", "connectors")
    dtypes = {"default": torch.float32} | dict.fromkeys(parts, dtype)
    index = load_index(config.base)
    others = [name for name in ("transformer", "transformer_2") if name != config.component]
    without = {name: None for name in others if index.get(name, [None])[0] is not None}
    pipe = trained_class(config).from_pretrained(str(config.base), dtype=dtypes, use_safetensors=True, **without)
    if without:
        # As if it were trained for every noise level: the other transformer has no part in this.
        pipe.register_modules(transformer=getattr(pipe, config.component), transformer_2=None)
        pipe.register_to_config(boundary_ratio=None)
    return pipe


class DistillObjective:
    """world: what is trained on where the config has no clips."""

    def __init__(self, config: Config, accelerator: Accelerator, world: World | None = None):
        self.config, self.accelerator, self.world = config, accelerator, world
        if config.base_dtype == "bfloat16" and accelerator.mixed_precision != "bf16":
            raise ValueError("base_dtype bfloat16 needs `accelerate launch --mixed_precision bf16`")
        self.pipeline = load_base(config)
        torch.manual_seed(config.seed)
        # Before the data, which may take minutes: an adapter that does not fit is refused at once.
        self.model = self.build_model()
        self.flex = self.model._flex[0]
        table = getattr(self.pipeline.scheduler, "alphas_cumprod", None)
        self.flex.diffusion = replace(self.flex.diffusion, alphas_cumprod=table)
        of_stream = getattr(self.pipeline, "audio_scheduler", None)
        stream_shift = None if of_stream is None else of_stream.config.shift
        self.levels = NoiseLevels(
            self.flex.diffusion, config.flow_shift, self.flex.base_patch, self.flex.family, stream_shift
        )
        configure_speed(self.pipeline.transformer, config)
        self.batches, self.costs = ReadAhead(self.read, config.steps), Costs(self.flex)
        self.data, self.facts = self.load_data()
        self.roll_outs = RollOuts(self.pipeline, self.flex, self.data, config, accelerator)

    def build_model(self) -> Student:
        return build_student(self.pipeline.transformer, self.config.distill, self.config.component)

    def load_data(self) -> tuple[Data, dict]:
        """The data, and what a checkpoint remembers of it: which clips are held out."""
        config, accelerator = self.config, self.accelerator
        if config.clips is not None:
            held_out = facts_of_last_checkpoint(config.output).get("held_out")
            data = build_cache(config.clips, self.pipeline, accelerator, held_out)
            return data, {"held_out": data.held_out_contents}
        with accelerator.main_process_first():
            return self.world.data(config.data, self.pipeline), {}

    def draw(self, step: int):
        """All that is random in a step: (patch sizes, tensors and conditions of this process's rows).

        In the place of these, where the model has a part in them, a function that gives them. Numbers are drawn for
        the whole batch, so that they are the same at every number of processes.
        """
        config, settings, generator = self.config, self.config.distill, step_generator(self.config.seed, step)
        rows = own_rows(self.accelerator, config, config.batch_size)
        weights = torch.tensor(settings.mode_weights or [1.0] * len(settings.modes))
        drawn = torch.multinomial(weights, settings.modes_per_step, generator=generator).tolist()
        patch_sizes = [settings.modes[i] for i in drawn]
        if settings.on_policy and torch.rand(1, generator=generator).item() < settings.on_policy:
            return patch_sizes, partial(self.roll_outs.batch, step, config.batch_size, generator, rows)
        x_0, conditions = self.data.batch(config.batch_size, generator, rows)
        noise = torch.randn(config.batch_size, *x_0.shape[1:], generator=generator)
        u = torch.rand(config.batch_size, generator=generator)
        u_before = u + settings.correction_gap * torch.rand(config.batch_size, generator=generator)
        conditions = with_stream_noise(conditions, self.flex.family, config.batch_size, generator, rows)
        return patch_sizes, (x_0, conditions, noise[rows], u[rows], u_before[rows])

    def read(self, step: int):
        """What `draw` gives, on this process's device."""
        here = partial(on_device, device=self.accelerator.device)
        chosen, values = self.draw(step)
        if callable(values):
            return Later(lambda: (chosen, on_values(values(), here)))
        return chosen, on_values(values, here)

    def part(self, step: int, micro_batch: int):
        """What `read` gives, but of its tensors the rows of a micro-batch."""
        chosen, values = self.batches.of(step)
        rows = micro_batch_rows(self.config, len(values[0]), micro_batch)
        return chosen, on_values(values, lambda tensor: tensor[rows])

    def flops(self, step: int) -> int:
        patch_sizes, values = self.batches.of(step)
        guided = any(parse_mode(patch_size)[1] for patch_size in patch_sizes)
        learning = sum(self.costs.learning(values, patch_size) for patch_size in patch_sizes)
        teacher = self.costs.forward(values, self.flex.powerful) * (2 if guided else 1)
        # With a correction gap at two noise levels; states of the student's own runs have one.
        levels = 2 if self.config.distill.correction_gap else 1
        return (teacher + learning) * levels * self.config.batch_size

    @property
    def done(self) -> int:
        """The step that is done, counted from 1."""
        return 0 if self.batches.current is None else self.batches.current + 1

    def loss(self, model, step, micro_batch):
        settings = self.config.distill
        patch_sizes, values = self.part(step, micro_batch)
        if len(values) == 3:  # states of the student's own runs come with their noise level
            x_t, timestep, conditions = values
            state = State(x_t, timestep, self.flex.diffusion.level(timestep), conditions)
            return distillation_loss(weak_errors(model, self.flex, patch_sizes, state))
        x_0, conditions, noise, u, u_before = values
        if settings.correction_gap == 0:
            state = self.state(x_0, noise, self.levels.drawn(u, settings.sigma_range), conditions)
            return distillation_loss(weak_errors(model, self.flex, patch_sizes, state))
        twice = on_rows(conditions, lambda tensor: torch.cat([tensor] * 2))
        timestep = self.levels.drawn(torch.cat([u, u_before.clamp(max=1)]), settings.sigma_range)
        state = self.levels.state(torch.cat([x_0] * 2), torch.cat([noise] * 2), timestep, twice)
        now, before = weak_errors(model, self.flex, patch_sizes, state).chunk(2, dim=1)
        # The first steps of a run come before its first powerful one, and are not corrected.
        return corrected_distillation_loss(now, before, u_before <= 1, settings.anchor)

    def state(self, x_0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor, conditions: dict) -> State:
        state = self.levels.state(x_0, noise, timestep, conditions)
        if self.config.distill.guidance_scale is None:
            return state
        empty = self.data.unconditional(x_0, state.conditions)
        return replace(state, unconditional=on_rows(empty, lambda tensor: tensor.to(x_0.device)))

    def errors(self, patch_sizes: list[str], state: State) -> torch.Tensor:
        """x0_weak - x0_powerful at some patch sizes, (modes, B, C, T, H, W)."""
        return weak_errors(self.model, self.flex, patch_sizes, state)

    @torch.no_grad()
    def errors_by_sigma(self) -> Errors:
        """|| x0_weak - x0_powerful ||^2 of every mode over SIGMAS, on the same clips and noise every time."""
        modes, generator = list(self.flex.weak_modes), torch.Generator().manual_seed(2**31)
        # As many at once as in training: more may not fit.
        size = clips_per_part(self.config, self.config.batch_size, self.accelerator.num_processes)
        totals, count = torch.zeros(len(SIGMAS), len(modes)), 0
        for x_0, conditions in self.data.validation():
            noise = torch.randn(x_0.shape, generator=generator)
            conditions = with_stream_noise(conditions, self.flex.family, len(x_0), generator)
            count += len(x_0)
            for start in range(0, len(x_0), size):
                rows = slice(start, start + size)
                totals += torch.stack([self._squared_errors(s, rows, x_0, noise, conditions) for s in SIGMAS])
        return {name: (totals[:, i] / count).tolist() for i, name in enumerate(modes)}

    def _squared_errors(self, sigma: float, rows: slice, x_0, noise, conditions: dict) -> torch.Tensor:
        """Sum over some clips of the mean squared error at a noise level, (modes,)."""

        def here(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[rows].to(self.accelerator.device)

        part = here(x_0)
        timestep = self.levels.at(sigma, len(part)).to(part.device)
        state = self.state(part, here(noise), timestep, on_rows(conditions, here))
        with autocast(self.accelerator):
            found = self.errors(list(self.flex.weak_modes), state)
        return found.square().flatten(2).mean(2).sum(1).cpu()

    def sample(self, path):
        errors, clips, main = self.errors_by_sigma(), error_clips(self.data), self.accelerator.is_main_process
        done = self.done
        if main:
            history = record_errors(self.config.output / "validation.jsonl", done, clips, errors)
            draw_errors(errors, history, clips, path.with_name(f"{path.stem}-error.png"))
            self.accelerator.print(f"\nerror {clips}", {k: f"{v:.3g}" for k, v in mean_errors(errors).items()})
        finite = {f"error/{name}": value for name, value in mean_errors(errors).items() if math.isfinite(value)}
        self.accelerator.log(finite, step=done)
        if self.config.clips is not None:
            return sample_budgets(self.pipeline, self.flex, self.config, self.accelerator, path)
        coarsest = self.config.distill.modes[-1]
        schedule = f"{coarsest}:35,{self.flex.powerful}:5"
        PipelineRunner(self.pipeline, {"transformer": self.flex}, budget=None, schedule=schedule)
        with autocast(self.accelerator):
            shares = self.world.judge(self.pipeline, path if main else None, steps=40)
        self.accelerator.print(f"\nadherence with {schedule}", shares, "->", path)

    @property
    def max_sequence_length(self) -> int:
        """Padded text length that an adapter is trained for."""
        clips, data = self.config.clips, self.config.data
        return clips.max_sequence_length if clips is not None else min(data.text_lengths)

    def save(self, folder, model: str | None = None):
        """Writes the adapter. model: that it is used with, if that is not its base."""
        config, settings = self.config, self.config.distill
        facts = {
            "objective": config.objective,
            "steps": config.steps,
            "clips_per_step": config.batch_size,
            "sigma_range": list(settings.sigma_range),
            "correction_gap": settings.correction_gap,
            "on_policy": settings.on_policy,
            "learning_rate": config.optim.lr,
            "seed": config.seed,
        }
        adapter = AdapterConfig.of(
            self.flex,
            lora_rank=settings.rank if config.objective == "distill" else 0,
            components=[config.component],
            base_model=model or public_name(config.base),
            max_sequence_length=self.max_sequence_length,
            training=facts,
        )
        errors, main = self.errors_by_sigma(), self.accelerator.is_main_process
        save_adapter(folder, adapter, {config.component: self.flex}, main)
        if not main:
            return
        write_card(folder, adapter, config, errors, error_clips(self.data), model)
        if config.push_to_hub is not None:
            push(folder, config.push_to_hub)
