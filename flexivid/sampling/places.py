"""How many steps are computed, and where they stand among all: pure functions."""

import math

FEW_STEPS = 8  # in runs of so many the last step is always a powerful one
DENSER_FIRST = 1.6  # docs/log.md, "Where powerful steps belong when guidance is kept"
# docs/log.md, "Where computed steps belong"
REUSE = 1.9
LAST = 4.0
# docs/log.md, "Guided first steps"
STOOD_FOR = 3
AFTER = 1.3
# docs/log.md, "Guided steps at the model's own patch size"
LAST_GUIDED = 6.5
BEGUN = 2


def fewer_steps(steps: int, share: float) -> int:
    """How many of `steps` steps cost at most a share of all, and one at least."""
    return max(1, int(share * steps + 1e-9))  # .29 of 100 is 29, whatever a float makes of it


def is_few(steps: int) -> bool:
    return steps <= FEW_STEPS


def reuse_places(count: int, steps: int, ends: bool | None = None) -> list[int]:
    """`count` of `steps` steps, at last * u^REUSE for u evenly from 0 to 1, or the next that is free.

    x0 changes most at high noise, and the first step has nothing to reuse. The last computed step is what is seen, and
    comes late, but with few steps it is better to be right about the layout than about the last of the detail. A fit to
    the places that leave the least error along full runs (`flexivid calibrate`).

    ends: the last of two or more is the last step; None is for a whole run, where it is so if that has few steps.
    """
    last = steps - 1.0
    if not (is_few(steps) if ends is None else ends):
        last = _last(count, steps, LAST)
    return _denser(count, steps, last)


def places_after_guided(guided: int, powerful: int, steps: int, ends: bool) -> tuple[list[int], list[int]]:
    """Places of guided first steps, and of the powerful ones after them, of `steps` steps.

    The guided ones stand for the first three of powerful + 3 computed steps, and fill the time until the next. Without
    any, the powerful ones stand as in `reuse_places`.
    """
    replaced = min(STOOD_FOR, steps - powerful) if guided else 0
    late = reuse_places(powerful + replaced, steps, ends)[replaced:]
    count = min(guided, late[0])
    return _spaced([late[0] * (k / count) ** AFTER for k in range(count)], late[0]), late


def places_of_guided(first: int, count: int, steps: int) -> list[int]:
    """Where `count` guided steps of the model's own patch size stand, after `first` coarser ones that begin a run.

    As `reuse_places`, but that the last comes earlier: what a guided step errs by is seen where it is the last. The
    coarser ones stand for the first two of all.
    """
    replaced = min(BEGUN, steps - count) if first else 0
    late = _denser(count + replaced, steps, _last(count + replaced, steps, LAST_GUIDED))[replaced:]
    return [max(place, first + k) for k, place in enumerate(late)]


def _last(count: int, steps: int, scale: float) -> float:
    """Where the last of `count` computed steps stands: the earlier, the fewer there are."""
    return (steps - 1) * (1 - (1 - count / steps) * math.exp(-((count / scale) ** 2)))


def _denser(count: int, steps: int, last: float) -> list[int]:
    return _spaced([last * (k / max(count - 1, 1)) ** REUSE for k in range(count)], steps)


def _spaced(places: list[float], steps: int) -> list[int]:
    """Places that rise, rounded to steps of their own."""
    found: list[int] = []
    for k, place in enumerate(places):
        after, room = found[-1] + 1 if found else 0, steps - len(places) + k  # one step each for those that follow
        found.append(min(max(round(place), after), room))
    return found


def evenly_spread(count: int, steps: int, ends: bool = False) -> list[int]:
    """`count` of `steps` steps, each in the middle of its share. ends: but the last one is the last step."""
    places = [(2 * k + 1) * steps // (2 * count) for k in range(count)]
    return [*places[:-1], steps - 1] if ends else places


def denser_first(count: int, steps: int, ends: bool = False) -> list[int]:
    """`count` of `steps` steps, at 1 + (steps - 3) u^DENSER_FIRST for u evenly from 0 to 1, or the next that is free.

    What guidance adds changes most from step to step at high noise, so that what is kept of it ages fastest there. Not
    at step 0, whose latents hold nothing but noise. The last but one step mends the detail that weak ones have left;
    one or two powerful steps are too few to spend one on that, and are in the middle of their shares.

    ends: the last one is the last step.
    """
    shares = [k / (count - 1) if count > 2 else (2 * k + 1) / (2 * count) for k in range(count)]
    places = _spaced([1 + max(steps - 3, 0) * u**DENSER_FIRST for u in shares], steps)
    return [*places[:-1], steps - 1] if ends else places
