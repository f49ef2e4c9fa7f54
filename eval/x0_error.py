"""Error of the predicted x0 over the noise level, of weak modes against the powerful one.

    python eval/x0_error.py --adapters flexivid/assets/shapes-flex --output docs/measurements/x0-error

Mean squared error to the true (normalised) latents of clips that were never trained on. The question behind it: how
much does a coarse mode lose before any training, with `snr` and with `direct`, and how much after it?
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from diffusers import WanPipeline
from tqdm import tqdm

import flexivid
from flexivid.command_line import Parser, add_embedded_model, command, count
from flexivid.diffusion import PARAMETRISATIONS
from flexivid.files import replacing, write_json, write_text
from flexivid.inputs import check_arm, check_output_folder, empty_wan_pipeline
from flexivid.model.adapter import read_config
from flexivid.shapes.embedded import USUAL
from flexivid.shapes.world import sample_clips
from flexivid.training.data.encoding import encode

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIGMAS = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
MODES = ("1x4x4", "2x2x2", "2x4x4")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_embedded_model(parser)
    parser.add_argument("--output", type=Path, default=Path("outputs/x0-error"), help="folder; %(default)s by default")
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="trained modes to measure too")
    parser.add_argument("--clips", type=count, default=48, help="rendered ones; %(default)s by default")
    return parser.parse_args(argv)


def check_arguments(arguments: argparse.Namespace) -> None:
    check_output_folder(arguments.output)
    empty = empty_wan_pipeline(arguments.model)
    for adapter in arguments.adapters:
        check_arm(empty, USUAL, adapter=adapter, budget=1.0)


def arms_of(adapters: list[Path]) -> dict[str, dict | None]:
    """Arguments of `flexivid.enable` by the name of an arm."""
    arms = {"powerful": None}
    for kind in PARAMETRISATIONS:
        arms |= {f"{kind} {mode}, untrained": {"schedule": mode, "parametrisation": kind} for mode in MODES}
    for adapter in adapters:
        config = read_config(adapter)
        for mode in config.patch_sizes:
            arms[f"{config.parametrisation} {mode}, trained"] = {"schedule": mode, "adapter": adapter}
    return arms


def errors_of(transformer, settings: dict | None, x_0: torch.Tensor, noise: torch.Tensor, text) -> list[float]:
    """Mean squared error of x0 at each of SIGMAS. x_0, noise: (B, C, T, H, W)."""
    if settings is not None:
        flexivid.enable(transformer, **settings)
    errors = []
    for sigma in SIGMAS:
        x_t = (1 - sigma) * x_0 + sigma * noise
        timestep = torch.full((len(x_t),), 1000 * sigma)
        velocity = transformer(x_t, timestep, text, return_dict=False)[0]
        errors.append((x_t - sigma * velocity - x_0).square().mean().item())
    flexivid.disable(transformer)
    return errors


def as_table(table: dict[str, list[float]]) -> str:
    lines = ["| mode | " + " | ".join(f"σ={sigma}" for sigma in SIGMAS) + " |", "|---" * (len(SIGMAS) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{error:.3f}" for error in errors) + " |" for name, errors in table.items()]
    return "\n".join(lines)


def draw(table: dict[str, list[float]], path: Path) -> None:
    figure, panels = plt.subplots(1, len(MODES), figsize=(12, 4), sharey=True)
    for name, errors in table.items():
        for mode, panel in zip(MODES, panels, strict=True):
            if name == "powerful" or mode in name:
                colour = {"powerful": "black", "snr": "tab:blue", "direct": "tab:red"}[name.split()[0]]
                style = "--" if "untrained" in name else "-"
                panel.plot(SIGMAS, errors, color=colour, linestyle=style, label=name)
    for panel in panels:
        panel.set_xlabel("noise level σ")
        panel.legend(fontsize=8)
    panels[0].set_ylabel("mean squared error of x0")
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


@command
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    check_arguments(arguments)
    pipe = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32, use_safetensors=True)
    clips, scenes = sample_clips(arguments.clips, torch.Generator().manual_seed(987_654_321))
    x_0 = encode(pipe.vae, clips)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    text, _ = pipe.encode_prompt(
        [scene.caption for scene in scenes], do_classifier_free_guidance=False, max_sequence_length=32
    )
    arms = tqdm(arms_of(arguments.adapters).items())
    table = {name: errors_of(pipe.transformer, settings, x_0, noise, text) for name, settings in arms}
    arguments.output.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output / "x0_error.json", {"sigmas": SIGMAS, "mse": table})
    write_text(arguments.output / "x0_error.md", as_table(table) + "\n")
    draw(table, arguments.output / "x0_error.png")
    print(as_table(table))


if __name__ == "__main__":
    sys.exit(main())
