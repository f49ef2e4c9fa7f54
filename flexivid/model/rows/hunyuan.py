"""HunyuanVideo (arXiv 2412.03603), its Framepack, HunyuanVideo-1.5 (arXiv 2511.18870) and Motif-Video."""

from contextlib import contextmanager
from dataclasses import replace

import torch
from torch.overrides import TorchFunctionMode

from flexivid.model.family import Family, Tables, centred_tables
from flexivid.model.rows.common import ONE_TIMESTEP, example_tensors, of_latents, section_places
from flexivid.patches.folding import Folding


def _hunyuan_example(config, size, length):
    call = example_tensors(config, size, length, "text_embed_dim", mask=True)
    call["pooled_projections"] = torch.empty(1, config["pooled_projection_dim"], device="meta")
    if config["guidance_embeds"]:
        call["guidance"] = torch.empty(1, device="meta")
    return call


HUNYUAN_VIDEO = Family(
    name="hunyuan-video",
    transformer_class="HunyuanVideoTransformer3DModel",
    embedder="x_embedder.proj",
    head="proj_out",
    channels_last=False,
    positions="rope",
    centred=of_latents(token_axis=0),
    positions_of_sizes=True,
    prediction="flow",
    guidance="embedded",
    lora_targets=(
        r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))|"
        r"single_transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v)|proj_mlp|proj_out)"
    ),
    example=_hunyuan_example,
    fps=24,
    unsupported=(("image_condition_type", "token_replace"),),
    loose=ONE_TIMESTEP,
)


# Tokens that HunyuanVideo-1.5 sees beside its prompt: of glyphs to draw, and of an image, which may be none.
GLYPH_TOKENS, IMAGE_TOKENS = 256, 729


class _MasksOnMeta(TorchFunctionMode):
    """HunyuanVideo-1.5 sorts text tokens by their masks, which have no values on the meta device: all count there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if args and torch.is_tensor(args[0]) and args[0].is_meta:
            if func is torch.Tensor.__bool__:  # whether there is no image
                return True
            if func is torch.Tensor.__invert__:  # which tokens are padding: none
                return args[0].new_zeros(0, dtype=torch.bool)
            if func is torch.Tensor.__getitem__ and getattr(args[1], "dtype", None) is torch.bool:
                return args[0][: len(args[1])]
        return func(*args, **(kwargs or {}))


def _hunyuan_15_example(config, size, length):
    call = example_tensors(config, size, length, "text_embed_dim", mask=True)
    glyphs = example_tensors(config, size, GLYPH_TOKENS, "text_embed_2_dim", mask=True)
    call |= {f"{name}_2": value for name, value in glyphs.items() if name.startswith("encoder")}
    return call | {"image_embeds": torch.empty(1, IMAGE_TOKENS, config["image_embed_dim"], device="meta")}


def _hunyuan_15_levels(call: dict, timestep: torch.Tensor) -> dict:
    """Its forward computes in the precision of its timestep, which pipelines give in that of the latents."""
    return {"timestep": timestep.to(call["hidden_states"].dtype)}


HUNYUAN_VIDEO_15 = replace(
    HUNYUAN_VIDEO,
    name="hunyuan-video-1.5",
    transformer_class="HunyuanVideo15Transformer3DModel",
    guidance="separate",
    lora_targets=r"transformer_blocks\.\d+\.(attn\.(to_q|to_k|to_v|to_out\.0)|ff\.net\.(0\.proj|2))",
    example=_hunyuan_15_example,
    counting=_MasksOnMeta,
    levels=_hunyuan_15_levels,
    unsupported=(),
    destination="timestep_r",  # of models with use_meanflow; None of others
)


MOTIF_VIDEO = replace(  # huggingface.co/Motif-Technologies/Motif-Video-2B
    HUNYUAN_VIDEO,
    name="motif-video",
    transformer_class="MotifVideoTransformer3DModel",
    guidance="separate",
    unsupported=(),
    example=lambda config, size, length: example_tensors(config, size, length, "text_embed_dim", mask=True),
)


# Latent frames after a section, the nearest first, by their arguments: those of the image that all begins with go with
# the first of them.
FRAMEPACK_HISTORY = {"clean": 1, "history_2x": 2, "history_4x": 16}


def _framepack_rope(module, stock, folding: Folding, frame_indices, height, width, device) -> Tables:
    """Of a section at its coarse tokens; of frames beside it, which stay on the base grid, as they are."""
    _, height, width = folding.size  # the forward asks for the grid of the folded section, of all
    tables = stock(frame_indices=frame_indices, height=height, width=width, device=device)
    # See `section_places`.
    return centred_tables(tables, folding, token_axis=0) if frame_indices.is_floating_point() else tables


@contextmanager
def _framepack_around(transformer, folding: Folding, call: dict):
    """Positions of far frames are pooled on their own grid, which the forward takes to be that of the section."""
    _, rows, columns = folding.grid
    stock = transformer._pad_rotary_emb
    transformer._pad_rotary_emb = lambda tables, height, width, kernel: stock(tables, rows, columns, kernel)
    try:
        yield
    finally:
        del transformer._pad_rotary_emb


class _TextOnMeta(TorchFunctionMode):
    """The text of one clip is cut to as many tokens as its mask has, without values on the meta device: all count."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.__getitem__ and isinstance(args[1], tuple):
            x, parts = args
            args = x, tuple(slice(None) if torch.is_tensor(getattr(part, "stop", None)) else part for part in parts)
        return func(*args, **(kwargs or {}))


def _framepack_example(config, size, length):
    frames, *space = size
    first, section, *after = torch.arange(1 + frames + sum(FRAMEPACK_HISTORY.values())).split(
        [1, frames, *FRAMEPACK_HISTORY.values()]
    )
    after[0] = torch.cat([first, after[0]])
    call = _hunyuan_example(config, size, length)
    call["image_embeds"] = torch.empty(1, IMAGE_TOKENS, config["image_proj_dim"], device="meta")
    for name, places in zip(FRAMEPACK_HISTORY, after, strict=True):
        call[f"latents_{name}"] = torch.empty(1, config["in_channels"], len(places), *space, device="meta")
        call[f"indices_latents_{name}"] = places
    return call | {"indices_latents": section}


FRAMEPACK = replace(  # arXiv 2504.12626
    HUNYUAN_VIDEO,
    name="framepack",
    transformer_class="HunyuanVideoFramepackTransformer3DModel",
    centred=_framepack_rope,
    positions_of_sizes=False,  # it is asked by keyword, and where a section stands is no size
    example=_framepack_example,
    counting=_TextOnMeta,
    fps=30,
    completed=section_places("indices_latents", *(f"indices_latents_{name}" for name in FRAMEPACK_HISTORY)),
    around=_framepack_around,
    section_frames=9,
    causal=False,  # the first frame of all is the image, beside which every section stands
    for_all_clips=("indices_latents", *(f"indices_latents_{name}" for name in FRAMEPACK_HISTORY)),
)
