"""The arms of a sweep: ways to spend a share of the full run's FLOPs, flexivid's and its rivals'."""

import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

from diffusers import DiffusionPipeline

import flexivid
from flexivid.inputs import read_json
from flexivid.model.adapter import read_config
from flexivid.model.families import family_of
from flexivid.model.family import transformer_of
from flexivid.sampling.budget import BudgetError
from flexivid.sampling.few_steps import call_of, share_of_full
from flexivid.sampling.places import fewer_steps
from flexivid.sampling.schedule import read_schedule
from flexivid.sweep.rivals import RIVALS
from flexivid.sweep.sampling import Run, stock_run
from flexivid.sweep.tuning import near

METHODS = {
    "adapter": "flexivid with its adapter",
    "training-free": "flexivid without any training",
    "direct": "flexivid with an adapter of the paper's parametrisation",
    "interleaved": "the adapter with weak steps between powerful ones",
    "adapter-same": "the adapter with both guidance branches of every weak step",
    "weak-first": "the adapter in the paper's order, weak steps first",
    "reuse": "flexivid with powerful steps only, whose x0 the steps between hold",
    "adapter-half-steps": "the adapter on half of the steps, at twice the budget",
    "adapter-fbcache": "the adapter at twice the budget, together with the fbcache of diffusers",
    "calibrated": "the adapter with the --schedules of flexivid calibrate",
    "few": "few steps without guidance, by the recipes of --few-adapters",
    "steps": "fewer steps",
    "unguided": "fewer steps without guidance, which cost half",
    **{name: rival.meaning for name, rival in RIVALS.items()},
}


@dataclass(frozen=True)
class Arm:
    """One way of sampling every clip of a sweep.

    name: the folder of its clips. budget: the share of the full run's FLOPs that it aims at: flexivid and fewer steps
    stay below, a rival comes `near` it. steps: denoising steps that the pipeline is called with.
    flexivid: arguments of `flexivid.enable`, None without it. rival: a name in `RIVALS`, and settings: what tuning has
    found for it, None before. guidance_scale: None for that of the full run.
    """

    name: str
    method: str
    budget: float
    steps: int
    flexivid: dict | None = field(default=None, hash=False)
    rival: str | None = None
    settings: dict | None = field(default=None, hash=False)
    guidance_scale: float | None = None

    def call(self, full: dict) -> dict:
        """Arguments of the pipeline. full: those of the full run."""
        own = {} if self.guidance_scale is None else {"guidance_scale": self.guidance_scale}
        return {**full, "steps": self.steps, **own}

    @property
    def depends_on_clips(self) -> bool:
        """Whether batches differ in what they cost."""
        return self.rival is not None and RIVALS[self.rival].depends_on_clips

    @contextmanager
    def on(self, pipe: DiffusionPipeline) -> Iterator[Run]:
        """Inside, the pipeline samples like this arm, without a rival that is not tuned, if it is run as is yielded;
        outside, it is stock again."""
        if self.flexivid is not None:
            flexivid.enable(pipe, **self.flexivid)
        try:
            tuned = self.settings is not None
            with RIVALS[self.rival].on(pipe, self.settings) if tuned else nullcontext(stock_run) as run:
                yield run
        finally:
            flexivid.disable(pipe)

    def plan(self, pipe: DiffusionPipeline, call: dict) -> None:
        """Counts and plans ahead of a run, inside of `on`. call: of the full run.

        Raises BudgetError for a budget that cannot be met.
        """
        if self.flexivid is not None:
            call = self.call(call)
            sizes = (call[name] for name in ("frames", "height", "width", "steps", "text_length"))
            flexivid.plan(pipe, *sizes, call["guidance_scale"] > 1)


def few_step_arms(adapters: list[Path], pipe: DiffusionPipeline, call: dict) -> dict[str, Arm]:
    """The recipes of few-step adapters, by the name of their folders; their budget is what all stock steps would cost.

    pipe: without weights. call: of the full run. Raises ValueError for an adapter without a recipe.
    """
    arms, family = {}, family_of(transformer_of(pipe))
    for folder in adapters:
        recipe = read_config(folder).recipe
        if recipe is None:
            raise ValueError(f"{folder} is no few-step adapter: its flexivid_config.json has no recipe")
        name, own = f"few-{folder.name}", call_of(recipe, family)
        if name in arms:
            raise ValueError(f"two of --few-adapters are called {folder.name}; give one of them another name")
        share = float(share_of_full(recipe, family, call["steps"], call["guidance_scale"]))
        settings = {"adapter": str(folder), "merge_lora": True}
        arms[name] = Arm(name, "few", share, flexivid=settings, **own)
    return arms


