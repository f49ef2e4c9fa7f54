"""The training configuration: YAML -> pydantic, with dotted overrides (`--optim.lr 1e-4`)."""

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import Field, PositiveFloat, ValidationError, model_validator

from flexivid.patches.sizes import parse_mode
from flexivid.shipped import find_config
from flexivid.text import read_text
from flexivid.training.data.buckets import Bucket
from flexivid.training.few_config import FewConfig
from flexivid.training.section import Fraction, Positive, Section, ShippedPath
from flexivid.training.unread import check_all_is_read


class OptimConfig(Section):
    name: Literal["adamw", "adamw8bit", "muon"] = Field(
        "adamw",
        description="adamw8bit: moments in 8 bits, of bitsandbytes; muon: Muon on the matrices, AdamW on the rest",
    )
    lr: float = Field(8e-4, gt=0, description="peak learning rate")
    muon_lr: float = Field(5e-3, gt=0, description="peak learning rate of Muon, on AdamW's scale")
    weight_decay: float = Field(1e-2, ge=0, description="of AdamW and Muon")
    warmup: int = Field(100, ge=0, description="steps of linear warm-up")
    decay: Fraction = Field(0.2, description="share of the steps, at the end, over which lr falls linearly to zero")
    clip: float = Field(1.0, gt=0, description="gradient norm above which gradients are scaled down")
    ema: Fraction = Field(0.999, description="decay of the exponential moving average of the weights")


class DataConfig(Section):
    clips: Positive = Field(6000, description="rendered clips whose latents are cached before the first step")
    cache: Path = Field(Path("runs/shapes-latents"), description="folder of the cached latents, one subfolder a VAE")
    frames: Positive = Field(17, description="of a clip")
    size: Positive = Field(64, description="sides of a clip in pixels")
    text_lengths: dict[Positive, Fraction] = Field(
        {32: 0.9, 512: 0.1}, description="padded text length -> how often it is drawn; pipelines pad to 512 by default"
    )
    drop_caption: Fraction = Field(0.1, description="how often the caption is empty, for classifier-free guidance")
    word_weights: dict[str, PositiveFloat] = Field(
        {}, description="factor word, such as `cross` or `moving left` -> how often its clips are drawn, 1 if not named"
    )


class ClipsConfig(Section):
    """Real data, or none: a folder of captioned clips, or prompts for which the teacher samples."""

    folder: Path | None = Field(
        None,
        description="clips with captions: metadata.csv, .json or .jsonl; videos.txt and "
        "prompts.txt; or a.mp4 beside a.txt",
    )
    prompts: Path | None = Field(None, description="text file with a prompt a line, instead of clips")
    cache: Path = Field(Path("runs/latents"), description="folder of the cached latents and text embeddings")
    buckets: list[str] = Field(
        ["81x480x832"], min_length=1, description="frames x height x width; a clip is cut to the one that suits it"
    )
    fps: float = Field(16.0, gt=0, description="frames a second at which clips are read")
    max_sequence_length: Positive = Field(512, description="text tokens, padded")
    drop_caption: Fraction = Field(0.1, description="how often the caption is empty, for classifier-free guidance")
    teacher_steps: Positive = Field(50, description="denoising steps of samples for `prompts`")
    teacher_guidance: float = Field(5.0, ge=1, description="guidance scale of samples for `prompts`")
    first_frame: bool = Field(
        False,
        description="a base that makes clips of text and of text with an image, such as LTX-Video, is trained for the "
        "latter: it is given the first frame of each clip",
    )
    held_out: int | None = Field(
        None,
        ge=0,
        description="clips that are never trained on, and that errors are measured on; by default a tenth of them, 1 "
        "to 8, and none of fewer than 5",
    )

    @model_validator(mode="after")
    def _one_source(self):
        if (self.folder is None) == (self.prompts is None):
            raise ValueError("give clips.folder or clips.prompts, one of them")
        for text in self.buckets:
            Bucket.parse(text)
        return self


class ValidationConfig(Section):
    prompts: list[str] = Field([], description="what is sampled every `sample_every` steps, at each budget")
    budgets: list[Annotated[float, Field(gt=0, le=1)]] = Field([1.0, 0.5, 0.25], description="shares of the full FLOPs")
    steps: Positive = Field(30, description="denoising steps")
    guidance_scale: float = Field(5.0, ge=1, description="of classifier-free guidance")


