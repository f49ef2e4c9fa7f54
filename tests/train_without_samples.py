"""`flexivid/train.py` without the pictures, which want full-size clips."""

import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from flexivid.training.distill import DistillObjective  # noqa: E402

DistillObjective.sample = lambda self, path: None
sys.argv[0] = str(ROOT / "flexivid/train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
