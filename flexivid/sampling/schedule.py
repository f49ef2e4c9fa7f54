"""Schedules: which patch size runs at which denoising step, in which guidance branch, and what all of them cost.

Nothing here knows a model, a scheduler or torch. A patch size is written frames x height x width in latent pixels, as
in `1x4x4`; the cheap ones are "weak", the model's own, most expensive one is "powerful". One forward of
`1x4x4-guided` gives what both guidance branches give together, one of `1x2x2+1x4x4@0.35` has patches of both sizes.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, takewhile
from pathlib import Path

from flexivid.patches.sizes import GUIDED, format_mode, is_mixed_size, parse_mixed_size, parse_mode, sizes_in
from flexivid.text import read_text

KEPT = "kept"  # stands for the patch size of an unconditional branch that does not run
REUSED = "reused"  # stands for that of a step that runs nothing: every branch holds its last x0
WITH_RESIDUAL = " with residual"  # behind a mixed patch size, where a powerful step before has left one


@dataclass(frozen=True)
class Schedule:
    """The patch size of every forward of one sampling run.

    steps: for every denoising step, the patch size of each guidance branch, written as in `1x4x4`: one without
        guidance, else (conditional, unconditional), where the second may be `kept`. `reused` in every branch: the step
        computes nothing. A guided patch size stands in every branch, and runs once.

    Raises ValueError for no steps, for steps that differ in their number of branches, for a first step that is reused,
    for a guided patch size in one of two branches only, for a mixed one at the first step, whose fine blocks nothing
    could choose, or beside another, and for what is no patch size.
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
            if is_reused(step):
                if index == 0:
                    raise ValueError("the first step has nothing to reuse")
                continue
            for name in step[:1] if step[-1] == KEPT else step:
                if is_mixed_size(name):
                    _check_mixed(index, step, name)
                elif parse_mode(name)[1] and set(step) != {name}:
                    raise ValueError(f"step {index}: {name} gives both guidance branches at once; it stands for two")

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
        names = [step[branch] for step in following if not is_guided(step) and not is_mixed_size(step[branch])]
        return tuple(dict.fromkeys(name for name in names if name not in (KEPT, REUSED)))

    def is_held(self, index: int) -> bool:
        """Whether the next step reuses what this one predicts, or chooses its fine blocks by that."""
        following = self.steps[index + 1 : index + 2]
        return any(is_reused(step) or is_mixed_size(step[0]) for step in following)

    def leaves_residual(self, index: int, powerful: str, branch: int) -> bool:
        """Whether a branch of later steps is mixed, before it is powerful again: that keeps residuals of this one."""
        return any(is_mixed_size(step[branch]) for step in self._until_powerful(index, powerful, branch))

    def counted_name(self, index: int, powerful: str, branch: int) -> str:
        """The patch size of a branch of a step, as its FLOPs are counted: a mixed one after a powerful step has what
        that left, and for all tokens the embedder and the head of the model."""
        name = self.steps[index][branch]
        before = (step[branch] == powerful and not is_mixed(step) for step in self.steps[:index])
        return name + WITH_RESIDUAL if is_mixed_size(name) and any(before) else name

    @property
    def mixed_sizes(self) -> list[str]:
        """The mixed patch sizes that there are."""
        return list(dict.fromkeys(step[0] for step in self.steps if is_mixed_size(step[0])))

    def gives_guidance(self, index: int, powerful: str) -> bool:
        """Whether later steps keep the guidance of this one."""
        return any(step[-1] == KEPT for step in self._until_powerful(index, powerful, -1))

    def forwards(self, powerful: str) -> list[str]:
        """The patch size of every forward, comparisons included. A mixed step runs its weaker one on both branches."""
        names: list[str] = []
        for index, step in enumerate(self.steps):
            if is_guided(step):
                names.append(step[0])
                continue
            own = [
                self.counted_name(index, powerful, branch)
                for branch, name in enumerate(step)
                if name not in (KEPT, REUSED)
            ]
            names += (*step, step[1]) if is_mixed(step) else own
            for branch in range(len(step)):
                names += self.compared(index, powerful, branch)
        return names

    def cost(self, costs: Mapping[str, float]) -> float:
        """FLOPs of all forwards, given the FLOPs of one forward by patch size; exact where those are integers.

        Raises ValueError where the cost of a patch size is missing.
        """
        names, missing = self.forwards(powerful_of(costs)), set()
        for name in set(names):
            try:
                costs[name]  # a mixed patch size is counted when it is asked for
            except KeyError:
                missing.add(name)
        if missing:
            raise ValueError(
                f"no cost is given for {', '.join(sorted(missing))}; there are costs for {', '.join(costs)}"
            )
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
        return in_runs(self.steps)


