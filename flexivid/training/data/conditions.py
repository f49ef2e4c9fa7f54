"""What a transformer is given beside latents and timestep, as its stock pipeline makes it from a prompt and an image.

Nothing here knows a family: the pipeline is called, and stopped when it comes to its transformer.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps

import torch
from diffusers import DiffusionPipeline

from flexivid.model.call import Call
from flexivid.model.families import family_of
from flexivid.model.family import Family, patch_size_of
from flexivid.stock_pipelines import call_arguments, latent_channels_of
from flexivid.training.config import ClipsConfig
from flexivid.training.data.buckets import BrokenClip, Bucket
from flexivid.training.noise import CHANNELS, CLEAN, TEXT_LENGTH

NOT_CONDITIONS = ("hidden_states", "timestep", "return_dict", "attention_kwargs")


class _AtTheTransformer(BaseException):  # modular pipelines print every Exception that passes
    pass


@contextmanager
def _replaced(module: torch.nn.Module, name: str, method: Callable) -> Iterator[None]:
    before = vars(module).get(name)
    setattr(module, name, method)
    try:
        yield
    finally:
        delattr(module, name)
        if before is not None:
            setattr(module, name, before)


def clip_arguments(pipe: DiffusionPipeline, bucket: Bucket, config: ClipsConfig, **more) -> dict:
    """Arguments of a call for a clip of a bucket's size; `more` by the names of `stock_pipelines.ARGUMENTS`."""
    sizes = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width, "fps": config.fps}
    return call_arguments(pipe, **sizes, text_length=config.max_sequence_length, **more)


@torch.no_grad()
def first_call(pipe: DiffusionPipeline, prompt: str, bucket: Bucket, config: ClipsConfig, media: dict) -> Call:
    """The first forward of a call, for one clip without classifier-free guidance. media: what is given with the prompt.

    Its latents are noise, except where the pipeline gives them without; the noise is the same in every call.
    """
    transformer = pipe.transformer
    family, signature = family_of(transformer), inspect.signature(type(transformer).forward)
    unguided = {} if family.guidance == "embedded" else {"guidance_scale": 1.0}
    seen = {}

    @wraps(transformer.forward)  # modular pipelines give what its signature names
    def stop(*args, **kwargs):
        seen.update(signature.bind(transformer, *args, **kwargs).arguments)
        raise _AtTheTransformer

    call = {"prompt": prompt, **media, **clip_arguments(pipe, bucket, config, steps=4, **unguided)}

    def encode(clips: torch.Tensor, *args, **kwargs):  # LTX gives them in the precision of its text encoder
        return stock_encode(clips.to(pipe.vae.dtype), *args, **kwargs)

    stock_encode = pipe.vae.encode
    with _replaced(transformer, "forward", stop), _replaced(pipe.vae, "encode", encode), suppress(_AtTheTransformer):
        pipe(**call, generator=torch.Generator().manual_seed(0), output_type="latent")
    del seen["self"]
    for name in family.for_all_clips:
        if (
            name in signature.parameters and signature.parameters[name].default is None
        ):  # what the forward takes by itself, such as scales of 1
            seen.pop(name, None)
    return Call(family, patch_size_of(transformer.config), seen, transformer.forward)


def conditions_in(call: Call, channels: int, text_length: int) -> dict:
    """What a first forward is given beside latents of so many channels, and their timestep.

    Tensors have a row a clip; tables of a size come as tuples, its axes as numbers. CHANNELS and CLEAN are there where
    the pipeline gives such. Of a sequence of all tokens its text, filled up to `text_length`, and its stream: what
    names tokens follows from them. Raises BrokenClip if that text is longer.
    """
    if call.family.sequence is not None:
        text = call.given["encoder_hidden_states"]
        if text.shape[1] > text_length:
            raise BrokenClip(f"its caption has {text.shape[1]} tokens, clips.max_sequence_length is {text_length}")
        streams = {name: call.given[name] for name in call.family.streams}
        filled = torch.nn.functional.pad(text, (0, 0, 0, text_length - text.shape[1]))
        return {"encoder_hidden_states": filled, TEXT_LENGTH: torch.tensor([[text.shape[1]]]), **streams}
    conditions = {name: value for name, value in call.given.items() if name not in NOT_CONDITIONS and value is not None}
    if call.latents.shape[1] > channels:
        conditions[CHANNELS] = call.latents[:, channels:]
    timestep = call.timesteps["timestep"]
    if timestep.ndim > 1 and not timestep.all():
        conditions[CLEAN] = call.over_latents(timestep == 0)
    return conditions


def conditions_of(
    pipe: DiffusionPipeline, prompt: str, bucket: Bucket, config: ClipsConfig, media: dict | None = None
) -> dict:
    """`conditions_in` of the first forward of a call."""
    call = first_call(pipe, prompt, bucket, config, media or {})
    return conditions_in(call, latent_channels_of(pipe.vae), config.max_sequence_length)


def of_clips(family: Family) -> tuple[str, ...]:
    """The conditions that are a clip's own, whatever its caption: image, video or sound, and how noisy it is."""
    return (*family.media, *family.conditions, *family.streams, *family.timesteps_beside, CHANNELS, CLEAN)
