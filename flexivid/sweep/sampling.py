"""Samples the clips of a sweep, batch by batch, so that a killed sweep goes on where it was.

A batch is the same clips, prompts and noise for every arm and every number of processes: what a cache does may depend
on all clips of its batch. It is done once `batches/<arm>/<batch>.json` is there, which is written last.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

import flexivid
from flexivid.files import write_json
from flexivid.model.family import COMPONENTS
from flexivid.patch_grid import FineBlocks
from flexivid.sampling.flops import flop_counter_mode
from flexivid.stock_pipelines import call_arguments, set_guidance_scale
from flexivid.sweep.grids import grid_paths, write_grids
from flexivid.video import enlarge, write_mp4

LONGEST_PROMPT = 230  # bytes: a file name may have 255, and is written under a longer one first
TIMED_CLIPS = 4
LEAST_HEIGHT = 256  # smaller clips are written enlarged by whole numbers, so that the codec does not blur their pixels


@dataclass(frozen=True)
class Clip:
    """One clip of a sweep: its prompt, the number of the clip among those of the prompt, and the seed of its noise."""

    prompt: str
    index: int
    seed: int

    @property
    def file_name(self) -> str:
        """VBench's naming."""
        return f"{self.prompt}-{self.index}.mp4"


def clips_of(prompts: list[str], videos_per_prompt: int, seed: int) -> list[Clip]:
    """The clips of a sweep, those of one prompt together.

    Raises ValueError for a prompt that is empty, asked for twice, or no file name.
    """
    for prompt in prompts:
        if not prompt.strip():
            raise ValueError("a prompt is empty")
        if "/" in prompt or len(prompt.encode()) > LONGEST_PROMPT:
            raise ValueError(
                f"a prompt becomes a file name: no / in it, and at most {LONGEST_PROMPT} bytes: {prompt!r}"
            )
    if len(set(prompts)) < len(prompts):
        raise ValueError(f"the prompt {next(p for p in prompts if prompts.count(p) > 1)!r} is there twice")
    pairs = [(prompt, index) for prompt in prompts for index in range(videos_per_prompt)]
    return [Clip(prompt, index, seed + place) for place, (prompt, index) in enumerate(pairs)]


class Meter:
    """Counts the FLOPs and seconds of a pipeline's transformers around their real forwards, and of nothing else.

    count_flops slows every operation down, so that seconds are measured without it.
    """

    def __init__(self, pipe: DiffusionPipeline, count_flops: bool):
        self.transformers = [module for name in COMPONENTS if (module := getattr(pipe, name, None)) is not None]
        self.counter = flop_counter_mode() if count_flops else None
        self.flops, self.seconds = 0, 0.0

    def _state(self) -> tuple[int, float]:
        if self.transformers[0].device.type == "cuda":
            torch.cuda.synchronize()
        return self.counter.get_total_flops() if self.counter else 0, time.perf_counter()

    def _begin(self, module, args):
        self._began = self._state()

    def _end(self, module, args, output):
        flops, seconds = self._state()
        self.flops += flops - self._began[0]
        self.seconds += seconds - self._began[1]

    def __enter__(self):
        self._stack = ExitStack()
        for transformer in self.transformers:
            self._stack.callback(transformer.register_forward_pre_hook(self._begin).remove)
            self._stack.callback(transformer.register_forward_hook(self._end).remove)
        if self.counter is not None:
            self._stack.enter_context(self.counter)
        return self

    def __exit__(self, *exception):
        self._stack.close()


# How one batch comes about: as `stock_run`, which takes further arguments of the pipeline by their own names.
Run = Callable[..., torch.Tensor | np.ndarray]


def stock_run(pipe: DiffusionPipeline, prompts: list[str], call: dict, generator: list[torch.Generator], **more):
    """One call of the pipeline. call: by the names of `stock_pipelines.ARGUMENTS`. generator: one a prompt."""
    return pipe(prompts, **call_arguments(pipe, **call), generator=generator, **more).frames


def sample(
    pipe: DiffusionPipeline,
    clips: list[Clip],
    call: dict,
    count_flops: bool,
    latents: bool = False,
    run: Run = stock_run,
) -> tuple[list[np.ndarray] | None, Meter]:
    """One batch with the pipeline as it is. call: further arguments, by the names of `stock_pipelines.ARGUMENTS`.

    Returns the clips, (T, H, W, 3) uint8 each, or None if the latents will do, and the meter of the transformers.
    """
    generators = [torch.Generator().manual_seed(clip.seed) for clip in clips]
    output_type = "latent" if latents else "np"
    set_guidance_scale(pipe, call["guidance_scale"])
    with Meter(pipe, count_flops) as meter:
        frames = run(pipe, [clip.prompt for clip in clips], call, generators, output_type=output_type)
    return None if latents else [(clip * 255).round().astype(np.uint8) for clip in frames], meter


