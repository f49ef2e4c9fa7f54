#!/usr/bin/env bash
# Guess:   a cache that skips the blocks of a transformer gives, for the same inputs, what computing them gave.
# Happens: not in Wan VACE. Its control comes in between the blocks, added by the model itself to what a block
#          returns. FirstBlockCache and MagCache keep the difference of last and first block, in which the control is,
#          and skip the blocks; the model still adds every hint to what they hand on. So each skipped step has the
#          control twice, while the computed ones have it once: the strength of depth, pose or inpainting jumps
#          between steps, more often at higher thresholds. No error, no warning. At a control scale of 0 skipped and
#          computed agree, as they do in Wan without VACE.
# Where:   diffusers 0.42.1, torch 2.13.0; random transformers, two calls with the same inputs, the second one
#          skipped.
# Seen:    how much of the control the skipped call has more than the computed one, and how far its output is off
#          FirstBlockCache Wan VACE 1.00, 0.38   scale 0: 0.00   Wan 0.00
#          MagCache        Wan VACE 1.00, 0.38   scale 0: 0.00   Wan 0.00
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, WanTransformer3DModel, WanVACETransformer3DModel

torch.manual_seed(0)
small = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 4, "rope_max_seq_len": 32,
}  # fmt: skip
wan = WanTransformer3DModel(**small)
vace = WanVACETransformer3DModel(**small, vace_layers=[0, 2], vace_in_channels=8)
inputs = {
    "hidden_states": torch.randn(1, 4, 2, 8, 8),
    "timestep": torch.tensor([500]),
    "encoder_hidden_states": torch.randn(1, 6, 16),
}
control = {"control_hidden_states": torch.randn(1, 8, 2, 8, 8)}


@torch.no_grad()
def skipped(model, config, scale=None):
    """(control that the skipped call has more than the computed one, distance of its output relative to that)"""
    hints, ends, runs = [], [], []
    handles = [
        model.norm_out.register_forward_pre_hook(lambda module, args: ends.append(args[0])),
        model.blocks[2].ffn.register_forward_hook(lambda *_: runs.append(1)),
    ]
    more = {}
    if scale is not None:
        more = control | {"control_hidden_states_scale": torch.full((2,), scale)}
        for block in model.vace_blocks:
            handles.append(block.register_forward_hook(lambda module, args, output: hints.append(output[0])))
    model.enable_cache(config)
    outputs = []
    for _ in range(2):
        with model.cache_context("cond"):
            outputs.append(model(**inputs, **more).sample)
    model.disable_cache()
    for handle in handles:
        handle.remove()
    assert len(runs) == 1
    distance = float((outputs[1] - outputs[0]).norm() / outputs[0].norm())
    if not hints:
        return 0.0, distance
    added = sum(hints[-2:])
    return float(((ends[1] - ends[0]) * added).sum() / added.square().sum()), distance


for name, config in {
    "FirstBlockCache": FirstBlockCacheConfig(threshold=0.01),
    "MagCache": MagCacheConfig(mag_ratios=[1.0] * 10, num_inference_steps=10, retention_ratio=0.1),
}.items():
    (share, off), (_, off_at_0) = skipped(vace, config, 1.0), skipped(vace, config, 0.0)
    _, off_wan = skipped(wan, config)
    print(f"{name:15} Wan VACE {share:.2f}, {off:.2f}   scale 0: {off_at_0:.2f}   Wan {off_wan:.2f}")
    assert abs(share - 1) < 0.01 and off > 0.05 and off_at_0 < 1e-4 and off_wan < 1e-4
PY
