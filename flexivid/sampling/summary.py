"""What ran in a call of a pipeline, and what it has cost."""

from dataclasses import dataclass, field

from flexivid.sampling.flops import flops_text
from flexivid.sampling.schedule import Schedule, in_runs


@dataclass
class Summary:
    """What ran in a call of a pipeline.

    schedule: what was planned. steps: per step, the patch size that each guidance branch ran at. flops_full: of the
    stock call, as far as this one has come; flops_used: of this one. Both count the transformer's forwards only, over
    the whole batch, and all of each: what a cache of diffusers skips is not subtracted.
    """

    schedule: Schedule
    flops_full: int = 0
    flops_used: int = 0
    steps: list[list[str]] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Share of the stock FLOPs that was used."""
        return self.flops_used / self.flops_full

    def __str__(self) -> str:
        used, full = flops_text(self.flops_used), flops_text(self.flops_full)
        return f"{in_runs(self.steps)}\n{used} of {full} ({self.ratio:.1%}), {1 - self.ratio:.1%} saved"
