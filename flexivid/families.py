"""The table of model families: what flexivid has to know of a video DiT, one row each."""

from dataclasses import dataclass

import torch

from flexivid.parametrisation import Prediction


@dataclass(frozen=True)
class Family:
    """One row.

    transformer_class: name of the diffusers class that the row describes.
    embedder, head, rope: attribute paths of the patch embedder (Conv3d), the output projection (Linear, rows ordered
        p_t, p_h, p_w, channel) and the rotary embedding module (latents -> cos, sin of shape (1, tokens, 1, D)).
    prediction: what the network predicts. time_scale: timestep = sigma * time_scale for flow matching.
    causal: the VAE encodes the first frame alone, so that it is a block of its own in time.
    separate_guidance: the pipeline calls the transformer once a guidance branch, so that branches can differ.
    lora_targets: regular expression of the modules that LoRA adapts: self-attention and feed-forward, not
        cross-attention (the paper's best).
    default_modes: weak patch sizes when the user names none and has no adapter.
    """

    name: str
    transformer_class: str
    embedder: str
    head: str
    rope: str
    prediction: Prediction
    time_scale: float
    causal: bool
    separate_guidance: bool
    lora_targets: str
    default_modes: tuple[str, ...]


FAMILIES = (
    Family(
        name="wan",
        transformer_class="WanTransformer3DModel",
        embedder="patch_embedding",
        head="proj_out",
        rope="rope",
        prediction="flow",
        time_scale=1000.0,
        causal=True,
        separate_guidance=True,
        lora_targets=r"blocks\.\d+\.(attn1\.(to_q|to_k|to_v|to_out\.0)|ffn\.net\.(0\.proj|2))",
        default_modes=("1x4x4",),
    ),
)


def family_of(transformer: torch.nn.Module) -> Family:
    """The row of a transformer. Raises ValueError, which lists what is supported."""
    name = type(transformer).__name__
    for family in FAMILIES:
        if family.transformer_class == name:
            return family
    supported = ", ".join(family.transformer_class for family in FAMILIES)
    raise ValueError(f"flexivid does not know the transformer {name}; it supports {supported}")
