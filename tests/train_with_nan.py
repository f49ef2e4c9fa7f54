"""Runs the training script of its first argument, with losses that are not finite.

FLEXIVID_NAN holds the steps, counted from 0, in which the loss of the last process is; `FLEXIVID_NAN=2,4`.
"""

import os
import runpy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from flexivid.training.distill import DistillObjective  # noqa: E402

BROKEN = {int(step) for step in os.environ["FLEXIVID_NAN"].split(",")}
whole = DistillObjective.loss


def loss(self, model, step, micro_batch):
    value, accelerator = whole(self, model, step, micro_batch), self.accelerator
    last = accelerator.process_index == accelerator.num_processes - 1
    return value * float("nan") if last and step in BROKEN else value


DistillObjective.loss = loss
DistillObjective.sample = lambda self, path: None
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
