"""What a rival is tuned with: runs of a few clips that no arm is measured on."""

from functools import cached_property
from typing import NamedTuple

from diffusers import DiffusionPipeline

from flexivid.sweep.metrics import psnr
from flexivid.sweep.sampling import Clip, Run, sample, stock_run


class Trial(NamedTuple):
    """share: of the full run's FLOPs. psnr: to the full run's clips, in dB, mean over the clips."""

    share: float
    psnr: float


class Probe:
    """Samples the tuning clips with the pipeline as it is. call: of the full run, as `sampling.sample` takes it.

    To be made while the pipeline is stock.
    """

    def __init__(self, pipe: DiffusionPipeline, clips: list[Clip], call: dict):
        self.pipe, self.clips, self.call = pipe, clips, call
        self.frames, meter = sample(pipe, clips, call, count_flops=True)
        self.full_flops = meter.flops

    @property
    def steps(self) -> int:
        """Of the full run."""
        return self.call["steps"]

    def __call__(self, run: Run = stock_run, steps: int | None = None) -> Trial:
        """steps: of the call, the full run's by default."""
        call = {**self.call, "steps": steps or self.steps}
        frames, meter = sample(self.pipe, self.clips, call, count_flops=True, run=run)
        quality = [psnr(ours, theirs) for ours, theirs in zip(frames, self.frames, strict=True)]
        return Trial(meter.flops / self.full_flops, sum(quality) / len(quality))

    @cached_property
    def low_share(self) -> float:
        """FLOPs of a step on latents of half the height and width, as a share of those of a step at full size."""
        short = {**self.call, "steps": 1}
        low = {**short, "height": short["height"] // 2, "width": short["width"] // 2}
        counted = [
            sample(self.pipe, self.clips[:1], call, count_flops=True, latents=True)[1].flops for call in (low, short)
        ]
        return counted[0] / counted[1]
