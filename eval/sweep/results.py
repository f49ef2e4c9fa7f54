"""What a sweep found: results.json, results.csv and pareto.png."""

import csv
import json
from pathlib import Path

import matplotlib

from flexivid.files import replacing
from sweep.metrics import HIGHER_IS_BETTER
from sweep.rivals import RIVALS
from sweep.vbench import total_scores

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MARKERS = "osD^vP<>Xph"
DIRECTION = {True: "higher is better", False: "lower is better", None: "relative to the full run's, 1 is best"}


def assemble(facts: dict, sampler, scorer, arms: list, videos_per_prompt: int, vbench: dict) -> dict:
    """A row per arm, the full run first. flops_ratio is counted around the real run: with a cache, over all clips."""
    rows = []
    for arm in arms:
        records = [json.loads(sampler.record(arm, i).read_text()) for i in range(len(sampler.batches))]
        counted = [record for record in records if record["flops"] is not None]
        timing = json.loads(sampler.timing(arm).read_text())
        metrics, differences = scorer.estimates(arm, arms[0], videos_per_prompt, vbench)
        rows.append(
            {
                "arm": arm.name,
                "method": arm.method,
                "budget": arm.budget,
                "steps": arm.steps,
                "settings": (arm.flexivid or {}) | (arm.settings or {}),
                "note": RIVALS[arm.rival].note if arm.rival else "",
                "flops": sum(record["flops"] for record in counted) / sum(record["clips"] for record in counted),
                "seconds": timing["seconds"] / timing["clips"],
                "metrics": metrics,
                "difference_to_full": differences,
                "vbench": {name: {k: v for k, v in d.items() if k != "videos"} for name, d in vbench[arm.name].items()},
                "vbench_total": total_scores(vbench[arm.name]),
            }
        )
    for row in rows:
        row["flops_ratio"] = row["flops"] / rows[0]["flops"]
        row["seconds_ratio"] = row["seconds"] / rows[0]["seconds"]
    return {**facts, "arms": rows}


def write_csv(results: dict, path: Path) -> None:
    """One line an arm; every metric with its interval and its difference to the full run."""
    columns = ["arm", "method", "budget", "steps", "flops_ratio", "seconds", "seconds_ratio"]
    lines = []
    for row in results["arms"]:
        line = {name: row[name] for name in columns}
        for kind, prefix in (("metrics", ""), ("difference_to_full", "difference_")):
            for name, value in row[kind].items():
                line |= {f"{prefix}{name}_{part}": value[part] for part in ("mean", "low", "high")}
        line |= {f"vbench_{name}_score": entry.get("score") for name, entry in row["vbench"].items()}
        line |= {f"vbench_{name}": score for name, score in row["vbench_total"].items()}
        lines.append(line)
    with replacing(path) as partial, partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)


def write_pareto(results: dict, path: Path, metrics: list[str] | None = None) -> None:
    """Quality over FLOPs and over seconds, every metric a row of panels, every method a line with its intervals.

    metrics: names to draw, all by default. What falls far below the other arms is a triangle at the edge.
    """
    rows = sorted(results["arms"], key=lambda row: (row["method"], row["flops_ratio"]))
    names = [name for name in metrics or HIGHER_IS_BETTER if any(name in row["metrics"] for row in rows)]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    figure, panels = plt.subplots(len(names), 2, figsize=(12, 3.6 * len(names)), squeeze=False, sharey="row")
    for name, line in zip(names, panels, strict=True):
        estimates = [row["metrics"][name] for row in rows if name in row["metrics"]]
        low, high = _view(estimates, HIGHER_IS_BETTER[name])
        for ratio, panel in zip(("flops_ratio", "seconds_ratio"), line, strict=True):
            for number, method in enumerate(methods):
                group = [row for row in rows if row["method"] == method and name in row["metrics"]]
                if not group:
                    continue
                x = [row[ratio] for row in group]
                values = [row["metrics"][name] for row in group]
                y = [value["mean"] for value in values]
                spans = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
                style = {"color": plt.get_cmap("tab20")(number % 20), "marker": MARKERS[number % len(MARKERS)]}
                style = {"color": "black", "marker": "*"} if method == "full" else style
                panel.errorbar(
                    x, y, yerr=spans, label=method, capsize=2, markersize=5, linewidth=1, elinewidth=0.5, **style
                )
                for at, mean in zip(x, y, strict=True):
                    if not low <= mean <= high:
                        edge, marker = (low, "v") if mean < low else (high, "^")
                        panel.plot(at, edge, marker, color=style["color"], markersize=8, clip_on=False)
            panel.set_ylim(low, high)
            panel.set_xlabel("share of the full run's " + ratio.removesuffix("_ratio").replace("flops", "FLOPs"))
            panel.grid(alpha=0.3)
        line[0].set_ylabel(f"{name.replace('_', ' ')}\n({DIRECTION[HIGHER_IS_BETTER[name]]})")
    panels[0][1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110)
    plt.close(figure)


def _view(estimates: list[dict], higher_is_better: bool | None) -> tuple[float, float]:
    """The range of an axis that holds most arms and their intervals: without the worst sixth, if that lies far off.

    higher_is_better: None where nearer to 1 is.
    """
    means = [estimate["mean"] for estimate in estimates]
    if higher_is_better is None:
        furthest = sorted(abs(mean - 1) for mean in means)[: max(6, int(len(means) * 5 / 6) + 1)][-1] or 0.01
        low, high = 1 - 1.25 * furthest, 1 + 1.25 * furthest
        return max(0.0, low), high
    ordered = sorted(means, reverse=higher_is_better)
    best, worst = ordered[0], ordered[int(len(ordered) * 5 / 6)] if len(ordered) > 6 else ordered[-1]
    span = best - worst or abs(best) or 1.0
    low, high = sorted((best + 0.15 * span, worst - 0.25 * span))
    near = [estimate for estimate in estimates if low <= estimate["mean"] <= high]
    return min([low, *(e["low"] for e in near)]), max([high, *(e["high"] for e in near)])
