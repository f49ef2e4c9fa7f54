"""What a distillation will cost, known before a GPU is rented: counted on the meta device, without loading weights."""

import math

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch.autograd.graph import saved_tensors_hooks

from flexivid.flops import FlopCounter, flop_counter_mode
from flexivid.schedules import least_budget, parse_patch_size
from flexivid.training.clips import Bucket
from flexivid.training.config import Config
from flexivid.training.distill import Student, build_student, distillation_loss, weak_errors
from flexivid.training.loop import clips_per_part

GIB = 2**30


def _inputs(config: Config, transformer, vae_config: dict, clips: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(x_t, sigma, text) of `clips` clips on the meta device, of the largest bucket."""
    if config.clips is None:
        bucket, length = Bucket(config.data.frames, config.data.size, config.data.size), max(config.data.text_lengths)
    else:
        bucket = max((Bucket.parse(text) for text in config.clips.buckets), key=lambda b: b.frames * b.height * b.width)
        length = config.clips.max_sequence_length
    space = vae_config["scale_factor_spatial"]
    frames = (bucket.frames - 1) // vae_config["scale_factor_temporal"] + 1
    channels, text_dim = transformer.config.in_channels, transformer.config.text_dim
    x_t = torch.empty(
        clips, channels, frames, bucket.height // space, bucket.width // space, dtype=dtype, device="meta"
    )
    return x_t, torch.empty(clips, device="meta"), torch.empty(clips, length, text_dim, dtype=dtype, device="meta")


def _count(parameters) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _saved_bytes(student: Student, patch_size: str, inputs: tuple[torch.Tensor, ...]) -> int:
    """Bytes of the activations that one forward keeps for its backward."""
    kept: dict[int, int] = {}
    weights = {id(parameter.untyped_storage()) for parameter in student.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in weights:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = student([patch_size], inputs[0], inputs[1] * 1000, inputs[2])
    del outputs
    return sum(kept.values())


def forecast(config: Config, processes: int, mixed_precision: bool) -> str:
    """The lines that `--dry-run` prints: parameters, tokens, FLOPs of a step, memory, reachable budgets.

    processes: over which a step is split. mixed_precision: activations are in bfloat16.
    Raises ValueError if the batch cannot be split, and what diffusers raises for a base without configs.
    """
    transformer_config = WanTransformer3DModel.load_config(config.base, subfolder="transformer")
    vae_config = AutoencoderKLWan.load_config(config.base, subfolder="vae")
    clips = clips_per_part(config, config.batch_size, processes)
    settings, dtype = config.distill, torch.bfloat16 if mixed_precision else torch.float32
    with torch.device("meta"):
        transformer = WanTransformer3DModel.from_config(transformer_config)
        base_count = _count(transformer.parameters())
        student = build_student(transformer, settings.model_copy(update={"adapter": None}))
        if config.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
    flex = student._flex[0]
    trained = {
        "LoRA": _count(p for name, p in student.named_parameters() if "lora_" in name),
        "embedders": _count(p for mode in flex.weak_modes.values() for p in mode.embedder.parameters()),
        "heads": _count(p for mode in flex.weak_modes.values() for p in mode.head.parameters()),
        "patch-size embeddings": _count(mode.patch_size_embedding for mode in flex.weak_modes.values()),
    }
    student.to(dtype)  # activations of one precision; autocast does not reach the meta device
    inputs = _inputs(config, transformer, vae_config, clips, dtype)
    call = {"hidden_states": inputs[0], "timestep": inputs[1], "encoder_hidden_states": inputs[2]}
    costs = {patch_size: FlopCounter(flex).count(patch_size, call) for patch_size in flex.patch_sizes}
    lines = [
        f"{config.base}: {base_count / 1e9:.3f} B parameters, frozen, in {config.base_dtype}",
        f"trained: {sum(trained.values()) / 1e6:.2f} M ("
        + ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in trained.items())
        + f"), {len(settings.modes)} modes",
        f"a step: {config.batch_size} clips, {processes} processes x {config.micro_batches} micro-batches x {clips}, "
        f"latents {'x'.join(map(str, inputs[0].shape[1:]))}, text {inputs[2].shape[1]}",
        "",
        f"{'patch size':12}{'tokens':>9}{'TFLOP a forward':>18}{'of powerful':>13}{'kept for backward, GiB':>25}",
    ]
    saved = {}
    for patch_size in flex.patch_sizes:
        sides = zip(inputs[0].shape[2:], parse_patch_size(patch_size), strict=True)
        tokens = math.prod(-(-length // patch) for length, patch in sides)
        kept = ""
        if patch_size != flex.powerful:
            saved[patch_size] = _saved_bytes(student, patch_size, inputs)
            kept = f"{saved[patch_size] / GIB:.2f}"
        share = costs[patch_size] / costs[flex.powerful]
        lines.append(f"{patch_size:12}{tokens:>9}{costs[patch_size] / 1e12:>18.4g}{share:>13.3f}{kept:>25}")

    with flop_counter_mode() as counter:
        coarsest = settings.modes[: settings.modes_per_step]
        distillation_loss(weak_errors(student, flex.powerful, coarsest, *inputs)).backward()
    noise_levels = 2 if settings.correction_gap else 1
    step_flops = counter.get_total_flops() * config.micro_batches * processes * noise_levels
    weights = base_count * (2 if config.base_dtype == "bfloat16" else 4)
    # Weight, gradient, two moments and the average of every trained parameter, in float32.
    optimiser = sum(trained.values()) * 4 * 5
    activations = max(saved.values()) * settings.modes_per_step * noise_levels
    lines += [
        "",
        f"{step_flops / 1e12:.4g} TFLOP a step with {', '.join(coarsest)}, "
        f"{step_flops * config.steps / 1e18:.4g} EFLOP in {config.steps} steps",
        f"memory a process, at least: {weights / GIB:.2f} GiB frozen + {optimiser / GIB:.2f} GiB trained + "
        f"{activations / GIB:.2f} GiB activations = {(weights + optimiser + activations) / GIB:.2f} GiB, "
        "and what single operations need while they run",
        f"budgets from {math.ceil(1000 * least_budget(costs)) / 1000:.3f} on can be reached",
    ]
    return "\n".join(lines)
