"""What a distillation will cost, known before a GPU is rented: counted on the meta device, without loading weights."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from diffusers.configuration_utils import FrozenDict
from torch.autograd.graph import saved_tensors_hooks

from flexivid.diffusion import FLOWS
from flexivid.model.families import family_of
from flexivid.model.family import Family, patch_size_of
from flexivid.patches.sizes import parse_mode
from flexivid.published import load_index, load_part
from flexivid.sampling.budget import least_budget, schedule_for_budget
from flexivid.sampling.flops import FlopCounter, flop_counter_mode
from flexivid.stock_pipelines import latent_channels_of
from flexivid.training.batches import clips_per_part
from flexivid.training.config import Config, DistillConfig
from flexivid.training.data.latents import check_buckets, check_sequence, check_text_length, clips_of
from flexivid.training.data.media import FILLS, TAKES, check_has_media, check_media, taken_by
from flexivid.training.meta import meta_call, meta_pipeline, meta_state
from flexivid.training.noise import State
from flexivid.training.student import Student, build_student, distillation_loss, unfrozen_student, weak_errors

GIB = 2**30


def _student(config: Config, pipe: DiffusionPipeline) -> tuple[Student, int]:
    """The student on the meta device, and the number of its frozen parameters."""
    transformer = pipe.transformer
    base_count = count_of(transformer.parameters())
    with torch.device("meta"):
        if config.objective == "shared":
            student = unfrozen_student(transformer, config.distill)
        else:
            student = build_student(transformer, config.distill.model_copy(update={"adapter": None}))
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    flex = student._flex[0]
    table = torch.linspace(1, 0, 1000)  # any will do: values cost nothing
    flex.diffusion = replace(flex.diffusion, alphas_cumprod=table)
    return student, base_count


def _costs(student: Student, call: dict) -> dict[str, int]:
    """FLOPs of one forward of one clip, by patch size."""
    return FlopCounter(student._flex[0]).costs(call)


def check_model(config: Config, with_clips: bool = True) -> None:
    """Raises ValueError for what would fail after hours, from configs alone.

    That is a model that adapters cannot be used on, data that is not there or does not fit it, and budgets that the
    modes cannot reach. with_clips: look for the clips or prompts too.
    """
    pipe = meta_pipeline(config)
    family, transformer = family_of(pipe.transformer), pipe.transformer.config
    _check_family(family, transformer, config.objective)
    if config.clips is None and family.name != "wan":
        raise ValueError("the rendered world is for the embedded model; give clips.folder or clips.prompts")
    index = load_index(config.base)
    two = index.get("transformer_2", [None])[0] is not None
    if two and config.clips is not None and (config.clips.prompts or config.validation.prompts):
        raise ValueError(
            f"{config.base} has two transformers, of which one is trained at a time: it cannot sample, so that there "
            f"can be no clips.prompts and no validation.prompts"
        )
    if two and config.objective == "shared":
        raise ValueError(f"{config.base} has two transformers, which the objective shared cannot keep together yet")
    if config.component == "transformer_2" and not two:
        raise ValueError(f"{config.base} has one transformer: component must be transformer")
    check_media(config, pipe)
    latent_channels = latent_channels_of(pipe.vae)
    beside = transformer["in_channels"] != latent_channels
    if beside and type(pipe).__name__ not in (*TAKES, *FILLS):
        raise ValueError(
            f"{config.base} takes {transformer['in_channels']} channels and its VAE has {latent_channels}: it has "
            f"conditions beside the text, which cannot be trained yet"
        )
    if config.distill.guidance_scale is not None and family.sequence is not None:
        raise ValueError(f"{family.transformer_class} has its guidance in its weights: it takes no guided modes")
    if config.distill.on_policy and (family.guidance != "separate" or two or beside):
        raise ValueError(f"on_policy is for pipelines such as Wan's, with one transformer; {config.base} is none")
    scheduler = load_part(config.base, "scheduler", UniPCMultistepScheduler)
    # Others shift by the size of the clip, or are no flow matching.
    shift = scheduler.get("flow_shift", scheduler.get("shift", config.flow_shift))
    if family.prediction in FLOWS and not scheduler.get("use_dynamic_shifting") and shift != config.flow_shift:
        raise ValueError(f"flow_shift is {config.flow_shift}, and the scheduler of {config.base} has {shift}")
    if config.clips is not None:
        if with_clips:
            check_has_media(taken_by(type(pipe)), clips_of(config.clips))
        stride, shrink = family.compression(pipe)
        patch_frames, _, patch_width = patch_size_of(transformer)
        check_buckets(config.clips, stride, shrink * patch_width, patch_frames)
        check_text_length(config.base, config.clips.max_sequence_length)
        check_sequence(config, pipe)
    if config.objective == "few":
        return _check_few(config, family, two)
    budgets = list(config.validation.budgets) if config.clips is not None and config.validation.prompts else []
    if config.distill.on_policy:
        budgets.append(config.distill.on_policy_budget)
    if budgets:
        student, _ = _student(config, pipe)
        costs = _costs(student, meta_call(config, pipe, 1, torch.float32))
        for budget in budgets:
            schedule_for_budget(costs, config.validation.steps, budget, 2, order="interleaved")


def _check_family(family: Family, transformer: FrozenDict, objective: str) -> None:
    """Raises ValueError for a class of transformers that training cannot give all that it takes."""
    if family.lora_targets is None:
        raise ValueError(f"{family.transformer_class} of diffusers takes no LoRA, and cannot be trained yet")
    not_drawn = {
        # HunyuanVideo-1.5 may be told one, AnyFlow always is.
        "is told the timestep that a step goes to, and training draws none": family.destination is not None
        and transformer.get("use_meanflow", True),
        "makes sections beside frames that are there already, and training draws none": family.section_frames,
    }
    if what := family.untrained or next((what for what, is_so in not_drawn.items() if is_so), None):
        raise ValueError(f"{family.transformer_class} {what}: it cannot be trained yet")
    if family.streams and objective != "distill":
        raise ValueError(f"{family.transformer_class} makes sound, which {objective} does not train: use distill")


def _check_few(config: Config, family: Family, two: bool) -> None:
    """Raises ValueError for a base that cannot be trained to run in a few steps."""
    if family.prediction not in FLOWS:
        raise ValueError(f"few is for models of flow matching, and {config.base} predicts {family.prediction}")
    if two:
        raise ValueError(f"few trains one transformer for all noise levels, and {config.base} has two")
    config.few.recipe(config.flow_shift)


def count_of(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def saved_bytes(student: Student, forward: Callable[[], object]) -> int:
    """Bytes of the activations that one forward of a student keeps for its backward."""
    kept: dict[int, int] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in student.parameters()}

    heads, width = student.transformer.config.num_attention_heads, student.transformer.config.attention_head_dim

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # The meta device knows the plain attention only, which keeps its matrix; the kernels that will run do not.
        matrix = tensor.ndim == 4 and tensor.shape[1] == heads and tensor.shape[3] != width
        if storage._cdata not in weights and not matrix:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with student._flex[0].family.counting(), saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = forward()
    del outputs
    return sum(kept.values())


def _trained_counts(student: Student) -> dict[str, int]:
    modes = student._flex[0].weak_modes.values()
    return {
        "LoRA": count_of(p for name, p in student.named_parameters() if "lora_" in name),
        "embedders": count_of(p for mode in modes for p in mode.embedder.parameters()),
        "heads": count_of(p for mode in modes for p in mode.head.parameters()),
        "patch-size embeddings": count_of(mode.patch_size_embedding for mode in modes),
    }


def cost_table(student: Student, state: State, costs: dict[str, int], saved: dict[str, int]) -> list[str]:
    """A line for every patch size. saved: bytes that a forward keeps for its backward."""
    powerful = student._flex[0].powerful
    lines = [f"{'patch size':12}{'tokens':>9}{'TFLOP a forward':>18}{'of powerful':>13}{'kept for backward, GiB':>25}"]
    for patch_size, cost in costs.items():
        sides = zip(state.x_t.shape[2:], parse_mode(patch_size)[0], strict=True)
        tokens = math.prod(-(-length // patch) for length, patch in sides)
        kept = f"{saved[patch_size] / GIB:.2f}" if patch_size in saved else ""
        lines.append(f"{patch_size:12}{tokens:>9}{cost / 1e12:>18.4g}{cost / costs[powerful]:>13.3f}{kept:>25}")
    return lines


def _part_flops(student: Student, state: State, settings: DistillConfig, teacher: int) -> float:
    """FLOPs of a micro-batch: the teacher runs once, every mode that is drawn runs forward and backward."""
    flex, weights, flops_of_modes = student._flex[0], settings.mode_weights or [1.0] * len(settings.modes), []
    for patch_size in settings.modes:
        with flex.family.counting(), flop_counter_mode() as counter:
            distillation_loss(weak_errors(student, flex, [patch_size], state)).backward()
        flops_of_modes.append(counter.get_total_flops() - teacher)
    mean_of_modes = sum(w * flops for w, flops in zip(weights, flops_of_modes, strict=True)) / sum(weights)
    return (teacher + settings.modes_per_step * mean_of_modes) * _noise_levels(settings)


def _data_lines(config: Config, pipe: DiffusionPipeline, call: dict, clips: int) -> list[str]:
    """What a clip takes of the disk, in half precision, and what the transformer is given of it beside latents."""
    if config.clips is None:
        return []
    taken, shared = taken_by(type(pipe)), family_of(pipe.transformer).for_all_clips
    kept = (
        2 * sum(value.numel() for name, value in call.items() if torch.is_tensor(value) and name not in shared) / clips
    )
    given = "" if taken is None else f", with what the pipeline makes of {taken}"
    return [f"a clip of this size takes up to {kept / 2**20:.1f} MiB of {config.clips.cache}{given}"]


def _noise_levels(settings: DistillConfig) -> int:
    return 2 if settings.correction_gap else 1


def forecast(config: Config, processes: int, mixed_precision: bool) -> str:
    """The lines that `--dry-run` prints: parameters, tokens, FLOPs of a step, memory, reachable budgets.

    processes: over which a step is split. mixed_precision: activations are in bfloat16.
    Raises ValueError if the batch cannot be split, and what diffusers raises for a base without configs.
    """
    clips = clips_per_part(config, config.batch_size, processes)
    settings, dtype = config.distill, torch.bfloat16 if mixed_precision else torch.float32
    pipe = meta_pipeline(config)
    student, base_count = _student(config, pipe)
    flex, trained = student._flex[0], _trained_counts(student)
    student.to(dtype)  # activations of one precision; autocast does not reach the meta device
    call = meta_call(config, pipe, clips, dtype)
    state, costs = meta_state(pipe, call), _costs(student, call)
    inputs = (state.x_t, state.timestep, state.conditions)
    saved = {name: saved_bytes(student, partial(student, [name], *inputs)) for name in flex.weak_modes}
    lines = [
        f"{config.base}: {base_count / 1e9:.3f} B parameters, frozen, in {config.base_dtype}",
        f"trained: {sum(trained.values()) / 1e6:.2f} M ("
        + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in trained.items())
        + f"), {len(settings.modes)} modes",
        f"a step: {config.batch_size} clips, {processes} processes x {config.micro_batches} micro-batches x {clips}, "
        f"latents {'x'.join(map(str, state.x_t.shape[1:]))}, text {call['encoder_hidden_states'].shape[1]}",
        *_data_lines(config, pipe, call, clips),
        "",
        *cost_table(student, state, costs, saved),
    ]
    part_flops = _part_flops(student, state, settings, costs[flex.powerful] * clips)
    step_flops = part_flops * config.micro_batches * processes
    weights = base_count * (2 if config.base_dtype == "bfloat16" else 4)
    # Weight, gradient, two moments and the average of every trained parameter, in float32.
    optimiser = sum(trained.values()) * 4 * 5
    activations = max(saved.values()) * settings.modes_per_step * _noise_levels(settings)
    lines += [
        "",
        f"{step_flops / 1e12:.4g} TFLOP a step, {step_flops * config.steps / 1e18:.4g} EFLOP in {config.steps} steps",
        f"memory a process, at least: {weights / GIB:.2f} GiB frozen + {optimiser / GIB:.2f} GiB trained + "
        f"{activations / GIB:.2f} GiB activations = {(weights + optimiser + activations) / GIB:.2f} GiB, "
        "and what single operations need while they run",
        f"budgets from {math.ceil(1000 * least_budget(costs)) / 1000:.3f} on can be reached",
    ]
    return "\n".join(lines)
