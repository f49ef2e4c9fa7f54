"""Seconds, achieved FLOP/s and peak memory of every patch size and budget, on a real architecture with random weights.

An arm `1x4x4` runs that patch size on every step; a budget runs powerful steps and reuses their x0 between.

    flexivid latency                                                    # the embedded model, which has weights
    flexivid latency --architecture wan2.1-1.3b --dtype bfloat16 --compile --output docs/measurements/latency-h100

Arms alternate within one run, and medians are compared, so that a slow minute of the machine hits all. A last run of
each arm, with clocks around every forward, splits its seconds by patch size into the stock forward and what flexivid
does around it. Text encoder and VAE are built and timed one by one: they run once a clip, whatever the budget is.
Writes latency.json, latency.md and latency.png into --output.
"""

import argparse
import gc
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
import torch
from diffusers import AutoencoderKLWan, WanPipeline
from tqdm import tqdm
from transformers import UMT5Config, UMT5EncoderModel

import flexivid
from flexivid.command_line import Parser, add_batch, add_device, add_rounds, command, count, share
from flexivid.files import replacing, write_json, write_text
from flexivid.inputs import check_arm, check_output_folder, check_sizes, empty_wan_pipeline
from flexivid.model.flexible import compile_blocks
from flexivid.shapes.embedded import MODEL
from flexivid.stock_pipelines import ARGUMENTS, now
from flexivid.sweep.architectures import ARCHITECTURES, TEXT_ENCODER, Architecture, build_pipeline, random_weights
from flexivid.sweep.settings import device_name

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# How arms with a budget are enabled, beside it.
OF_BUDGETS = {"order": "reuse"}


