"""Quality over compute: pareto.png, and what the curve on the page of a sweep is drawn from.

Where a metric has a difference to the full run, prompt by prompt, that is drawn: its interval is far smaller than that
of the metric itself, and it is what can be told apart.
"""

from pathlib import Path

import matplotlib
import numpy as np

from flexivid.files import replacing
from flexivid.sweep.metrics import HIGHER_IS_BETTER

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# A colour and a marker for each method, the same in every picture: warm and round are flexivid's, cool its rivals'.
LOOKS = {
    "full": ("#000000", "*"),
    "adapter": ("#d62728", "o"),
    "reuse": ("#ff7f0e", "o"),
    "training-free": ("#e377c2", "o"),
    "interleaved": ("#8c564b", "o"),
    "adapter-same": ("#ad494a", "o"),
    "weak-first": ("#e7969c", "o"),
    "direct": ("#7d7f00", "o"),
    "calibrated": ("#f2b400", "o"),
    "adapter-half-steps": ("#7b2d43", "o"),
    "adapter-fbcache": ("#f4a582", "o"),
    "few": ("#b0006d", "o"),
    "steps": ("#1f77b4", "s"),
    "unguided": ("#00b4f0", "s"),
    "steps-at-our-places": ("#6baed6", "s"),
    "steps-optimised": ("#08306b", "s"),
    "magcache": ("#2ca02c", "D"),
    "seacache": ("#17a2a8", "D"),
    "seacache-extrapolated": ("#0b5e63", "D"),
    "fbcache": ("#8fce6d", "^"),
    "taylorseer": ("#7b52ab", "v"),
    "fastercache": ("#b39ddb", "P"),
    "pab": ("#4a48a8", "X"),
    "cache-dit": ("#00441b", "^"),
    "low-resolution": ("#7f7f7f", "h"),
}
OTHER = ("#444444", "x")  # a method that there is no more, in measurements of before
DIRECTION = {True: "higher is better", False: "lower is better", None: "relative to the full run's, 1 is best"}
TICKS = (0.05, 0.075, 0.1, 0.125, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
SPREAD = 0.05  # of its place, by which an arm is moved aside, so that arms of one budget do not hide each other


def is_paired(rows: list[dict], metric: str) -> bool:
    """Whether every arm but the full run says how much it differs from that."""
    others = [row for row in rows if row["method"] != "full" and metric in row["metrics"]]
    return bool(others) and all(metric in row.get("difference_to_full", {}) for row in others)


def estimates(rows: list[dict], metric: str) -> dict[str, dict[str, float]]:
    """By arm what is drawn: its difference to the full run, or where there is none the metric itself."""
    kind = "difference_to_full" if is_paired(rows, metric) else "metrics"
    return {row["arm"]: row[kind][metric] for row in rows if metric in row.get(kind, {})}


def front(rows: list[dict], metric: str) -> list[str]:
    """The arms than which no other one has a better mean at as many FLOPs or fewer. Intervals are not looked at."""
    score = {True: lambda mean: mean, False: lambda mean: -mean, None: lambda mean: -abs(mean - 1)}
    points = {
        row["arm"]: (row["flops_ratio"], score[HIGHER_IS_BETTER[metric]](row["metrics"][metric]["mean"]))
        for row in rows
        if metric in row["metrics"]
    }

    def is_beaten(share: float, quality: float) -> bool:
        return any(s <= share and q >= quality and (s, q) != (share, quality) for s, q in points.values())

    return [arm for arm, point in points.items() if not is_beaten(*point)]


def view(rows: list[dict], metric: str) -> tuple[float, float]:
    """The range of an axis that holds most arms and their intervals: without the worst sixth, if that lies far off."""
    found, higher = list(estimates(rows, metric).values()), HIGHER_IS_BETTER[metric]
    means = [estimate["mean"] for estimate in found]
    if higher is None:
        furthest = sorted(abs(mean - 1) for mean in means)[: max(6, int(len(means) * 5 / 6) + 1)][-1] or 0.01
        low, high = 1 - 1.25 * furthest, 1 + 1.25 * furthest
        return max(0.0, low), high
    ordered = sorted(means, reverse=higher)
    best, worst = ordered[0], ordered[int(len(ordered) * 5 / 6)] if len(ordered) > 6 else ordered[-1]
    span = best - worst or abs(best) or 1.0
    low, high = sorted((best + 0.15 * span, worst - 0.25 * span))
    near = [estimate for estimate in found if low <= estimate["mean"] <= high]
    return min([low, *(e["low"] for e in near)]), max([high, *(e["high"] for e in near)])


def metrics_of(rows: list[dict]) -> list[str]:
    """The metrics that an arm has, in the order of `HIGHER_IS_BETTER`."""
    return [name for name in HIGHER_IS_BETTER if any(name in row["metrics"] for row in rows)]


def write_pareto(results: dict, path: Path, metrics: list[str] | None = None) -> None:
    """Every metric a row of panels, over FLOPs and, where they were measured, over seconds; every method a line.

    metrics: names to draw, all by default. What falls far below the other arms is a triangle at the edge. Arms are
    moved aside by up to SPREAD, so that those of one budget stand beside each other.
    """
    rows = results["arms"]
    names = metrics or metrics_of(rows)
    ratios = [name for name in ("flops_ratio", "seconds_ratio") if all(name in row for row in rows)]
    size = (2.2 + 5.6 * len(ratios), 3.7 * len(names))
    figure, panels = plt.subplots(len(names), len(ratios), figsize=size, squeeze=False, sharey="row")
    for metric, line in zip(names, panels, strict=True):
        for ratio, panel in zip(ratios, line, strict=True):
            _draw(panel, rows, metric, ratio)
        words = "difference to the full run, " if is_paired(rows, metric) else ""
        line[0].set_ylabel(f"{metric.replace('_', ' ')}\n({words}{DIRECTION[HIGHER_IS_BETTER[metric]]})")
    handles = {}
    for panel in panels.flat:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.tight_layout()
    right = panels[0][-1].get_position()
    figure.legend(handles.values(), handles, fontsize=9, loc="upper left", bbox_to_anchor=(right.x1 + 0.01, right.y1))
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, bbox_inches="tight")
    plt.close(figure)


