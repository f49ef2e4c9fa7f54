"""The picture of the README: the same prompts and seeds at full compute, in fewer steps and at budgets of as much.

python eval/budget_picture.py --output docs/tenth.png
"""

import sys
from pathlib import Path

import torch
from diffusers import WanPipeline
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import flexivid
from flexivid.command_line import Parser, budget_share, command, seed
from flexivid.files import replacing
from flexivid.inputs import check_arm, check_output_file, empty_wan_pipeline
from flexivid.sampling.places import fewer_steps
from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING, USUAL

PROMPTS = (
    "a striped red circle moving right on a black background",
    "a checked yellow square turning on a gray background",
    "a plain blue triangle moving up on a white background",
    "a dotted green cross growing on a black background",
)
FRAMES = (0, 8, 16)
SCALE = 2
FONT_SIZE, HEADER = 30, 78  # pixels: two lines, which can be read on a phone too


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--budgets", type=budget_share, nargs="+", default=[0.1], help="beside full compute")
    parser.add_argument("--seed", type=seed, default=0, help="of the noise; %(default)s by default")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/budgets.png"), help="a picture; %(default)s by default"
    )
    arguments = parser.parse_args(argv)
    check_output_file(arguments.output, ".png", ".jpg", ".webp")
    check_arm(empty_wan_pipeline(MODEL), USUAL, adapter=ADAPTER, budget=min(arguments.budgets))
    pipe = WanPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    cell, gap = 64 * SCALE, 8
    column, steps = len(FRAMES) * cell + gap, USUAL["steps"]
    arms: list[tuple[int, float | None]] = [(steps, None)]  # steps of the call, budget
    for share in sorted(arguments.budgets, reverse=True):
        arms += [(fewer_steps(steps, share), None), (steps, share)]
    picture = Image.new("RGB", (len(arms) * column - gap, HEADER + len(PROMPTS) * (cell + gap)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (count, share) in enumerate(tqdm(arms)):
        label = f"{count} steps\n{count / steps:.0%} of the FLOPs"
        if share is not None:
            flexivid.enable(pipe, adapter=ADAPTER, budget=share, merge_lora=True)
        settings = {**SAMPLING, "num_inference_steps": count}
        videos = pipe(list(PROMPTS), **settings, generator=torch.Generator().manual_seed(arguments.seed)).frames
        if share is not None:
            label = f"flexivid\n{flexivid.summary(pipe).ratio:.1%} of the FLOPs"
            flexivid.disable(pipe)
        draw.text((i * column, 0), label, fill="black", font=ImageFont.load_default(FONT_SIZE))
        for row, video in enumerate(videos):
            for k, frame in enumerate(FRAMES):
                image = Image.fromarray((video[frame] * 255).round().astype("uint8")).resize((cell, cell), 0)
                picture.paste(image, (i * column + k * cell, HEADER + row * (cell + gap)))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(arguments.output) as partial:
        picture.save(partial)


if __name__ == "__main__":
    sys.exit(main())
