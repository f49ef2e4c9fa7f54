"""One training loop for every objective: optimiser, EMA, log, checkpoints that survive a kill."""

import math
import signal
import threading
import time
from contextlib import nullcontext
from functools import cached_property

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from flexivid.tensors import whole
from flexivid.training.checkpoints import load_checkpoint, run_facts, save_checkpoint
from flexivid.training.config import Config
from flexivid.training.finite import StepResult, TrainingFailed, Watch, check_weights
from flexivid.training.objective import Objective
from flexivid.training.optimizers import build_optimizers, learning_rate_factor
from flexivid.training.parallel.launch import is_sharded, is_zero
from flexivid.training.parallel.sharding import outer_weights
from flexivid.training.parallel.zero import prepare_zero, whole_moments
from flexivid.training.progress import Log


class Run:
    """Model, optimisers and averaged weights of a run, as its last checkpoint left them."""

    def __init__(self, config: Config, objective: Objective, accelerator: Accelerator):
        self.config, self.objective, self.accelerator = config, objective, accelerator
        self.sharded, self.zero = is_sharded(accelerator), is_zero(accelerator)
        # FSDP moves the model part by part: it may not fit as a whole.
        self.bare_model = objective.model if self.sharded else objective.model.to(accelerator.device)
        self.bare_optimizers = build_optimizers(config, self.trained_parameters())
        self.peaks = [optimizer.param_groups[0]["lr"] for optimizer in self.bare_optimizers]
        accelerator.gradient_accumulation_steps = config.micro_batches
        if self.zero:
            self.model, *self.optimizers = prepare_zero(accelerator, config, self.bare_model, *self.bare_optimizers)
        else:
            self.model, *self.optimizers = accelerator.prepare(self.bare_model, *self.bare_optimizers)
        self.trainable = self.trained_parameters()  # with FSDP other ones
        self.weights = list(self.trainable.values())
        self.ema = EMAModel(self.weights, decay=config.optim.ema, use_ema_warmup=True, power=0.75)
        split = self.optimizers[0].optimizer if self.zero else None
        self.start = load_checkpoint(config.output, self.trainable, self.bare_optimizers, self.ema, split)
        starts = accelerator.gather(torch.tensor([self.start], device=accelerator.device)).tolist()
        if len(set(starts)) > 1:
            raise TrainingFailed(
                f"the processes start at steps {starts}: {config.output} must be shared by all machines"
            )

    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.bare_model.named_parameters() if p.requires_grad}

    @cached_property
    def facts(self) -> dict:
        """What checkpoints are bound to. It hashes the base, which may take minutes, so that it is asked for once."""
        return run_facts(self.config) | self.objective.facts

    def compute(self, step: int, stop: bool) -> tuple[StepResult, bool]:
        """Loss and gradients of a step, and whether any process has been told to stop."""
        config, accelerator = self.config, self.accelerator
        for optimizer, peak in zip(self.bare_optimizers, self.peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_factor(config, step)
        loss = torch.zeros((), device=accelerator.device)
        for micro_batch in range(config.micro_batches):
            with accelerator.accumulate(self.model):
                with accelerator.autocast() if self.sharded else nullcontext():
                    part = self.objective.loss(self.model, step, micro_batch)
                # A loss that is not finite spoils its gradients: DeepSpeed and gradient scalers look at nothing else.
                accelerator.backward(part * torch.where(part.isfinite(), 1.0, math.nan))
            loss += part.detach() / config.micro_batches
        norm = whole(torch.as_tensor(accelerator.clip_grad_norm_(self.weights, config.optim.clip)))
        # All processes step, or stop, or none does, whichever of them has a reason for it.
        told = torch.stack([loss, norm.to(loss), loss.new_tensor(float(stop))])
        losses, norms, stops = accelerator.gather(told).view(-1, 3).T.tolist()
        return StepResult(losses, norms), any(stops)

    def update(self) -> None:
        """Takes the step whose gradients have been computed."""
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.ema.step(self.weights)

    def leave_out(self) -> None:
        """Forgets the gradients of a step that is not finite; DeepSpeed has done so itself."""
        for optimizer in self.optimizers:
            if self.accelerator.scaler is not None:
                optimizer.step()  # takes no step, and lowers the scale of float16
            optimizer.zero_grad()

    def scale_is_too_large(self, result: StepResult) -> bool:
        """Whether gradients overflow only because float16 has not found its scale yet, which is usual at first."""
        scaler = self.accelerator.scaler
        return scaler is not None and math.isfinite(result.loss) and scaler.get_scale() > 1

    @torch.no_grad()
    def with_averaged_weights(self, action, path) -> None:
        present = [p.detach().clone() for p in self.weights]
        for p, average in zip(self.weights, self.ema.shadow_params, strict=True):
            p.copy_(average)
        with outer_weights(self.model):
            action(path)
        for p, value in zip(self.weights, present, strict=True):
            p.copy_(value)

    def check_weights(self, step: int) -> None:
        check_weights(step, self.trainable, self.ema.shadow_params, self.accelerator)

    def save_checkpoint(self, step: int) -> None:
        main = self.accelerator.is_main_process
        self.check_weights(step)
        if self.zero:
            states = [whole_moments(*self.bare_optimizers, self.weights, main)]
        else:
            states = [optimizer.state_dict()["state"] for optimizer in self.bare_optimizers]
        if main or self.sharded:
            # With FSDP all take part, and only the main one writes.
            facts = self.facts if main else {}
            save_checkpoint(self.config, step, self.trainable, states, self.ema, facts, main)


def train(config: Config, objective: Objective, accelerator: Accelerator) -> None:
    """Runs `objective` for `config.steps` steps, resuming from `config.output` if it holds a checkpoint.

    On SIGTERM it finishes its step, writes a checkpoint and returns. Raises TrainingFailed, with the last good
    checkpoint kept, if losses, gradients or weights are not finite for longer than `config.max_nonfinite_steps`.
    """
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, objective, accelerator)
    count = sum(p.numel() for p in run.weights)
    started = f"step {run.start} of {config.steps}"
    accelerator.print(f"{config.objective}: {count / 1e6:.2f} M trainable parameters, {started}")
    with objective.batches:  # whatever ends the steps, nothing is read any more
        stopped = _make_steps(run)
    if stopped is not None:
        accelerator.print(f"stopped at step {stopped} of {config.steps}; the same command goes on from there")
        return
    run.check_weights(config.steps)
    if accelerator.is_main_process or run.sharded:
        run.with_averaged_weights(objective.save, folder / "result")
        accelerator.print(f"saved {folder / 'result'}")


