"""Error of the predicted x0 over the noise level, of weak modes against the powerful one.

    python eval/x0_error.py --adapters flexivid/assets/shapes-flex --output docs/measurements/x0-error

Mean squared error to the true (normalised) latents of clips that were never trained on. The question behind it: how
much does a coarse mode lose before any training, with `snr` and with `direct`, and how much after it?
"""

import argparse
import json
from pathlib import Path

import matplotlib
import torch
from diffusers import WanPipeline
from diffusers.utils import logging
from tqdm import tqdm

import flexivid
from flexivid.diffusion import PARAMETRISATIONS
from flexivid.model.adapter import read_config
from flexivid.shapes.embedded import MODEL
from flexivid.shapes.world import sample_clips
from flexivid.training.data.encoding import encode

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIGMAS = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
MODES = ("1x4x4", "2x2x2", "2x4x4")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--output", type=Path, default=Path("outputs/x0-error"))
    parser.add_argument("--adapters", type=Path, nargs="*", default=[], help="trained modes to measure too")
    parser.add_argument("--clips", type=int, default=48)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    pipe = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32)
    clips, scenes = sample_clips(arguments.clips, torch.Generator().manual_seed(987_654_321))
    x_0 = encode(pipe.vae, clips)
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(1))
    text, _ = pipe.encode_prompt(
        [scene.caption for scene in scenes], do_classifier_free_guidance=False, max_sequence_length=32
    )
    arms = {"powerful": None}
    for kind in PARAMETRISATIONS:
        arms |= {f"{kind} {mode}, untrained": {"schedule": mode, "parametrisation": kind} for mode in MODES}
    for adapter in arguments.adapters:
        config = read_config(adapter)
        for mode in config.patch_sizes:
            arms[f"{config.parametrisation} {mode}, trained"] = {"schedule": mode, "adapter": adapter}
    table = {}
    for name, settings in tqdm(arms.items()):
        if settings is not None:
            flexivid.enable(pipe.transformer, **settings)
        errors = []
        for sigma in SIGMAS:
            x_t = (1 - sigma) * x_0 + sigma * noise
            timestep = torch.full((len(x_t),), 1000 * sigma)
            velocity = pipe.transformer(x_t, timestep, text, return_dict=False)[0]
            errors.append((x_t - sigma * velocity - x_0).square().mean().item())
        flexivid.disable(pipe.transformer)
        table[name] = errors
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "x0_error.json").write_text(json.dumps({"sigmas": SIGMAS, "mse": table}, indent=1))
    lines = ["| mode | " + " | ".join(f"σ={sigma}" for sigma in SIGMAS) + " |", "|---" * (len(SIGMAS) + 1) + "|"]
    figure, panels = plt.subplots(1, len(MODES), figsize=(12, 4), sharey=True)
    for name, errors in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{error:.3f}" for error in errors) + " |")
        for mode, panel in zip(MODES, panels, strict=True):
            if name == "powerful" or mode in name:
                colour = {"powerful": "black", "snr": "tab:blue", "direct": "tab:red"}[name.split()[0]]
                style = "--" if "untrained" in name else "-"
                panel.plot(SIGMAS, errors, color=colour, linestyle=style, label=name)
    for panel in panels:
        panel.set_xlabel("noise level σ")
        panel.legend(fontsize=8)
    panels[0].set_ylabel("mean squared error of x0")
    (arguments.output / "x0_error.md").write_text("\n".join(lines) + "\n")
    figure.tight_layout()
    figure.savefig(arguments.output / "x0_error.png", dpi=120)
    print("\n".join(lines))


if __name__ == "__main__":
    main()
