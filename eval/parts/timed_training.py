"""One process of a training run, with the times of its steps in a file: `eval/data_speed.py --before` starts it.

    PYTHONPATH=CHECKOUT python eval/parts/timed_training.py TIMES.json --config ...

It takes the flexivid of PYTHONPATH, and only names that all versions have. The file holds, for every step, its seconds
and CPU seconds (of all threads), losses and gradient norms of all processes, exactly, in hexadecimal; and for every
batch the CPU seconds of drawing it, and whether its step did that itself.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

from flexivid.train import main
from flexivid.training.distill import DistillObjective
from flexivid.training.loop import Run

steps: list[dict] = []
reading: list[dict] = []
draw, compute, update = DistillObjective.draw, Run.compute, Run.update


def timed_draw(self, step: int):
    began = time.thread_time()
    drawn = draw(self, step)
    in_the_step = threading.current_thread() is threading.main_thread()
    reading.append({"step": step, "cpu_seconds": time.thread_time() - began, "in_the_step": in_the_step})
    return drawn


def timed_compute(self, step: int, stop: bool):
    steps.append({"step": step, "began": (time.perf_counter(), time.process_time())})
    result, stopped = compute(self, step, stop)
    steps[-1]["losses"] = [value.hex() for value in result.losses + result.gradient_norms]
    return result, stopped


def timed_update(self) -> None:
    update(self)
    seconds, cpu_seconds = steps[-1].pop("began")
    steps[-1] |= {"seconds": time.perf_counter() - seconds, "cpu_seconds": time.process_time() - cpu_seconds}


if __name__ == "__main__":
    DistillObjective.draw, Run.compute, Run.update = timed_draw, timed_compute, timed_update
    times, *arguments = sys.argv[1:]
    code = main(arguments)
    if os.environ["RANK"] == "0":
        Path(times).write_text(json.dumps({"steps": steps, "reading": reading}))
    sys.exit(code)
