"""The stock pipelines of diffusers, which call the same things by different names."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline

from flexivid.model.families import family_of
from flexivid.model.family import transformer_of
from flexivid.published import load_index, load_part
from flexivid.video import Sound

# What pipelines call an argument of ours.
ARGUMENTS = {
    "frames": ("num_frames", "frames", "video_length", "segment_frame_length"),
    "height": ("height",),
    "width": ("width",),
    "steps": ("num_inference_steps",),
    "guidance_scale": ("guidance_scale",),
    "text_length": ("max_sequence_length",),
    "fps": ("frame_rate",),
}


def pipeline_class(model: str | Path, with_image: bool) -> type[DiffusionPipeline]:
    """The class that a model's folder or hub id names, or its sister that continues images. Raises ValueError."""
    name = load_index(model)["_class_name"]
    found = getattr(diffusers, name, None)
    if found is None:
        raise ValueError(f"diffusers {diffusers.__version__} has no {name}, which {model} asks for")
    if issubclass(found, ModularPipeline):
        raise ValueError(
            f"{model} is a {name}: of a modular pipeline only MiniMax-H3 can be trained, and others must be loaded in "
            f"Python, for flexivid.enable"
        )
    if not with_image or "image" in inspect.signature(found.__call__).parameters:
        return found
    sister = getattr(diffusers, name.replace("Pipeline", "ImageToVideoPipeline"), None)
    if sister is None:
        raise ValueError(f"{name} takes no image, and diffusers has no other pipeline of its family that does")
    return sister


def without_weights(model: str | Path, pipeline: type[DiffusionPipeline]) -> DiffusionPipeline:
    """The pipeline from the configs of its transformers, VAE, guider and scheduler alone, on the meta device."""
    index = load_index(model)
    settings = {}
    for name, parameter in inspect.signature(pipeline.__init__).parameters.items():
        value = index.get(name)
        if isinstance(value, list) and name.split("_")[0] in ("transformer", "vae", "guider") and value[1] is not None:
            component = getattr(diffusers, value[1])
            config = load_part(model, name, component)
            with torch.device("meta"):
                settings[name] = component.from_config(config)
        elif isinstance(value, list) and name.endswith("scheduler") and value[1] is not None:
            component = getattr(diffusers, value[1])
            settings[name] = component.from_config(load_part(model, name, component))  # it has no weights
        elif isinstance(value, list) or (value is None and parameter.default is parameter.empty):
            settings[name] = None
        elif value is not None:
            settings[name] = value
    settings.pop("self")
    return pipeline(**settings)


def load(model: str | Path, pipeline: type[DiffusionPipeline], dtype: torch.dtype, **parts) -> DiffusionPipeline:
    """The pipeline with its weights in `dtype`, but its VAE in float32 where it casts what it gives to that: Wan's.

    parts: by name, what is there already, and is not loaded.
    """
    index = load_index(model)
    is_wan = any(
        index.get(name, [None, None])[1] == "WanTransformer3DModel" for name in ("transformer", "transformer_2")
    )
    precise = {"vae": torch.float32} if is_wan else {}
    return pipeline.from_pretrained(model, dtype={"default": dtype, **precise}, use_safetensors=True, **parts)


def set_guidance_scale(pipe: DiffusionPipeline, scale: float) -> None:
    """For pipelines that take it not as an argument of a call but from their guider."""
    if getattr(pipe, "guider", None) is not None:
        pipe.register_modules(guider=pipe.guider.new(guidance_scale=scale))


def latent_channels_of(vae: torch.nn.Module) -> int:
    """Channels of a VAE's latents, which its class names in its own way."""
    return vae.config.get("z_dim") or vae.config["latent_channels"]


