"""Which patch size runs at which denoising step, and what that costs.

A schedule is a pure function of (costs, steps, budget, guidance): nothing here knows a model, a scheduler or torch.
Coarse ("weak") patches are cheap, the model's own ("powerful") patch is exact. Two orders:

    weak-first    early steps are weak, late ones powerful (FlexiDiT, arXiv 2502.20126)
    interleaved   powerful steps are spread over all; what the last one knew better than the weak patch size is added to
                  the weak predictions that follow, x0 = x0_weak(t) + [x0_powerful(t_k) - x0_weak(t_k)]. For that a
                  powerful step runs the weak patch size too.

and with classifier-free guidance three ways to treat its two branches:

    same          both branches of a step run at one patch size
    kept          weak steps after a powerful one run the conditional branch only; what guidance adds is kept from the
                  powerful step, x0_uncond(t) = x0_cond(t) - [x0_cond(t_k) - x0_uncond(t_k)]. A weak step then costs
                  half, and its errors are not multiplied by the guidance scale. With interleaved only, whose powerful
                  steps are then denser at first
    weak-uncond   mixed steps: the conditional branch powerful, the unconditional one weak. With weak-first only

A patch size is written frames x height x width in latent pixels, as in `1x4x4`.
"""

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby, islice, takewhile
from numbers import Real
from pathlib import Path
from typing import Literal

PatchSize = tuple[int, int, int]
Guidance = Literal["same", "kept", "weak-uncond"]
Order = Literal["interleaved", "weak-first"]

KEPT = "kept"  # stands for the patch size of an unconditional branch that does not run

DENSER_FIRST = 1.6  # docs/log.md, "Where powerful steps belong when guidance is kept"

_NOTATION = "write frames x height x width in latent pixels, for example 1x4x4"


class BudgetError(ValueError):
    """A budget that is not a number in (0, 1], or that the patch sizes at hand cannot reach."""


def parse_patch_size(text: str) -> PatchSize:
    """`"1x4x4"` -> `(1, 4, 4)`: frames, height, width in latent pixels. Raises ValueError that names what is wrong."""
    numbers = text.split("x")
    if not all(re.fullmatch("[0-9]+", number) for number in numbers):
        raise ValueError(f"{text!r} is not a patch size; {_NOTATION}")
    if len(numbers) != 3:
        count = "1 number" if len(numbers) == 1 else f"{len(numbers)} numbers"
        raise ValueError(f"{text!r} is not a patch size: it has {count} instead of 3; {_NOTATION}")
    t, h, w = map(int, numbers)
    if 0 in (t, h, w):
        raise ValueError(f"{text!r} is not a patch size: each number must be at least 1; {_NOTATION}")
    return t, h, w


def format_patch_size(patch_size: PatchSize) -> str:
    """`(1, 4, 4)` -> `"1x4x4"`, the inverse of `parse_patch_size`."""
    t, h, w = patch_size
    return f"{t}x{h}x{w}"


def spatially_doubled(base: PatchSize) -> str:
    """The weak patch size that is tried first: twice as large in space."""
    t, h, w = base
    return format_patch_size((t, 2 * h, 2 * w))