def all_arms(arguments: Namespace, pipe: DiffusionPipeline, call: dict) -> list[Arm]:
    """The full run and every method at every budget; rivals are still to be tuned (`tuning.tune_all`).

    arguments: those of the command line, checked. pipe: without weights. call: of the full run.
    """
    steps, is_guided = call["steps"], call["guidance_scale"] > 1
    methods, guidance = arguments.methods, arguments.guidance
    merged = {"adapter": str(arguments.adapter), "merge_lora": True}
    trained = {**merged, "guidance": guidance}
    enable = {
        "adapter": trained,
        "training-free": {"modes": arguments.modes, "guidance": guidance},
        "direct": {"adapter": str(arguments.direct_adapter), "merge_lora": True, "guidance": guidance},
        "interleaved": {**trained, "order": "interleaved"},
        "adapter-same": {**trained, "guidance": "same"},
        "weak-first": {**trained, "order": "weak-first"},
        "reuse": {"order": "reuse"},
    }
    arms = {"full": Arm("full", "full", 1.0, steps)}
    if "calibrated" in methods:
        for path in arguments.schedules:
            schedule, budget = read_schedule(path), read_json(path).get("budget")
            if not isinstance(budget, float | int):
                raise ValueError(f"{path} names no budget; the method calibrated takes files of flexivid calibrate")
            name = f"calibrated-{budget:g}"
            if name in arms:
                raise ValueError(f"two of --schedules are for a budget of {budget:g}; give one a budget")
            # Mixed patch sizes do not go with merged LoRA.
            own = {"schedule": schedule.to_text(), "merge_lora": not schedule.mixed_sizes}
            arms[name] = Arm(name, "calibrated", budget, steps, flexivid={**merged, **own})
    for method in methods:
        for budget in arguments.budgets:
            name = f"budget-{budget:g}" if method == "adapter" else f"{method}-{budget:g}"
            if method in enable:
                arms[name] = Arm(name, method, budget, steps, flexivid={**enable[method], "budget": budget})
            elif method == "adapter-half-steps" and 2 * budget < 1:
                arms[name] = Arm(name, method, budget, steps // 2, flexivid={**trained, "budget": 2 * budget})
            elif method == "adapter-fbcache" and 2 * budget < 1:
                arms[name] = Arm(name, method, budget, steps, {**trained, "budget": 2 * budget}, "fbcache")
            elif method in RIVALS:
                arms[name] = Arm(name, method, budget, steps, rival=method)
            elif method == "steps":
                fewer = fewer_steps(steps, budget)
                # Two budgets may come to the same number.
                arms.setdefault(f"steps-{fewer}", Arm(f"steps-{fewer}", method, budget, fewer))
            elif method == "unguided" and is_guided:
                fewer = min(steps, fewer_steps(2 * steps, budget))
                name = f"unguided-{fewer}"
                arms.setdefault(name, Arm(name, method, budget, fewer, guidance_scale=1.0))
    if "few" in methods:
        arms |= few_step_arms(arguments.few_adapters, pipe, call)
    return list(arms.values())


def picked(arms: list[Arm], names: list[str] | None) -> list[Arm]:
    """The full run and the arms of some names, all of them for None. Raises ValueError for a name that there is not."""
    known = [arm.name for arm in arms]
    if unknown := [name for name in names or [] if name not in known]:
        raise ValueError(f"there is no arm {unknown[0]}; with these methods and budgets there are {', '.join(known)}")
    return arms if names is None else [arm for arm in arms if arm.name in ("full", *names)]


def tuned(arms: list[Arm], tuning: dict, say) -> list[Arm]:
    """The arms with the settings of their rivals, without those that come near no budget; says which.

    tuning: what `tuning.tune_all` wrote.
    """
    kept = []
    for arm in arms:
        if arm.rival is None:
            kept.append(arm)
            continue
        settings, share = (tuning[arm.name][name] for name in ("settings", "share"))
        if abs(share - arm.budget) > near(arm.budget):
            say(f"{arm.method} does not reach {arm.budget:g}: the nearest is {share:.3f}")
        else:
            kept.append(replace(arm, settings=settings, steps=settings.get("steps", arm.steps)))
    return kept


def possible(arms: list[Arm], pipe: DiffusionPipeline, call: dict, named: bool, say) -> list[Arm]:
    """The arms without those of rivals that the pipeline cannot be sampled with; says why.

    pipe: without weights. named: somebody has asked for these rivals by name, and is refused. Raises ValueError.
    """
    kept = []
    for arm in arms:
        why = RIVALS[arm.rival].refusal(pipe, call) if arm.rival else None
        if why and named:
            raise ValueError(why)
        if why:
            say(f"{arm.name} is left out: {why}")
        else:
            kept.append(arm)
    return kept


def reachable(arms: list[Arm], pipe: DiffusionPipeline, call: dict, say) -> list[Arm]:
    """The arms without those of flexivid that the patch sizes cannot bring below their budget; says which.

    pipe: without weights. Raises what `flexivid.enable` raises for an adapter that does not fit.
    """
    kept = []
    for arm in arms:
        try:
            # Warnings are of copies between tensors that have no data.
            with warnings.catch_warnings(action="ignore"), arm.on(pipe):
                arm.plan(pipe, call)
            kept.append(arm)
        except BudgetError as error:
            say(f"{arm.name} is left out: {error}")
    return kept
