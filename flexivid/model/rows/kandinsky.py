"""Kandinsky 5 (arXiv 2511.14993)."""

import torch

from flexivid.model.family import Family, patch_size_of
from flexivid.model.rows.common import ONE_TIMESTEP, example_tensors
from flexivid.patches.folding import Folding, token_grid
from flexivid.patches.positions import centred_rope


def centred_rotations(matrices: torch.Tensor, folding: Folding) -> torch.Tensor:
    """Rotation matrices of the base grid, (T, H, W, 1, D, 2, 2) -> of the coarse tokens, (T', H', W', 1, D, 2, 2)."""
    cos, sin = centred_rope(*matrices[..., 0].unbind(-1), folding.centres, folding.aside)
    return torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))


def _kandinsky_rope(module, stock, folding: Folding, shape, places, scale_factor) -> torch.Tensor:
    """Of a batch, from the places of the base grid that the pipeline passes."""
    matrices = centred_rotations(stock((1, *folding.grid), places, scale_factor)[0], folding)
    return matrices.expand(shape[0], *matrices.shape)


def _kandinsky_example(config, size, length):
    channels = config["in_visual_dim"] * (2 if config["visual_cond"] else 1) + config["visual_cond"]
    call = example_tensors({**config, "in_channels": channels}, size, length, "in_text_dim")
    call["pooled_projections"] = torch.empty(1, config["in_text_dim2"], device="meta")
    call["visual_rope_pos"] = [torch.arange(tokens) for tokens in token_grid(size, patch_size_of(config))]
    call["text_rope_pos"] = torch.arange(length)
    return call | KANDINSKY5.arguments_for(call["hidden_states"])


def _check_kandinsky(call: dict) -> None:
    latents = call["hidden_states"]
    # The last channel, if there are others beside the latents, tells which frames are given.
    if latents.shape[-1] % 2 and not latents.is_meta and latents[..., -1].any():
        raise ValueError(
            "Kandinsky5 image-to-video is not supported: the first frame is clean, and its timestep does not say so"
        )


KANDINSKY5 = Family(
    name="kandinsky5",
    transformer_class="Kandinsky5Transformer3DModel",
    embedder="visual_embeddings.in_layer",
    head="out_layer.out_layer",
    channels_last=False,
    embedder_channels_last=True,
    positions="visual_rope_embeddings",
    centred=_kandinsky_rope,
    prediction="flow",
    guidance="separate",
    lora_targets=(
        r"visual_transformer_blocks\.\d+\."
        r"(self_attention\.(to_query|to_key|to_value|out_layer)|feed_forward\.(in_layer|out_layer))"
    ),
    example=_kandinsky_example,
    fps=24,
    layout="b t h w c",
    for_all_clips=("text_rope_pos", "visual_rope_pos"),
    bare_output=True,
    # Sparse attention, over blocks that values choose.
    unsupported=(("attention_type", "nabla"),),
    check=_check_kandinsky,
    untrained="takes text of two encoders and places of its tokens, which training does not pass",
    loose=ONE_TIMESTEP,
)
