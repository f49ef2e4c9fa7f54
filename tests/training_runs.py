"""Runs of `flexivid/train.py`: in this process, or in processes of their own where that is what is tested.

Those are forked from a process that has imported flexivid, which takes longer than what most of them do.
"""

import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState

from flexivid.train import main
from flexivid.training.distill import DistillObjective

TESTS = Path(__file__).parent
ROOT = TESTS.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["flexivid.train", "training_runs"])


@dataclass(frozen=True)
class Launch:
    """A script of the tests, which starts the training script, in so many processes.

    by_torchrun: started by torch's launcher, as people do it, each with the imports of its own.
    """

    script: str
    processes: int = 1
    by_torchrun: bool = False

    def start(self, path: Path, *before: str) -> list[BaseProcess]:
        """path: the config. before: scripts that are given this one to run."""
        words = [str(TESTS / name) for name in (*before, self.script)] + ["--config", str(path)]
        several = {}
        if self.by_torchrun:
            words = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(self.processes), *words]
            return [self._started(words, {"ACCELERATE_USE_CPU": "true"}, path)]
        if self.processes > 1:
            several = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
            several |= {"MASTER_PORT": str(_free_port())}
            several |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(self.processes))
        ranks = [dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)) for rank in range(self.processes)]
        return [self._started(words, several | (rank if several else {}), path) for rank in ranks]

    @staticmethod
    def _started(words: list[str], environment: dict[str, str], path: Path) -> BaseProcess:
        process = FORKS.Process(target=_run, args=(words, os.environ | environment, said_by(path)))
        process.start()
        return process


ONE = Launch("train_without_samples.py")
TWO = Launch("train_without_samples.py", 2)
LAUNCHED = Launch("train_without_samples.py", 2, by_torchrun=True)
SHARDED = Launch("train_with_fsdp_on_cpu.py", 2)


def _run(words: list[str], environment: dict[str, str], log: Path) -> None:
    """Becomes `python words`, its output at the end of a file."""
    os.environ.clear()
    os.environ.update(environment)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = words
    if words[0].endswith(".py"):
        runpy.run_path(words[0], run_name="__main__")
    else:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def said_by(path: Path) -> Path:
    """The file with what the processes of a config have printed."""
    return path.with_suffix(".txt")


def ended(processes: list[BaseProcess], seconds: float = 300) -> int:
    """The exit code: of several that of the first that failed."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(until - time.monotonic())
        if process.is_alive():
            for each in processes:
                each.kill()
            raise AssertionError(f"the run took more than {seconds:g} s")
    return next((process.exitcode for process in processes if process.exitcode), 0)


def write(tmp_path: Path, name: str, settings: dict, **more) -> tuple[Path, Path]:
    """(config file, output folder) of a run."""
    path, output = tmp_path / f"{name}.yaml", tmp_path / name
    path.write_text(yaml.safe_dump({**settings, "output": str(output), **more}))
    return path, output


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def train_here(path: Path, *overrides: str) -> int:
    """The script's main, in this process and without pictures, which want full-size clips. Returns its exit code."""
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillObjective, "sample", lambda self, path: None)
        try:
            return main(["--config", str(path), *overrides])
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)
            torch.set_num_threads(threads)
            signal.signal(signal.SIGTERM, handler)


def run(launch: Launch, path: Path) -> None:
    code = ended(launch.start(path))
    assert code == 0, said_by(path).read_text()[-2000:]


def start_and_signal(launch: Launch, path: Path, output: Path, after: int, number: int) -> int:
    """Starts a run, sends it a signal once it has logged `after` steps, and returns its exit status."""
    log = output / "log.jsonl"
    before = len(log.read_text().splitlines()) if log.exists() else 0
    assert before < after, f"the run before was killed only after {before} steps"
    processes = launch.start(path)
    while not (log.exists() and len(log.read_text().splitlines()) >= after):
        assert all(process.is_alive() for process in processes), said_by(path).read_text()[-2000:]
        time.sleep(0.005)
    for process in processes:
        with suppress(ProcessLookupError):  # the others end when one has gone
            os.kill(process.pid, number)
    if number == signal.SIGKILL:
        # Those that a launcher has started are in sessions of their own.
        while subprocess.run(["pkill", "-KILL", "-f", str(path)]).returncode == 0:
            time.sleep(0.01)
        assert not (output / "result").exists(), "the run ended before it could be killed"
    return ended(processes)
