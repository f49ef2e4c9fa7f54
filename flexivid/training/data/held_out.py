"""Which clips are never trained on, so that errors can be measured on them."""

import hashlib
from collections import Counter

from flexivid.training.data.shards import Place

LEAST = 5  # clips; of fewer none is held out by default
MOST = 8  # clips that are held out by default

Places = dict[str, list[Place]]  # by bucket


def usual_count(clips: int) -> int:
    """How many of `clips` are held out if nothing else is asked for: a tenth, 1 to MOST."""
    return min(MOST, max(1, clips // 10)) if clips >= LEAST else 0


def choose_held_out(places: Places, count: int | None) -> list[str]:
    """The contents that are held out, the same whatever the order of the clips: copies of a file go together.

    count: None for the usual one. Every bucket keeps something to train on. Raises ValueError if so many cannot be.
    """
    of_content: dict[str, Counter] = {}
    for bucket, row in places.items():
        for place in row:
            of_content.setdefault(place.content, Counter())[bucket] += 1
    left = Counter({bucket: len(row) for bucket, row in places.items()})
    wanted, chosen = usual_count(len(of_content)) if count is None else count, []
    for content in sorted(of_content, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if len(chosen) < wanted and all(left[bucket] > number for bucket, number in of_content[content].items()):
            chosen.append(content)
            left -= of_content[content]
    if count is not None and len(chosen) < count:
        raise ValueError(
            f"clips.held_out is {count}, but of {len(of_content)} clips at most {len(chosen)} can be: every bucket has "
            "to keep one to train on"
        )
    return sorted(chosen)


def split(places: Places, held_out: list[str]) -> tuple[Places, Places]:
    """(what is trained on, what is held out); buckets without a clip are in neither."""

    def those(wanted: bool) -> Places:
        rows = {bucket: [p for p in row if (p.content in held_out) == wanted] for bucket, row in places.items()}
        return {bucket: row for bucket, row in rows.items() if row}

    return those(False), those(True)
