"""How many forwards a pipeline makes in a step: its guidance says so, or its guider, and not the model.

A schedule tells two branches apart at most: the first forward of a step, which is the conditional one or holds both
branches of guidance, and all others.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from diffusers.guiders import BaseGuidance

from flexivid.model.family import Family


@dataclass(frozen=True)
class Forwards:
    """Of one call of a pipeline.

    counts: of every step. clips: in the first forward of a step, for one in each of the others.
    """

    counts: tuple[int, ...]
    clips: int = 1

    @property
    def branches(self) -> int:
        return min(max(self.counts), 2)

    def of_step(self, costs: Mapping[str, int], count: int) -> list[dict[str, int]]:
        """FLOPs by patch size of each of `count` forwards, if all cost the same a clip.

        costs: of one forward of one clip.
        """
        return [{name: cost * (1 if index else self.clips) for name, cost in costs.items()} for index in range(count)]


def calls_branches_apart(pipe, family: Family) -> bool:
    """Whether a pipeline calls its transformer once a guidance branch, so that branches can differ."""
    return family.guidance == "separate" or getattr(pipe, "guider", None) is not None


def can_keep_guidance(pipe, family: Family) -> bool:
    """Whether a step may have forwards after its first that weak steps need not run."""
    return calls_branches_apart(pipe, family) or bool(family.more_forwards)


def forwards_of(pipe, family: Family, steps: int) -> Forwards:
    """Of the call that runs, by the guidance that is on now. Raises ValueError for a guider that is not supported."""
    if getattr(pipe, "guider", None) is not None:
        return Forwards(_of_guiders(pipe, steps))
    if family.guidance == "separate":
        guided = getattr(pipe, "do_classifier_free_guidance", None)  # Kandinsky5 has no such property
        return Forwards((2 if (pipe.guidance_scale > 1 if guided is None else guided) else 1,) * steps)
    more = sum(bool(getattr(pipe, name, False)) for name in family.more_forwards)
    return Forwards((1 + more,) * steps, 2 if more and pipe.do_classifier_free_guidance else 1)


def usual_forwards(pipe, family: Family, steps: int, guided: bool) -> Forwards:
    """Of a call to come, with or without guidance; what a pipeline has beside classifier-free guidance is on.

    steps: as the pipeline is asked for them.
    """
    steps -= family.steps_without_forward
    if getattr(pipe, "guider", None) is not None:
        return Forwards(_of_guiders(pipe, steps) if guided else (1,) * steps)
    if family.guidance == "separate":
        return Forwards((2 if guided else 1,) * steps)
    return Forwards((1 + len(family.more_forwards),) * steps, 2 if family.more_forwards else 1)


def _of_guiders(pipe, steps: int) -> tuple[int, ...]:
    """What the guiders of video and sound ask for, each forward once."""
    guiders = [getattr(pipe, name, None) for name in ("guider", "guider_2", "audio_guider")]
    first, second, sound = (_predictions(guider, steps) if guider is not None else None for guider in guiders)
    if second is not None:
        # Wan2.2 has one for each of its transformers.
        boundary, timesteps = pipe.config.boundary_ratio * pipe.num_train_timesteps, pipe.scheduler.timesteps
        if len(timesteps) == steps:
            first = [first[i] if timestep >= boundary else second[i] for i, timestep in enumerate(timesteps)]
    return tuple(len(video | (sound[i] if sound is not None else set())) for i, video in enumerate(first))


def _predictions(guider: BaseGuidance, steps: int) -> list[set[str]]:
    """By step, what a guider calls the transformer for: its guidance may have a start and a stop."""
    if type(guider).prepare_models is not BaseGuidance.prepare_models:
        raise ValueError(
            f"{type(guider).__name__} changes layers of the transformer for one of its predictions, which flexivid "
            f"neither plans nor counts; it knows guiders that leave the transformer as it is, such as "
            f"ClassifierFreeGuidance"
        )
    guider, predictions = copy.copy(guider), []
    for step in range(steps):
        guider.set_state(step, steps, None)
        asked = getattr(guider, "active_predictions", lambda: guider._input_predictions[: guider.num_conditions])
        predictions.append(set(asked()))
    return predictions


def costs_of_branches(of_step: Sequence[Mapping[str, int]], branches: int, powerful: str) -> dict[str, float]:
    """FLOPs of one branch by patch size, given those of every forward of a step: the mean of both branches, and for a
    weak patch size at least those of the first, which is all that a step runs whose guidance is kept."""
    found = {}
    for name, first in of_step[0].items():
        of_all = sum(costs[name] for costs in of_step)
        mean = of_all / branches if of_all % branches else of_all // branches
        found[name] = mean if name == powerful else max(mean, first)
    return found