def in_runs(steps: Iterable[Sequence[str]]) -> str:
    """Runs of equal steps: `35 x 2x4x4, 5 x 1x2x2`, with `1x2x2/2x4x4` where the branches of a step differ."""
    runs = ((step, sum(1 for _ in run)) for step, run in groupby(steps))
    return ", ".join(f"{count} x {'/'.join(dict.fromkeys(step))}" for step, count in runs)


def powerful_of(costs: Mapping[str, float]) -> str:
    """The model's own patch size, by the FLOPs of one forward: the most expensive one.

    But for a guided one of that size, which stands for two forwards and has a larger head.
    """
    return max((name for name in costs if not name.endswith(GUIDED)), key=costs.__getitem__)


def _check_mixed(index: int, step: tuple[str, ...], name: str) -> None:
    parse_mixed_size(name)
    if index == 0:
        raise ValueError(f"the first step has no x0 yet to choose the fine blocks of {name} by; give it a patch size")
    if set(step) - {KEPT} != {name}:
        raise ValueError(f"step {index}: {name} runs in both guidance branches, or in the first one beside {KEPT}")


def is_reused(step: tuple[str, ...]) -> bool:
    """Whether a step runs nothing."""
    return set(step) == {REUSED}


def is_guided(step: tuple[str, ...]) -> bool:
    """Whether one forward of a step gives both guidance branches."""
    return step[0].endswith(GUIDED)


def is_mixed(step: tuple[str, ...]) -> bool:
    """Whether the guidance branches of a step run at two patch sizes."""
    return len(set(step) - {KEPT}) > 1


def explicit_schedule(text: str, steps: int, branches: int, patch_sizes: Collection[str]) -> Schedule:
    """A schedule as `--schedule` takes it: `2x4x4:30,1x4x4:5,1x2x2:5`, runs of patch size:number of steps.

    Args:
        text: the runs, in any order; `1x2x2/2x4x4:5` gives the conditional and the unconditional branch their own,
            `2x4x4/kept:5` keeps the guidance of the last powerful step, `reused:5` the last x0, `1x4x4-guided:5` gives
            both branches in one forward, `1x2x2+1x4x4@0.35:5` runs both patch sizes in one, the fine one in .35 of the
            blocks.
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
        step = tuple(name.strip() for name in match[1].split("/"))
        if not is_reused(step):
            named = step[:1] if step[1:] == (KEPT,) else step
            step = (*map(format_mode, named), *step[len(named) :])
        for name in (size for mode in step for size in sizes_in(mode)):
            if name not in (*patch_sizes, KEPT, REUSED):
                raise ValueError(f"{name} in the schedule is not a patch size of this model: {', '.join(patch_sizes)}")
        if len(step) > branches:
            has = "no guidance, so one branch" if branches == 1 else "two branches, conditional/unconditional"
            raise ValueError(f"{run!r} in the schedule names {len(step)} patch sizes, but this run has {has}")
        if branches == 1 and is_guided(step):
            raise ValueError(f"{step[0]} gives both guidance branches at once, but this run has no guidance")
        schedule += [step if len(step) == branches else step * branches] * int(match[2])
    if len(schedule) != steps:
        raise ValueError(f"the schedule {text!r} adds up to {len(schedule)} steps, but there are {steps}")
    return Schedule(tuple(schedule))


def read_schedule(path: Path) -> Schedule:
    """The schedule of a JSON file such as `flexivid calibrate` writes, `{"schedule": [["2x4x4", "2x4x4"], ...], ...}`.

    Raises ValueError, or OSError if there is no such file.
    """
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict) or "schedule" not in content:
        raise ValueError(f'{path} holds no schedule; it should look like {{"schedule": [["2x4x4", "2x4x4"], ...]}}')
    return Schedule.from_json(content["schedule"])
