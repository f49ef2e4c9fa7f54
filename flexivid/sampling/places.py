"""How many steps are computed, and where they stand among all: pure functions."""

import math

from flexivid.diffusion import shift_sigma

FEW_STEPS = 8  # in runs of so many the last step is always a powerful one
DENSER_FIRST = 1.6  # docs/log.md, "Where powerful steps belong when guidance is kept"
# docs/log.md, "Places, found by searching"
LAST = 4.4  # with more computed steps than about so many, the last one is among the last of the run
THIRD = 0.1  # of the steps: where the third one stands at least,
CROWDED = 0.2  # as long as no more than this share is computed
IN_A_ROW = 7  # computed steps from which on the third and the fourth stand in a row
# docs/log.md, "Where computed steps belong"
REUSE = 1.9
# docs/log.md, "Guided first steps"
STOOD_FOR = 3
AFTER = 1.3
# docs/log.md, "Guided steps at the model's own patch size"
LAST_GUIDED = 6.5
BEGUN = 2
FLOW_SHIFT = 3.0  # of the runs that all of this was found on


def fewer_steps(steps: int, share: float) -> int:
    """How many of `steps` steps cost at most a share of all, and one at least."""
    return max(1, int(share * steps + 1e-9))  # .29 of 100 is 29, whatever a float makes of it


def is_few(steps: int) -> bool:
    return steps <= FEW_STEPS


def reuse_places(count: int, steps: int, ends: bool | None = None) -> list[int]:
    """`count` of `steps` steps: the first two, of many two more in a row, and from there on evenly spread ones.

    Evenly by the logarithm of the signal's share, 1 - sigma, which grows by one factor from one to the next. x0 changes
    most at high noise, and the first step has nothing to reuse. The last computed step is what is seen, and comes late,
    but with few steps it is better to be right about the layout than about the last of the detail. A fit to the places
    whose clips are nearest to full runs.

    ends: the last of two or more is the last step; None is for a whole run, where it is so if that has few steps.
    """
    if is_few(steps) if ends is None else ends:
        return _denser(count, steps, steps - 1)
    last = min(_last(count, steps, LAST), steps - 2)
    if count < 3 or last <= 1:
        return _spaced([0, last, *range(2, steps)][:count], steps)
    third = _geometric(1, last, steps, max(count - 1, 3))[1]
    third = max(third, steps * THIRD * min(1, CROWDED * steps / count))
    begun = [0, 1, third, third + 1] if count >= IN_A_ROW else [0, 1, third] if count > 3 else [0, third]
    return _spaced([*begun, *_geometric(begun[-1], last, steps, count - len(begun) + 1)[1:]], steps)


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


def _geometric(first: float, last: float, steps: int, count: int) -> list[float]:
    """Two or more places, from first to last, whose share of the signal grows by one factor."""

    # 1 - sigma is shifted by the inverse of what shifts sigma.
    begun, ended = (shift_sigma(place / steps, 1 / FLOW_SHIFT) for place in (first, last))
    factor = (ended / begun) ** (1 / (count - 1))
    return [steps * shift_sigma(begun * factor**k, FLOW_SHIFT) for k in range(count)]


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