@dataclass(frozen=True)
class Sampler:
    """Writes the clips of one sweep below `folder`.

    call: as `sample` takes it. shown: of the clips, those that are written with patch grids too.
    """

    pipe: DiffusionPipeline
    clips: list[Clip]
    folder: Path
    call: dict
    batch_size: int
    shown: tuple[Clip, ...] = ()

    @property
    def batches(self) -> list[list[Clip]]:
        return [self.clips[i : i + self.batch_size] for i in range(0, len(self.clips), self.batch_size)]

    def record(self, arm, number: int) -> Path:
        return self.folder / "batches" / arm.name / f"{number}.json"

    def timing(self, arm) -> Path:
        """Seconds of one batch: of another number of threads they are another figure."""
        return self.folder / "batches" / arm.name / f"seconds-{torch.get_num_threads()}-threads.json"

    def make(self, arm, numbers: list[int], progress) -> None:
        """Samples the batches of an arm that are not there yet."""
        missing = [number for number in numbers if not self.record(arm, number).exists()]
        if not missing:
            return
        call = arm.call(self.call)
        folder = self.folder / "videos" / arm.name
        for place in (folder, self.record(arm, 0).parent):
            place.mkdir(parents=True, exist_ok=True)
        with arm.on(self.pipe) as run:
            for number in missing:
                clips = self.batches[number]
                # Counting slows small models down by a third. Only a cache makes batches differ in what they cost.
                counted = number == 0 or arm.depends_on_clips
                chosen = FineBlocks(len(clips))
                with flexivid.observe(self.pipe, chosen) if arm.flexivid is not None else nullcontext():
                    videos, meter = sample(self.pipe, clips, call, count_flops=counted, run=run)
                for place, (clip, frames) in enumerate(zip(clips, videos, strict=True)):
                    write_mp4(enlarge(frames, LEAST_HEIGHT), folder / clip.file_name, self.call["fps"])
                    if arm.flexivid is not None and clip in self.shown:
                        paths = grid_paths(self.folder, arm.name, clip.file_name)
                        write_grids(self.pipe, frames, chosen, place, paths, self.call["fps"], LEAST_HEIGHT)
                write_json(self.record(arm, number), {"flops": meter.flops if counted else None, "clips": len(clips)})
                progress.update()

    def time(self, arms: list, rounds: int) -> None:
        """Measures every arm's seconds for the first TIMED_CLIPS clips; nothing else should run meanwhile.

        The arms alternate and the median of the rounds counts, so that a slow minute of the machine hits all of them:
        where one is not known, all are measured again.
        """
        if all(self.timing(arm).exists() for arm in arms):
            return
        seconds, clips = {arm.name: [] for arm in arms}, self.batches[0][:TIMED_CLIPS]
        cuda = self.pipe.transformer.device.type == "cuda"
        for index in tqdm(range(rounds), desc="timing", unit="round"):
            for arm in tqdm(arms, desc=f"round {index + 1}", leave=False):
                call = arm.call(self.call)
                with arm.on(self.pipe) as run:
                    arm.plan(self.pipe, self.call)
                    if cuda and index == 0:  # kernels are loaded when they are first needed
                        sample(self.pipe, clips, call, count_flops=False, latents=True, run=run)
                    _, meter = sample(self.pipe, clips, call, count_flops=False, latents=True, run=run)
                seconds[arm.name].append(meter.seconds)
        for arm in arms:
            found = {"seconds": median(seconds[arm.name]), "all": seconds[arm.name], "clips": len(clips)}
            write_json(self.timing(arm), found)


def read_clip(path: Path, height: int) -> np.ndarray:
    """The frames of a clip that `Sampler` wrote, (T, height, W, 3) uint8: an enlarged one in its own size again."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    factor = frames.shape[1] // height
    time_, rows, columns, _ = frames.shape
    blocks = frames.reshape(time_, rows // factor, factor, columns // factor, factor, 3)
    return blocks.mean((2, 4), dtype=np.float32).round().astype(np.uint8)
