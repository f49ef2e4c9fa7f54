"""What pipelines are given beside the prompt: a clip's first frame, or its control video and mask.

They are images as one gives them to the stock pipeline, which makes of them what its transformer takes.
"""

import inspect
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, MiniMaxH3ModularPipeline
from PIL import Image

from flexivid.model.families import family_of
from flexivid.published import load_index
from flexivid.stock_pipelines import latent_channels_of, pipeline_class
from flexivid.training.config import Config
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.data.captions import CaptionedClip
from flexivid.training.data.clips import load_beside
from flexivid.training.modular import MiniMaxH3Pipeline

IMAGE, CONTROL = "an image", "a control video"
REMEDY = "put a.control.mp4 or a.mask.mp4 beside a.mp4, or name them in control and mask of the metadata"
# Those that can be trained, by what they take beside the prompt: other arguments of their calls are not built.
TAKES = {
    "WanImageToVideoPipeline": IMAGE,
    "LTXImageToVideoPipeline": IMAGE,
    "LTX2ImageToVideoPipeline": IMAGE,
    "WanVACEPipeline": CONTROL,
}

# Those that are given a prompt alone, and fill the channels of an image themselves.
FILLS = ("HunyuanVideo15Pipeline",)


def trained_class(config: Config) -> type[DiffusionPipeline]:
    """The class that a config's base is trained as: with `clips.first_frame` that which takes an image.

    Raises ValueError if diffusers has none.
    """
    if load_index(config.base)["_class_name"] == MiniMaxH3ModularPipeline.__name__:
        if config.clips is not None and config.clips.first_frame:
            raise ValueError(
                "MiniMax-H3 is trained on text alone, frames are not built: clips.first_frame must be false"
            )
        return MiniMaxH3Pipeline
    return pipeline_class(config.base, with_image=config.clips is not None and config.clips.first_frame)


def taken_by(pipeline: type[DiffusionPipeline]) -> str | None:
    """What its calls take beside the prompt, of a clip."""
    return TAKES.get(pipeline.__name__)


def gives_clean_frame(pipe: DiffusionPipeline) -> bool:
    """Whether the image is the first of the latents, without noise, and not channels beside them."""
    return taken_by(type(pipe)) == IMAGE and pipe.transformer.config.in_channels == latent_channels_of(pipe.vae)


def check_media(config: Config, pipe: DiffusionPipeline) -> None:
    """Raises ValueError if what the base takes beside the prompt is not built, or not for what the config asks for.

    pipe: of `trained_class`, without weights will do.
    """
    pipeline = type(pipe)
    name, taken = pipeline.__name__, taken_by(pipeline)
    if taken is None:
        # An argument that has to be given, or what clips.first_frame asks for.
        parameters = inspect.signature(pipeline.__call__).parameters.values()
        needs = [p.name for p in parameters if p.default is p.empty and p.name not in ("self", "prompt")]
        if needs or (config.clips is not None and config.clips.first_frame):
            raise ValueError(
                f"{name} takes {needs[0] if needs else 'an image'} beside the prompt, which is built for "
                f"{', '.join(TAKES)} only: it cannot be trained yet"
            )
        return
    by_timestep = family_of(pipe.transformer).image_by_timestep or pipe.config.get("expand_timesteps")
    if gives_clean_frame(pipe) and not by_timestep:
        raise ValueError(f"{config.base} was trained on text alone: it has no channels for an image")
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


def check_has_media(taken: str | None, clips: list[CaptionedClip]) -> None:
    """Raises ValueError if the base takes a control video, and no clip has one."""
    if taken == CONTROL and not any(clip.beside for clip in clips):
        raise ValueError(f"the base takes {taken}, and none of the {len(clips)} clips has one or a mask: {REMEDY}")


def pictures(frames: torch.Tensor) -> list[Image.Image]:
    """Frames (3, T, H, W) in [-1, 1] as images of 8 bits."""
    pixels = ((frames + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(frame) for frame in pixels.permute(1, 2, 3, 0).cpu().numpy()]


def media_of(taken: str | None, clip: CaptionedClip, frames: torch.Tensor, bucket: Bucket, fps: float) -> dict:
    """Arguments of a call for a clip, whose frames (3, T, H, W) are in [-1, 1]. Raises BrokenClip if it has none.

    A mask without a control video is one of the clip itself, which is to be seen where the mask is black.
    """
    if taken == IMAGE:
        return {"image": pictures(frames[:, :1])[0]}
    if taken is None:
        return {}
    if not clip.beside:
        raise BrokenClip(f"it has neither {CONTROL} nor a mask: {REMEDY}")

    def beside(path: Path) -> torch.Tensor:
        return load_beside(path, clip.path, bucket, fps)

    media = {"video": pictures(frames if clip.control is None else beside(clip.control))}
    if clip.mask is not None:
        media["mask"] = [image.convert("L") for image in pictures(beside(clip.mask))]
    return media


def blank_media(taken: str | None, bucket: Bucket) -> dict:
    """The same for no clip at all."""
    images = pictures(torch.zeros(3, bucket.frames, bucket.height, bucket.width))
    return {IMAGE: {"image": images[0]}, CONTROL: {"video": images}}.get(taken, {})
