"""VBench (Huang et al. 2024, arXiv 2311.17982) through its own package in its own environment, one dimension a call.

`make vbench` makes the environment. A dimension is `scored`, or it has `weights missing`, a `dependency missing`, or it
`failed`: never 0 for a reason that is not the clips. docs/vbench.md says what to download.
"""

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from flexivid.files import write_json

CHECKOUT = Path(__file__).parents[2]
# Beside an installed flexivid there is no `make`: its environment lies in the folder where one works.
ROOT = CHECKOUT if (CHECKOUT / "Makefile").exists() else Path.cwd()
PYTHON = ROOT / ".venv-vbench" / "bin" / "python"
WORKER = Path(__file__).with_name("vbench_worker.py")
DEFAULT_CACHE = Path.home() / ".cache" / "vbench"

CLIP_B = "clip_model/ViT-B-32.pt"
VICLIP = ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz")
GRIT = ("grit_model/grit_b_densecap_objectdet.pth",)


@dataclass(frozen=True)
class Dimension:
    """group: which of the two scores it is part of. weights: files below the cache. modules: what VBench does not
    install itself. low, high: what the official normalisation maps to 0 and 1. share: its weight in the group.
    any_prompt: can be scored on prompts of one's own.
    """

    group: Literal["quality", "semantic"]
    weights: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0
    share: float = 1.0
    any_prompt: bool = True
    modules: tuple[str, ...] = ()


DIMENSIONS = {
    "subject_consistency": Dimension(
        "quality",
        ("dino_model/facebookresearch_dino_main/hubconf.py", "dino_model/dino_vitbase16_pretrain.pth"),
        0.1462,
    ),
    "background_consistency": Dimension("quality", (CLIP_B,), 0.2615),
    "temporal_flickering": Dimension("quality", (), 0.6293),
    "motion_smoothness": Dimension("quality", ("amt_model/amt-s.pth",), 0.706, 0.9975),
    "dynamic_degree": Dimension("quality", ("raft_model/models/raft-things.pth",), share=0.5),
    "aesthetic_quality": Dimension(
        "quality", ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth")
    ),
    "imaging_quality": Dimension("quality", ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",)),
    "object_class": Dimension("semantic", GRIT, any_prompt=False, modules=("detectron2",)),
    "multiple_objects": Dimension("semantic", GRIT, any_prompt=False, modules=("detectron2",)),
    "human_action": Dimension(
        # On other prompts it looks for the action in the file name, finds none, and says 0.
        "semantic",
        ("umt_model/l16_ptk710_ftk710_ftk400_f16_res224.pth",),
        any_prompt=False,
    ),
    "color": Dimension("semantic", GRIT, any_prompt=False, modules=("detectron2",)),
    "spatial_relationship": Dimension("semantic", GRIT, any_prompt=False, modules=("detectron2",)),
    "scene": Dimension("semantic", ("caption_model/tag2text_swin_14m.pth",), 0.0, 0.8222, any_prompt=False),
    "appearance_style": Dimension("semantic", (CLIP_B,), 0.0009, 0.2855, any_prompt=False),
    "temporal_style": Dimension("semantic", VICLIP, 0.0, 0.364),
    "overall_consistency": Dimension("semantic", VICLIP, 0.0, 0.364),
}


def availability(cache: Path | None) -> dict[str, str]:
    """Per dimension, what is missing to score it here, an empty string if nothing is known to be."""
    folder, environment = cache or DEFAULT_CACHE, PYTHON.parents[1]
    lacking = {}
    for name, dimension in DIMENSIONS.items():
        weights = [path for path in dimension.weights if not (folder / path).exists()]
        packages = [module for module in dimension.modules if not any(environment.glob(f"lib/python*/*/{module}"))]
        what = {
            "the environment is missing": [] if PYTHON.exists() else ["make vbench"],
            "weights missing": weights,
            "dependency missing": packages,
        }
        lacking[name] = "; ".join(f"{kind}: {', '.join(things)}" for kind, things in what.items() if things)
    return lacking


def standard_prompts(dimensions: list[str]) -> list[str]:
    """VBench's own prompts for some dimensions, or for all if none is named. Raises ValueError without its package."""
    found = list(ROOT.glob(".venv-vbench/lib/python*/site-packages/vbench/VBench_full_info.json"))
    if not found:
        raise ValueError("VBench's prompts are in its package: make vbench")
    entries = json.loads(found[0].read_text())
    wanted = set(dimensions or DIMENSIONS)
    return list(dict.fromkeys(entry["prompt_en"] for entry in entries if wanted & set(entry["dimension"])))


def score_dimension(videos: Path, name: str, cache: Path | None, standard: bool) -> dict:
    """{"status": ..., "score" or "detail": ...} of one dimension of one folder of clips."""
    missing = availability(cache)[name]
    if missing:
        return {"status": missing.split(":")[0], "detail": missing}
    environment = {**os.environ, "VBENCH_CACHE_DIR": str(cache or DEFAULT_CACHE)}
    # -P: the worker's own folder has a module that is called vbench too.
    command = [str(PYTHON), "-P", str(WORKER), str(videos), name, *(["standard"] if standard else [])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"status": "failed", "detail": done.stderr.strip()[-500:]}
    return json.loads(lines[-1])


def total_scores(dimensions: dict[str, dict]) -> dict[str, float]:
    """Quality, Semantic and Total of one arm, with the official normalisation; empty unless all 16 are scored."""
    if any(dimensions.get(name, {}).get("status") != "scored" for name in DIMENSIONS):
        return {}
    groups = {}
    for group in ("quality", "semantic"):
        members = {name: dimension for name, dimension in DIMENSIONS.items() if dimension.group == group}
        weighted = [d.share * (dimensions[name]["score"] - d.low) / (d.high - d.low) for name, d in members.items()]
        groups[group] = sum(weighted) / sum(dimension.share for dimension in members.values())
    return {**groups, "total": (4 * groups["quality"] + groups["semantic"]) / 5}


def values_of_clips(dimensions: dict[str, dict], clips: list) -> dict[str, np.ndarray]:
    """Of one arm, by `vbench_<dimension>`, one value a clip, where VBench says one for every clip."""
    names = [clip.file_name for clip in clips]
    whole = {
        name: d["videos"] for name, d in dimensions.items() if d["status"] == "scored" and {*names} <= {*d["videos"]}
    }
    return {f"vbench_{name}": np.array([values[clip] for clip in names]) for name, values in whole.items()}


def score_arms(
    names: list[str], folder: Path, arms: list[str], cache: Path | None, standard: bool
) -> dict[str, dict[str, dict]]:
    """Per arm and dimension what `score_dimension` says, kept in vbench/<arm>/<dimension>.json once it is scored."""
    scores = {arm: {} for arm in arms}
    pairs = [(arm, name) for arm in arms for name in names]
    for arm, name in tqdm(pairs, desc="VBench", disable=not pairs):
        path = folder / "vbench" / arm / f"{name}.json"
        if path.exists():
            scores[arm][name] = json.loads(path.read_text())
            continue
        answer = scores[arm][name] = score_dimension(folder / "videos" / arm, name, cache, standard)
        if answer["status"] == "scored":
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, answer)
    return scores
