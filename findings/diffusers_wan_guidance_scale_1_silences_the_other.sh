#!/usr/bin/env bash
# Guess:   guidance_scale=1 and guidance_scale_2=4 guide the second, low-noise expert of Wan2.2 alone, as one wants
#          with a LoRA that distils the first.
# Happens: whether there is a second prediction is asked of guidance_scale for both experts. At 1 or below it, nothing
#          is guided, and guidance_scale_2 does nothing at any value: the latents are equal bit for bit. The other way
#          round it works, at two calls a step for both. A guidance_scale of 1.001 is the way out, at that price.
# Where:   diffusers 0.42.1, torch 2.13.0; WanPipeline with two random transformers, 12 steps.
# Seen:    calls of the two transformers
#          guidance_scale=4.0, guidance_scale_2=1.0: calls [8, 16], off from no guidance by 0.094
#          guidance_scale=1.0, guidance_scale_2=4.0: calls [4, 8], off from no guidance by 0.000
#          guidance_scale=1.0, guidance_scale_2=100.0: calls [4, 8], off from no guidance by 0.000
#          guidance_scale=1.001, guidance_scale_2=4.0: calls [8, 16], off from no guidance by 0.441
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel

torch.manual_seed(0)
text = {"prompt_embeds": torch.randn(1, 6, 16), "negative_prompt_embeds": torch.randn(1, 6, 16)}
noise = torch.randn(1, 4, 2, 8, 8)
experts = [
    WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )
    for _ in range(2)
]  # fmt: skip
calls = [0, 0]


def count(index):
    def add(module, args, kwargs):
        calls[index] += 1

    return add


for index, expert in enumerate(experts):
    expert.register_forward_pre_hook(count(index), with_kwargs=True)
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
pipe = WanPipeline(None, None, None, scheduler, experts[0], experts[1], boundary_ratio=0.875)
pipe.set_progress_bar_config(disable=True)


def sample(first, second):
    calls[:] = [0, 0]
    latents = pipe(
        **text, latents=noise, height=64, width=64, num_frames=5, num_inference_steps=12, guidance_scale=first,
        guidance_scale_2=second, output_type="latent",
    ).frames  # fmt: skip
    return latents, list(calls)


plain, _ = sample(1.0, 1.0)
for pair in ((4.0, 1.0), (1.0, 4.0), (1.0, 100.0), (1.001, 4.0)):
    latents, made = sample(*pair)
    away = float((latents - plain).abs().max())
    print(f"guidance_scale={pair[0]}, guidance_scale_2={pair[1]}: calls {made}, off from no guidance by {away:.3f}")
    assert (away == 0 and sum(made) == 12) if pair[0] == 1 else (away > 0.05 and sum(made) == 24)
PY
