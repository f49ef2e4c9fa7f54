#!/usr/bin/env bash
# Guess:   in the modular Wan2.2 pipeline each expert's guider works as it is set, guider_2 as guider does.
# Happens: AdaptiveProjectedGuidance makes its momentum buffer at step 0 of the clip and at no other. The guider of
#          the second, low-noise expert is never asked at step 0, so it has no buffer and its momentum does nothing at
#          any value: the latents are equal bit for bit. No warning; the setting stands in its config.
# Where:   diffusers 0.42.1, torch 2.13.0; the modular Wan2.2 pipeline with two random transformers, 12 steps.
# Seen:    momentum of guider and guider_2, whether they have a buffer afterwards
#          momentum (-0.5, None) buffers [True, False]  changes the clip by 0.059
#          momentum (None, -0.5) buffers [False, False] changes the clip by 0.000
#          momentum (None, -0.9) buffers [False, False] changes the clip by 0.000
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import UniPCMultistepScheduler, WanModularPipeline, WanTransformer3DModel, guiders
from diffusers.modular_pipelines.wan.modular_blocks_wan22 import Wan22CoreDenoiseStep

torch.manual_seed(0)
experts = [
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )
    for _ in range(2)
]  # fmt: skip
embeds = {"prompt_embeds": torch.randn(1, 6, 16), "negative_prompt_embeds": torch.randn(1, 6, 16)}
noise = torch.randn(1, 4, 2, 8, 8)


def sample(first, second):
    """(latents, whether each guider has a momentum buffer)"""
    pair = [
        guiders.AdaptiveProjectedGuidance(5.0, adaptive_projected_guidance_momentum=momentum)
        for momentum in (first, second)
    ]
    pipe = WanModularPipeline(blocks=Wan22CoreDenoiseStep())
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe.update_components(
        transformer=experts[0], transformer_2=experts[1], scheduler=scheduler, guider=pair[0], guider_2=pair[1]
    )
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(**embeds, latents=noise, height=64, width=64, num_frames=5, num_inference_steps=12, output="latents")
    return latents, [guider.momentum_buffer is not None for guider in pair]


without, _ = sample(None, None)
for pair in ((-0.5, None), (None, -0.5), (None, -0.9)):
    latents, buffers = sample(*pair)
    away = float((latents - without).abs().max())
    print(f"momentum {pair!s:12} buffers {buffers!s:14} changes the clip by {away:.3f}")
    assert buffers == [pair[0] is not None, False] and (away > 1e-2 if pair[0] else away == 0)
PY
