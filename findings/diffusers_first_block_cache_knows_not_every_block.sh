#!/usr/bin/env bash
# Guess:   FirstBlockCache works in every video transformer that has enable_cache, at the least in those built as
#          Wan's is.
# Happens: the cache looks each block up in a table of classes. SkyReels-V2, Wan-Animate and ChronoEdit bring blocks
#          of their own, two of them under the very name of Wan's, and these are not in it, nor is HunyuanVideo-1.5's:
#          enable_cache raises that the class is not registered, for MagCache too. Kandinsky 5 is in the table with
#          another name for its argument, which FirstBlockCache does not ask for: enable_cache succeeds, and the first
#          step raises; MagCache works there. TransformerBlockRegistry.register with Wan's metadata makes SkyReels-V2
#          work.
# Where:   diffusers 0.42.1, torch 2.13.0; small random models of the real classes.
# Seen:    FirstBlockCache, MagCache, and FirstBlockCache once the block is registered
#          Wan               works / works
#          SkyReels-V2       enable_cache raises / enable_cache raises / works
#          Wan-Animate       enable_cache raises / enable_cache raises
#          ChronoEdit        enable_cache raises / enable_cache raises
#          HunyuanVideo-1.5  enable_cache raises / enable_cache raises
#          Kandinsky 5       first step raises / works
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    FirstBlockCacheConfig,
    HunyuanVideo15Transformer3DModel,
    Kandinsky5Transformer3DModel,
    MagCacheConfig,
    SkyReelsV2Transformer3DModel,
    WanAnimateTransformer3DModel,
    WanTransformer3DModel,
)
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

torch.manual_seed(0)
wan = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
image = wan | {"in_channels": 12, "image_dim": 8, "added_kv_proj_dim": 24}
face = {
    "latent_channels": 4, "motion_encoder_channel_sizes": {"4": 2, "8": 2}, "motion_encoder_size": 8,
    "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8,
    "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
}  # fmt: skip
hunyuan = {
    "in_channels": 9, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2,
    "num_refiner_layers": 1, "text_embed_dim": 16, "text_embed_2_dim": 8, "image_embed_dim": 8,
    "rope_axes_dim": (4, 6, 6),
}  # fmt: skip
kandinsky = {
    "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": 16, "in_text_dim2": 8, "time_dim": 16, "model_dim": 32,
    "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 2, "axes_dims": (4, 6, 6), "visual_cond": True,
}  # fmt: skip
call_wan = {
    "hidden_states": torch.randn(1, 4, 2, 8, 8),
    "timestep": torch.tensor([500]),
    "encoder_hidden_states": torch.randn(1, 6, 16),
}
call_kandinsky = {
    "hidden_states": torch.randn(1, 2, 8, 8, 9),
    "encoder_hidden_states": torch.randn(1, 6, 16),
    "pooled_projections": torch.randn(1, 8),
    "timestep": torch.tensor([500.0]),
    "visual_rope_pos": [torch.arange(2), torch.arange(4), torch.arange(4)],
    "text_rope_pos": torch.arange(6),
}


def attempt(model, call, config):
    try:
        model.enable_cache(config)
    except ValueError as error:
        assert "not registered" in str(error)
        return "enable_cache raises"
    try:
        with torch.no_grad(), model.cache_context("cond"):
            first, second = (model(**call).sample for _ in range(2))
    except ValueError as error:
        assert "'hidden_states' not found" in str(error)
        return "first step raises"
    finally:
        model.disable_cache()
    assert torch.allclose(first, second, atol=1e-5)  # equal inputs, the second time from the cache
    return "works"


unknown = ["enable_cache raises"] * 2
first_block, mag = FirstBlockCacheConfig(), MagCacheConfig(mag_ratios=[1.0] * 4, num_inference_steps=4)
for name, model, call, expected in (
    ("Wan", WanTransformer3DModel(**wan), call_wan, ["works"] * 2),
    ("SkyReels-V2", SkyReelsV2Transformer3DModel(**wan), call_wan, unknown + ["works"]),
    ("Wan-Animate", WanAnimateTransformer3DModel(**image, **face), None, unknown),
    ("ChronoEdit", ChronoEditTransformer3DModel(**image), None, unknown),
    ("HunyuanVideo-1.5", HunyuanVideo15Transformer3DModel(**hunyuan), None, unknown),
    ("Kandinsky 5", Kandinsky5Transformer3DModel(**kandinsky), call_kandinsky, ["first step raises", "works"]),
):
    seen = [attempt(model, call, config) for config in (first_block, mag)]
    if name == "SkyReels-V2":
        TransformerBlockRegistry.register(type(model.blocks[0]), TransformerBlockMetadata(return_hidden_states_index=0))
        seen.append(attempt(model, call, first_block))
    print(f"{name:17}", " / ".join(seen))
    assert seen == expected
PY
