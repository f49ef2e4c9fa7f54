"""What a transformer is given beside latents and timestep, as its stock pipeline makes it from a prompt.

Nothing here knows a family: the pipeline is called, and stopped when it comes to its transformer.
"""

import inspect

import torch
from diffusers import DiffusionPipeline

from flexivid.model.families import family_of
from flexivid.stock_pipelines import call_arguments
from flexivid.training.config import ClipsConfig
from flexivid.training.data.buckets import Bucket

NOT_CONDITIONS = ("hidden_states", "timestep", "return_dict", "attention_kwargs")


class _AtTheTransformer(Exception):
    pass


def clip_arguments(pipe: DiffusionPipeline, bucket: Bucket, config: ClipsConfig, **more) -> dict:
    """Arguments of a call for a clip of a bucket's size; `more` by the names of `stock_pipelines.ARGUMENTS`."""
    sizes = {"frames": bucket.frames, "height": bucket.height, "width": bucket.width, "fps": config.fps}
    return call_arguments(pipe, **sizes, text_length=config.max_sequence_length, **more)


@torch.no_grad()
def conditions_of(pipe: DiffusionPipeline, prompt: str, bucket: Bucket, config: ClipsConfig) -> dict:
    """The other arguments of the first forward of a call, for one clip without classifier-free guidance.

    Tensors have a row a clip; tables of a size come as tuples, its axes as numbers.
    """
    transformer = pipe.transformer
    family, signature = family_of(transformer), inspect.signature(type(transformer).forward)
    unguided = {} if family.guidance == "embedded" else {"guidance_scale": 1.0}
    seen = {}

    def stop(*args, **kwargs):
        seen.update(signature.bind(transformer, *args, **kwargs).arguments)
        raise _AtTheTransformer

    hooked = vars(transformer).get("forward")
    transformer.forward = stop
    try:
        pipe(prompt=prompt, **clip_arguments(pipe, bucket, config, steps=4, **unguided), output_type="latent")
    except _AtTheTransformer:
        pass
    finally:
        del transformer.forward
        if hooked is not None:
            transformer.forward = hooked
    del seen["self"]
    return {name: value for name, value in seen.items() if name not in NOT_CONDITIONS and value is not None}
