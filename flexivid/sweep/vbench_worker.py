"""Scores one VBench dimension; runs in VBench's own environment (`make vbench`) and speaks JSON on its last line.

.venv-vbench/bin/python flexivid/sweep/vbench_worker.py VIDEOS DIMENSION [standard]
"""

import contextlib
import importlib
import json
import sys
import tempfile
from pathlib import Path

import torch

_declarations = None
if not torch.cuda.is_available():
    # torchvision from PyPI registers kernels for operators that a CPU torch never declared.
    _declarations = torch.library.Library("torchvision", "DEF")
    _declarations.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _declarations.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def score(videos: str, dimension: str, standard: bool) -> dict:
    """{"score": of all clips, "videos": of each by file name, where the dimension gives one}."""
    vbench = importlib.import_module("vbench")
    importlib.import_module(f"vbench.{dimension}")  # VBench itself hides which package is missing
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(vbench.__file__).with_name("VBench_full_info.json")
        judge = vbench.VBench(device, str(everything), folder)
        mode = "vbench_standard" if standard else "custom_input"
        judge.evaluate(videos_path=videos, name="score", dimension_list=[dimension], mode=mode, local=True)
        results = json.loads(Path(folder, "score_eval_results.json").read_text())
    total, videos_results = results[dimension]
    single = {Path(entry["video_path"]).name: entry["video_results"] for entry in videos_results}
    return {"score": float(total), "videos": {n: float(v) for n, v in single.items() if isinstance(v, int | float)}}


def main() -> None:
    videos, dimension, *rest = sys.argv[1:]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = {"status": "scored", **score(videos, dimension, rest == ["standard"])}
    except ImportError as error:
        answer = {"status": "dependency missing", "detail": str(error)}
    except Exception as error:  # whatever a dimension's own code raises is an answer too
        answer = {"status": "failed", "detail": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
