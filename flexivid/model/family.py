"""What flexivid has to know of a family of video DiTs: the fields of one row of the table in `families`."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
from diffusers import DiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange

from flexivid.diffusion import Prediction
from flexivid.patches.folding import Folding, Size3, folding_for
from flexivid.patches.positions import centred_rope

Tables = tuple[torch.Tensor, torch.Tensor]
# What pipelines call their transformers. Wan2.2-A14B has two, the second for low noise; MiniMax-H3 has one for clips
# with references.
COMPONENTS = ("transformer", "transformer_2", "transformer_ref")


@dataclass(frozen=True)
class Loose:
    """How a forward takes tokens of any places: as those of one column, frame above frame, of one token each.

    blocks: attribute of the transformer with its blocks, which take and give `hidden_states` (B, tokens, D).
    timed: further arguments where every token has a timestep of its own.
    """

    blocks: str
    timed: dict = field(default_factory=dict)


@dataclass(frozen=True)
class Same:
    """The value that another setting of a configuration has."""

    setting: str


@dataclass(frozen=True)
class Sequence:
    """How a forward takes one sequence of the tokens of all that there is, and tensors that say what each of them is.

    Between `completed` and `stock` the arguments are those of a forward over the latents of the clip alone.

    stock: (completed arguments, folding of the clip, None at the base patch size) -> as the stock forward takes them.
    latents: the arguments of a forward, or what it gives for `hidden_states` -> (B, C, T, H, W) of the clip.
    packed: (B, C, T, H, W) -> tokens. given: (completed arguments) -> how many tokens stand before those in
    `hidden_states`, and are no part of the clip: its first and last frame, or what it refers to.
    laid_out: (latents (1, C, T, H, W), text (1, tokens, D), stream (1, tokens, C), timestep of the latents, timestep of
    the stream) -> the arguments that a pipeline gives to `forward` for one clip of text, what names tokens on the CPU.
    """

    stock: Callable[[dict, Folding | None], dict]
    latents: Callable[[dict], torch.Tensor]
    packed: Callable[[torch.Tensor], torch.Tensor]
    given: Callable[[dict], int]
    laid_out: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, float], dict]


@dataclass(frozen=True, eq=False)
class Family:
    """One row, told from others by identity.

    transformer_class: name of the diffusers class that the row describes.
    embedder: attribute path of the layer that embeds patches, a Conv3d, Conv2d or Linear. head: that of the output
        projection, a Linear. channels_last: its rows are ordered p_t, p_h, p_w, channel, else channel, p_t, p_h, p_w.
    embedder_channels_last: the same of the columns of a Linear embedder.
    layout: how `hidden_states` hold latents, an einops pattern of b, c, t, h, w. sizes: the arguments of `forward`
        that name the axes of the token grid, where the layout alone does not tell them apart, or a number. A tuple of
        frames is several clips behind one another.
    completed: the arguments of a call with those sizes, where a pipeline leaves them to coordinates, and its timesteps
        as (B,) or (B, tokens). What is complete stays as it is. sequence: see `Sequence`, None where the arguments hold
        the clip by itself.
    positions: attribute path of the module that makes positions, and `centred`, which calls it for coarse tokens:
        (module, its stock forward, folding, *its arguments) -> what the module returns.
    positions_of_sizes: these depend on the sizes of the latents only, and can be used again in a further step.
    rope_argument: the argument of `forward` with rotary tables, where the pipeline makes them, and `centred_argument`,
        which reads them at the centres of coarse tokens: (tables, folding) -> tables. Else they are (tokens, D).
    frame_timesteps: how `forward` holds the timesteps of latent frames, an einops pattern of b and t, if it knows one a
        frame; else (B,) or (B, tokens). destination: the argument with a second timestep, to which a flow map goes.
    prediction: what the network predicts. time_scale: timestep = sigma * time_scale for flow matching.
    causal: the VAE encodes the first frame alone, so that it is a block of its own in time.
    guidance: `separate`, the pipeline calls the transformer once a guidance branch, so that branches can differ;
        `batched`, one call with both; `embedded`, the scale is an input of the network.
    lora_targets: regular expression of the modules that LoRA adapts: self-attention and feed-forward, not
        cross-attention (the paper's best). None where diffusers' class takes no adapters.
    vae_factors: attributes of the pipeline with the compression of its VAE in time and in space, None if it has none.
    latent_frames: (frames, compression in time) -> the frames of its latents.
    fps: frames a second of what its published models make. frames: of a clip, where neither the pipeline nor the
        configuration tells.
    example: (config, latent size (T, H, W), text length) -> the arguments of one forward of one clip, for counting.
    counting: a context in which the forward runs on the meta device.
    temporal: patches may be larger in time too. fixed_out_channels: the forward cuts its output into
        `self.out_channels`, which has to be that of a weak head while one runs. as_many_channels: it gives as many as
        it is given, so that empty ones come behind folded latents, which the embedder leaves out. image_by_timestep:
        image-to-video gives the first frame as clean tokens, not as channels. without_last_step: classes of pipelines
        that leave out the last timestep of their scheduler.
    more_positions: other modules that make positions of the video, by `centred` too. streams: arguments of `forward`
        with the latents of what is made beside the video, such as sound, (B, tokens, channels), at the noise level of
        the step: they stay as they are, and what is predicted for them comes after the video in the output.
        stream_timestep: the completed argument with their own timesteps, (1, tokens, 1), where that is another one.
        levels: (call, timestep of the weak pass) -> the other arguments that tell noise levels. timesteps_beside: those
        by which pipelines give the timestep of a step once more, (B,). output_class: what `forward` gives with
        return_dict.
    steps_without_forward: of the steps that a pipeline is asked for.
    more_forwards: attributes of the stock pipelines that say whether each step has one more forward, for guidance by a
        perturbed model.
    conditions: arguments with a video (B, C, T, H, W) that modules of their own embed: weak passes get its block means.
    media: arguments that show the image which a pipeline is given beside the prompt.
    reference_frames: latent frames that a pipeline puts before those of the clip. given_behind: (completed arguments)
        -> how many it puts behind them, clean whatever the timestep: a clip of their own, for whose frames `levels` is
        told timestep 0, as `frame_timesteps` has it. section_frames: those of a section, where a pipeline makes clips
        of any length, section after section, each with all of its steps: a plan, and a summary, are of one.
    around: (transformer, folding, completed arguments) -> a context in which a weak forward runs.
    refused: classes of pipelines around the same transformer, and what they do that weak modes do not go with.
    for_all_clips: tensors that have no row for each clip. of_size: those whose rows are the same for all clips of a
        size. raw_latents: with output_type `latent` pipelines give latents as their VAE has them, and unpacked.
    untrained: what keeps training from it, empty where nothing does.
    bare_output: without `return_dict` the forward gives its tensor, and no tuple.
    unsupported: settings of a model's configuration, and the value with which it is refused. required: settings, and
        the only value that they may have, or the other setting whose value that is, as `Same`.
    check: raises ValueError for the arguments of a call that a pipeline makes, and that cannot be planned.
    loose: how its forward takes a sequence of fine and coarse tokens, with a timestep and a place each; or why not.
    """

    name: str
    transformer_class: str
    embedder: str
    head: str
    channels_last: bool
    positions: str
    centred: Callable
    prediction: Prediction
    guidance: Literal["separate", "batched", "embedded"]
    lora_targets: str | None
    example: Callable[[FrozenDict, Size3, int], dict]
    vae_factors: tuple[str | None, str | None] = ("vae_scale_factor_temporal", "vae_scale_factor_spatial")
    latent_frames: Callable[[int, int], int] = lambda frames, stride: (frames - 1) // stride + 1
    fps: int = 16
    frames: int | None = None
    layout: str = "b c t h w"
    sizes: tuple[tuple[str, str | int], ...] = ()
    completed: Callable[[dict], dict] = dict
    sequence: Sequence | None = None
    rope_argument: str | None = None
    centred_argument: Callable = lambda tables, folding: centred_tables(tables, folding, token_axis=0)
    frame_timesteps: str | None = None
    destination: str | None = None
    time_scale: float = 1000.0
    causal: bool = True
    counting: Callable[[], AbstractContextManager] = nullcontext
    temporal: bool = True
    fixed_out_channels: bool = False
    as_many_channels: bool = False
    image_by_timestep: bool = False
    positions_of_sizes: bool = False
    without_last_step: tuple[str, ...] = ()
    more_positions: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    stream_timestep: str | None = None
    levels: Callable[[dict, torch.Tensor], dict] = lambda call, timestep: {}
    timesteps_beside: tuple[str, ...] = ()
    output_class: type = Transformer2DModelOutput
    steps_without_forward: int = 0
    more_forwards: tuple[str, ...] = ()
    conditions: tuple[str, ...] = ()
    media: tuple[str, ...] = ()
    reference_frames: int = 0
    given_behind: Callable[[dict], int] = lambda call: 0
    around: Callable[[torch.nn.Module, Folding, dict], AbstractContextManager] = lambda *call: nullcontext()
    section_frames: int | None = None
    refused: tuple[tuple[str, str], ...] = ()
    for_all_clips: tuple[str, ...] = ()
    of_size: tuple[str, ...] = ()
    untrained: str = ""
    raw_latents: bool = False
    embedder_channels_last: bool = False
    bare_output: bool = False
    unsupported: tuple[tuple[str, object], ...] = ()
    required: tuple[tuple[str, object], ...] = ()
    check: Callable[[dict], None] = lambda call: None
    loose: Loose | str = "its row does not say how its forward would take mixed tokens"

    @property
    def makes_images(self) -> bool:
        return ("t", 1) in self.sizes

    def latents(self, call: dict) -> torch.Tensor:
        """The latents of a call, (B, C, T, H, W)."""
        if self.sequence is not None:
            return self.sequence.latents(call)
        if self.layout == "b c t h w":
            return call["hidden_states"]
        sizes = {axis: call.get(argument, argument) for axis, argument in self.sizes}
        if "t" in sizes:
            sizes["t"] = sum(self._clips(call) or ())
        return rearrange(call["hidden_states"], f"{self.layout} -> b c t h w", **sizes)

    def folding(self, call: dict, multiple: Size3, patch_size: Size3) -> Folding:
        """How the latents of a call are folded by `multiple`, each of several clips by itself."""
        size, clips = tuple(self.latents(call).shape[2:]), self._clips(call)
        if behind := self.given_behind(call):
            clips = (size[0] - behind, behind)
        return folding_for(size, multiple, patch_size, self.causal, clips)

    def _clips(self, call: dict) -> tuple[int, ...] | None:
        """Frames of each clip, None where the layout alone tells them."""
        argument = dict(self.sizes).get("t")
        frames = call.get(argument, argument)
        return frames if frames is None or isinstance(frames, tuple) else (frames,)

    def steps(self, pipe: DiffusionPipeline) -> int:
        """Denoising steps of a call that begins at the scheduler's first timestep."""
        return len(pipe.scheduler.timesteps) - (type(pipe).__name__ in self.without_last_step)

    def latent_size(self, pipe: DiffusionPipeline, frames: int, height: int, width: int) -> Size3:
        """(T, H, W) of the latents that a pipeline makes for a clip in pixels, padded to whole patches in time, or of a
        section of it.

        Raises ValueError if the pipeline does not tell the factors of its VAE.
        """
        stride, shrink = self.compression(pipe)
        if self.section_frames is not None:
            return self.section_frames, height // shrink, width // shrink
        patch_frames = patch_size_of(transformer_of(pipe).config)[0]  # CogVideoX-1.5 pads to them
        latent_frames = math.ceil(self.latent_frames(frames, stride) / patch_frames) * patch_frames
        return latent_frames + self.reference_frames, height // shrink, width // shrink

    def compression(self, pipe: DiffusionPipeline) -> tuple[int, int]:
        """Frames a latent frame, and pixels a latent pixel. Raises ValueError if the pipeline does not tell."""
        time, space = self.vae_factors
        if space is None:
            raise ValueError(f"the sizes of {self.name}'s latents are unknown: its pipeline does not tell them")
        return getattr(pipe, time) if time else 1, getattr(pipe, space)

    def packed(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> as the transformer takes and gives them."""
        if self.sequence is not None:
            return self.sequence.packed(latents)
        if self.layout == "b c t h w":
            return latents
        return rearrange(latents, f"b c t h w -> {self.layout}")

    def arguments_for(self, latents: torch.Tensor) -> dict:
        """The arguments of `forward` that hold latents (B, C, T, H, W)."""
        lengths = dict(zip("bcthw", latents.shape, strict=True))
        sizes = {argument: lengths[axis] for axis, argument in self.sizes if isinstance(argument, str)}
        return {"hidden_states": self.packed(latents), **sizes}


def check_pipeline(pipe, family: Family) -> None:
    """Raises ValueError for a pipeline that does what weak modes do not go with."""
    if (reason := dict(family.refused).get(type(pipe).__name__)) is not None:
        raise ValueError(f"{type(pipe).__name__} is not supported: it has {reason}")


def transformer_of(pipe: DiffusionPipeline) -> torch.nn.Module:
    """A pipeline's transformer, or the one that it has been loaded with alone."""
    return next(part for name in COMPONENTS if (part := getattr(pipe, name, None)) is not None)


def patch_size_of(config: FrozenDict) -> Size3:
    """The model's own patch size (p_t, p_h, p_w): diffusers writes it as three numbers, or as one and patch_size_t."""
    patch_size = config["patch_size"]
    if isinstance(patch_size, int):
        return config.get("patch_size_t") or 1, patch_size, patch_size
    return tuple(patch_size)


def centred_tables(tables: Tables, folding: Folding, token_axis: int) -> Tables:
    """Rotary tables of the base grid, tokens on `token_axis`, read at the centres of the coarse tokens."""
    if math.prod(folding.multiple) == 1:
        return tables
    cos, sin = (table.movedim(token_axis, 0).unflatten(0, folding.grid) for table in tables)
    centred = centred_rope(cos, sin, folding.centres, folding.aside)
    return tuple(table.flatten(0, 2).movedim(0, token_axis) for table in centred)
