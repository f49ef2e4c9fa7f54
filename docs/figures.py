"""The drawings of docs/how-it-works.md, from the schedules that budgets really buy: python docs/figures.py"""

from pathlib import Path

from flexivid.sampling.budget import schedule_for_budget
from flexivid.sampling.schedule import KEPT, REUSED, Schedule, is_guided

DOCS = Path(__file__).parent
STEPS, BRANCHES, POWERFUL = 40, 2, "1x2x2"
# FLOPs of a forward of the embedded model, in thousandths of a powerful one (docs/results.md).
COSTS = {POWERFUL: 1000, "2x2x2": 561, "1x4x4": 227, "2x4x4": 143}
FINE_GUIDED = "1x2x2-guided"
GUIDED = {"1x4x4-guided": 227, FINE_GUIDED: 1004}
WIDTH, MARGIN, CELL = 460, 10, 11
DARK, BLUE, PALE, RED, ORANGE, GREY = "#1f3a5f", "#6aa6d8", "#b9d6ee", "#a63a00", "#f2a33c", "#c8c8c8"
LEGEND = [
    (DARK, "powerful"),
    (RED, "guided, fine"),
    (ORANGE, "guided, coarse"),
    (BLUE, "weak"),
    (PALE, "weak, kept"),
    ("white", "nothing"),
]


def text(x: float, y: float, words: str, more: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}" {more}>{words}</text>'


def box(x: float, y: float, width: float, height: float, fill: str, line: str = GREY) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" stroke="{line}"/>'


def picture(height: int, *parts: str) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{1.3 * WIDTH:g}"'
    style = 'font-family="sans-serif" font-size="12" fill="#222"'
    return "\n".join([f"{head} {style}>", box(0, 0, WIDTH, height, "white", "white"), *parts, "</svg>"]) + "\n"


def colour(step: tuple[str, ...]) -> str:
    if is_guided(step):
        return RED if step[0] == FINE_GUIDED else ORANGE
    return {POWERFUL: DARK, REUSED: "white"}.get(step[0], PALE if step[-1] == KEPT else BLUE)


def schedules() -> str:
    """What every step runs: a row a budget, a box a step."""

    def bought(budget: float, costs: dict = COSTS, **more: str) -> Schedule:
        return schedule_for_budget(costs, STEPS, budget, BRANCHES, **more)

    rows = {
        "full compute": Schedule(((POWERFUL,) * BRANCHES,) * STEPS),
        "budget .25": bought(0.25),
        "budget .15": bought(0.15),
        "budget .1": bought(0.1, COSTS | GUIDED),
        "budget .1 without an adapter": bought(0.1),
        "budget .05": bought(0.05, COSTS | GUIDED),
        "budget .25, interleaved": bought(0.25, guidance="kept"),
        "budget .25, weak-first": bought(0.25, order="weak-first"),
    }
    parts, y = [], 22
    for name, schedule in rows.items():
        share = schedule.cost(COSTS | GUIDED) / (STEPS * BRANCHES * COSTS[POWERFUL])
        parts += [text(MARGIN, y, name), text(WIDTH - MARGIN, y, f"{share:.3f} of the FLOPs", 'text-anchor="end"')]
        parts += [box(MARGIN + i * CELL, y + 5, CELL, 14, colour(step)) for i, step in enumerate(schedule.steps)]
        y += 40
    parts += [text(MARGIN, y, "noise"), text(WIDTH - MARGIN, y, "clip", 'text-anchor="end"')]
    x, y = MARGIN, y + 14
    for fill, words in LEGEND:
        parts += [box(x, y, 10, 10, fill), text(x + 14, y + 9, words, 'font-size="10"')]
        x += 26 + 5.2 * len(words)
    return picture(y + 20, *parts)


def patches(x: float, fine: set[int], title: str) -> list[str]:
    """8 x 8 latents in four blocks, patches of 2 x 2 in the `fine` ones and of 4 x 4 in the others."""
    pixel, parts, tokens = 16, [], 0
    parts += [box(x + pixel * (i % 8), 34 + pixel * (i // 8), pixel, pixel, "#f4f4f4", "#e2e2e2") for i in range(64)]
    parts.append(f'<circle cx="{x + 30:g}" cy="66" r="21" fill="{ORANGE}" fill-opacity=".55"/>')
    for block in range(4):
        side = 2 if block in fine else 4
        for i in range((4 // side) ** 2):
            corner = [4 * (block % 2) + side * (i % (4 // side)), 4 * (block // 2) + side * (i // (4 // side))]
            place = (x + pixel * corner[0], 34 + pixel * corner[1])
            parts.append(box(*place, pixel * side, pixel * side, "none", DARK))
            tokens += 1
    middle = f'text-anchor="middle" x="{x + 64:g}"'
    parts.append(f'<text y="24" font-size="11" font-weight="bold" {middle}>{title}</text>')
    return [*parts, f'<text y="182" {middle}>{tokens} tokens</text>']


def folding() -> str:
    """How patch sizes cut latents."""
    gap = (WIDTH - 2 * MARGIN - 3 * 128) / 2 + 128
    return picture(
        194,
        *patches(MARGIN, {0, 1, 2, 3}, "1x2x2"),
        *patches(MARGIN + gap, set(), "1x4x4"),
        *patches(MARGIN + 2 * gap, {0}, "1x2x2+1x4x4@0.25"),
    )


FIGURES = {"schedules.svg": schedules, "folding.svg": folding}

if __name__ == "__main__":
    for name, draw in FIGURES.items():
        (DOCS / name).write_text(draw())
