"""Scores one VBench dimension; runs in VBench's own environment (`make vbench`) and speaks JSON on its last line.

.venv-vbench/bin/python eval/sweep/vbench_worker.py VIDEOS DIMENSION [standard]
"""

import contextlib
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

import vbench  # noqa: E402


def score(videos: str, dimension: str, standard: bool) -> float:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        everything = Path(vbench.__file__).with_name("VBench_full_info.json")
        judge = vbench.VBench(device, str(everything), folder)
        mode = "vbench_standard" if standard else "custom_input"
        judge.evaluate(videos_path=videos, name="score", dimension_list=[dimension], mode=mode, local=True)
        results = json.loads(Path(folder, "score_eval_results.json").read_text())
    return float(results[dimension][0])


def main() -> None:
    videos, dimension, *rest = sys.argv[1:]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            answer = {"status": "scored", "score": score(videos, dimension, rest == ["standard"])}
    except (ImportError, ModuleNotFoundError) as error:
        answer = {"status": "dependency missing", "detail": str(error)}
    except Exception as error:  # whatever a dimension's own code raises is an answer too
        answer = {"status": "failed", "detail": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
