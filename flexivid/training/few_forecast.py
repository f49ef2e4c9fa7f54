"""What a few-step distillation will cost, counted on the meta device as that of weak modes (`forecast.py`)."""

from functools import partial
from itertools import accumulate

import torch

from flexivid.sampling.flops import FlopCounter, flop_counter_mode
from flexivid.training.batches import clips_per_part
from flexivid.training.config import Config
from flexivid.training.few_student import FAKE, STUDENT, FewStudent, build_few_student, is_of_fake_score
from flexivid.training.forecast import GIB, cost_table, count_of, saved_bytes
from flexivid.training.meta import meta_call, meta_pipeline, meta_state


def few_forecast(config: Config, processes: int, mixed_precision: bool) -> str:
    """The lines that `--dry-run` prints: parameters, tokens, FLOPs of both kinds of step, memory.

    processes: over which a step is split. mixed_precision: activations are in bfloat16.
    Raises ValueError if the batch cannot be split, and what diffusers raises for a base without configs.
    """
    clips, settings = clips_per_part(config, config.batch_size, processes), config.few
    pipe, dtype = meta_pipeline(config), torch.bfloat16 if mixed_precision else torch.float32
    base_count = count_of(pipe.transformer.parameters())
    with torch.device("meta"):
        student = build_few_student(pipe.transformer, settings.model_copy(update={"adapter": None}))
    if config.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    flex, trained = student._flex[0], {name: p for name, p in student.named_parameters() if p.requires_grad}
    of_fake = count_of(p for name, p in trained.items() if is_of_fake_score(name))
    of_student = count_of(trained.values()) - of_fake
    student.to(dtype)  # activations of one precision; autocast does not reach the meta device
    call = meta_call(config, pipe, clips, dtype)
    state, counter = meta_state(pipe, call), FlopCounter(flex)
    costs = dict(counter.costs(call))
    forwards = {size: partial(student, STUDENT, size) for size in dict.fromkeys(settings.patch_sizes)}
    forwards[FAKE] = partial(student, FAKE, flex.powerful)
    inputs = (state.x_t, state.timestep, state.conditions)
    forwards = {name: partial(forward, *inputs) for name, forward in forwards.items()}
    saved = {name: saved_bytes(student, forward) for name, forward in forwards.items()}
    fake_step, student_step = _step_flops(config, student, costs, counter.cost_of_adapted(call, FAKE), forwards, clips)
    parts = config.micro_batches * processes
    cycle = (settings.fake_updates * fake_step + student_step) / (settings.fake_updates + 1)
    weights = base_count * (2 if config.base_dtype == "bfloat16" else 4)
    # Weight, gradient, two moments and the average of every trained parameter, in float32.
    optimiser, activations = (of_student + of_fake) * 4 * 5, max(saved.values())
    lines = [
        f"{config.base}: {base_count / 1e9:.3f} B parameters, frozen, in {config.base_dtype}; student, fake score and "
        f"teacher are this one base",
        f"trained: student {of_student / 1e6:.2f} M, fake score {of_fake / 1e6:.2f} M",
        f"a step: {config.batch_size} clips, {processes} processes x {config.micro_batches} micro-batches x {clips}, "
        f"latents {'x'.join(map(str, state.x_t.shape[1:]))}, text {call['encoder_hidden_states'].shape[1]}",
        "",
        *cost_table(student, state, costs, saved),
        "",
        f"{fake_step * parts / 1e12:.4g} TFLOP a step of the fake score, {student_step * parts / 1e12:.4g} one of the "
        f"student, {cycle * parts * config.steps / 1e18:.4g} EFLOP in {config.steps} steps, "
        f"{config.steps // (settings.fake_updates + 1)} of them the student's",
        f"memory a process, at least: {weights / GIB:.2f} GiB frozen + {optimiser / GIB:.2f} GiB trained + "
        f"{activations / GIB:.2f} GiB activations = {(weights + optimiser + activations) / GIB:.2f} GiB, "
        "and what single operations need while they run",
    ]
    return "\n".join(lines)


def _step_flops(
    config: Config, student: FewStudent, costs: dict[str, int], adapted: int, forwards: dict, clips: int
) -> tuple[float, float]:
    """FLOPs of a micro-batch that trains the fake score, and of one that trains the student, over all stops."""
    flex, sizes = student._flex[0], config.few.patch_sizes
    learning = {}
    for name, forward in forwards.items():
        with flex.family.counting(), flop_counter_mode() as counter:
            forward().square().mean().backward()
        learning[name] = counter.get_total_flops()
    run = [(adapted if size == flex.powerful else costs[size]) * clips for size in sizes]
    so_far = list(accumulate(run))
    mean_run, mean_before = sum(so_far) / len(run), (sum(so_far) - sum(run)) / len(run)
    mean_last = sum(learning[size] for size in sizes) / len(sizes)
    scores = adapted + costs[flex.powerful] * (1 if flex.family.guidance == "embedded" else 2)
    return mean_run + learning[FAKE], mean_before + mean_last + scores * clips
