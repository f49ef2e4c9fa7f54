"""The arms of a sweep: ways to spend a share of the full run's FLOPs, flexivid's and its rivals'."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from diffusers import DiffusionPipeline

import flexivid
from flexivid.schedules import BudgetError
from sweep.rivals import CACHES, NEAR

METHODS = {
    "adapter": "flexivid with its adapter",
    "training-free": "flexivid without any training",
    "direct": "flexivid with an adapter of the paper's parametrisation",
    "weak-first": "the adapter in the paper's order, weak steps first",
    "adapter-half-steps": "the adapter on half of the steps, at twice the budget",
    "steps": "fewer steps",
    **{name: f"{name} of diffusers" for name in CACHES},
}


@dataclass(frozen=True)
class Arm:
    """One way of sampling every clip of a sweep.

    name: the folder of its clips. budget: the share of the full run's FLOPs that it may spend. steps: denoising steps.
    flexivid: arguments of `flexivid.enable`, None without it. cache: settings of the cache that `method` names.
    """

    name: str
    method: str
    budget: float
    steps: int
    flexivid: dict | None = field(default=None, hash=False)
    cache: dict | None = field(default=None, hash=False)

    @contextmanager
    def on(self, pipe: DiffusionPipeline) -> Iterator[None]:
        """The pipeline samples like this arm inside, and is the stock one again outside."""
        if self.flexivid is not None:
            flexivid.enable(pipe, **self.flexivid)
        if self.cache is not None:
            pipe.transformer.enable_cache(CACHES[self.method].config(pipe, self.cache))
        try:
            yield
        finally:
            if self.cache is not None:
                pipe.transformer.disable_cache()
            flexivid.disable(pipe)


def flexivid_arms(
    methods: list[str], budgets: list[float], steps: int, adapter: Path | None, direct_adapter: Path | None, modes: list
) -> list[Arm]:
    """The arms that need no tuning: the full run, flexivid's and fewer steps, at every budget below 1."""
    trained = {"adapter": str(adapter), "merge_lora": True}
    enable = {
        "adapter": trained,
        "training-free": {"modes": modes},
        "direct": {"adapter": str(direct_adapter), "merge_lora": True},
        "weak-first": {**trained, "order": "weak-first"},
    }
    arms = {"full": Arm("full", "full", 1.0, steps)}
    for method in methods:
        for budget in budgets:
            name = f"budget-{budget:g}" if method == "adapter" else f"{method}-{budget:g}"
            if method in enable:
                arms[name] = Arm(name, method, budget, steps, flexivid={**enable[method], "budget": budget})
            elif method == "adapter-half-steps" and 2 * budget < 1:
                arms[name] = Arm(name, method, budget, steps // 2, flexivid={**trained, "budget": 2 * budget})
            elif method == "steps":
                fewer = max(1, int(budget * steps + 1e-9))
                # Two budgets may come to the same number.
                arms.setdefault(f"steps-{fewer}", Arm(f"steps-{fewer}", method, budget, fewer))
    return list(arms.values())


def cache_arms(caches: list[str], budgets: list[float], steps: int, tuning: dict, say) -> list[Arm]:
    """The arms of the caches that come near a budget; says which do not. tuning: what `rivals.tune_all` found."""
    arms = []
    for name in caches:
        for budget in budgets:
            found = tuning[name][f"{budget:g}"]
            if abs(found["share"] - budget) > NEAR:
                say(f"{name} does not reach {budget:g}: the nearest is {found['share']:.3f}")
            else:
                arms.append(Arm(f"{name}-{budget:g}", name, budget, steps, cache=found["settings"]))
    return arms


def reachable(arms: list[Arm], pipe: DiffusionPipeline, call: dict, say) -> list[Arm]:
    """The arms without those of flexivid that the patch sizes cannot bring below their budget; says which.

    Raises what `flexivid.enable` raises for an adapter that does not fit.
    """
    kept = []
    for arm in arms:
        try:
            with arm.on(pipe):
                if arm.flexivid is not None:
                    sizes = (call[name] for name in ("num_frames", "height", "width"))
                    flexivid.plan(pipe, *sizes, arm.steps, call["max_sequence_length"], call["guidance_scale"] > 1)
            kept.append(arm)
        except BudgetError as error:
            say(f"{arm.name} is left out: {error}")
    return kept