class VaeConfig(Section):
    base_dim: Positive = Field(16, description="channels of the first level")
    z_dim: Positive = Field(16, description="channels of the latents")
    crop: Positive = Field(32, description="side in pixels of the training crops around the object")
    frames: Positive = Field(9, description="frames of a training crop: 1 + a multiple of 4")
    image_steps: int = Field(
        0, ge=0, description="first steps on single frames: many times cheaper, teaches the picture"
    )
    image_batch: Positive = Field(64, description="frames a step meanwhile")
    full_share: Fraction = Field(0.2, description="share of steps on whole frames, at a quarter of the batch")
    kl: float = Field(1e-6, ge=0, description="weight of the KL term beside the mean absolute and squared errors")
    latent_noise: float = Field(
        0.0, ge=0, description="noise on normalised latents while a decoder alone is trained, as a sampler's errors"
    )


class TransformerConfig(Section):
    heads: Positive = Field(3, description="of 64 channels")
    layers: Positive = Field(6, description="blocks")
    ffn_dim: Positive = Field(512, description="hidden channels of the feed-forward layers")
    image_steps: int = Field(0, ge=0, description="first steps on single frames: 5 times cheaper, teaches the words")
    image_batch: Positive = Field(64, description="frames a step meanwhile")


class DistillConfig(Section):
    modes: list[str] = Field(["1x4x4", "2x2x2", "2x4x4"], description="weak patch sizes")
    modes_per_step: Positive = Field(1, description="weak patch sizes drawn per step; the teacher runs once for all")
    mode_weights: list[float] | None = Field(None, description="how often each mode is drawn; equally by default")
    parametrisation: Literal["snr", "direct"] = Field(
        "snr", description="snr: x0 of the coarse latents and a residual; direct: the paper's, all pixels at once"
    )
    rank: Positive = Field(32, description="LoRA rank")
    guidance_scale: float | None = Field(
        None, gt=1, description="of classifier-free guidance, that modes such as 1x4x4-guided give in one forward"
    )
    adapter: ShippedPath | None = Field(
        None,
        description="adapter folder to go on from, of the same modes and rank; guided modes that it has not start from "
        "the others",
    )
    sigma_range: tuple[Fraction, Fraction] = Field((0.2, 1.0), description="noise levels at which weak modes run")
    correction_gap: Fraction = Field(
        0.0,
        description="for interleaved schedules: the most that may lie between a weak step and the powerful one that "
        "corrects it, as a share of the steps; the loss then is what the correction leaves. 0: the paper's loss",
    )
    teacher_weight: float = Field(
        1.0, ge=0, description="of `shared`: weight of the distance to the original beside flow matching"
    )
    on_policy: Fraction = Field(
        0.0, description="share of the steps whose x_t are taken from the student's own sampling runs"
    )
    on_policy_every: Positive = Field(50, description="steps after which these runs are made anew")
    on_policy_clips: Positive = Field(16, description="clips of such a run; `validation` has its steps and guidance")
    on_policy_budget: float = Field(0.25, gt=0, le=1, description="budget of such a run")
    anchor: float = Field(0.2, ge=0, description="with correction_gap: weight of the paper's loss beside it")

    @model_validator(mode="after")
    def _modes_can_be_drawn(self):
        if self.modes_per_step > len(self.modes):
            raise ValueError(f"modes_per_step is {self.modes_per_step}, but there are only {len(self.modes)} modes")
        guided = [mode for mode in self.modes if parse_mode(mode)[1]]
        if bool(guided) != (self.guidance_scale is not None):
            raise ValueError("guidance_scale and guided modes, such as 1x4x4-guided, go together: give both or none")
        if guided and (self.on_policy or self.correction_gap):
            raise ValueError(f"{guided[0]} goes with neither correction_gap nor on_policy: set both to 0")
        if self.on_policy and self.correction_gap:
            raise ValueError("on_policy and correction_gap exclude each other: a run has one noise level a state")
        if self.mode_weights is not None and len(self.mode_weights) != len(self.modes):
            raise ValueError(f"mode_weights has {len(self.mode_weights)} entries for {len(self.modes)} modes")
        return self


