"""How fast clips are read, and by av alone, and what keeping latents saves of a training step.

    python eval/data_speed.py --config configs/real-clips.yaml
    python eval/data_speed.py --config configs/real-clips.yaml --before CHECKOUT --output speed.json --steps 12

The first uses the folder, the model and the sizes of a training config, and writes nothing. The second trains by the
config in several CPU processes, with this code and that of another checkout in turn, and compares steps and losses.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from accelerate import Accelerator

from flexivid.command_line import Parser, add_rounds, command, count
from flexivid.files import write_text
from flexivid.inputs import check_output_file
from flexivid.training.config import Config, load_config
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.data.captions import CaptionedClip, find_clips
from flexivid.training.data.clips import load_clip
from flexivid.training.data.conditions import conditions_of
from flexivid.training.data.encoding import encode
from flexivid.training.data.media import media_of, taken_by
from flexivid.training.distill import DistillObjective
from flexivid.training.forecast import check_model

ROOT = Path(__file__).resolve().parents[1]
TIMED = ROOT / "eval/parts/timed_training.py"


def seconds_of(action, rounds: int) -> float:
    """Median of some rounds, after one that does not count."""
    spent = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def parse_arguments(argv: list[str] | None) -> tuple[Config, argparse.Namespace, list[str]]:
    """The training config, what else was asked for, and overrides. Raises ValueError for what cannot be measured."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="as flexivid/train.py takes it, overrides included")
    add_rounds(parser, default=5)
    parser.add_argument("--before", type=Path, help="checkout of the code that training steps are compared with")
    parser.add_argument("--processes", type=count, default=2, help="that train; %(default)s by default")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="of training; bf16 by default")
    parser.add_argument("--output", type=Path, help="JSON file for what --before has found")
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    if config.objective != "distill" or config.base is None:
        raise ValueError(f"{arguments.config} must be of the objective distill, and name a base")
    if config.clips is None or config.clips.folder is None:
        raise ValueError(f"{arguments.config} names no folder of clips")
    if arguments.before is not None and not (arguments.before / "flexivid/train.py").is_file():
        raise ValueError(f"--before must be a checkout of flexivid, and {arguments.before} has no flexivid/train.py")
    if arguments.output is not None:
        check_output_file(arguments.output, ".json")
    check_model(config)
    return config, arguments, overrides


def read_all(config: Config, clips: list[CaptionedClip], buckets: list[Bucket]) -> int:
    """How many of the clips can be read."""
    read = 0
    for clip in clips:
        try:
            load_clip(clip.path, buckets, config.clips.fps)
            read += 1
        except BrokenClip:
            pass
    return read


def time_steps(config: Config, clips: list[CaptionedClip], buckets: list[Bucket], rounds: int) -> tuple[float, float]:
    """Seconds of a step from kept latents, and of reading and encoding its clips."""
    with tempfile.TemporaryDirectory() as folder:
        kept = config.clips.model_copy(update={"cache": Path(folder)})
        objective = DistillObjective(config.model_copy(update={"clips": kept}), Accelerator(cpu=True))
        pipe, broken = objective.pipeline, dict(objective.data.broken)
        readable = [clip for clip in clips if str(clip.path) not in broken]
        steps = iter(range(10**9))

        def step() -> None:
            objective.loss(objective.model, next(steps), 0).backward()

        def encode_a_batch() -> None:
            for number in range(config.batch_size):
                clip = readable[number % len(readable)]
                bucket, frames = load_clip(clip.path, buckets, config.clips.fps)
                encode(pipe.vae, frames[None])
                media = media_of(taken_by(type(pipe)), clip, frames, bucket, config.clips.fps)
                conditions_of(pipe, clip.caption, bucket, config.clips, media)

        return seconds_of(step, rounds), seconds_of(encode_a_batch, rounds)


