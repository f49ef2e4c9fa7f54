#!/usr/bin/env bash
# Guess:   enable_cache(TaylorSeerCacheConfig()) caches the attention of any transformer, as its docstring says.
# Happens: the default patterns match whole names that end in "attn". Image models and HunyuanVideo call their attention
#          so; Wan, SkyReels-V2, LTX-Video, CogVideoX and Mochi call it attn1, attn2. There not one module is
#          hooked, no warning is given, is_cache_enabled is True and every step is computed in full: a comparison with
#          "TaylorSeer at its defaults" measures the model without a cache. Naming modules (cache_identifiers) works.
# Where:   diffusers 0.42.1, torch 2.13.0; small random models of the real classes.
# Seen:    hooked modules, with the cache enabled: Wan 0, SkyReels-V2 0, LTX-Video 0, CogVideoX 0, Mochi 0,
#          HunyuanVideo 2, Flux 2
#          Wan, cross-attention of block 0 in 12 steps: 12 times; with cache_identifiers: 5 times
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import (
    CogVideoXTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    SkyReelsV2Transformer3DModel,
    TaylorSeerCacheConfig,
    WanTransformer3DModel,
)

small = {"in_channels": 4, "num_attention_heads": 2, "num_layers": 1}
wan = small | {"attention_head_dim": 12, "out_channels": 4, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
head = small | {"attention_head_dim": 8}
pooled = {"pooled_projection_dim": 16}
axes = {"rope_axes_dim": (2, 2, 4), "num_single_layers": 1, "num_refiner_layers": 1}
models = {
    "Wan": WanTransformer3DModel(**wan),
    "SkyReels-V2": SkyReelsV2Transformer3DModel(**wan),
    "LTX-Video": LTXVideoTransformer3DModel(**head, cross_attention_dim=16),
    "CogVideoX": CogVideoXTransformer3DModel(**head, time_embed_dim=4, text_embed_dim=8),
    "Mochi": MochiTransformer3DModel(**head, **pooled, text_embed_dim=8, time_embed_dim=4),
    "HunyuanVideo": HunyuanVideoTransformer3DModel(**head, **pooled, **axes, text_embed_dim=16),
    "Flux": FluxTransformer2DModel(**head, **pooled, num_single_layers=1, axes_dims_rope=(2, 2, 4)),
}
hooked = {}
for name, model in models.items():
    model.enable_cache(TaylorSeerCacheConfig())
    assert model.is_cache_enabled
    hooked[name] = sum(bool(getattr(module, "_diffusers_hook", None) and module._diffusers_hook.hooks)
                       for module in model.modules())  # fmt: skip
print("hooked modules, with the cache enabled:", ", ".join(f"{name} {n}" for name, n in hooked.items()))
assert list(hooked.values()) == [0, 0, 0, 0, 0, 2, 2]


@torch.no_grad()
def runs(config):
    """How often the cross-attention of block 0 is computed in 12 steps."""
    model, calls = WanTransformer3DModel(**wan), []
    model.enable_cache(config)
    model.blocks[0].attn2.to_q.register_forward_hook(lambda *_: calls.append(1))
    for step in range(12):
        with model.cache_context("cond"):
            model(torch.ones(1, 4, 2, 8, 8), torch.tensor([990 - 80 * step]), torch.ones(1, 6, 16))
    return len(calls)


default, named = runs(TaylorSeerCacheConfig()), runs(TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+\.attn\d"]))
print(f"Wan, cross-attention of block 0 in 12 steps: {default} times; with cache_identifiers: {named} times")
assert default == 12 and named == 5
PY
