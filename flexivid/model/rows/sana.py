"""Sana-Video (arXiv 2509.24695): linear attention, so that patch size costs what it covers and no more."""

from flexivid.model.family import Family
from flexivid.model.rows.common import example_tensors, of_latents

SANA_VIDEO = Family(
    name="sana-video",
    transformer_class="SanaVideoTransformer3DModel",
    embedder="patch_embedding",
    head="proj_out",
    channels_last=True,
    positions="rope",
    centred=of_latents(token_axis=1),
    positions_of_sizes=True,
    prediction="flow",
    guidance="batched",
    loose="its feed-forward is a convolution over the grid, which mixed tokens do not form",
    lora_targets=r"transformer_blocks\.\d+\.attn1\.(to_q|to_k|to_v|to_out\.0)",  # the feed-forward is a convolution
    example=lambda config, size, length: example_tensors(config, size, length, "caption_channels", mask=True),
)