def train_from(checkout: Path, arguments: argparse.Namespace, overrides: list[str], cache: Path) -> dict:
    """Trains with the code of a checkout. Returns what `parts/timed_training.py` writes."""
    with tempfile.TemporaryDirectory() as folder:
        times, said = Path(folder) / "times.json", Path(folder) / "said.txt"
        words = [sys.executable, str(TIMED), str(times), "--config", arguments.config, *overrides]
        words += ["--output", f"{folder}/out", "--clips.cache", str(cache)]
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        environment = {
            "PYTHONPATH": str(checkout.resolve()),
            "ACCELERATE_USE_CPU": "true",
            "ACCELERATE_MIXED_PRECISION": arguments.precision,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(arguments.processes)),
        }
        with said.open("w") as file:
            processes = [
                subprocess.Popen(
                    words,
                    env=os.environ | environment | dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank)),
                    stdout=file,
                    stderr=file,
                )
                for rank in range(arguments.processes)
            ]
            codes = [process.wait() for process in processes]
        if any(codes):
            raise ValueError(f"training with {checkout} failed: {said.read_text()[-2000:]}")
        return json.loads(times.read_text())


def figures(runs: list[dict]) -> dict:
    """Medians over all steps of some runs, without the first two of each, in which memory is allocated."""
    steps = [step for run in runs for step in run["steps"][2:]]
    reading = [batch for run in runs for batch in run["reading"][2:]]
    seconds = statistics.median(step["seconds"] for step in steps)
    return {
        "steps_per_second": 1 / seconds,
        "seconds_per_step": seconds,
        "cpu_seconds_per_step_of_a_process": statistics.median(step["cpu_seconds"] for step in steps),
        "cpu_seconds_of_reading_a_batch": statistics.median(batch["cpu_seconds"] for batch in reading),
        "read_in_the_step": sum(batch["in_the_step"] for batch in reading) / len(reading),
        "seconds_of_all_steps": [[round(step["seconds"], 4) for step in run["steps"]] for run in runs],
    }


def compare(config: Config, arguments: argparse.Namespace, overrides: list[str]) -> dict:
    """Steps of training with this code and with that before it, in turn, so that what else runs disturbs both."""
    checkouts = {"before": arguments.before, "now": ROOT}
    runs: dict[str, list[dict]] = {name: [] for name in checkouts}
    with tempfile.TemporaryDirectory() as cache:
        for _ in range(arguments.rounds):
            for name, checkout in checkouts.items():
                runs[name].append(train_from(checkout, arguments, overrides, Path(cache)))
    found = {name: figures(of_code) for name, of_code in runs.items()}
    losses = [[step["losses"] for step in run["steps"]] for of_code in runs.values() for run in of_code]
    return {
        "config": arguments.config,
        "overrides": overrides,
        "processes": arguments.processes,
        "precision": arguments.precision,
        "clips_a_step": config.batch_size,
        "rounds": arguments.rounds,
        **found,
        "times_as_many_steps_a_second": found["now"]["steps_per_second"] / found["before"]["steps_per_second"],
        "losses_and_gradient_norms_are_equal": all(each == losses[0] for each in losses),
    }


@command
def main(argv: list[str] | None = None) -> None:
    config, arguments, overrides = parse_arguments(argv)
    rounds = arguments.rounds
    if arguments.before is not None:
        text = json.dumps(compare(config, arguments, overrides), indent=1)
        print(text)
        if arguments.output is not None:
            write_text(arguments.output, text + "\n")
        return
    clips, buckets = find_clips(config.clips.folder), [Bucket.parse(text) for text in config.clips.buckets]
    readable = read_all(config, clips, buckets)
    if not readable:
        raise ValueError(f"none of the {len(clips)} clips of {config.clips.folder} can be read")
    print(f"{readable} clips of {config.clips.folder}, {', '.join(map(str, buckets))} at {config.clips.fps:g} a second")
    print(f"decord: {readable / seconds_of(lambda: read_all(config, clips, buckets), rounds):.2f} clips a second")
    with mock.patch("decord.VideoReader", None):
        print(f"av:     {readable / seconds_of(lambda: read_all(config, clips, buckets), rounds):.2f} clips a second")
    cached, encoding = time_steps(config, clips, buckets, rounds)
    print(f"steps of {config.batch_size} clips: {1 / cached:.2f} a second from kept latents")
    print(f"  reading and encoding each time, {encoding:.2f} s a step: {1 / (cached + encoding):.2f} a second")


if __name__ == "__main__":
    sys.exit(main())
