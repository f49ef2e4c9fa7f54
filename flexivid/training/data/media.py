"""What pipelines are given beside the prompt: the first frame of a clip, as one gives an image to the stock pipeline."""

import inspect
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from flexivid.stock_pipelines import pipeline_class
from flexivid.training.config import ClipsConfig, Config
from flexivid.training.data.buckets import Bucket

# Those that can be trained, by what they take beside the prompt: other arguments of their calls are not built.
TAKES: dict[str, Literal["image"]] = {"WanImageToVideoPipeline": "image"}


def trained_class(config: Config) -> type[DiffusionPipeline]:
    """The class that a config's base is trained as: with `clips.first_frame` that which takes an image.

    Raises ValueError if diffusers has none.
    """
    return pipeline_class(config.base, with_image=config.clips is not None and config.clips.first_frame)


def taken_by(pipeline: type[DiffusionPipeline]) -> str | None:
    """What its calls take beside the prompt."""
    return TAKES.get(pipeline.__name__)


def check_media(config: Config) -> None:
    """Raises ValueError if what the base takes beside the prompt is not built, or not for what the config asks for."""
    pipeline = trained_class(config)
    name, taken = pipeline.__name__, taken_by(pipeline)
    if taken is None:
        # An argument that has to be given, or what clips.first_frame asks for.
        needs = [key for key, value in inspect.signature(pipeline.__call__).parameters.items() if _is_needed(key, value)]
        if needs or (config.clips is not None and config.clips.first_frame):
            raise ValueError(
                f"{name} takes {needs[0] if needs else 'an image'} beside the prompt, which is built for "
                f"{', '.join(TAKES)} only: it cannot be trained yet"
            )
        return
    if config.objective != "distill":
        raise ValueError(f"{name} takes {taken} beside the prompt, which {config.objective} cannot train: use distill")
    if config.clips is None or config.clips.folder is None:
        raise ValueError(f"{name} takes {taken} beside the prompt, which is made of clips: give clips.folder")
    if config.validation.prompts:
        raise ValueError(
            f"{name} takes {taken} beside the prompt, so that there can be no validation.prompts: errors are measured "
            f"on held-out clips"
        )
    if config.distill.on_policy:
        raise ValueError(f"{name} takes {taken} beside the prompt, and on_policy has none: set it to 0")


def _is_needed(name: str, parameter: inspect.Parameter) -> bool:
    return name not in ("self", "prompt") and parameter.default is parameter.empty


def picture(frame: torch.Tensor) -> Image.Image:
    """A frame (3, H, W) in [-1, 1] as an image of 8 bits."""
    pixels = ((frame + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def media_of(taken: str | None, frames: torch.Tensor) -> dict:
    """Arguments of a call for a clip (3, T, H, W) in [-1, 1]: what its pipeline takes beside the prompt."""
    return {"image": picture(frames[:, 0])} if taken == "image" else {}


def blank_media(taken: str | None, bucket: Bucket) -> dict:
    """The same for no clip at all."""
    return media_of(taken, torch.zeros(3, bucket.frames, bucket.height, bucket.width))
