"""Few-step runs of an adapter that was distilled for them: its noise levels, its patch sizes, guidance off."""

from collections.abc import Mapping
from fractions import Fraction
from functools import partial

from diffusers import FlowMatchEulerDiscreteScheduler

from flexivid.diffusion import Diffusion
from flexivid.model.call import Call
from flexivid.model.family import Family
from flexivid.model.flexible import FlexTransformer
from flexivid.model.recipe import Recipe
from flexivid.sampling.clock import Position
from flexivid.sampling.forwards import Forwards
from flexivid.sampling.mixing import Mixing
from flexivid.sampling.observe import Observer
from flexivid.sampling.run import Run
from flexivid.sampling.runner import PipelineRunner
from flexivid.sampling.schedule import Schedule

# What would move the noise levels of a recipe, or add noise to its steps.
PLAIN = {
    "shift": 1.0,
    "use_dynamic_shifting": False,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "stochastic_sampling": False,
}


def few_step_scheduler(usual, recipe: Recipe) -> FlowMatchEulerDiscreteScheduler:
    """The stock scheduler that takes the steps a recipe was distilled with, at its noise levels whatever it is asked.

    usual: the pipeline's own, most of which would not do: a multistep solver such as UniPC makes of four predictions
    what only a fine discretisation makes right, and corrects even its steps of first order.
    """
    is_euler = isinstance(usual, FlowMatchEulerDiscreteScheduler)
    settings = dict(usual.config) if is_euler else {"num_train_timesteps": usual.config.num_train_timesteps}
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(settings | PLAIN)
    scheduler.set_timesteps = partial(_set_timesteps, scheduler, recipe.sigmas)
    return scheduler


def _set_timesteps(
    scheduler, recipe, num_inference_steps=None, device=None, sigmas=None, mu=None, timesteps=None, **more
) -> None:
    """Stands in for the scheduler's own, under the arguments that pipelines look for. Raises ValueError."""
    asked = num_inference_steps or len(sigmas if sigmas is not None else timesteps)
    check_steps(len(recipe), asked)
    type(scheduler).set_timesteps(scheduler, sigmas=recipe, device=device)


def call_of(recipe: Recipe, family: Family) -> dict:
    """What a call of a pipeline has to be given, by the names of `stock_pipelines.ARGUMENTS`."""
    # Where it is an input of the network, guidance stays.
    return {"steps": recipe.steps} | ({} if family.guidance == "embedded" else {"guidance_scale": 1.0})


def share_of_full(recipe: Recipe, family: Family, steps: int, guidance_scale: float) -> Fraction:
    """FLOPs of the recipe's steps if all were stock, of those of a full run of `steps` with guidance."""
    is_doubled = guidance_scale > 1 and family.guidance != "embedded"
    return Fraction(recipe.steps, steps * (2 if is_doubled else 1))


def check_steps(steps: int, asked: int) -> None:
    """Raises ValueError for another number of steps than a recipe has."""
    if asked != steps:
        raise ValueError(
            f"the recipe of this adapter has {steps} steps, not {asked}: call the pipeline with {steps}, or enable it "
            f"with a budget or a schedule"
        )


class FewStepRun(Run):
    """Every step as it was trained: no correction of weak ones, and powerful ones with the LoRA that they have here.

    cost_of_powerful: FLOPs of one such forward of one clip, 0 if there is none.
    """

    def __init__(
        self, schedule: Schedule, powerful: str, diffusion: Diffusion, forwards: Forwards, cost_of_powerful: int
    ):
        super().__init__(schedule, powerful, diffusion, forwards, Mixing(1.0, is_batched=False))
        self.cost_of_powerful = cost_of_powerful

    def forward(
        self,
        flex: FlexTransformer,
        call: Call,
        at: Position,
        costs: Mapping[str, int],
        observer: Observer | None = None,
    ):
        """The output of one forward. costs: FLOPs of one forward of one clip by patch size."""
        (name,) = self.planned(at.step)
        call.memo = self._memo
        self.summary.steps.append([name])
        batch, is_powerful = len(call.arguments["hidden_states"]), name == flex.powerful
        self.summary.flops_used += (self.cost_of_powerful if is_powerful else costs[name]) * batch
        self.summary.flops_full += costs[flex.powerful] * batch
        if is_powerful:
            output = flex.adapted(call, flex.powerful)
        else:
            output = call.output_of(flex.predict(call, name, self.diffusion, call.level(self.diffusion, at.sigma)))
        if at.step == at.steps - 1:
            self.drop()
        return output


class FewStepRunner(PipelineRunner):
    """Runs a pipeline by the recipe of its adapter, with a scheduler of its own until it is detached."""

    def __init__(self, pipe, flexes: dict[str, FlexTransformer], recipe: Recipe):
        super().__init__(pipe, flexes, budget=None, schedule=Schedule(tuple((name,) for name in recipe.patch_sizes)))
        self.recipe = recipe
        self._usual_scheduler = pipe.scheduler
        # A pipeline without weights, which is planned with, has none.
        self._scheduler = pipe.scheduler and few_step_scheduler(pipe.scheduler, recipe)
        self.attach()

    def attach(self) -> None:
        pipe = self.pipe
        if pipe is not None and pipe.scheduler is self._usual_scheduler:
            pipe.scheduler = self._scheduler

    def detach(self) -> None:
        pipe = self.pipe
        if pipe is not None and pipe.scheduler is self._scheduler:
            pipe.scheduler = self._usual_scheduler

    def forwards(self, steps: int) -> Forwards:
        forwards, pipe = super().forwards(steps), self.pipe
        batched = self.family.guidance == "batched" and getattr(pipe, "do_classifier_free_guidance", False)
        self._refuse_guidance(forwards.branches > 1 or batched)
        return forwards

    def usual_forwards(self, steps: int, guided: bool) -> Forwards:
        self._refuse_guidance(guided)
        return Forwards((1,) * steps)

    def _refuse_guidance(self, guided: bool) -> None:
        # Where it is an input of the network, it stays.
        if guided and self.family.guidance != "embedded":
            raise ValueError("the recipe of this adapter was trained to run without guidance: give guidance_scale 1")

    def plan(self, arguments: dict, forwards: Forwards) -> Schedule:
        check_steps(self.recipe.steps, len(forwards.counts))
        return self.schedule

    def own_costs(self, arguments: dict) -> dict[str, int]:
        """FLOPs of one forward of one clip where they are others than in a budget: powerful ones have LoRA here."""
        if self.powerful not in self.recipe.patch_sizes:
            return {}
        return {self.powerful: self.counter.cost_of_adapted(arguments, self.powerful)}

    def _fits(self, scale: float) -> bool:
        # What guided patch sizes were trained for they give without guidance in the call.
        return True

    def _begun(self, arguments: dict, schedule: Schedule, diffusion: Diffusion, forwards: Forwards) -> Run:
        if self.pipe.scheduler is not self._scheduler:
            raise ValueError(
                "the recipe of this adapter runs with the scheduler that enable has given the pipeline, and now it has "
                "another: enable it again"
            )
        cost = self.own_costs(arguments).get(self.powerful, 0)
        return FewStepRun(schedule, self.powerful, diffusion, forwards, cost)
