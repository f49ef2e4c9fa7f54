"""A way to look at a run while it happens: what measures and calibrates overrides what it wants to see."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from flexivid.patches.mixed import Selection


@dataclass(frozen=True)
class Forward:
    """One forward that a pipeline made.

    patch_size: `kept` and `reused` where no network ran; none did either in the second branch of a guided patch size.
    seconds: of it all, and of the stock transformer within it, which may have run more than once; 0 without a clock.
    """

    step: int
    branch: int
    patch_size: str
    seconds: float = 0.0
    stock_seconds: float = 0.0


class Observer:
    """Sees every forward of a run; nothing here changes the clip.

    patch_sizes: weak ones that every powerful forward is compared with, whether the schedule needs it or not; what that
        costs is not counted. clock: seconds, read before and after every forward. Both are optional.
    """

    patch_sizes: tuple[str, ...] = ()
    clock: Callable[[], float] | None = None

    def forward(self, forward: Forward) -> None:
        """A forward has run."""

    def error(self, step: int, branch: int, patch_size: str, x0_error: torch.Tensor) -> None:
        """x0_weak - x0_powerful at the same latents, (B, C, T, H, W) float32."""

    def x0(self, step: int, branch: int, x0: torch.Tensor) -> None:
        """The powerful prediction of a branch, (B, C, T, H, W) float32."""

    def fine_blocks(self, step: int, selection: Selection) -> None:
        """Which blocks of a mixed step are fine, in both branches; where one batch holds these, the conditional clips
        come last."""

    def guidance(self, step: int, x0_difference: torch.Tensor) -> None:
        """x0_cond - x0_uncond of a step whose branches are both powerful, (B, C, T, H, W) float32."""
