"""Prints a checksum of the clip of every family's tiny pipeline, at several budgets: run it before and after a change.

python tests/clips_of_families.py > before.txt
"""

import hashlib
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "eval"), str(Path(__file__).parent)]
from diffusers import WanPipeline  # noqa: E402
from diffusers.utils import logging  # noqa: E402
from families import IMAGE_PIPELINES, TINY, tiny_image_pipeline, tiny_pipeline  # noqa: E402

import flexivid  # noqa: E402
from flexivid.shapes.embedded import ADAPTER, MODEL  # noqa: E402

SETTINGS = [{"budget": budget} for budget in (1.0, 0.5, 0.25)]
SETTINGS += [{"budget": 0.5, "order": "weak-first"}, {"budget": 0.5, "guidance": "same"}]
SETTINGS += [{"budget": 0.6, "guidance": "weak-uncond"}, {"budget": 0.5, "parametrisation": "direct"}]


def clip(pipe, call: dict) -> str:
    output = pipe(**call, generator=torch.Generator().manual_seed(0))
    frames = output.frames if hasattr(output, "frames") else output.images
    return hashlib.sha256(torch.as_tensor(frames).detach().float().contiguous().numpy().tobytes()).hexdigest()[:16]


def show(name: str, pipe, call: dict, settings: list[dict]) -> None:
    print(name, "stock", clip(pipe, call), flush=True)
    for setting in settings:
        told = " ".join(f"{key}={value}" for key, value in setting.items() if key != "adapter")
        try:
            flexivid.enable(pipe, **setting)
            print(name, told, clip(pipe, call), flush=True)
        except ValueError as error:
            print(name, told, "refused:", str(error).splitlines()[0][:40], flush=True)
        flexivid.disable(pipe)


def main() -> None:
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    for name in TINY:
        if name != "wan-i2v":  # an image pipeline's
            show(name, *tiny_pipeline(name), SETTINGS)
    for name in IMAGE_PIPELINES:
        show(name, *tiny_image_pipeline(name), SETTINGS)
    pipe = WanPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle moving left on a black background", "num_inference_steps": 10, "num_frames": 17}
    call |= {"height": 64, "width": 64, "guidance_scale": 5.0, "max_sequence_length": 32, "output_type": "latent"}
    merged = [{"budget": 0.5, "adapter": ADAPTER, "merge_lora": merge} for merge in (False, True)]
    show("embedded", pipe, call, [*SETTINGS, *merged])


if __name__ == "__main__":
    main()
