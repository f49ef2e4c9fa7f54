"""Objective `distill`: weak modes learn to predict what the frozen powerful mode predicts (FlexiDiT, section 3.2).

Trained are the coarse embedders, heads and patch-size embeddings, and a LoRA per weak mode; the base stays frozen,
so that the powerful mode stays exact.
"""

from dataclasses import replace

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from huggingface_hub import HfApi

from flexivid.model.adapter import AdapterConfig, load_adapter, read_config, save_adapter, transformer_shape
from flexivid.model.family import Family
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora
from flexivid.sampling.runner import PipelineRunner
from flexivid.shapes.data import ShapesData
from flexivid.shapes.pretrain import sample_and_judge
from flexivid.tensors import on_rows
from flexivid.training.config import Config, DistillConfig
from flexivid.training.data.buckets import Bucket
from flexivid.training.data.conditions import clip_arguments
from flexivid.training.data.latents import build_cache, encoders_of
from flexivid.training.loop import clips_per_part, configure_speed, global_batch_slice, step_generator
from flexivid.training.noise import NoiseLevels, State
from flexivid.training.parallel.launch import autocast
from flexivid.training.parallel.sharding import block_classes
from flexivid.training.report import SIGMAS, draw_errors, write_card
from flexivid.training.rollouts import RollOuts
from flexivid.video import write_picture


def predict(transformer: torch.nn.Module, family: Family, x_t, timestep, conditions: dict) -> torch.Tensor:
    """One forward: x_t (B, C, T, H, W) -> the network's output, (B, C, T, H, W) float32."""
    call = conditions | family.arguments_for(x_t) | {"timestep": timestep}
    output = transformer(**call, return_dict=False)[0]
    return family.latents(call | {"hidden_states": output}).float()


class Student(torch.nn.Module):
    """The transformer and its weak modes in one module, so that data parallelism sees every trained parameter."""

    def __init__(self, flex: FlexTransformer):
        super().__init__()
        self.transformer, self.weak_modes = flex.transformer, flex.weak_modes.requires_grad_(True)
        self._flex = [flex]  # in a list: it is no submodule
        self._no_split_modules = block_classes(flex.transformer)  # what accelerate shards by

    def forward(self, patch_sizes: list[str], x_t, timestep, conditions: dict) -> list[torch.Tensor]:
        """The network's output at each of the patch sizes."""
        flex, predictions = self._flex[0], []
        for patch_size in patch_sizes:
            flex.fix(patch_size)
            predictions.append(predict(self.transformer, flex.family, x_t, timestep, conditions))
        return predictions


def build_student(transformer: torch.nn.Module, settings: DistillConfig, component: str = "transformer") -> Student:
    """Freezes the transformer and attaches trainable weak modes and LoRA, from the stock weights or an adapter.

    Raises ValueError if that adapter is one of other modes, another rank or parametrisation, or of another model.
    """
    transformer.requires_grad_(False)
    flex = FlexTransformer(transformer, settings.modes, settings.parametrisation)
    if settings.adapter is None:
        add_lora(flex, settings.rank)
    else:
        config = read_config(settings.adapter)
        asked = {"patch_sizes": settings.modes, "parametrisation": settings.parametrisation, "lora_rank": settings.rank}
        if differing := [
            f"{key} {getattr(config, key)} != {value}" for key, value in asked.items() if getattr(config, key) != value
        ]:
            raise ValueError(f"cannot go on from {settings.adapter}: {', '.join(differing)}")
        load_adapter(settings.adapter, config, {component: flex})
    for name, parameter in transformer.named_parameters():
        parameter.requires_grad_("lora_" in name)
    student = Student(flex)
    # A frozen base may be in half precision; what is trained never is.
    cast_training_params(student, dtype=torch.float32)
    return student


def weak_errors(student: torch.nn.Module, flex: FlexTransformer, patch_sizes: list[str], state: State) -> torch.Tensor:
    """x0_weak - x0_powerful, (modes, B, C, T, H, W); gradients reach the weak part only."""
    arguments = (state.x_t, state.timestep, state.conditions)
    with torch.no_grad():
        (powerful,) = student([flex.powerful], *arguments)
    weak = student(patch_sizes, *arguments)
    return torch.stack([state.x0_difference(flex.diffusion, output - powerful) for output in weak])


def distillation_loss(errors: torch.Tensor) -> torch.Tensor:
    """|| x0_weak - x0_powerful ||^2, mean over modes and clips (FlexiDiT, section 3.2, in x0)."""
    return errors.square().mean()


