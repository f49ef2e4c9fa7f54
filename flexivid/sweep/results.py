"""What a sweep found: results.json and results.csv."""

import csv
import json
from pathlib import Path

from flexivid.files import replacing
from flexivid.sweep.rivals import RIVALS
from flexivid.sweep.vbench import total_scores


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
