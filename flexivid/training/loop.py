"""One training loop for every objective: optimiser, EMA, log, checkpoints that survive a kill."""

import json
import signal
import threading
import time
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from flexivid.files import write_text
from flexivid.model.flexible import compile_blocks
from flexivid.tensors import whole
from flexivid.training.checkpoints import load_checkpoint, run_facts, save_checkpoint
from flexivid.training.config import Config
from flexivid.training.parallel.launch import is_sharded, is_zero
from flexivid.training.parallel.sharding import outer_weights
from flexivid.training.parallel.zero import prepare_zero, whole_moments


class Objective(Protocol):
    """What is trained. Batches are a pure function of the step, so that a resumed run repeats and loses nothing."""

    model: torch.nn.Module

    def loss(self, model: torch.nn.Module, step: int, micro_batch: int) -> torch.Tensor: ...

    def sample(self, path: Path) -> None:
        """Draws a picture of where training stands."""

    def save(self, folder: Path) -> None:
        """Writes the result, from the averaged weights that are in `model` at that moment."""


def clips_per_part(config: Config, count: int, processes: int) -> int:
    """How many clips of `count` a process has in memory at once. Raises ValueError if they cannot be split evenly."""
    share, rest = divmod(count, processes * config.micro_batches)
    if rest:
        raise ValueError(
            f"a batch of {count} clips cannot be split evenly over {processes} processes and {config.micro_batches} "
            f"micro-batches"
        )
    return share


def global_batch_slice(accelerator: Accelerator, config: Config, count: int, micro_batch: int) -> slice:
    """The rows of a batch of `count`, drawn identically in every process, that this process computes now."""
    share = clips_per_part(config, count, accelerator.num_processes)
    part = accelerator.process_index * config.micro_batches + micro_batch
    return slice(part * share, (part + 1) * share)


def configure_speed(transformer: torch.nn.Module, config: Config) -> None:
    """Applies what changes the seconds of a step and not its result, beyond rounding.

    Raises ValueError for an attention backend that diffusers does not know.
    """
    if config.attention_backend is not None:
        transformer.set_attention_backend(config.attention_backend)
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(transformer)


def step_generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: the same at every number of processes and after every resume."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)


class FlatMuon(torch.optim.Muon):
    """Muon (Jordan et al. 2024) that sees convolution kernels as (out, everything else) matrices."""

    def __init__(self, weights: list[torch.nn.Parameter], **settings):
        self.weights = weights
        # Views share storage with the weights. match_rms_adamw makes learning rates comparable to AdamW's.
        flat = [torch.nn.Parameter(weight.detach().flatten(1)) for weight in weights]
        super().__init__(flat, adjust_lr_fn="match_rms_adamw", **settings)

    def step(self, closure=None):
        for flat, weight in zip(self.param_groups[0]["params"], self.weights, strict=True):
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True):
        super().zero_grad(set_to_none)
        for weight in self.weights:
            weight.grad = None


def check_optimizer(config: Config) -> None:
    """Raises ValueError if the optimiser is not installed."""
    if config.optim.name == "adamw8bit" and find_spec("bitsandbytes") is None:
        raise ValueError("optim.name adamw8bit is that of bitsandbytes, which is not here: pip install bitsandbytes")


