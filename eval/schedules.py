"""Schedules of the embedded model against its full run: PSNR of the clips, and what the oracle sees in them.

    python eval/schedules.py --schedules 1x2x2:2,reused:38 1x2x2:2,1x2x2+1x4x4@0.5:38

Same captions and noise in every arm, one seed a caption. Captions that no sweep has, of `shapes-unjudged`.
"""

import argparse
import sys
from dataclasses import astuple

import numpy as np
import torch
from diffusers import WanPipeline
from tqdm import tqdm

import flexivid
from flexivid.command_line import Parser, add_embedded_adapter, add_embedded_model, command, count
from flexivid.inputs import check_arm, empty_wan_pipeline, shapes_scenes
from flexivid.shapes.embedded import SAMPLING, USUAL
from flexivid.shapes.oracle import judge
from flexivid.shapes.world import FACTORS, Scene

SEED = 9000  # of the first caption; the others follow


def clips_of(pipe: WanPipeline, scenes: list[Scene]) -> torch.Tensor:
    """(clips, frames, 3, height, width) in [0, 1]."""
    generators = [torch.Generator().manual_seed(SEED + index) for index in range(len(scenes))]
    captions = [scene.caption for scene in scenes]
    return pipe(captions, **SAMPLING, generator=generators, output_type="pt").frames.float().clamp(0, 1)


def row(name: str, flops: float, clips: torch.Tensor, full: torch.Tensor, scenes: list[Scene]) -> str:
    """Of a Markdown table."""
    psnr = -10 * (clips - full).square().flatten(1).mean(1).clamp(min=1e-10).log10()
    seen = [judge(clip) for clip in clips.transpose(1, 2) * 2 - 1]
    shown = np.array([[words[factor] for factor in FACTORS] for words in seen], dtype=object)
    right = shown == np.array([astuple(scene) for scene in scenes], dtype=object)
    shares = " | ".join(f"{share:.2f}" for share in (*right.mean(0), right.all(1).mean()))
    return f"| {name} | {flops:.3f} | {psnr.mean():.1f} | {shares} |"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_embedded_model(parser)
    add_embedded_adapter(parser)
    parser.add_argument("--schedules", nargs="+", required=True, help="of 40 steps, such as 1x2x2:2,reused:38")
    parser.add_argument("--skip", type=count, default=240, help="so many captions before the first one")
    parser.add_argument("--captions", type=count, default=12, help="a clip each; %(default)s by default")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the transformer")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    empty = empty_wan_pipeline(arguments.model)
    for schedule in arguments.schedules:
        check_arm(empty, USUAL, adapter=arguments.adapter, schedule=schedule)
    scenes = shapes_scenes("shapes-unjudged")[arguments.skip :][: arguments.captions]
    if not scenes:
        raise ValueError(f"--skip {arguments.skip} leaves no caption")
    dtypes = {"default": torch.float32, "transformer": getattr(torch, arguments.dtype)}
    pipe = WanPipeline.from_pretrained(arguments.model, dtype=dtypes, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    full = clips_of(pipe, scenes)
    print("| schedule | FLOPs | PSNR | " + " | ".join((*FACTORS, "all")) + " |")
    print("|---" * (len(FACTORS) + 4) + "|")
    print(row("full", 1.0, full, full, scenes), flush=True)
    for schedule in tqdm(arguments.schedules):
        flexivid.enable(pipe, adapter=arguments.adapter, schedule=schedule)
        clips = clips_of(pipe, scenes)
        print(row(schedule, flexivid.summary(pipe).ratio, clips, full, scenes), flush=True)


if __name__ == "__main__":
    sys.exit(main())