def _draw(panel, rows: list[dict], metric: str, ratio: str) -> None:
    found, (low, high) = estimates(rows, metric), view(rows, metric)
    drawn = [row for row in rows if row["arm"] in found and not (is_paired(rows, metric) and row["method"] == "full")]
    methods = sorted({row["method"] for row in drawn}, key=[*LOOKS, *(row["method"] for row in drawn)].index)
    aside = np.linspace(1 - SPREAD, 1 + SPREAD, len(methods)) if len(methods) > 1 else [1.0]
    for method, factor in zip(methods, aside, strict=True):
        group = sorted((row for row in drawn if row["method"] == method), key=lambda row: row[ratio])
        values = [found[row["arm"]] for row in group]
        x, y = [row[ratio] * factor for row in group], [value["mean"] for value in values]
        spans = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
        colour, marker = LOOKS.get(method, OTHER)
        panel.plot(x, y, color=colour, marker=marker, markersize=6, linewidth=1.6, label=method)
        panel.errorbar(x, y, yerr=spans, fmt="none", ecolor=colour, elinewidth=1.4, capsize=2.5, alpha=0.45)
        for at, mean in zip(x, y, strict=True):
            if not low <= mean <= high:
                edge, triangle = (low, "v") if mean < low else (high, "^")
                panel.plot(at, edge, triangle, color=colour, markersize=9, clip_on=False)
    if is_paired(rows, metric):
        panel.axhline(0, color=LOOKS["full"][0], linestyle="--", linewidth=1, label="full")
    panel.set_ylim(low, high)
    panel.set_xscale("log")
    left, right = panel.get_xlim()
    panel.set_xticks([tick for tick in TICKS if left <= tick <= right], minor=False)
    panel.xaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.set_xlabel("share of the full run's " + ratio.removesuffix("_ratio").replace("flops", "FLOPs"))
    panel.grid(alpha=0.3)


def curve_of(rows: list[dict]) -> dict[str, dict]:
    """By metric what the page draws: values by arm, the range that is shown, and the arms that none is better than."""
    return {
        metric: {
            "paired": is_paired(rows, metric),
            "values": estimates(rows, metric),
            "view": view(rows, metric),
            "front": front(rows, metric),
        }
        for metric in metrics_of(rows)
    }
