"""What a distillation has reached: its error over the noise level as a picture, and the adapter's model card."""

from pathlib import Path

import matplotlib

from flexivid.files import replacing, write_text
from flexivid.model.adapter import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME, AdapterConfig
from flexivid.training.config import Config

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

SIGMAS = (0.98, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)

CARD = """---
base_model: {base}
library_name: flexivid
tags: [flexivid, text-to-video, lora]
---

# flexivid adapter for {base}

Lets `{base}` run with the larger patch sizes {modes} beside its own, so that a video costs the share of the FLOPs that
you set. Made by flexivid ([FlexiDiT](https://arxiv.org/abs/2502.20126) for the video models of diffusers), {objective}.

```python
import flexivid, torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}", dtype=torch.bfloat16).to("cuda")
flexivid.enable(pipe, adapter="{name}", budget=0.5)
video = pipe("...", max_sequence_length={length}).frames
```

`pipe.load_lora_weights` alone is not enough: it reads `{lora}` and leaves out `{weights}`, which hold the
embedders and heads of the larger patches, and nothing would switch between them.

## Training

{facts}

Mean squared difference of the predicted x0 to that of the base model at its own patch size, over the noise level sigma:

{errors}
"""


def draw_errors(errors: dict[str, list[float]], path: Path) -> None:
    """Distillation error of every mode over SIGMAS."""
    figure, panel = plt.subplots(figsize=(6, 4))
    for patch_size, values in errors.items():
        panel.plot(SIGMAS, values, "o-", label=patch_size)
    panel.set_xlabel("noise level sigma")
    panel.set_ylabel("squared difference of x0 to the powerful mode")
    panel.set_yscale("log")
    panel.grid(alpha=0.3)
    panel.legend()
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)


def write_card(folder: Path, adapter: AdapterConfig, config: Config, errors: dict[str, list[float]]) -> None:
    """README.md of an adapter folder: what it was trained on and for how long, what it reached, how to use it."""
    data = "rendered clips of the shapes world"
    if config.clips is not None:
        data = f"clips of `{config.clips.folder}`" if config.clips.folder else "the teacher's own samples for prompts"
    facts = adapter.training | {
        "data": data,
        "LoRA rank": adapter.lora_rank,
        "parametrisation": adapter.parametrisation,
    }
    rows = ["| patch size | " + " | ".join(f"{sigma:g}" for sigma in SIGMAS) + " |", "|---" * (len(SIGMAS) + 1) + "|"]
    rows += [f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |" for name, values in errors.items()]
    text = CARD.format(
        base=adapter.base_model,
        modes=", ".join(adapter.patch_sizes),
        objective=adapter.training["objective"],
        name=folder,
        length=adapter.max_sequence_length,
        lora=LORA_NAME,
        weights=f"{WEIGHTS_NAME}` and `{CONFIG_NAME}",
        facts="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
        errors="\n".join(rows),
    )
    write_text(folder / "README.md", text)