def _make_steps(run: Run) -> int | None:
    """The steps that are left. Returns the one after which it was told to stop, None if all are made."""
    config, objective, accelerator, folder = run.config, run.objective, run.accelerator, run.config.output
    main, takes_part = accelerator.is_main_process, accelerator.is_main_process or run.sharded
    progress = tqdm(total=config.steps, initial=run.start, disable=not main, mininterval=10, maxinterval=60)
    log, watch = Log(config, objective, accelerator, run.start), Watch(config.max_nonfinite_steps)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    for done in range(run.start + 1, config.steps + 1):
        began = time.perf_counter()
        result, stopped = run.compute(done - 1, stop.is_set())
        if result.finite:
            run.update()
            watch.finite()
        else:
            if not run.scale_is_too_large(result):
                accelerator.print(f"\n{watch.not_finite(done, result, run.bare_model)}")
            run.leave_out()
        log.add(result, done - 1, time.perf_counter() - began)
        progress.update()
        if done % config.log_every == 0:
            progress.set_postfix(log.write(done, result.gradient_norm, run.bare_optimizers[0].param_groups[0]["lr"]))
        if done == config.steps:
            watch.check_end(done)
        # A step that was left out may tell of weights that went wrong before: the last checkpoint is better than those.
        if (done % config.save_every == 0 and result.finite) or done == config.steps or stopped:
            run.save_checkpoint(done)
        if stopped:
            progress.close()
            return done
        if takes_part and done % config.sample_every == 0:
            (folder / "samples").mkdir(exist_ok=True)
            run.with_averaged_weights(objective.sample, folder / "samples" / f"{done:06d}.png")
        # DeepSpeed's own groups of processes give up after minutes, the one of `wait_for_everyone` after a day.
        if run.zero and (done % config.save_every == 0 or done % config.sample_every == 0):
            accelerator.wait_for_everyone()
    progress.close()
    return None
