"""What the page shows, as HTML: the schedule as a strip, what is planned, the clips. Pure functions."""

from collections import Counter
from collections.abc import Iterable, Mapping
from html import escape
from typing import Literal

from flexivid.app.planner import Plan
from flexivid.app.sampler import ARMS, Arm
from flexivid.sampling.flops import flops_text
from flexivid.sampling.schedule import KEPT, REUSED, is_reused

COLOURS = 6  # of page.css
Progress = Literal["idle", "queued", "sampling"]
TITLES = {"full": "Full", "fewer": "Fewer steps", "flexivid": "flexivid"}


def share_text(share: float) -> str:
    """`12.5 %`, `25 %`."""
    return f"{100 * share:.3g} %"


def strip(steps: Iterable[tuple[str, ...]], patch_sizes: tuple[str, ...]) -> str:
    """A schedule as a row of cells, one a step: a colour a patch size, the last one's in pale where a step is reused.

    Where guidance branches differ, the upper half is the conditional one, and a kept branch is pale. patch_sizes: the
    finest first.
    """
    cells, last = [], ()
    for number, step in enumerate(steps, start=1):
        last = last if is_reused(step) else step
        halves = [_colour(*half, patch_sizes) for half in zip(_of_both(step), _of_both(last), strict=True)]
        said = step[0] if len(set(step)) == 1 else "/".join(step)
        style = ";".join(f"--{side}:{colour}" for side, colour in zip(("upper", "lower"), halves, strict=True))
        kind = "reused" if is_reused(step) else "computed"
        cells.append(f'<li class="{kind}" style="{style}" title="step {number}: {said}"></li>')
    return f'<ol class="strip">{"".join(cells)}</ol>'


def _of_both(step: tuple[str, ...]) -> tuple[str, str]:
    return step[0], step[-1]


def _colour(name: str, last: str, patch_sizes: tuple[str, ...]) -> str:
    """Of one branch of a step. last: of the last step that computed something, which a reused one holds."""
    if name == KEPT or last == KEPT:
        return "var(--held)"
    index = patch_sizes.index(last) % COLOURS
    return f"var(--pale-{index})" if name == REUSED else f"var(--patch-{index})"


def legend(steps: Iterable[tuple[str, ...]], patch_sizes: tuple[str, ...]) -> str:
    """What the colours mean, with how many steps each has: by their conditional branch."""
    counts = Counter(step[0] for step in steps)
    names = [name for name in patch_sizes if counts[name]]
    items = [
        f'<li><i style="--upper:var(--patch-{patch_sizes.index(name) % COLOURS})"></i>{name}<b>{counts[name]}</b></li>'
        for name in names
    ]
    if counts[REUSED]:
        items.append(f'<li><i style="--upper:var(--pale-0)"></i>reused<b>{counts[REUSED]}</b></li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


def plan_markup(plan: Plan) -> str:
    """What a budget buys."""
    plain = "1 plain step" if plan.fewer_steps == 1 else f"{plan.fewer_steps} plain steps"
    buys = f"would buy {plain}" if plan.share * plan.full_steps > 1 - 1e-9 else "less than 1 plain step costs"
    return (
        '<div class="plan"><p class="figures">'
        f'<strong id="planned-share">{share_text(plan.share)}</strong>'
        f'<span id="planned-flops">{flops_text(plan.flops_used)} of {flops_text(plan.flops_full)}</span>'
        f"<span>{_computed(plan)} of {plan.steps} steps computed</span><span>{buys}</span></p>"
        f"{strip(plan.schedule.steps, plan.patch_sizes)}{legend(plan.schedule.steps, plan.patch_sizes)}</div>"
    )


def recipe_markup(steps: int, full_steps: int, guidance_scale: float | None) -> str:
    """What a few-step adapter decides, in the place of the dial. guidance_scale: of the full run, None where the recipe
    leaves it as it is."""
    guidance = " and turns guidance off" if guidance_scale is not None else ""
    scale = f", and a guidance scale of {guidance_scale:g}" if guidance_scale is not None else ""
    return (
        f'<div class="note recipe"><b>The recipe of this adapter</b> sets {steps} steps{guidance}. '
        f"The full run has {full_steps} steps{scale}. Started with --budget, this page has a dial instead.</div>"
    )


def refusal_markup(message: str) -> str:
    """Why nothing is planned or sampled."""
    text = message[:1].upper() + message[1:]
    return f'<div class="refusal" role="alert">{escape(text)}{"" if text.endswith(".") else "."}</div>'


def note_markup(text: str) -> str:
    """Something to know that stops nothing, or nothing."""
    return f'<div class="note">{escape(text)}</div>' if text else ""


def arms_markup(plan: Plan, done: Mapping[str, Arm], ratio: str, progress: Progress = "idle") -> str:
    """The three clips, or what will be there. ratio: width / height in CSS. progress: of those that are not."""
    waiting = [name for name in ARMS if name not in done]
    figures = []
    for name in TITLES:
        if name in done:
            arm = done[name]
            video = f'<video class="screen" src="{_address(arm.shown)}" muted playsinline preload="auto"></video>'
            figures.append(_figure(name, plan, video, arm.flops, f"{arm.seconds:.2f} s"))
        elif progress == "idle":
            figures.append(_figure(name, None, '<div class="screen"></div>'))
        else:
            state = "sampling" if progress == "sampling" and name == waiting[0] else "waiting"
            screen = f'<div class="screen {state}">{state}</div>'
            flops = plan.flops_used if name == "flexivid" else plan.flops_full * _steps(name, plan) // plan.full_steps
            figures.append(_figure(name, plan, screen, flops))
    return f'<div class="arms" style="--ratio:{ratio}">{"".join(figures)}</div>'


def _steps(name: str, plan: Plan) -> int:
    return {"full": plan.full_steps, "fewer": plan.fewer_steps, "flexivid": plan.steps}[name]


def _figure(name: str, plan: Plan | None, screen: str, flops: int | None = None, seconds: str = "&ndash;") -> str:
    """One clip under its figures. plan: None where nothing has been asked for."""
    said = spent = "&ndash;"
    if plan is not None:
        steps = _steps(name, plan)
        said = f"{_computed(plan)} of {steps} computed" if name == "flexivid" else str(steps)
        spent = f"{flops_text(flops)} <small>{share_text(flops / plan.flops_full)}</small>"
    rows = "".join(
        f"<div><dt>{label}</dt><dd>{value}</dd></div>"
        for label, value in (("steps", said), ("FLOPs", spent), ("denoising", seconds))
    )
    return (
        f'<figure class="arm" data-arm="{name}">{screen}'
        f"<figcaption><h3>{TITLES[name]}</h3><dl>{rows}</dl></figcaption></figure>"
    )


def _computed(plan: Plan) -> int:
    return sum(not is_reused(step) for step in plan.schedule.steps)


def downloads_markup(arm: Arm) -> str:
    """Links to flexivid's clip and its record."""
    links = [
        f'<a download="flexivid{path.suffix}" href="{_address(path)}">{label}</a>'
        for path, label in ((arm.clip, "Clip, mp4"), (arm.record, "Its figures, JSON"))
    ]
    return f'<div class="downloads">{"".join(links)}</div>'


def _address(path) -> str:
    """Of a file in the folder that the server may show, relative to the page."""
    return f"gradio_api/file={escape(str(path), quote=True)}"