def corrected_distillation_loss(
    errors: torch.Tensor, errors_before: torch.Tensor, corrected: torch.Tensor, anchor: float
) -> torch.Tensor:
    """What is left of a weak prediction's error in an interleaved schedule (`budget.py`), and a share of the whole.

    There a weak step at t predicts x0_weak(t) + [x0_powerful(t_k) - x0_weak(t_k)], so that its error is e(t) - e(t_k):
    a weak mode may be wrong, as long as it stays equally wrong until the next powerful step.

    errors: e(t), (modes, B, C, T, H, W). errors_before: e(t_k) of the same clips and noise. corrected: (B,), whether
    there was a powerful step before. anchor: weight of || e(t) ||^2.
    """
    left = errors - corrected.view(1, -1, 1, 1, 1, 1) * errors_before
    return left.square().mean() + anchor * errors.square().mean()


def load_base(config: Config) -> DiffusionPipeline:
    """The pipeline of a config's base, the transformer that is trained as its only one."""
    dtype = getattr(torch, config.base_dtype)
    dtypes = {"default": torch.float32, "transformer": dtype, "transformer_2": dtype, "text_encoder": dtype}
    index = DiffusionPipeline.load_config(str(config.base))
    others = [name for name in ("transformer", "transformer_2") if name != config.component]
    without = {name: None for name in others if index.get(name, [None])[0] is not None}
    pipe = DiffusionPipeline.from_pretrained(str(config.base), dtype=dtypes, **without)
    if without:
        # As if it were trained for every noise level: the other transformer has no part in this.
        pipe.register_modules(transformer=getattr(pipe, config.component), transformer_2=None)
        pipe.register_to_config(boundary_ratio=None)
    return pipe


