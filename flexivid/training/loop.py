"""One training loop for every objective: optimiser, EMA, log, checkpoints that survive a kill."""

import json
import math
import signal
import threading
import time
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from flexivid.files import write_text
from flexivid.tensors import whole
from flexivid.training.checkpoints import load_checkpoint, run_facts, save_checkpoint
from flexivid.training.config import Config
from flexivid.training.finite import StepResult, TrainingFailed, Watch, check_weights
from flexivid.training.objective import Objective
from flexivid.training.optimizers import build_optimizers, learning_rate_factor
from flexivid.training.parallel.launch import is_sharded, is_zero
from flexivid.training.parallel.sharding import outer_weights
from flexivid.training.parallel.zero import prepare_zero, whole_moments


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
            facts = run_facts(self.config) | self.objective.facts
            save_checkpoint(self.config, step, self.trainable, states, self.ema, facts, main)


class Log:
    """log.jsonl and the trackers: a line every `log_every` steps, of the steps since the last."""

    def __init__(self, run: Run):
        self.run, self.path = run, run.config.output / "log.jsonl"
        self.began, self.losses, self.left_out = time.time(), [], 0
        # Of an objective whose steps have several losses.
        self.name_of = getattr(run.objective, "loss_name", None)
        self.named: dict[str, list[float]] = {}
        run.accelerator.init_trackers("flexivid")
        if run.accelerator.is_main_process:
            # Lines past the checkpoint belong to steps that are about to be made again; a kill may have cut off one.
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= run.start]
            write_text(self.path, "".join(kept))

    def add(self, result: StepResult, step: int) -> None:
        if result.finite:
            self.losses.append(result.loss)
            if self.name_of is not None:
                self.named.setdefault(self.name_of(step), []).append(result.loss)
        else:
            self.left_out += 1

    def write(self, step: int, gradient_norm: float) -> str:
        """Writes the line of a step; returns what a progress bar shows. A loss of no finite step is null."""
        accelerator = self.run.accelerator
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        seconds = (time.time() - self.began) / (len(self.losses) + self.left_out)
        line = {"step": step, "loss": mean if mean is None else round(mean, 6), "seconds_per_step": round(seconds, 3)}
        if self.left_out:
            line["left_out"] = self.left_out
        line |= {f"loss/{name}": round(sum(values) / len(values), 6) for name, values in self.named.items()}
        rates = {"learning_rate": self.run.bare_optimizers[0].param_groups[0]["lr"], "gradient_norm": gradient_norm}
        rates["clips_per_second"] = self.run.config.batch_size / seconds
        figures = {name: value for name, value in (line | rates).items() if value is not None and math.isfinite(value)}
        accelerator.log(figures, step=step)
        if accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self.began, self.losses, self.left_out, self.named = time.time(), [], 0, {}
        return "none finite" if mean is None else f"{mean:.4f}"


def train(config: Config, objective: Objective, accelerator: Accelerator) -> None:
    """Runs `objective` for `config.steps` steps, resuming from `config.output` if it holds a checkpoint.

    On SIGTERM it finishes its step, writes a checkpoint and returns. Raises TrainingFailed, with the last good
    checkpoint kept, if losses, gradients or weights are not finite for longer than `config.max_nonfinite_steps`.
    """
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(config, objective, accelerator)
    main, takes_part = accelerator.is_main_process, accelerator.is_main_process or run.sharded
    count = sum(p.numel() for p in run.weights)
    started = f"step {run.start} of {config.steps}"
    accelerator.print(f"{config.objective}: {count / 1e6:.2f} M trainable parameters, {started}")
    progress = tqdm(total=config.steps, initial=run.start, disable=not main, mininterval=10, maxinterval=60)
    log, watch, stop = Log(run), Watch(config.max_nonfinite_steps), threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    for done in range(run.start + 1, config.steps + 1):
        result, stopped = run.compute(done - 1, stop.is_set())
        if result.finite:
            run.update()
            watch.finite()
        else:
            if not run.scale_is_too_large(result):
                accelerator.print(f"\n{watch.not_finite(done, result, run.bare_model)}")
            run.leave_out()
        log.add(result, done - 1)
        progress.update()
        if done % config.log_every == 0:
            progress.set_postfix(loss=log.write(done, result.gradient_norm))
        if done == config.steps:
            watch.check_end(done)
        # A step that was left out may tell of weights that went wrong before: the last checkpoint is better than those.
        if (done % config.save_every == 0 and result.finite) or done == config.steps or stopped:
            run.save_checkpoint(done)
        if stopped:
            progress.close()
            accelerator.print(f"stopped at step {done} of {config.steps}; the same command goes on from there")
            return
        if takes_part and done % config.sample_every == 0:
            (folder / "samples").mkdir(exist_ok=True)
            run.with_averaged_weights(objective.sample, folder / "samples" / f"{done:06d}.png")
        # DeepSpeed's own groups of processes give up after minutes, the one of `wait_for_everyone` after a day.
        if run.zero and (done % config.save_every == 0 or done % config.sample_every == 0):
            accelerator.wait_for_everyone()
    progress.close()
    run.check_weights(config.steps)
    if takes_part:
        run.with_averaged_weights(objective.save, folder / "result")
        accelerator.print(f"saved {folder / 'result'}")
