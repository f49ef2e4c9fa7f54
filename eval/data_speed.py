"""How fast clips are read, and by av alone, and what keeping latents saves of a training step.

    python eval/data_speed.py --config configs/real-clips.yaml

Uses the folder, the model and the sizes of a training config, and writes nothing.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

from accelerate import Accelerator
from diffusers.utils import logging

from flexivid.training.config import load_config
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.data.captions import find_clips
from flexivid.training.data.clips import load_clip
from flexivid.training.data.conditions import conditions_of
from flexivid.training.data.encoding import encode
from flexivid.training.distill import DistillObjective


def seconds_of(action, rounds: int) -> float:
    """Median of some rounds, after one that does not count."""
    spent = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    arguments, overrides = parser.parse_known_args()
    logging.set_verbosity_error()
    config = load_config(arguments.config, overrides)
    if config.clips is None or config.clips.folder is None:
        parser.error("the config names no folder of clips")
    clips, buckets = find_clips(config.clips.folder), [Bucket.parse(text) for text in config.clips.buckets]

    def read_all() -> int:
        read = 0
        for clip in clips:
            try:
                load_clip(clip.path, buckets, config.clips.fps)
                read += 1
            except BrokenClip:
                pass
        return read

    count = read_all()
    print(f"{count} clips of {config.clips.folder}, {', '.join(map(str, buckets))} at {config.clips.fps:g} a second")
    print(f"as flexivid reads them: {count / seconds_of(read_all, arguments.rounds):.2f} clips a second")
    with mock.patch("decord.VideoReader", None):
        print(f"by av alone: {count / seconds_of(read_all, arguments.rounds):.2f} clips a second")

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
                conditions_of(pipe, clip.caption, bucket, config.clips)

        cached, encoding = seconds_of(step, arguments.rounds), seconds_of(encode_a_batch, arguments.rounds)
    print(f"steps of {config.batch_size} clips: {1 / cached:.2f} a second from kept latents")
    print(f"  reading and encoding each time, {encoding:.2f} s a step: {1 / (cached + encoding):.2f} a second")


if __name__ == "__main__":
    main()