class Config(Section):
    objective: Literal["vae", "pretrain", "distill", "shared", "few"] = Field(
        description="vae and pretrain make the embedded model; distill makes an adapter for any supported pipeline; "
        "shared trains all weights of one for every patch size; few makes an adapter for a few steps without guidance"
    )
    output: Path = Field(description="folder of checkpoints, log.jsonl, samples and the result")
    base: ShippedPath | None = Field(
        None, description="what is started from: a VAE (`vae` trains its decoder on), a VAE or pipeline, a teacher"
    )
    component: Literal["transformer", "transformer_2"] = Field(
        "transformer",
        description="of a base with two of them, such as Wan2.2-A14B, which is trained: that of high noise levels or "
        "transformer_2, that of low ones; `python -m flexivid merge` joins the adapters of both",
    )
    seed: int = Field(0, description="of data order, noise and noise levels, at any number of processes")
    steps: Positive = Field(1000, description="optimiser steps")
    batch_size: Positive = Field(32, description="clips a step, over all processes")
    flow_shift: float = Field(3.0, gt=0, description="shift of the noise levels in training; that of the sampler")
    micro_batches: Positive = Field(
        1, description="parts of a process's share of a step, one after the other in memory"
    )
    base_dtype: Literal["float32", "bfloat16"] = Field("float32", description="of weights that stay frozen")
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    compile: bool = Field(False, description="torch.compile the transformer blocks")
    attention_backend: str | None = Field(
        None, description="attention backend of diffusers; on a CPU _native_math is the fastest with `compile`"
    )
    max_nonfinite_steps: Positive = Field(
        5, description="steps in a row whose loss or gradient is not finite, which change nothing, until the run stops"
    )
    log_every: Positive = Field(10, description="steps between lines of log.jsonl and of the trackers")
    save_every: Positive = Field(200, description="steps between checkpoints")
    sample_every: Positive = Field(500, description="steps between pictures in `samples` and lines of validation.jsonl")
    keep_checkpoints: Positive = Field(1, description="how many of the last checkpoints are kept")
    peak_tflops: float | None = Field(
        None,
        gt=0,
        description="TFLOP a second that the device of a process can do in the precision of training, for the MFU in "
        "log.jsonl; known for some GPUs in bf16 and fp16",
    )
    trackers: list[str] = Field(["tensorboard"], description="of accelerate: tensorboard, wandb, trackio, ...")
    push_to_hub: str | None = Field(None, description="hub repository that the finished adapter is uploaded to")
    optim: OptimConfig = Field(OptimConfig(), description="optimiser and learning rate")
    data: DataConfig = Field(DataConfig(), description="the rendered world of the embedded model")
    clips: ClipsConfig | None = Field(None, description="trained on instead of the rendered world")
    validation: ValidationConfig = Field(ValidationConfig(), description="pictures while an adapter trains on `clips`")
    vae: VaeConfig = Field(VaeConfig(), description="the autoencoder that objective `vae` trains")
    transformer: TransformerConfig = Field(TransformerConfig(), description="the model that `pretrain` starts with")
    distill: DistillConfig = Field(DistillConfig(), description="the adapter")
    few: FewConfig = Field(FewConfig(), description="the adapter of a few steps without guidance")

    @model_validator(mode="after")
    def _settings_go_together(self):
        if self.gradient_checkpointing and self.objective == "distill" and self.distill.modes_per_step > 1:
            raise ValueError(
                "gradient_checkpointing needs distill.modes_per_step 1: blocks run again in the backward pass, when "
                "only the LoRA of the last mode is active"
            )
        if self.objective == "shared" and self.base_dtype != "float32":
            raise ValueError("shared trains all weights: base_dtype must be float32")
        if self.objective == "shared" and self.distill.guidance_scale is not None:
            raise ValueError("shared trains no guided modes: its teacher is what it learns to be")
        if self.objective == "few" and self.optim.name == "muon":
            raise ValueError("few has a learning rate of its own for the fake score: optim.name must be adamw")
        check_all_is_read(self)
        return self


def _override(tree: dict, name: str, text: str) -> None:
    """Sets `section.key` to what `text` means in YAML; null takes the setting out."""
    *sections, key = name.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ValueError(f"cannot set {name}: {section} is {node!r} in the config, and no section")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"the value {text!r} of --{name} is not YAML") from None
    if value is None:
        node.pop(key, None)
    else:
        node[key] = value


def load_config(path: str | Path, overrides: list[str] = ()) -> Config:
    """Reads a YAML file, or the one that ships under a name, and applies `--section.key value` overrides.

    `null` takes a setting out. Raises ValueError that names what is wrong.
    """
    path = find_config(path)
    try:
        tree = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, not a mapping of settings")
    if len(overrides) % 2:
        raise ValueError(f"the override {overrides[-1]!r} has no value; write for example --optim.lr 1e-4")
    for name, value in zip(overrides[::2], overrides[1::2], strict=True):
        if not name.startswith("--"):
            raise ValueError(f"expected an override such as --optim.lr, got {name!r}")
        _override(tree, name.removeprefix("--").replace("-", "_"), value)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        # One that is about several settings has no place.
        found = [(".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors()]
        problems = "; ".join(": ".join(filter(None, place_and_message)) for place_and_message in found)
        raise ValueError(f"{path}: {problems}") from None
