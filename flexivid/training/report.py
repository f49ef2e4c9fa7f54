"""What a distillation has reached, for people: its errors as a picture, and the adapter's model card."""

import json
import re
from pathlib import Path

import matplotlib
from diffusers import ModularPipeline
from huggingface_hub import HfApi

from flexivid.files import replacing, write_text
from flexivid.model.adapter import CONFIG_NAME, LORA_NAME, WEIGHTS_NAME, AdapterConfig
from flexivid.training.config import Config
from flexivid.training.data.media import taken_by, trained_class
from flexivid.training.objective import Data
from flexivid.training.validation import SIGMAS, Errors

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_CACHE = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # folder of a model that was downloaded

CARD = """---
base_model: {base}
library_name: flexivid
tags: [flexivid, text-to-video, lora]
---

# flexivid adapter for {base}

Lets `{model}` run with the larger patch sizes {modes} beside its own, so that a video costs the share of the FLOPs that
you set. Made by flexivid ([FlexiDiT](https://arxiv.org/abs/2502.20126) for the video models of diffusers), {objective}.

```python
{usage}
```

`pipe.load_lora_weights` alone is not enough: it reads `{lora}` and leaves out `{weights}`, which hold the
embedders and heads of the larger patches, and nothing would switch between them.

## Training

{facts}

Mean squared difference of the predicted x0 to that of the base model at its own patch size, over the noise level sigma,
{clips}:

{errors}
"""

USAGE = """\
import flexivid, torch
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{model}", dtype=torch.bfloat16).to("cuda")
flexivid.enable(pipe, adapter="{name}", budget=0.5)
video = pipe("...", max_sequence_length={length}).frames"""
MODULAR_USAGE = """\
import flexivid, torch
from diffusers import ModularPipeline

pipe = ModularPipeline.from_pretrained("{model}", workflow="t2va")
pipe.load_components(dtype=torch.bfloat16)
flexivid.enable(pipe.to("cuda"), adapter="{name}", budget=0.5)
video = pipe(prompt="...", num_inference_steps=50, output="videos")"""


def public_name(base: Path) -> str:
    """The hub id of a model, also of a copy of it or one in the hub's cache; else the folder's name, never its path."""
    known = [str(base) if not base.exists() else str(base.resolve())]
    for file in (base / "model_index.json", *sorted(base.glob("transformer*/config.json"))):
        if file.is_file():
            known.append(json.loads(file.read_text()).get("_name_or_path") or "")
    for text in known:
        if found := HUB_CACHE.search(text):
            return "/".join(found.groups())
        if HUB_ID.fullmatch(text) and not Path(text).exists():
            return text
    package = Path(__file__).parents[1]
    resolved = base.resolve()
    return str(resolved.relative_to(package.parent)) if resolved.is_relative_to(package) else resolved.name


def error_clips(data: Data) -> str:
    """Which clips errors are of."""
    if data.held_out:
        return f"on {data.held_out} clips that were held out"
    return "on clips that it was trained on, as none were held out"


def draw_errors(errors: Errors, history: list[dict], clips: str, path: Path) -> None:
    """Distillation error of every mode over the noise level now, and its mean over the steps so far.

    history: the lines of validation.jsonl. clips: what the errors are of.
    """
    figure, (now, over_steps) = plt.subplots(1, 2, figsize=(12, 4), sharey=True)
    for patch_size, values in errors.items():
        now.plot(SIGMAS, values, "o-", label=patch_size)
        means = [line["errors"].get(patch_size) for line in history]
        means = [float("nan") if mean is None else mean for mean in means]
        over_steps.plot([line["step"] for line in history], means, "o-", label=patch_size)
    now.set_xlabel("noise level sigma")
    now.set_ylabel("squared difference of x0 to the powerful mode")
    over_steps.set_xlabel("step (mean over the noise levels)")
    for panel in (now, over_steps):
        panel.set_yscale("log")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(clips)
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=100, format="png")
    plt.close(figure)


def write_card(
    folder: Path, adapter: AdapterConfig, config: Config, errors: Errors, clips: str, model: str | None = None
) -> None:
    """README.md of an adapter folder: what it was trained on and for how long, what it reached, how to use it.

    clips: what the errors are of. model: that it is used with, if that is not its base.
    """
    data, base = "rendered clips of the shapes world", public_name(config.base)
    if config.clips is not None:
        kind = config.clips.folder and config.clips.folder.name
        data = f"clips of `{kind}`" if kind else "the teacher's own samples for prompts"
        taken = taken_by(trained_class(config))
        data += "" if taken is None else f", with {taken} for each"
    facts = adapter.training | {
        "data": data,
        "LoRA rank": adapter.lora_rank,
        "parametrisation": adapter.parametrisation,
    }
    usage = MODULAR_USAGE if issubclass(trained_class(config), ModularPipeline) else USAGE
    rows = ["| patch size | " + " | ".join(f"{sigma:g}" for sigma in SIGMAS) + " |", "|---" * (len(SIGMAS) + 1) + "|"]
    rows += [f"| {name} | " + " | ".join(f"{value:.4f}" for value in values) + " |" for name, values in errors.items()]
    text = CARD.format(
        base=base,
        model=model or base,
        modes=", ".join(adapter.patch_sizes),
        objective=adapter.training["objective"],
        usage=usage.format(
            model=model or base,
            name=config.push_to_hub or "path/to/this/folder",
            length=adapter.max_sequence_length,
        ),
        lora=LORA_NAME,
        weights=f"{WEIGHTS_NAME}` and `{CONFIG_NAME}",
        facts="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items()),
        clips=clips,
        errors="\n".join(rows),
    )
    write_text(folder / "README.md", text)


def push(folder: Path, repository: str) -> None:
    """Uploads an adapter folder."""
    api = HfApi()
    api.create_repo(repository, exist_ok=True)
    api.upload_folder(repo_id=repository, folder_path=folder)
    print(f"pushed to {repository}")
