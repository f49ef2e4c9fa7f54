"""What a few-step student has reached: motion and diversity against the teacher's, clips, and the adapter's card."""

from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline

from flexivid.files import write_text
from flexivid.model.adapter import AdapterConfig
from flexivid.model.families import family_of
from flexivid.model.recipe import Recipe
from flexivid.sampling.few_steps import call_of
from flexivid.training.config import Config
from flexivid.training.few_runs import Runs
from flexivid.training.few_warmup import in_parts
from flexivid.training.validation import picture_of, record

TEXTS = 8  # of which two clips each are looked at

CARD = """---
base_model: {base}
library_name: flexivid
tags: [flexivid, text-to-video, lora]
---

# flexivid few-step adapter for {base}

Runs `{base}` in {steps} steps without guidance, at the patch sizes {patch_sizes} and the noise levels {sigmas}. Made by
flexivid (distribution matching, [DMD2](https://arxiv.org/abs/2405.14867), at the patch sizes of
[FlexiDiT](https://arxiv.org/abs/2502.20126)).

```python
import flexivid, torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
flexivid.enable(pipe, adapter="{name}")
video = pipe("...", num_inference_steps={steps}, guidance_scale=1.0, max_sequence_length={length}).frames
```

## Training

{facts}

Against the guided teacher, in latents, two clips of each of some captions: {looks}.
"""


class Looks:
    """Motion and diversity of the student's clips, each as a share of the teacher's. What distillation loses first.

    Two clips of each of TEXTS captions, of the same noise every time. motion: mean change from a latent frame to the
    next. diversity: mean distance between the two clips of a caption.
    """

    def __init__(self, model, runs: Runs, texts, config: Config, accelerator: Accelerator):
        self.model, self.runs, self.texts, self.config, self.accelerator = model, runs, texts, config, accelerator
        self._teacher: dict[str, float] | None = None
        self.last: dict[str, float] = {}

    def record(self, step: int) -> dict[str, float]:
        """The shares, which it also prints and adds to validation.jsonl, in the place of those of later steps."""
        generator = torch.Generator().manual_seed(2**31)
        size, conditions, empty = self.texts(TEXTS, generator)
        noises = [torch.randn(TEXTS, *size, generator=generator) for _ in range(2)]

        def clips_of(run, *more) -> list[torch.Tensor]:
            return [in_parts(run, self.config, self.accelerator, noise, *more) for noise in noises]

        if self._teacher is None:  # it does not change
            steps = self.config.validation.steps
            self._teacher = _figures(
                clips_of(lambda *values: self.runs.teacher(self.model, *values, steps)[-1], conditions, empty)
            )
        last = self.runs.recipe.steps - 1
        student = _figures(clips_of(lambda *values: self.runs.student(self.model, *values, last), conditions))
        self.last = {name: value / self._teacher[name] for name, value in student.items()}
        if self.accelerator.is_main_process:
            record(self.config.output / "validation.jsonl", step, self.last)
        self.accelerator.print("\nof the teacher's", {name: f"{value:.3g}" for name, value in self.last.items()})
        return self.last


def _figures(clips: list[torch.Tensor]) -> dict[str, float]:
    """clips: twice (B, C, T, H, W), of the same captions."""
    one, other = clips
    motion = torch.cat(clips).diff(dim=2).abs().mean() if one.shape[2] > 1 else torch.tensor(1.0)
    return {"motion": motion.item(), "diversity": (one - other).square().mean((1, 2, 3, 4)).sqrt().mean().item()}


def sample_prompts(
    pipe: DiffusionPipeline, recipe: Recipe, config: Config, accelerator: Accelerator, path: Path
) -> None:
    """A picture with two rows of frames, of two seeds, for every validation prompt. pipe: enabled for the recipe."""
    call = call_of(recipe, family_of(pipe.transformer))
    with picture_of(pipe, config, accelerator, path, **call) as draw:
        for prompt in config.validation.prompts:
            for seed in range(2):
                draw(str(seed), prompt, seed)


def write_few_card(folder: Path, adapter: AdapterConfig, config: Config, looks: dict[str, float]) -> None:
    """README.md of an adapter folder. looks: the last ones, none if training ended before there were any."""
    facts = adapter.training | {"LoRA rank": adapter.lora_rank, "parametrisation": adapter.parametrisation}
    text = CARD.format(
        base=adapter.base_model,
        steps=adapter.recipe.steps,
        patch_sizes=", ".join(adapter.recipe.patch_sizes),
        sigmas=", ".join(f"{sigma:g}" for sigma in adapter.recipe.sigmas),
        name=config.push_to_hub or "path/to/this/folder",
        length=adapter.max_sequence_length,
        facts="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
        looks=", ".join(f"{name} {value:.2f}" for name, value in looks.items()) or "not measured",
    )
    write_text(folder / "README.md", text)
