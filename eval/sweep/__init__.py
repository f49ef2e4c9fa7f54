"""The parts of `eval/vbench_sweep.py`: arms, rivals, sampling, scoring, results and the page."""