class DistillObjective:
    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        if config.base_dtype == "bfloat16" and accelerator.mixed_precision != "bf16":
            raise ValueError("base_dtype bfloat16 needs `accelerate launch --mixed_precision bf16`")
        self.pipeline = load_base(config)
        torch.manual_seed(config.seed)
        # Before the data, which may take minutes: an adapter that does not fit is refused at once.
        self.model = self.build_model()
        self.flex = self.model._flex[0]
        table = getattr(self.pipeline.scheduler, "alphas_cumprod", None)
        self.flex.diffusion = replace(self.flex.diffusion, alphas_cumprod=table)
        self.levels = NoiseLevels(self.flex.diffusion, config.flow_shift)
        configure_speed(self.pipeline.transformer, config)
        self.drawn: tuple[int, tuple] | None = None
        if config.clips is not None:
            self.data = build_cache(config.clips, self.pipeline, accelerator)
        else:
            parts = (self.pipeline.vae, self.pipeline.tokenizer, self.pipeline.text_encoder)
            with accelerator.main_process_first():
                self.data = ShapesData(config.data, *parts)
        self.roll_outs = RollOuts(self.pipeline, self.flex, self.data, config, accelerator)

    def build_model(self) -> Student:
        return build_student(self.pipeline.transformer, self.config.distill, self.config.component)

    def draw(self, step: int):
        """All that is random in a step, for the whole batch: (patch sizes, tensors and conditions)."""
        config, settings, generator = self.config, self.config.distill, step_generator(self.config.seed, step)
        weights = torch.tensor(settings.mode_weights or [1.0] * len(settings.modes))
        drawn = torch.multinomial(weights, settings.modes_per_step, generator=generator).tolist()
        patch_sizes = [settings.modes[i] for i in drawn]
        if settings.on_policy and torch.rand(1, generator=generator).item() < settings.on_policy:
            return patch_sizes, self.roll_outs.batch(step, config.batch_size, generator)
        x_0, conditions = self.data.batch(config.batch_size, generator)
        noise = torch.randn(x_0.shape, generator=generator)
        u = torch.rand(config.batch_size, generator=generator)
        u_before = u + settings.correction_gap * torch.rand(config.batch_size, generator=generator)
        return patch_sizes, (x_0, conditions, noise, u, u_before)

    def part(self, step: int, micro_batch: int):
        """What `draw` gives, but of its tensors the rows that this process computes now, on its device."""
        if self.drawn is None or self.drawn[0] != step:  # the micro-batches of a step share it
            self.drawn = step, self.draw(step)
        chosen, values = self.drawn[1]
        rows = global_batch_slice(self.accelerator, self.config, self.config.batch_size, micro_batch)

        def here(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[rows].to(self.accelerator.device)

        return chosen, tuple(on_rows(v, here) if isinstance(v, dict) else here(v) for v in values)

    def loss(self, model, step, micro_batch):
        settings = self.config.distill
        patch_sizes, values = self.part(step, micro_batch)
        if len(values) == 3:  # states of the student's own runs come with their noise level
            x_t, timestep, conditions = values
            state = State(x_t, timestep, self.flex.diffusion.level(timestep), conditions)
            return distillation_loss(weak_errors(model, self.flex, patch_sizes, state))
        x_0, conditions, noise, u, u_before = values
        if settings.correction_gap == 0:
            state = self.levels.state(x_0, noise, self.levels.drawn(u, settings.sigma_range), conditions)
            return distillation_loss(weak_errors(model, self.flex, patch_sizes, state))
        twice = on_rows(conditions, lambda tensor: torch.cat([tensor] * 2))
        timestep = self.levels.drawn(torch.cat([u, u_before.clamp(max=1)]), settings.sigma_range)
        state = self.levels.state(torch.cat([x_0] * 2), torch.cat([noise] * 2), timestep, twice)
        now, before = weak_errors(model, self.flex, patch_sizes, state).chunk(2, dim=1)
        # The first steps of a run come before its first powerful one, and are not corrected.
        return corrected_distillation_loss(now, before, u_before <= 1, settings.anchor)

    def errors(self, patch_sizes: list[str], state: State) -> torch.Tensor:
        """x0_weak - x0_powerful at some patch sizes, (modes, B, C, T, H, W)."""
        return weak_errors(self.model, self.flex, patch_sizes, state)

    @torch.no_grad()
    def errors_by_sigma(self, clips: int = 8) -> dict[str, list[float]]:
        """|| x0_weak - x0_powerful ||^2 of every mode over SIGMAS, on the same clips and noise every time."""
        generator, device = torch.Generator().manual_seed(2**31), self.accelerator.device
        x_0, conditions = self.data.batch(clips, generator)
        noise = torch.randn(x_0.shape, generator=generator)
        # As many at once as in training: more may not fit.
        size = clips_per_part(self.config, self.config.batch_size, self.accelerator.num_processes)
        modes = list(self.flex.weak_modes)
        errors = {patch_size: [] for patch_size in modes}
        for level in SIGMAS:
            total = torch.zeros(len(modes))
            for start in range(0, clips, size):

                def here(tensor: torch.Tensor, rows=slice(start, start + size)) -> torch.Tensor:
                    return tensor[rows].to(device)

                part = here(x_0)
                timestep = self.levels.at(level, len(part)).to(device)
                state = self.levels.state(part, here(noise), timestep, on_rows(conditions, here))
                with autocast(self.accelerator):
                    found = self.errors(modes, state)
                total += found.square().flatten(2).mean(2).sum(1).cpu()
            for patch_size, error in zip(modes, (total / clips).tolist(), strict=True):
                errors[patch_size].append(error)
        return errors

    def sample(self, path):
        errors = self.errors_by_sigma()
        if self.accelerator.is_main_process:
            draw_errors(errors, path.with_name(f"{path.stem}-error.png"))
        if self.config.clips is not None:
            return self._sample_budgets(path)
        coarsest = self.config.distill.modes[-1]
        schedule = f"{coarsest}:35,{self.flex.powerful}:5"
        PipelineRunner(self.pipeline, {"transformer": self.flex}, budget=None, schedule=schedule)
        with autocast(self.accelerator):
            drawn = path if self.accelerator.is_main_process else None
            shares = sample_and_judge(self.pipeline, drawn, steps=40, count=32)
        self.accelerator.print(f"\nadherence with {schedule}", shares, "->", path)

    @torch.no_grad()
    def _sample_budgets(self, path):
        """A row of frames for every validation prompt and budget."""
        settings, bucket = self.config.validation, Bucket.parse(self.config.clips.buckets[0])
        for part in encoders_of(self.pipeline).values():
            part.to(self.accelerator.device)
        sampling = {"steps": settings.steps, "guidance_scale": settings.guidance_scale}
        call = clip_arguments(self.pipeline, bucket, self.config.clips, **sampling)
        rows = {}
        for prompt in settings.prompts:
            for budget in settings.budgets:
                PipelineRunner(self.pipeline, {"transformer": self.flex}, budget=budget, schedule=None)
                generator = torch.Generator().manual_seed(0)
                with autocast(self.accelerator):
                    frames = self.pipeline(prompt=prompt, **call, generator=generator, output_type="np").frames[0]
                rows[f"{budget:g}: {prompt}"] = (frames * 255).round().astype("uint8")
        for part in encoders_of(self.pipeline).values():
            part.to("cpu")
        clear_device_cache()
        if rows and self.accelerator.is_main_process:
            write_picture(rows, path)

    def save(self, folder, base_model: str | None = None):
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
        adapter = AdapterConfig(
            patch_sizes=settings.modes,
            parametrisation=settings.parametrisation,
            lora_rank=settings.rank if config.objective == "distill" else 0,
            components=[config.component],
            base_model=base_model or str(config.base),
            transformer_class=type(self.flex.transformer).__name__,
            transformer_shape=transformer_shape(self.flex),
            max_sequence_length=(
                config.clips.max_sequence_length if config.clips is not None else min(config.data.text_lengths)
            ),
            training=facts,
        )
        errors, main = self.errors_by_sigma(), self.accelerator.is_main_process
        save_adapter(folder, adapter, {config.component: self.flex}, main)
        if not main:
            return
        write_card(folder, adapter, config, errors)
        if config.push_to_hub is not None:
            api = HfApi()
            api.create_repo(config.push_to_hub, exist_ok=True)
            api.upload_folder(repo_id=config.push_to_hub, folder_path=folder)
            print(f"pushed to {config.push_to_hub}")
