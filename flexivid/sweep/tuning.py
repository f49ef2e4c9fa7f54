"""Finds for every rival the settings that spend a budget, on clips that no arm is measured on."""

import json
from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path

from tqdm import tqdm

from flexivid.files import write_json
from flexivid.inputs import read_json
from flexivid.sweep.probe import Probe, Trial
from flexivid.sweep.rivals import RIVALS, Rival

CLOSE = 0.1  # settings whose FLOPs are so close to a budget, as a share of it, are chosen among by their PSNR
ENOUGH = 0.02  # and those that are so close need not be searched any nearer


def near(budget: float) -> float:
    """How far from a budget a rival may stay: what comes no closer does not reach it."""
    return min(0.05, budget / 5)


def bisected(family: list[dict], budget: float, share: Callable[[dict], float]) -> dict:
    """The settings of a family whose share of the FLOPs is nearest to the budget, with as few runs as can be."""
    low, high = 0, len(family) - 1
    while high - low > 1:
        middle = (low + high) // 2
        found = share(family[middle])
        if abs(found - budget) <= ENOUGH * budget:
            return family[middle]
        low, high = (middle, high) if found > budget else (low, middle)
    return min((family[low], family[high]), key=lambda settings: abs(share(settings) - budget))


def tune(probe: Probe, rival: Rival, budgets: list[float]) -> Iterator[tuple[dict, Trial]]:
    """Per budget, the best settings by PSNR among the nearest of every family; the nearest if none is CLOSE.

    probe: of a pipeline that is sampled as it is but for the rival.
    """
    trials: dict[str, Trial] = {}

    def trial(settings: dict) -> Trial:
        key = json.dumps(settings)
        if key not in trials:
            with rival.on(probe.pipe, settings) as run:
                trials[key] = probe(run, settings.get("steps"))
        return trials[key]

    for budget in budgets:
        families = rival.families(probe, budget)
        nearest = [bisected(family, budget, lambda settings: trial(settings).share) for family in families]
        # Steps of which there must be one at least may cost more than a small budget.
        close = [s for s in nearest if abs(trial(s).share - budget) <= CLOSE * budget]
        best = max(close, key=lambda s: trial(s).psnr, default=None)
        best = best or min(nearest, key=lambda s: abs(trial(s).share - budget), default=None)
        yield (best, trial(best)) if best is not None else ({}, Trial(1.0, 0.0))


def tune_all(new_probe: Callable[[], Probe], arms: list, path: Path) -> None:
    """Tunes the rival of every arm that has one. What was found is kept in `path`, and not searched for again."""
    known = read_json(path) if path.exists() else {}
    write_json(path, known)
    missing = [arm for arm in arms if arm.rival is not None and arm.name not in known]
    probe = new_probe() if missing else None
    # Arms that differ in their budget only share the runs.
    groups = [list(group) for _, group in groupby(missing, key=lambda arm: (arm.rival, arm.flexivid))]
    for group in tqdm(groups, desc="tuning rivals", disable=not groups):
        with group[0].on(probe.pipe):
            for arm, found in zip(group, tune(probe, RIVALS[group[0].rival], [a.budget for a in group]), strict=True):
                known[arm.name] = {"settings": found[0], **found[1]._asdict()}
                write_json(path, known)
