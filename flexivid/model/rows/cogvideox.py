"""CogVideoX (arXiv 2408.06072)."""

import math

import torch

from flexivid.model.family import Family, patch_size_of
from flexivid.model.rows.common import ATTENTION_AND_FEED_FORWARD, ONE_TIMESTEP, example_tensors
from flexivid.patches import positions
from flexivid.patches.folding import Folding, token_grid


def _cogvideox_embedding(module, stock, folding: Folding, text, latents) -> torch.Tensor:
    """CogVideoX-2B adds a sin-cos table to its tokens, 5B image-to-video a learned one."""
    flags = ("use_positional_embeddings", "use_learned_positional_embeddings")
    before = {flag: getattr(module, flag) for flag in flags}
    if not any(before.values()):
        return stock(text, latents)
    frames = (folding.size[0] - 1) * module.temporal_compression_ratio + 1
    if before["use_learned_positional_embeddings"] and frames == module.sample_frames:
        table = module.pos_embedding
    else:
        table = module._get_positional_embeddings(folding.size[1], folding.size[2], frames, device=latents.device)
    try:
        for flag in flags:
            setattr(module, flag, False)
        tokens = stock(text, latents)
    finally:
        for flag, value in before.items():
            setattr(module, flag, value)
    of_video = table[0, module.max_text_seq_length :].unflatten(0, folding.grid)
    of_video = positions.middle(of_video, folding.centres).flatten(0, 2).to(tokens.dtype)
    # Text stands at no position: its part of the table is zero.
    return torch.cat([tokens[:, : text.shape[1]], tokens[:, text.shape[1] :] + of_video], 1)


def _cogvideox_example(config, size, length):
    call = example_tensors(config, size, length, "text_embed_dim")
    if config["use_rotary_positional_embeddings"]:
        tokens = math.prod(token_grid(size, patch_size_of(config)))
        call["image_rotary_emb"] = (torch.empty(tokens, config["attention_head_dim"], device="meta"),) * 2
    return call | COGVIDEOX.arguments_for(call["hidden_states"])


COGVIDEOX = Family(
    name="cogvideox",
    transformer_class="CogVideoXTransformer3DModel",
    embedder="patch_embed.proj",
    head="proj_out",
    channels_last=False,
    positions="patch_embed",
    centred=_cogvideox_embedding,
    prediction="v_prediction",
    guidance="batched",
    lora_targets=ATTENTION_AND_FEED_FORWARD,
    example=_cogvideox_example,
    fps=8,
    layout="b t c h w",
    rope_argument="image_rotary_emb",
    loose=ONE_TIMESTEP,
)
