"""How fast clips are read, and by av alone, and what keeping latents saves of a training step.

    python eval/data_speed.py --config configs/real-clips.yaml

Uses the folder, the model and the sizes of a training config, and writes nothing.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

from accelerate import Accelerator

from flexivid.command_line import Parser, add_rounds, command
from flexivid.training.config import Config, load_config
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.data.captions import CaptionedClip, find_clips
from flexivid.training.data.clips import load_clip
from flexivid.training.data.conditions import conditions_of
from flexivid.training.data.encoding import encode
from flexivid.training.data.media import media_of, taken_by
from flexivid.training.distill import DistillObjective
from flexivid.training.forecast import check_model


def seconds_of(action, rounds: int) -> float:
    """Median of some rounds, after one that does not count."""
    spent = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        action()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:])


def parse_arguments(argv: list[str] | None) -> tuple[Config, int]:
    """The training config and the number of rounds. Raises ValueError for what cannot be measured."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config", required=True, help="as flexivid/train.py takes it, overrides included")
    add_rounds(parser, default=5)
    arguments, overrides = parser.parse_known_args(argv)
    config = load_config(arguments.config, overrides)
    if config.objective != "distill" or config.base is None:
        raise ValueError(f"{arguments.config} must be of the objective distill, and name a base")
    if config.clips is None or config.clips.folder is None:
        raise ValueError(f"{arguments.config} names no folder of clips")
    check_model(config)
    return config, arguments.rounds


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


@command
def main(argv: list[str] | None = None) -> None:
    config, rounds = parse_arguments(argv)
    clips, buckets = find_clips(config.clips.folder), [Bucket.parse(text) for text in config.clips.buckets]
    count = read_all(config, clips, buckets)
    if not count:
        raise ValueError(f"none of the {len(clips)} clips of {config.clips.folder} can be read")
    print(f"{count} clips of {config.clips.folder}, {', '.join(map(str, buckets))} at {config.clips.fps:g} a second")
    print(f"decord: {count / seconds_of(lambda: read_all(config, clips, buckets), rounds):.2f} clips a second")
    with mock.patch("decord.VideoReader", None):
        print(f"av:     {count / seconds_of(lambda: read_all(config, clips, buckets), rounds):.2f} clips a second")
    cached, encoding = time_steps(config, clips, buckets, rounds)
    print(f"steps of {config.batch_size} clips: {1 / cached:.2f} a second from kept latents")
    print(f"  reading and encoding each time, {encoding:.2f} s a step: {1 / (cached + encoding):.2f} a second")


if __name__ == "__main__":
    sys.exit(main())