@torch.no_grad()
def seconds_of_the_rest(architecture: Architecture, call: dict, dtype: torch.dtype, device: torch.device) -> dict:
    """{"text": prompt and negative prompt, "vae": decoding one clip} in seconds, the second run of each."""
    length = call["max_sequence_length"]
    if architecture.transformer:
        encoder = random_weights(lambda: UMT5EncoderModel(UMT5Config(**TEXT_ENCODER)), dtype, device)
        tokens = torch.ones(2, length, dtype=torch.long, device=device)
        text = _second_run(lambda: encoder(tokens), device)
        del encoder
        gc.collect()
        vae = random_weights(AutoencoderKLWan, torch.float32, device)
        factors = (4, 8)
    else:
        pipe = WanPipeline.from_pretrained(MODEL, dtype=torch.float32).to(device)
        text = _second_run(lambda: pipe.encode_prompt("a red circle", max_sequence_length=length), device)
        vae, factors = pipe.vae, (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial)
    frames = (call["num_frames"] - 1) // factors[0] + 1
    latents = torch.zeros(1, vae.config.z_dim, frames, call["height"] // factors[1], call["width"] // factors[1])
    latents = latents.to(device)
    return {"text": text, "vae": _second_run(lambda: vae.decode(latents), device)}


def _second_run(work, device: torch.device) -> float:
    work()
    began = now(device)
    work()
    return now(device) - began


class Clocks(flexivid.Observer):
    """Number, seconds and seconds of stock forwards within them, of the forwards at each patch size."""

    def __init__(self, device: torch.device):
        self.clock = lambda: now(device)
        self.spent = defaultdict(lambda: [0, 0.0, 0.0])

    def forward(self, forward: flexivid.Forward):
        row = self.spent[forward.patch_size]
        for i, value in enumerate((1, forward.seconds, forward.stock_seconds)):
            row[i] += value


def forwards_by_patch_size(pipe: WanPipeline, denoise, device: torch.device) -> dict[str, dict[str, float]]:
    """Per patch size: number of forwards, milliseconds of one, and milliseconds of stock forwards within it.

    A powerful forward of an interleaved schedule includes its comparison, a weak one.
    """
    with flexivid.observe(pipe, Clocks(device)) as clocks:
        denoise(pipe)
    return {
        patch_size: {"forwards": n, "milliseconds": 1e3 * total / n, "in_stock_forwards": 1e3 * stock / n}
        for patch_size, (n, total, stock) in clocks.spent.items()
    }


def measure(
    pipe: WanPipeline, architecture: Architecture, call: dict, batch: int, arguments, compiled: bool
) -> list[dict]:
    """A row per arm: the stock pipeline, flexivid that idles at budget 1, and every budget below."""
    device, config = pipe.transformer.device, pipe.transformer.config
    generator = torch.Generator().manual_seed(0)
    shape = (batch, call["max_sequence_length"], config.text_dim)
    embeds = [torch.randn(shape, generator=generator).to(device, pipe.transformer.dtype) for _ in range(2)]

    def denoise(pipe) -> None:
        pipe(
            prompt_embeds=embeds[0],
            negative_prompt_embeds=embeds[1],
            **call,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )

    settings = {"modes": list(architecture.modes), "adapter": architecture.adapter}
    settings["merge_lora"] = architecture.adapter is not None
    enabled = {"stock": None, "idle": {"budget": 1.0}}
    enabled |= {f"budget-{budget:g}": {"budget": budget, **OF_BUDGETS} for budget in arguments.budgets}
    enabled |= {patch_size: {"schedule": patch_size} for patch_size in architecture.modes}
    rows = {name: {"compiled": compiled, "batch": batch, "arm": name, "all_seconds": []} for name in enabled}
    # The first of the repeats warms up: it compiles, and asks for memory.
    for repeat in tqdm(range(arguments.rounds + 1), desc=f"batch {batch}{', compiled' * compiled}"):
        for name, how in enabled.items():
            row = rows[name]
            if how is not None:
                flexivid.enable(pipe, **how, **settings)
                sizes = (call[key] for key in ("num_frames", "height", "width", "num_inference_steps"))
                flexivid.plan(pipe, *sizes, call["max_sequence_length"])  # counts FLOPs before the clock starts
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = now(device)
            denoise(pipe)
            if repeat:
                row["all_seconds"].append(now(device) - began)
            if device.type == "cuda":
                row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if how is not None:
                summary = flexivid.summary(pipe)
                row |= {"flops": summary.flops_used, "flops_ratio": summary.ratio, "schedule": str(summary.schedule)}
                rows["stock"] |= {"flops": summary.flops_full, "flops_ratio": 1.0}
                if repeat == arguments.rounds:
                    row["forwards"] = forwards_by_patch_size(pipe, denoise, device)
                flexivid.disable(pipe)
    for row in rows.values():
        row["seconds"] = statistics.median(row["all_seconds"])
        row["seconds_ratio"] = row["seconds"] / rows["stock"]["seconds"]
        row["tflop_per_second"] = row["flops"] / row["seconds"] / 1e12
    return list(rows.values())


def write_table(result: dict, path: Path) -> None:
    rest = result["seconds_of_the_rest"]
    facts = f"{result['architecture']}, {result['device']}, {result['threads']} threads, {result['dtype']}"
    lines = [
        f"{facts}, torch {result['torch']}: {result['call']}",
        "",
        f"Once a clip: text {rest['text']:.3g} s, VAE {rest['vae']:.3g} s." if rest else "Text and VAE not timed.",
        "",
        "| blocks | batch | arm | FLOPs | denoise, s | time | TFLOP/s | peak GiB | text + denoise + VAE, s a clip "
        "| one forward, ms (of it stock forwards) |",
        "|" + "---|" * 10,
    ]
    for row in result["rows"]:
        forwards = ", ".join(
            f"{name}: {f['milliseconds']:.4g} ({f['in_stock_forwards']:.4g})"
            for name, f in row.get("forwards", {}).items()
        )
        total = f"{row['seconds'] / row['batch'] + sum(rest.values()):.4g}" if rest else ""
        blocks = "compiled" if row["compiled"] else "eager"
        peak = f"{row['peak_gib']:.1f}" if "peak_gib" in row else ""
        lines.append(
            f"| {blocks} | {row['batch']} | {row['arm']} | {row['flops_ratio']:.3f} "
            f"| {row['seconds']:.4g} | {row['seconds_ratio']:.3f} | {row['tflop_per_second']:.4g} | {peak} | {total} "
            f"| {forwards} |"
        )
    write_text(path, "\n".join(lines) + "\n")


def draw(result: dict, path: Path) -> None:
    figure, panel = plt.subplots(figsize=(6.5, 5))
    series = defaultdict(list)
    for row in result["rows"]:
        if row["arm"] == "stock" or row["arm"].startswith("budget"):
            series[row["compiled"], row["batch"]].append((row["flops_ratio"], row["seconds_ratio"]))
    for (compiled, batch), points in series.items():
        panel.plot(*zip(*points, strict=True), "o-", label=f"{'compiled' if compiled else 'eager'}, batch {batch}")
    panel.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":", label="time = FLOPs")
    panel.set_xlabel("share of the FLOPs")
    panel.set_ylabel("share of the denoise time")
    panel.set_title(f"{result['architecture']}, {result['device']}", fontsize=10)
    panel.set_xlim(0, 1.02)
    panel.set_ylim(0)
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="flexivid latency", description=__doc__)
    add = parser.add_argument
    add(
        "--architecture",
        choices=ARCHITECTURES,
        default="embedded",
        help="of the model, which has random weights unless it is the embedded one; %(default)s by default",
    )
    add("--budgets", type=share, nargs="+", default=[0.6, 0.4, 0.25], help="shares of the full FLOPs")
    add_batch(parser, "--batches", nargs="+", default=[1])
    add_rounds(parser, "--repeats", default=5)
    add("--compile", action="store_true", help="measure once more with compiled blocks, the stock ones included")
    add("--steps", type=count, help="denoising steps; the usual number of the architecture by default")
    add("--frames", type=count, help="of a clip; the architecture's usual ones by default, as for --height, --width")
    add("--height", type=count, help="in pixels")
    add("--width", type=count, help="in pixels")
    add(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of transformer and text encoder"
    )
    add_device(parser)
    add("--denoise-only", action="store_true", help="without text encoder and VAE: UMT5-XXL takes 11 GB in bfloat16")
    add("--output", type=Path, default=Path("outputs/latency"), help="folder; %(default)s by default")
    return parser.parse_args(argv)


