"""Clips on one device, one after the other: at a budget, in fewer plain steps of the same cost, and in full."""

import argparse
import shutil
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from diffusers import DiffusionPipeline

import flexivid
from flexivid.app.planner import Plan
from flexivid.commands.sample import generate, record_of
from flexivid.commands.sample_options import plan as enable_and_check
from flexivid.files import write_json
from flexivid.video import Clip, enlarge, write_mp4

ARMS = ("flexivid", "fewer", "full")  # as they are sampled: what was asked for comes first
KEPT_RUNS, KEPT_CLIPS = 20, 4
SHOWN_HEIGHT = 384  # at least: a browser would blur smaller clips


@dataclass(frozen=True)
class Arm:
    """One of three clips. shown: large enough to look at. clip, record: files to take away, of flexivid's alone."""

    name: str
    steps: int
    flops: int
    seconds: float
    shown: Path
    clip: Path | None = None
    record: Path | None = None


class Sampler:
    """arguments: of every clip. folder: for files, of which those of the last runs are kept."""

    def __init__(self, pipe: DiffusionPipeline, arguments: argparse.Namespace, load_seconds: float, folder: Path):
        self.pipe, self.folder = pipe, folder
        self._arguments, self._load_seconds = arguments, load_seconds
        # Stock clips by prompt, seed and steps: the dial changes none of these.
        self._stock: OrderedDict[tuple, tuple[Clip, float]] = OrderedDict()

    def run(self, prompt: str, budget: float | None, plan: Plan, seed: int) -> Iterator[Arm]:
        """The arms of ARMS, each when it is there. budget: None for the recipe of the adapter."""
        folder = self._new_folder()
        yield self._ours(folder, prompt, budget, plan, seed)
        flexivid.disable(self.pipe)
        for name, steps in (("fewer", plan.fewer_steps), ("full", plan.full_steps)):
            stock, seconds = self._stock_clip(prompt, seed, steps)
            flops = plan.flops_full * steps // plan.full_steps
            yield Arm(name, steps, flops, seconds, self._show(stock, folder / f"{name}.mp4"))

    def _ours(self, folder: Path, prompt: str, budget: float | None, plan: Plan, seed: int) -> Arm:
        arguments = self._with(budget=budget, steps=plan.steps, seed=seed)
        enable_and_check(self.pipe, arguments)  # counts FLOPs, which then do not count as denoising time
        made, seconds = generate(self.pipe, arguments, prompt)
        summary, clip = flexivid.summary(self.pipe), folder / "clip.mp4"
        write_mp4(made.frames, clip, arguments.fps, sounds=made.sounds)
        all_seconds = {"load": self._load_seconds, **seconds}
        record = clip.with_suffix(".json")
        write_json(record, record_of(arguments, prompt, made.frames, summary, all_seconds))
        shown = self._show(made, folder / "flexivid.mp4")
        return Arm("flexivid", plan.steps, summary.flops_used, seconds["denoise"], shown, clip, record)

    def _stock_clip(self, prompt: str, seed: int, steps: int) -> tuple[Clip, float]:
        """A clip, and seconds of denoising when it was sampled. The pipeline is disabled."""
        key = (prompt, seed, steps)
        if key not in self._stock:
            arguments = self._with(**self._arguments.full | {"steps": steps, "seed": seed})
            clip, seconds = generate(self.pipe, arguments, prompt)
            self._stock[key] = clip, seconds["denoise"]
        self._stock.move_to_end(key)
        while len(self._stock) > KEPT_CLIPS:
            self._stock.popitem(last=False)
        return self._stock[key]

    def _with(self, **changed) -> argparse.Namespace:
        return argparse.Namespace(**vars(self._arguments) | changed)

    def _show(self, clip: Clip, path: Path) -> Path:
        write_mp4(enlarge(clip.frames, SHOWN_HEIGHT), path, self._arguments.fps, sounds=clip.sounds)
        return path

    def _new_folder(self) -> Path:
        runs = sorted(self.folder.iterdir(), key=lambda run: run.stat().st_mtime_ns)
        for run in runs[:-KEPT_RUNS]:
            shutil.rmtree(run)
        folder = self.folder / uuid4().hex
        folder.mkdir()
        return folder
