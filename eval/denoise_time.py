"""Denoise time of the embedded model at a budget against full compute, and where the difference to the FLOPs goes.

    python eval/denoise_time.py --output docs/measurements/denoise-time.json

Arms alternate within one run, and medians are compared, so that a slow minute of the machine hits both.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import logging
from tqdm import tqdm

import flexivid

ASSETS = Path(flexivid.__file__).parent / "assets"
CAPTION = "a striped red circle moving right on a black background"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSETS / "shapes")
    parser.add_argument("--adapter", type=Path, default=ASSETS / "shapes-flex")
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("outputs/denoise-time.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    pipe = WanPipeline.from_pretrained(arguments.model)
    pipe.set_progress_bar_config(disable=True)

    def denoise(batch: int) -> float:
        text, negative = pipe.encode_prompt([CAPTION] * batch, max_sequence_length=32)
        began = time.perf_counter()
        pipe(
            prompt_embeds=text,
            negative_prompt_embeds=negative,
            height=64,
            width=64,
            num_frames=17,
            num_inference_steps=40,
            guidance_scale=4.0,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        return time.perf_counter() - began

    rows = []
    for batch in arguments.batches:
        seconds = {"stock": [], "idle": [], "budget": []}
        for _ in tqdm(range(arguments.repeats + 1), desc=f"batch {batch}"):
            flexivid.disable(pipe)
            seconds["stock"].append(denoise(batch))
            for name, budget in (("idle", 1.0), ("budget", arguments.budget)):
                flexivid.enable(pipe, adapter=arguments.adapter, budget=budget)
                flexivid.plan(pipe, 17, 64, 64, 40, 32)  # counts FLOPs before the clock starts
                seconds[name].append(denoise(batch))
        summary = flexivid.summary(pipe)
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        rows.append(
            {
                "batch": batch,
                "seconds": medians,
                "time_ratio": medians["budget"] / medians["stock"],
                "flops_ratio": summary.ratio,
                "idle_overhead": medians["idle"] / medians["stock"] - 1,
                "schedule": str(summary.schedule),
                "all_seconds": seconds,
            }
        )
        print(json.dumps({key: value for key, value in rows[-1].items() if key != "all_seconds"}))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