def call_of(arguments: argparse.Namespace, architecture: Architecture) -> dict:
    """Arguments of the pipeline. Raises ValueError for what cannot be run, before there are any weights."""
    given = {
        "num_inference_steps": arguments.steps,
        "num_frames": arguments.frames,
        "height": arguments.height,
        "width": arguments.width,
    }
    call = architecture.sampling | {name: value for name, value in given.items() if value is not None}
    check_output_folder(arguments.output)
    if architecture.transformer:
        empty = build_pipeline(architecture, torch.float32, torch.device("meta"))
    else:
        empty = empty_wan_pipeline(MODEL)
    ours = {name: call[theirs] for name in ARGUMENTS for theirs in ARGUMENTS[name] if theirs in call}
    check_sizes(empty, *(ours[name] for name in ("frames", "height", "width")))
    weak = {"modes": list(architecture.modes), "adapter": architecture.adapter}
    check_arm(empty, ours, budget=min(arguments.budgets), **OF_BUDGETS, **weak)
    return call


@command
def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(words)
    architecture, device = ARCHITECTURES[arguments.architecture], arguments.device
    call = call_of(arguments, architecture)
    dtype = getattr(torch, arguments.dtype)
    if device.type == "cuda":
        torch.cuda.set_device(device if device.index is not None else 0)  # whose clock and memory are read
    arguments.output.mkdir(parents=True, exist_ok=True)
    result = {
        "command": shlex.join(["flexivid", "latency", *words]),
        "architecture": arguments.architecture,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "dtype": arguments.dtype,
        "torch": torch.__version__,
        "call": call,
        "seconds_of_the_rest": {} if arguments.denoise_only else seconds_of_the_rest(architecture, call, dtype, device),
        "rows": [],
    }
    pipe = build_pipeline(architecture, dtype, device)
    for compiled in (False, True)[: 1 + arguments.compile]:
        if compiled:
            compile_blocks(pipe.transformer)
        for batch in arguments.batch:
            result["rows"] += measure(pipe, architecture, call, batch, arguments, compiled)
            write_json(arguments.output / "latency.json", result)
            write_table(result, arguments.output / "latency.md")
            draw(result, arguments.output / "latency.png")
    print((arguments.output / "latency.md").read_text())
