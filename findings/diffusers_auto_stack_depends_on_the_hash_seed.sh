#!/usr/bin/env bash
# Guess:   LayerSkipConfig([1]) with its fqn "auto" skips the same block each time, in a model with two kinds of
#          blocks too.
# Happens: the names of stacks to look for are taken out of a set of strings, whose order Python shuffles in each
#          process. In HunyuanVideo, which has transformer_blocks and single_transformer_blocks, block 1 is one of the
#          first in some processes and one of the second in others, so a script with every seed fixed makes two
#          different clips. SkipLayerGuidance, AutoGuidance, PerturbedAttentionGuidance and SmoothedEnergyGuidance all
#          look for "auto". With one stack, as Wan has, it is found always; else fqn has to be given.
# Where:   diffusers 0.42.1, torch 2.13.0; a random HunyuanVideoTransformer3DModel, a process for each line.
# Seen:    PYTHONHASHSEED=0: block 1 of single_transformer_blocks output 0.4195
#          PYTHONHASHSEED=1: block 1 of single_transformer_blocks output 0.4195
#          PYTHONHASHSEED=2: block 1 of transformer_blocks        output 0.4248
#          PYTHONHASHSEED=3: block 1 of single_transformer_blocks output 0.4195
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
cat >skip.py <<'PY'
import sys

import torch
from diffusers import HunyuanVideoTransformer3DModel, LayerSkipConfig
from diffusers.hooks import apply_layer_skip

torch.manual_seed(0)
model = HunyuanVideoTransformer3DModel(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=2, num_single_layers=2,
    num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    guidance_embeds=False,
)  # fmt: skip
config = LayerSkipConfig([1])
apply_layer_skip(model, config)
with torch.no_grad():
    output = model(
        torch.randn(1, 4, 2, 8, 8), torch.tensor([500]), torch.randn(1, 6, 16), torch.ones(1, 6), torch.randn(1, 8)
    ).sample
print(f"block 1 of {config.fqn:25} output {float(output.double().abs().mean()):.4f}")
PY
for seed in 0 1 2 3 4 5 random random; do
    printf 'PYTHONHASHSEED=%s: ' "$seed"
    PYTHONHASHSEED=$seed venv/bin/python skip.py 2>/dev/null
done | tee seen
[ "$(grep -c ' transformer_blocks' seen)" -gt 0 ] && [ "$(grep -c single_transformer_blocks seen)" -gt 0 ]
[ "$(sed 's/.*output/output/' seen | sort -u | wc -l)" = 2 ]
