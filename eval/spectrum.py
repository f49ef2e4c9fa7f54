"""The experiment behind the method: which denoising steps need high frequencies, in space and in time?

    python eval/spectrum.py --output docs/measurements/spectrum

One denoising update of a run is low-pass or high-pass filtered, all others stay as they are, and the distance of the
result to the undisturbed one is measured (FlexiDiT, arXiv 2502.20126, section 3.1). Steps at which a low-pass filter
does no harm can run at a large patch.
"""

import argparse
import sys
from pathlib import Path

import matplotlib
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline
from tqdm import tqdm

from flexivid.command_line import Parser, add_embedded_model, add_prompts, command, count, share
from flexivid.files import replacing, write_json, write_text
from flexivid.inputs import check_output_folder, empty_wan_pipeline, read_prompts
from flexivid.shapes.embedded import SAMPLING

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

AXES = {"space": (-2, -1), "time": (-3,)}
STEPS = SAMPLING["num_inference_steps"]


def low_pass(x: torch.Tensor, axes: tuple[int, ...], cutoff: float) -> torch.Tensor:
    """Keeps the frequencies of which none is above `cutoff` times the highest that the grid can hold.

    x: (B, C, T, H, W). A cutoff of .5 keeps what a patch of twice the size could still show. Every axis is mirrored
    first: a clip does not go on at its end as it began.
    """
    for axis in axes:
        spectrum = torch.fft.rfft(torch.cat([x, x.flip(axis)], axis), dim=axis)
        kept = torch.fft.rfftfreq(2 * x.shape[axis]) <= cutoff / 2
        spectrum = spectrum * kept.view([-1 if i == axis else 1 for i in range(-x.ndim, 0)])
        x = torch.fft.irfft(spectrum, 2 * x.shape[axis], dim=axis).narrow(axis, 0, x.shape[axis])
    return x


class Run:
    """Euler sampling of one batch that can be taken up at any step. x: (B, C, T, H, W); text, negative: (B, L, D)."""

    def __init__(self, pipe: WanPipeline, text: torch.Tensor, negative: torch.Tensor, guidance_scale: float):
        self.pipe, self.text, self.negative, self.guidance_scale = pipe, text, negative, guidance_scale
        scheduler = FlowMatchEulerDiscreteScheduler(shift=pipe.scheduler.config.flow_shift)
        scheduler.set_timesteps(STEPS)
        self.sigmas = scheduler.sigmas

    def update(self, x: torch.Tensor, step: int) -> torch.Tensor:
        """What one step adds to x: (sigma_next - sigma) v, with classifier-free guidance."""
        timestep = (1000 * self.sigmas[step]).expand(len(x))
        conditional, unconditional = (
            self.pipe.transformer(x, timestep, text, return_dict=False)[0] for text in (self.text, self.negative)
        )
        velocity = unconditional + self.guidance_scale * (conditional - unconditional)
        return (self.sigmas[step + 1] - self.sigmas[step]) * velocity

    def finish(self, x: torch.Tensor, step: int) -> torch.Tensor:
        for later in range(step, STEPS):
            x = x + self.update(x, later)
        return x


def draw(result: dict, path: Path) -> None:
    figure, panels = plt.subplots(1, len(AXES), figsize=(11, 4), sharey=True)
    for axis, panel in zip(AXES, panels, strict=True):
        for kind, colour in (("low-pass", "tab:blue"), ("high-pass", "tab:red")):
            panel.plot(result["steps"], result["errors"][f"{kind}, {axis}"], "o-", color=colour, label=kind)
        panel.set_title(f"update of one step filtered in {axis}")
        panel.set_xlabel(f"denoising step of {STEPS}")
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("squared distance to the undisturbed latents,\nshare of their variance")
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=120)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_embedded_model(parser)
    add_prompts(parser, default="shapes")
    parser.add_argument("--max-prompts", type=count, default=16, help="only the first so many")
    parser.add_argument("--cutoff", type=share, default=0.5, help="share of the highest frequency that low-pass keeps")
    parser.add_argument("--every", type=count, default=3, help="filter every so many steps")
    parser.add_argument("--output", type=Path, default=Path("outputs/spectrum"), help="folder; %(default)s by default")
    return parser.parse_args(argv)


def measure(run: Run, x: torch.Tensor, every: int, cutoff: float) -> dict:
    """What filtering one step's update does to the end of a run from the noise x, (B, C, T, H, W)."""
    starts, updates = [], []
    for step in tqdm(range(STEPS), desc="undisturbed run"):
        starts.append(x)
        updates.append(run.update(x, step))
        x = x + updates[-1]
    steps = list(range(0, STEPS, every))
    errors = {f"{kind}, {axis}": [] for axis in AXES for kind in ("low-pass", "high-pass")}
    for step in tqdm(steps, desc="one step filtered"):
        for axis, dimensions in AXES.items():
            low = low_pass(updates[step], dimensions, cutoff)
            for kind, filtered in (("low-pass", low), ("high-pass", updates[step] - low)):
                changed = run.finish(starts[step] + filtered, step + 1)
                errors[f"{kind}, {axis}"].append(((changed - x).square().mean() / x.var()).item())
    return {"steps": steps, "sigmas": [run.sigmas[step].item() for step in steps], "errors": errors}


def as_table(result: dict) -> str:
    errors = result["errors"]
    lines = ["| step | σ | " + " | ".join(errors) + " |", "|---" * (2 + len(errors)) + "|"]
    for row, (step, sigma) in enumerate(zip(result["steps"], result["sigmas"], strict=True)):
        cells = " | ".join(f"{values[row]:.4f}" for values in errors.values())
        lines.append(f"| {step} | {sigma:.3f} | {cells} |")
    return "\n".join(lines)


@command
@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    captions = read_prompts(arguments.prompts)[: arguments.max_prompts]
    check_output_folder(arguments.output)
    empty_wan_pipeline(arguments.model)
    pipe = WanPipeline.from_pretrained(arguments.model, dtype=torch.float32, use_safetensors=True)
    text, negative = pipe.encode_prompt(captions, max_sequence_length=SAMPLING["max_sequence_length"])
    run = Run(pipe, text, negative, SAMPLING["guidance_scale"])
    shape = (pipe.transformer.config.in_channels, 5, SAMPLING["height"] // 4, SAMPLING["width"] // 4)
    noise = torch.randn(len(captions), *shape, generator=torch.Generator().manual_seed(0))
    result = measure(run, noise, arguments.every, arguments.cutoff)
    arguments.output.mkdir(parents=True, exist_ok=True)
    facts = {"cutoff": arguments.cutoff, "prompts": len(captions)}
    write_json(arguments.output / "spectrum.json", facts | result)
    draw(result, arguments.output / "spectrum.png")
    write_text(arguments.output / "spectrum.md", as_table(result) + "\n")
    print(as_table(result))


if __name__ == "__main__":
    sys.exit(main())
