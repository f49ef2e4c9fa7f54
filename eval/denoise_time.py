"""Denoise time of the embedded model at a budget against full compute, and where the difference to the FLOPs goes.

    python eval/denoise_time.py --output docs/measurements/denoise-time.json
    python eval/denoise_time.py --compile --output docs/measurements/denoise-time-compiled.json

Arms alternate within one run, and medians are compared, so that a slow minute of the machine hits both. A last run of
each arm, with clocks around every forward, splits the seconds by patch size into the stock forward and what flexivid
does around it.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import WanPipeline
from diffusers.utils import logging
from tqdm import tqdm

import flexivid
from flexivid.shapes.embedded import ADAPTER, MODEL, SAMPLING

CAPTION = "a striped red circle moving right on a black background"


def seconds_by_patch_size(pipe: WanPipeline, denoise) -> dict[str, dict[str, float]]:
    """Per patch size: number of forwards, milliseconds of one, and milliseconds of the stock forward within it.

    A powerful forward of an interleaved schedule includes its comparison, a weak one.
    """
    hook = pipe.transformer._diffusers_hook.get_hook("flexivid")
    flex, outer, inner = hook.flex, hook.flex.run, hook.fn_ref.original_forward
    spent = defaultdict(lambda: [0, 0.0, 0.0])
    inside = 0.0

    def timed_inner(*args, **kwargs):
        nonlocal inside
        began = time.perf_counter()
        output = inner(*args, **kwargs)
        inside += time.perf_counter() - began
        return output

    def timed_outer(stock_forward, *args):
        nonlocal inside
        inside = 0.0
        began = time.perf_counter()
        output = outer(stock_forward, *args)
        total = time.perf_counter() - began
        row = spent[flexivid.summary(pipe).steps[-1][-1]]
        for i, value in enumerate((1, total, inside)):
            row[i] += value
        return output

    flex.run, hook.fn_ref.original_forward = timed_outer, timed_inner
    denoise(pipe)
    flex.run, hook.fn_ref.original_forward = outer, inner
    return {
        patch_size: {"forwards": n, "milliseconds": 1e3 * total / n, "in_stock_forward": 1e3 * stock / n}
        for patch_size, (n, total, stock) in spent.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--adapter", type=Path, default=ADAPTER)
    parser.add_argument("--budget", type=float, default=0.25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile the blocks of every arm, stock included")
    parser.add_argument("--output", type=Path, default=Path("outputs/denoise-time.json"))
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    arms = {
        "stock": None,
        "idle": {"budget": 1.0},
        "budget": {"budget": arguments.budget},
        "budget, LoRA merged": {"budget": arguments.budget, "merge_lora": True},
    }
    pipes = {}
    for name, settings in arms.items():
        pipe = pipes[name] = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32)
        pipe.set_progress_bar_config(disable=True)
        if arguments.compile:
            # Every arm, patch size and batch size is a graph of the same code.
            torch._dynamo.config.recompile_limit = 64
            pipe.transformer.compile_repeated_blocks(fullgraph=True, dynamic=False)
        if settings is not None:
            flexivid.enable(pipe, adapter=arguments.adapter, **settings)
            flexivid.plan(pipe, 17, 64, 64, 40, 32)  # counts FLOPs before the clock starts

    rows = []
    for batch in arguments.batches:
        text, negative = pipes["stock"].encode_prompt([CAPTION] * batch, max_sequence_length=32)

        def denoise(pipe, batch=batch, text=text, negative=negative) -> float:
            began = time.perf_counter()
            pipe(
                prompt_embeds=text,
                negative_prompt_embeds=negative,
                **SAMPLING,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            )
            return time.perf_counter() - began

        seconds = {name: [] for name in arms}
        for _ in tqdm(range(arguments.repeats + 1), desc=f"batch {batch}"):
            for name, pipe in pipes.items():
                seconds[name].append(denoise(pipe))
        medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
        for name, pipe in pipes.items():
            row = {"batch": batch, "arm": name, "seconds": medians[name], "ratio": medians[name] / medians["stock"]}
            if name != "stock":
                row["forwards"] = seconds_by_patch_size(pipe, denoise)
                row["flops_ratio"] = flexivid.summary(pipe).ratio
                row["schedule"] = str(flexivid.summary(pipe).schedule)
            rows.append({**row, "all_seconds": seconds[name][1:]})
            print(json.dumps(row))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    result = {"threads": torch.get_num_threads(), "compiled": arguments.compile, "rows": rows}
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
