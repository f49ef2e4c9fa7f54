"""What a run says of itself while it goes: log.jsonl, the trackers and the line of the progress bar."""

import json
import math
import time
from datetime import timedelta

from accelerate import Accelerator

from flexivid.devices import peak_flops
from flexivid.files import write_text
from flexivid.sampling.flops import flops_text
from flexivid.training.config import Config
from flexivid.training.finite import StepResult
from flexivid.training.objective import Objective


def peak_of_run(config: Config, accelerator: Accelerator) -> float | None:
    """FLOPs a second that all devices of a run can do, None where nobody knows: of CPUs and GPUs without an entry."""
    if config.peak_tflops is not None:
        peak = config.peak_tflops * 1e12
    else:
        peak = peak_flops(accelerator.device) if accelerator.mixed_precision in ("bf16", "fp16") else None
    return peak and peak * accelerator.num_processes


class Log:
    """A line every `log_every` steps, of the steps since the last. start: steps that earlier parts of a run have made.

    Seconds of steps are without the checkpoints and pictures between them; the time that is left is with them.
    """

    def __init__(self, config: Config, objective: Objective, accelerator: Accelerator, start: int):
        self.config, self.objective, self.accelerator = config, objective, accelerator
        self.path, self.start, self.began = config.output / "log.jsonl", start, time.perf_counter()
        self.peak = peak_of_run(config, accelerator)
        # Of an objective whose steps have several losses.
        self.name_of = getattr(objective, "loss_name", None)
        self._forget()
        accelerator.init_trackers("flexivid")
        if accelerator.is_main_process:
            # Lines past the checkpoint belong to steps that are about to be made again; a kill may have cut off one.
            lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
            write_text(self.path, "".join(kept))

    def _forget(self) -> None:
        self.losses, self.left_out, self.seconds, self.flops = [], 0, 0.0, 0
        self.named: dict[str, list[float]] = {}

    def add(self, result: StepResult, step: int, seconds: float) -> None:
        self.seconds += seconds
        if self.accelerator.is_main_process:  # counting takes its time, once a size
            self.flops += self.objective.flops(step)
        if result.finite:
            self.losses.append(result.loss)
            if self.name_of is not None:
                self.named.setdefault(self.name_of(step), []).append(result.loss)
        else:
            self.left_out += 1

    def _speed(self, step: int) -> dict[str, float]:
        """What the steps since the last line have made of the time, and how long it will take."""
        steps = len(self.losses) + self.left_out
        speed = {
            "seconds_per_step": round(self.seconds / steps, 3),
            "clips_per_second": steps * self.config.batch_size / self.seconds,
        }
        if self.flops:
            speed["tflops_per_second"] = self.flops / self.seconds / 1e12
            if self.peak is not None:
                speed["mfu"] = self.flops / self.seconds / self.peak
        a_step = (time.perf_counter() - self.began) / (step - self.start)
        speed["seconds_left"] = a_step * (self.config.steps - step)
        return {name: float(f"{value:.4g}") for name, value in speed.items()}

    def write(self, step: int, gradient_norm: float, learning_rate: float) -> dict[str, str]:
        """Writes the line of a step; returns what a progress bar shows. A loss of no finite step is null."""
        mean = sum(self.losses) / len(self.losses) if self.losses else None
        speed = self._speed(step)
        line = {"step": step, "loss": mean if mean is None else round(mean, 6), **speed}
        if self.left_out:
            line["left_out"] = self.left_out
        line |= {f"loss/{name}": round(sum(values) / len(values), 6) for name, values in self.named.items()}
        rates = {"learning_rate": learning_rate, "gradient_norm": gradient_norm}
        figures = {name: value for name, value in (line | rates).items() if value is not None and math.isfinite(value)}
        self.accelerator.log(figures, step=step)
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        self._forget()
        return {"loss": "none finite" if mean is None else f"{mean:.4f}"} | for_people(speed)


def for_people(speed: dict[str, float]) -> dict[str, str]:
    shown = {"clips/s": f"{speed['clips_per_second']:.3g}"}
    if "mfu" in speed:
        shown["MFU"] = f"{speed['mfu']:.1%}"
    elif "tflops_per_second" in speed:
        shown["speed"] = f"{flops_text(speed['tflops_per_second'] * 1e12)}/s"
    return shown | {"left": str(timedelta(seconds=round(speed["seconds_left"])))}