def build_optimizers(config: Config, trainable: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    """AdamW, or Muon on hidden matrices and convolution kernels and AdamW on everything else."""
    optim, betas = config.optim, (0.9, 0.98)
    hidden = []
    if optim.name == "adamw8bit":  # Dettmers et al. 2022, arXiv 2110.02861
        from bitsandbytes.optim import AdamW8bit

        return [AdamW8bit(list(trainable.values()), lr=optim.lr, weight_decay=optim.weight_decay, betas=betas)]
    if optim.name == "muon":
        hidden = [name for name, p in trainable.items() if p.ndim >= 4 or (p.ndim == 2 and "blocks." in name)]
    rest = [p for name, p in trainable.items() if name not in hidden]
    optimizers = [torch.optim.AdamW(rest, lr=optim.lr, weight_decay=optim.weight_decay, betas=betas)]
    if hidden:
        weights = [trainable[name] for name in hidden]
        optimizers.append(FlatMuon(weights, lr=optim.muon_lr, weight_decay=optim.weight_decay))
    return optimizers


def learning_rate_factor(config: Config, step: int) -> float:
    """Linear warm-up, constant, linear decay to zero over the last `optim.decay` of the steps."""
    warmup = min(1.0, (step + 1) / max(config.optim.warmup, 1))
    decay_steps = max(config.optim.decay * config.steps, 1)
    return min(warmup, (config.steps - step) / decay_steps, 1.0)


def train(config: Config, objective: Objective, accelerator: Accelerator) -> None:
    """Runs `objective` for `config.steps` steps, resuming from `config.output` if it holds a checkpoint.

    On SIGTERM it finishes its step, writes a checkpoint and returns.
    """
    folder = config.output
    folder.mkdir(parents=True, exist_ok=True)
    sharded, zero = is_sharded(accelerator), is_zero(accelerator)
    # FSDP moves the model part by part: it may not fit as a whole.
    bare_model = objective.model if sharded else objective.model.to(accelerator.device)

    def trained_parameters() -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in bare_model.named_parameters() if p.requires_grad}

    bare_optimizers = build_optimizers(config, trained_parameters())
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in bare_optimizers]
    accelerator.gradient_accumulation_steps = config.micro_batches
    if zero:
        model, *optimizers = prepare_zero(accelerator, config, bare_model, *bare_optimizers)
    else:
        model, *optimizers = accelerator.prepare(bare_model, *bare_optimizers)
    trainable = trained_parameters()  # with FSDP other ones
    weights = list(trainable.values())
    ema = EMAModel(weights, decay=config.optim.ema, use_ema_warmup=True, power=0.75)
    start = load_checkpoint(folder, trainable, bare_optimizers, ema, optimizers[0].optimizer if zero else None)
    starts = accelerator.gather(torch.tensor([start], device=accelerator.device)).tolist()
    if len(set(starts)) > 1:
        raise ValueError(f"the processes start at steps {starts}: {folder} must be shared by all machines")
    main, facts = accelerator.is_main_process, run_facts(config)
    log_path = folder / "log.jsonl"
    if main:
        # Lines past the checkpoint belong to steps that are about to be made again; a kill may have cut off the last.
        lines = log_path.read_text().splitlines(keepends=True) if log_path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        write_text(log_path, "".join(kept))
        count = sum(p.numel() for p in weights)
        print(f"{config.objective}: {count / 1e6:.2f} M trainable parameters, step {start} of {config.steps}")
    progress = tqdm(total=config.steps, initial=start, disable=not main, mininterval=10, maxinterval=60)
    began, losses, stop = time.time(), [], threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: stop.set())
    accelerator.init_trackers("flexivid")

    @torch.no_grad()
    def with_averaged_weights(action, path):
        present = [p.detach().clone() for p in weights]
        for p, average in zip(weights, ema.shadow_params, strict=True):
            p.copy_(average)
        with outer_weights(model):
            action(path)
        for p, value in zip(weights, present, strict=True):
            p.copy_(value)

    for step in range(start, config.steps):
        for optimizer, peak in zip(bare_optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * learning_rate_factor(config, step)
        loss = torch.zeros((), device=accelerator.device)
        for micro_batch in range(config.micro_batches):
            with accelerator.accumulate(model):
                with accelerator.autocast() if sharded else nullcontext():
                    part = objective.loss(model, step, micro_batch)
                accelerator.backward(part)
            loss += part.detach() / config.micro_batches
        gradient_norm = whole(accelerator.clip_grad_norm_(weights, config.optim.clip))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        ema.step(weights)
        # All processes stop at the same step, whichever of them was told to.
        gathered = accelerator.gather(torch.stack([loss, loss.new_tensor(float(stop.is_set()))])).view(-1, 2)
        losses.append(gathered[:, 0].mean().item())
        stopped = bool(gathered[:, 1].any())
        progress.update()
        done = step + 1
        if done % config.log_every == 0:
            mean = sum(losses) / len(losses)
            seconds = (time.time() - began) / len(losses)
            line = {"step": done, "loss": round(mean, 6), "seconds_per_step": round(seconds, 3)}
            rates = {"learning_rate": bare_optimizers[0].param_groups[0]["lr"], "gradient_norm": float(gradient_norm)}
            accelerator.log(line | rates | {"clips_per_second": config.batch_size / seconds}, step=done)
            if main:
                with log_path.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            progress.set_postfix(loss=f"{mean:.4f}")
            began, losses = time.time(), []
        if done % config.save_every == 0 or done == config.steps or stopped:
            if zero:
                states = [whole_moments(*bare_optimizers, weights, main)]
            else:
                states = [optimizer.state_dict()["state"] for optimizer in bare_optimizers]
            if main or sharded:
                save_checkpoint(config, done, trainable, states, ema, facts, main)
        if stopped:
            progress.close()
            accelerator.print(f"stopped at step {done} of {config.steps}; the same command goes on from there")
            return
        if (main or sharded) and done % config.sample_every == 0:
            (folder / "samples").mkdir(exist_ok=True)
            with_averaged_weights(objective.sample, folder / "samples" / f"{done:06d}.png")
        # DeepSpeed's own groups of processes give up after minutes, the one of `wait_for_everyone` after a day.
        if zero and (done % config.save_every == 0 or done % config.sample_every == 0):
            accelerator.wait_for_everyone()
    progress.close()
    if main or sharded:
        with_averaged_weights(objective.save, folder / "result")
        accelerator.print(f"saved {folder / 'result'}")