def call_arguments(pipe: DiffusionPipeline, **values) -> dict:
    """Arguments of a call in the pipeline's own words, without those that it does not take."""
    parameters = inspect.signature(pipe.__call__).parameters
    named = {ours: [name for name in ARGUMENTS[ours] if name in parameters] for ours in values}
    call = {named[ours][0]: value for ours, value in values.items() if named[ours]}
    scale = call.get("guidance_scale")
    if "audio_guidance_scale" in parameters and scale is not None and scale <= 1:
        call["audio_guidance_scale"] = 1.0  # sound has a scale of its own, which would keep guidance on
    return call


def decoders(pipe: DiffusionPipeline) -> Iterator[tuple[object, str]]:
    """What makes frames, and sound, of latents: its part of the pipeline, and the method that is called."""
    for part, method in (("vae", "decode"), ("audio_vae", "decode"), ("vocoder", "forward")):
        if getattr(pipe, part, None) is not None:
            yield getattr(pipe, part), method


def sound_of(pipe: DiffusionPipeline, output) -> Sound | None:
    """What a pipeline has made beside the frames of the first clip of its output, with `output_type` other than
    `latent`."""
    if getattr(output, "audio", None) is None:
        return None
    samples = torch.as_tensor(output.audio[0]).float().cpu()
    # Kandinsky 6 makes one channel, without an axis for it, and its vocoder does not tell the rate.
    rate = getattr(pipe, "audio_sample_rate", None) or pipe.vocoder.config["output_sampling_rate"]
    return Sound(torch.atleast_2d(samples).numpy(), rate)


def usual_arguments(pipe: DiffusionPipeline) -> dict:
    """What a pipeline does when it is not told, by the names of ARGUMENTS."""
    parameters = inspect.signature(pipe.__call__).parameters
    family = family_of(transformer_of(pipe))
    values = {"text_length": 1, "fps": family.fps}
    if (guider := getattr(pipe, "guider", None)) is not None:
        values["guidance_scale"] = guider.guidance_scale
    for ours, theirs in ARGUMENTS.items():
        given = [parameters[name].default for name in theirs if name in parameters]
        if given and given[0] is not None:
            values[ours] = given[0]
    config = transformer_of(pipe).config
    if "target_size" in config:  # HunyuanVideo-1.5, whose image-to-video takes the shape of its image
        size = pipe.video_processor.calculate_default_height_width(9, 16, config["target_size"])
        values["height"], values["width"] = size
    # CogVideoX counts the frames of a clip, and says what its VAE makes of them; Allegro those of latents.
    of_clip = "temporal_compression_ratio" in config
    for name, latents in (("height", "sample_height"), ("width", "sample_width"), ("frames", "sample_frames")):
        # CogVideoX and Mochi decide by themselves.
        if name not in values and latents in config:
            time, space = family.compression(pipe)
            values[name] = config[latents] * (space if name != "frames" else 1 if of_clip else time)
        elif name not in values:
            decided = family.frames if name == "frames" else None
            values[name] = getattr(pipe, f"default_{name}") if decided is None else decided
    return values


def unknown_words(pipe: DiffusionPipeline, prompt: str) -> list[str]:
    """Words of a prompt that the tokenizer does not know."""
    tokenizer = pipe.tokenizer if hasattr(pipe.tokenizer, "unk_token_id") else pipe.tokenizer.tokenizer  # a processor's
    return [
        word for word in prompt.split() if tokenizer.unk_token_id in tokenizer(word, add_special_tokens=False).input_ids
    ]


@contextmanager
def timed(
    target,
    method: str,
    seconds: dict[str, float],
    name: str,
    device: str | torch.device,
    before: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Adds the seconds of every call of a method to `seconds`. before: is called before the first of them."""
    stock, own = getattr(target, method), vars(target).get(method)

    def call(*args, **kwargs):
        if not seconds[name]:
            before()
        began = now(device)
        result = stock(*args, **kwargs)
        seconds[name] += now(device) - began
        return result

    setattr(target, method, call)
    try:
        yield
    finally:
        delattr(target, method)
        if own is not None:  # such as a forward that is hooked
            setattr(target, method, own)


def now(device: str | torch.device) -> float:
    """Seconds by the clock, once all that was asked of the device is done."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
