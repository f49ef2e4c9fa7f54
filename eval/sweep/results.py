"""What a sweep found: results.json, results.csv and pareto.png."""

import csv
import json
import os
from itertools import groupby
from pathlib import Path

import matplotlib

from sweep.metrics import HIGHER_IS_BETTER
from sweep.rivals import CACHES
from sweep.vbench import total_scores

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


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
                "note": CACHES[arm.cache].note if arm.cache else "",
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
    beside = path.with_suffix(".partial")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for line in lines for name in line)))
        writer.writeheader()
        writer.writerows(lines)
    os.replace(beside, path)


def write_pareto(results: dict, path: Path) -> None:
    """Quality over FLOPs and over seconds, every metric a row of panels, every method a line with its intervals."""
    rows = sorted(results["arms"], key=lambda row: (row["method"], row["flops_ratio"]))
    names = [name for name in HIGHER_IS_BETTER if any(name in row["metrics"] for row in rows)]
    figure, panels = plt.subplots(len(names), 2, figsize=(12, 3.2 * len(names)), squeeze=False, sharey="row")
    for name, line in zip(names, panels, strict=True):
        for ratio, panel in zip(("flops_ratio", "seconds_ratio"), line, strict=True):
            for method, group in groupby(rows, key=lambda row: row["method"]):
                points = [(row[ratio], row["metrics"][name]) for row in group if name in row["metrics"]]
                if not points:
                    continue
                x, values = zip(*sorted(points, key=lambda point: point[0]), strict=True)
                means = [value["mean"] for value in values]
                spans = [[v["mean"] - v["low"] for v in values], [v["high"] - v["mean"] for v in values]]
                style = {"color": "black", "marker": "*"} if method == "full" else {"marker": "o"}
                panel.errorbar(x, means, yerr=spans, label=method, capsize=2, markersize=4, linewidth=1, **style)
            panel.set_xlabel("share of the full run's " + ratio.removesuffix("_ratio").replace("flops", "FLOPs"))
            panel.grid(alpha=0.3)
        direction = "higher is better" if HIGHER_IS_BETTER[name] else "lower is better"
        line[0].set_ylabel(f"{name.replace('_', ' ')}\n({direction})")
    panels[0][1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    figure.tight_layout()
    beside = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(beside, dpi=110)
    os.replace(beside, path)
