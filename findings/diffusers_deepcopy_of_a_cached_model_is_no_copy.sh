#!/usr/bin/env bash
# Guess:   copy.deepcopy of a transformer, for an EMA, a teacher or a second pipeline, is a model of its own.
# Happens: not once a cache of diffusers is enabled on it. A hook's forward is a closure, which deepcopy does not
#          copy, and in it stands the original's module. The copy lists, saves and loads its own parameters and computes
#          with the original's: with MagCache and SeaCache its output is the original's whatever its own blocks hold
#          (SeaCache at least warns that it lacks a context), with PyramidAttentionBroadcast it is a mixture, attention
#          of the one and feed-forward of the other. FirstBlockCache raises that no cache context is set, inside
#          cache_context. disable_cache() on the copy sets it free. Hooks of accelerate are copied rightly.
# Where:   diffusers 0.42.1, accelerate 1.15.0, torch 2.13.0; a random WanTransformer3DModel.
# Seen:    the copy's blocks get other weights; whose is its output?
#          no cache         its own; after disable_cache its own: True
#          accelerate       its own; after disable_cache its own: True
#          MagCache         the original's; after disable_cache its own: True
#          SeaCache         the original's; after disable_cache its own: True
#          PyramidAttention neither's; after disable_cache its own: True
#          FirstBlockCache  No cache context is set; after disable_cache its own: True
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import copy

import diffusers
import torch
from accelerate.hooks import ModelHook, add_hook_to_module

video, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 6, 16)


def model():
    torch.manual_seed(1)
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


@torch.no_grad()
def output(model):
    with model.cache_context("cond", step_index=0, num_inference_steps=28):
        return model(video, torch.tensor([500]), text).sample


@torch.no_grad()
def changed(model):
    """The model with other weights in its blocks."""
    for parameter in model.blocks.parameters():
        parameter.mul_(1.5).add_(0.02)
    return model


other, own = output(model()), output(changed(model()))
seen = {}
for name, config in {
    "no cache": None,
    "accelerate": None,
    "MagCache": diffusers.MagCacheConfig(mag_ratios=[1.0] * 28),
    "SeaCache": diffusers.SeaCacheConfig(),
    "PyramidAttention": diffusers.PyramidAttentionBroadcastConfig(2, current_timestep_callback=lambda: 500),
    "FirstBlockCache": diffusers.FirstBlockCacheConfig(),
}.items():
    original = model()
    if config is not None:
        original.enable_cache(config)
    elif name == "accelerate":
        add_hook_to_module(original.blocks[0], ModelHook())
    twin = changed(copy.deepcopy(original))
    try:
        out = output(twin)
        seen[name] = "its own" if out.equal(own) else "the original's" if out.equal(other) else "neither's"
    except ValueError as error:
        seen[name] = str(error).split(".")[0]
    twin.disable_cache()  # a warning where there is none
    print(f"{name:17}{seen[name]}; after disable_cache its own: {torch.equal(output(twin), own)}")
    assert torch.equal(output(twin), own)
assert list(seen.values()) == ["its own"] * 2 + ["the original's"] * 2 + ["neither's", "No cache context is set"]
PY
