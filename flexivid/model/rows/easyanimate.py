"""EasyAnimate 5.1 (arXiv 2405.18991)."""

from flexivid.model.family import Family
from flexivid.model.rows.common import ONE_TIMESTEP, example_tensors, of_latents

EASYANIMATE = Family(
    name="easyanimate",
    transformer_class="EasyAnimateTransformer3DModel",
    embedder="proj",
    head="proj_out",
    channels_last=False,
    positions="rope_embedding",
    centred=of_latents(token_axis=0),
    positions_of_sizes=True,
    prediction="flow",
    guidance="batched",
    lora_targets=None,
    vae_factors=("vae_temporal_compression_ratio", "vae_spatial_compression_ratio"),
    example=lambda config, size, length: example_tensors(config, size, length, "text_embed_dim"),
    fps=8,
    as_many_channels=True,
    # The published models that follow a video, and that continue or fill one: the forward joins those to the latents.
    unsupported=(("in_channels", 32), ("in_channels", 33)),
    loose=ONE_TIMESTEP,
)