def multiple_of(patch_size: PatchSize, base: PatchSize) -> PatchSize:
    """How many base patches a patch spans: `(1, 4, 4)` over `(1, 2, 2)` -> `(1, 2, 2)`.

    Raises ValueError, with patch sizes that would do, where a number is not a positive multiple of the base's.
    """
    if any(p < b or p % b for p, b in zip(patch_size, base, strict=True)):
        t, h, w = base
        space, time, both = (format_patch_size(p) for p in ((t, 2 * h, 2 * w), (2 * t, h, w), (2 * t, 2 * h, 2 * w)))
        raise ValueError(
            f"{format_patch_size(patch_size)} is not an integer multiple of the model's own patch size "
            f"{format_patch_size(base)}; for example {space}, {time} or {both} would be"
        )
    t, h, w = (p // b for p, b in zip(patch_size, base, strict=True))
    return t, h, w


@dataclass(frozen=True)
class Schedule:
    """The patch size of every forward of one sampling run.

    steps: for every denoising step, the patch size of each guidance branch, written as in `1x4x4`: one without
        guidance, else (conditional, unconditional), where the second may be `kept`.

    Raises ValueError for no steps, for steps that differ in their number of branches, and for what is no patch size.
    """

    steps: tuple[tuple[str, ...], ...]

    def __post_init__(self):
        if not self.steps:
            raise ValueError("a schedule has at least one step")
        branches = len(self.steps[0])
        for index, step in enumerate(self.steps):
            if len(step) not in (1, 2) or len(step) != branches:
                raise ValueError(
                    f"step {index} has {len(step)} patch sizes; every step has one, or every step has two "
                    "(conditional, unconditional)"
                )
            for name in step[:1] if step[-1] == KEPT else step:
                parse_patch_size(name)

    def _until_powerful(self, index: int, powerful: str, branch: int) -> list[tuple[str, ...]]:
        """The steps after one whose branch is powerful, up to the next such. Empty for a step that is no such.

        In a mixed step no branch counts as powerful.
        """

        def is_powerful(step: tuple[str, ...]) -> bool:
            return step[branch] == powerful and not is_mixed(step)

        if not is_powerful(self.steps[index]):
            return []
        return list(takewhile(lambda step: not is_powerful(step), islice(self.steps, index + 1, None)))

    def compared(self, index: int, powerful: str, branch: int) -> tuple[str, ...]:
        """The weak patch sizes that a powerful branch of a step is compared with: its own until it is powerful again.

        What the powerful prediction knew better is added to theirs. Mixed steps have a correction of their own.
        """
        following = [step for step in self._until_powerful(index, powerful, branch) if not is_mixed(step)]
        return tuple(dict.fromkeys(step[branch] for step in following if step[branch] != KEPT))

    def gives_guidance(self, index: int, powerful: str) -> bool:
        """Whether later steps keep the guidance of this one."""
        return any(step[-1] == KEPT for step in self._until_powerful(index, powerful, -1))

    def forwards(self, powerful: str) -> list[str]:
        """The patch size of every forward, comparisons included. A mixed step runs its weaker one on both branches."""
        names: list[str] = []
        for index, step in enumerate(self.steps):
            names += (*step, step[1]) if is_mixed(step) else [name for name in step if name != KEPT]
            for branch in range(len(step)):
                names += self.compared(index, powerful, branch)
        return names

    def cost(self, costs: Mapping[str, float]) -> float:
        """FLOPs of all forwards, given the FLOPs of one forward by patch size; exact where those are integers.

        The most expensive patch size is the powerful one. Raises ValueError where the cost of a patch size is missing.
        """
        names = self.forwards(max(costs, key=costs.get))
        if missing := sorted(set(names) - set(costs)):
            raise ValueError(f"no cost is given for {', '.join(missing)}; there are costs for {', '.join(costs)}")
        prices = [costs[name] for name in names]
        return sum(prices) if all(isinstance(cost, int) for cost in prices) else math.fsum(prices)

    def to_json(self) -> list[list[str]]:
        """The steps as lists, for `json.dump`: `[["1x4x4", "1x4x4"], ...]`."""
        return [list(step) for step in self.steps]

    @classmethod
    def from_json(cls, steps: list[list[str]]) -> "Schedule":
        """The inverse of `to_json`. Raises ValueError for anything but lists of patch sizes."""
        if not isinstance(steps, list) or not all(
            isinstance(step, list) and all(isinstance(name, str) for name in step) for step in steps
        ):
            raise ValueError('a schedule is a list with a list of patch sizes per step, such as [["1x4x4", "1x4x4"]]')
        return cls(tuple(tuple(step) for step in steps))

    def to_text(self) -> str:
        """As `explicit_schedule` reads it: `2x4x4/2x4x4:1,...`."""
        return ",".join(f"{'/'.join(step)}:1" for step in self.steps)

    def __str__(self) -> str:
        """Runs of equal steps: `35 x 2x4x4, 5 x 1x2x2`, with `1x2x2/2x4x4` where the two branches differ."""
        runs = ((step, sum(1 for _ in run)) for step, run in groupby(self.steps))
        return ", ".join(f"{count} x {step[0] if len(set(step)) == 1 else '/'.join(step)}" for step, count in runs)


def is_mixed(step: tuple[str, ...]) -> bool:
    """Whether the guidance branches of a step run at two patch sizes."""
    return len(set(step) - {KEPT}) > 1


def schedule_for_budget(
    costs: Mapping[str, float],
    steps: int,
    budget: float,
    guidance_branches: int,
    guidance: Guidance = "same",
    order: Order | None = None,
) -> Schedule:
    """The schedule that spends at most `budget` of what the powerful patch size would cost on every forward.

    `interleaved`: as many powerful steps as fit, evenly spread, all others at the cheapest patch size; weak-first where
    not even one fits together with its comparison. With `kept` the weak steps after the first powerful one run their
    conditional branch only.

    `weak-first`: steps go from coarse to fine. As many of the last steps as fit are powerful, with all others at the
    cheapest patch size; what is left of the budget then raises the last weak steps, to the finest weak patch size
    first. With `weak-uncond` a mixed step, powerful on the conditional branch and guided by the cheapest patch size on
    both, takes the place of a powerful one; a budget in which every step can be mixed raises the last steps to the
    powerful patch size on both branches, so that the late, fine steps are the last to be guided by weak predictions.
    Where the cheapest patch size costs half the powerful one or more, a mixed step saves nothing and there is none.

    Args:
        costs: FLOPs of one forward by patch size. The most expensive one is the powerful one.
        steps: number of denoising steps.
        budget: share of the reference, in (0, 1]; the reference is steps x guidance_branches x powerful.
        guidance_branches: forwards a step makes: 2 with classifier-free guidance, else 1.
        guidance: see above; without guidance all are `same`.
        order: `interleaved` or `weak-first`; None is weak-first where steps are mixed, else interleaved.

    Raises:
        BudgetError: the budget is not a number in (0, 1], or less than the cheapest such schedule costs.
        ValueError: another argument is out of its range, or an order and a guidance do not go together.
    """
    check_budget(budget)
    modes, prices = _sorted_modes(costs)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, not {steps}")
    if guidance_branches not in (1, 2):
        raise ValueError(f"guidance_branches must be 1 or 2 (with guidance), not {guidance_branches}")
    check_order(order, guidance)
    mixes = guidance == "weak-uncond" and guidance_branches == 2
    order = order or ("weak-first" if mixes else "interleaved")

    def cost(*steps: tuple[str, ...]) -> Fraction:
        return sum(prices[mode] for mode in Schedule(steps).forwards(modes[-1]))

    ladder = [(mode,) * guidance_branches for mode in modes]  # kinds of steps, from coarse to fine
    full = cost(ladder[-1])
    limit = _exact(budget) * full
    if mixes:
        mixed_step = (modes[-1], modes[0])
        if cost(mixed_step) <= limit:
            ladder = [mixed_step, ladder[-1]]
        elif cost(mixed_step) < cost(ladder[-1]):
            ladder = [*ladder[:-1], mixed_step]
    coarsest, *finer = ladder
    slack = steps * (limit - cost(coarsest))
    cheapest = steps * cost(coarsest)
    if order == "interleaved":
        keeps = guidance == "kept" and guidance_branches == 2
        if keeps:
            cheapest = min(cheapest, cost(ladder[-1], *[(modes[0], KEPT)] * (steps - 1)))
        for count in range(min(steps, steps * limit // cost(ladder[-1])), 0, -1):
            usual, *others = denser_first(count, steps) if keeps else evenly_spread(count, steps)
            # Weak steps before the first powerful one run both branches: it comes earlier where that is too much.
            for first in range(usual, -1 if keeps else usual - 1, -1):
                interleaved = [(modes[0], KEPT) if keeps and index > first else coarsest for index in range(steps)]
                for index in (first, *others):
                    interleaved[index] = ladder[-1]
                if cost(*interleaved) <= limit * steps:
                    return Schedule(tuple(interleaved))
    if slack < 0:
        # Rounded up: the least that is named here must itself be accepted.
        least = math.ceil(1000 * cheapest / (steps * full)) / 1000
        raise BudgetError(
            f"budget {budget} cannot be reached: with {modes[0]} as the coarsest patch size the least is {least:g}; "
            f"ask for {least:g} or more, or for modes with a coarser patch size"
        )
    fine_to_coarse: list[tuple[str, ...]] = []
    for step in reversed(finer):
        left, extra = steps - len(fine_to_coarse), cost(step) - cost(coarsest)
        count = min(left, slack // extra) if extra else left
        slack -= count * extra
        fine_to_coarse += [step] * count
    fine_to_coarse += [coarsest] * (steps - len(fine_to_coarse))
    return Schedule(tuple(reversed(fine_to_coarse)))


def evenly_spread(count: int, steps: int) -> list[int]:
    """`count` of `steps` steps, each in the middle of its share."""
    return [(2 * k + 1) * steps // (2 * count) for k in range(count)]


def denser_first(count: int, steps: int) -> list[int]:
    """`count` of `steps` steps, at 1 + (steps - 3) u^DENSER_FIRST for u evenly from 0 to 1, or the next that is free.

    What guidance adds changes most from step to step at high noise, so that what is kept of it ages fastest there. Not
    at step 0, whose latents hold nothing but noise. The last but one step mends the detail that weak ones have left;
    one or two powerful steps are too few to spend one on that, and are in the middle of their shares.
    """
    places: list[int] = []
    for k in range(count):
        u = k / (count - 1) if count > 2 else (2 * k + 1) / (2 * count)
        place = round(1 + max(steps - 3, 0) * u**DENSER_FIRST)
        after, room = places[-1] + 1 if places else 0, steps - count + k  # one step each for those that follow
        places.append(min(max(place, after), room))
    return places


def least_budget(costs: Mapping[str, float]) -> float:
    """The least budget that `schedule_for_budget` can meet at any guidance: the cheapest patch size on every step.

    With `kept` and many steps less will do: one powerful step, whose guidance the others keep.

    costs: FLOPs of one forward by patch size. Raises ValueError where they are empty or not positive.
    """
    modes, prices = _sorted_modes(costs)
    least = prices[modes[0]] / prices[modes[-1]]
    # The nearest float may lie just below, and would be refused as a budget.
    return float(least) if _exact(float(least)) >= least else math.nextafter(float(least), math.inf)


def explicit_schedule(text: str, steps: int, branches: int, patch_sizes: Collection[str]) -> Schedule:
    """A schedule as `--schedule` takes it: `2x4x4:30,1x4x4:5,1x2x2:5`, runs of patch size:number of steps.

    Args:
        text: the runs, in any order; `1x2x2/2x4x4:5` gives the conditional and the unconditional branch their own,
            `2x4x4/kept:5` keeps the guidance of the last powerful step.
        steps: number of denoising steps, which the runs must add up to.
        branches: forwards a step makes: 2 with classifier-free guidance, else 1.
        patch_sizes: what the model has, written as in `1x4x4`.

    Raises ValueError that names the run that is wrong, or the sum.
    """
    schedule: list[tuple[str, ...]] = []
    for run in text.split(","):
        run = run.strip()
        match = re.fullmatch(r"([^:]+):\s*([0-9]+)", run)
        if not match or int(match[2]) == 0:
            raise ValueError(f"{run!r} in the schedule is not patch size:number of steps, such as 2x4x4:30")
        conditional, *unconditional = (name.strip() for name in match[1].split("/"))
        named = [] if unconditional == [KEPT] else unconditional
        step = tuple(format_patch_size(parse_patch_size(name)) for name in (conditional, *named))
        step += tuple(unconditional[len(named) :])
        for name in step:
            if name not in (*patch_sizes, KEPT):
                raise ValueError(f"{name} in the schedule is not a patch size of this model: {', '.join(patch_sizes)}")
        if len(step) > branches:
            has = "no guidance, so one branch" if branches == 1 else "two branches, conditional/unconditional"
            raise ValueError(f"{run!r} in the schedule names {len(step)} patch sizes, but this run has {has}")
        schedule += [step if len(step) == branches else step * branches] * int(match[2])
    if len(schedule) != steps:
        raise ValueError(f"the schedule {text!r} adds up to {len(schedule)} steps, but there are {steps}")
    return Schedule(tuple(schedule))


def read_schedule(path: Path) -> Schedule:
    """The schedule of a JSON file such as `eval/calibrate.py` writes, `{"schedule": [["2x4x4", "2x4x4"], ...], ...}`.

    Raises ValueError, or OSError if there is no such file.
    """
    try:
        content = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or "schedule" not in content:
        raise ValueError(f'{path} holds no schedule; it should look like {{"schedule": [["2x4x4", "2x4x4"], ...]}}')
    return Schedule.from_json(content["schedule"])


def _exact(number: float) -> Fraction:
    """The number as it is written: the float 0.29 is 29/100, so that 29 of 100 is within a budget of 0.29."""
    return Fraction(number) if isinstance(number, int) else Fraction(str(float(number)))


def check_order(order: Order | None, guidance: Guidance | None) -> None:
    """Raises ValueError for an order or a guidance that there is not, and for two that do not go together."""
    if guidance not in (None, "same", "kept", "weak-uncond"):
        raise ValueError(f"guidance must be same, kept or weak-uncond, not {guidance!r}")
    if order not in (None, "interleaved", "weak-first"):
        raise ValueError(f"order must be interleaved or weak-first, not {order!r}")
    if guidance == "kept" and order == "weak-first":
        raise ValueError("kept guidance goes with interleaved only: weak-first has no powerful step to keep it from")
    if guidance == "weak-uncond" and order == "interleaved":
        # The correction of the conditional branch does not do for the other one: docs/log.md.
        raise ValueError("weak-uncond goes with weak-first only: interleaved needs both branches of a powerful step")


def check_budget(budget: float) -> None:
    if not isinstance(budget, Real) or isinstance(budget, bool) or not 0 < budget <= 1:
        raise BudgetError(f"budget must be a number above 0 and up to 1, the share of the full FLOPs, not {budget!r}")


def _sorted_modes(costs: Mapping[str, float]) -> tuple[list[str], dict[str, Fraction]]:
    """The patch sizes from cheapest to most expensive (the coarser first where they cost the same), exact costs."""
    if not costs:
        raise ValueError("costs is empty: it needs the FLOPs of one forward for every patch size")
    for name, cost in costs.items():
        if not (math.isfinite(cost) and cost > 0):
            raise ValueError(f"the cost of {name} must be a positive number of FLOPs, not {cost}")
    modes = sorted(costs, key=lambda name: (costs[name], -math.prod(parse_patch_size(name))))
    return modes, {name: _exact(cost) for name, cost in costs.items()}
