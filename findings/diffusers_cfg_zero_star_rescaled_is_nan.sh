#!/usr/bin/env bash
# Guess:   guidance_rescale can be had with any guider that has it.
# Happens: ClassifierFreeZeroStarGuidance predicts zero for the first zero_init_steps steps, one by default.
#          guidance_rescale then divides by the deviation of that zero, and the whole clip is NaN from the first step
#          on, without an error. With zero_init_steps=0 it works.
# Where:   diffusers 0.42.1, torch 2.13.0; the modular Wan pipeline with a random transformer, 8 steps.
# Seen:    ClassifierFreeZeroStarGuidance {}: 0% of the latents are NaN
#          ClassifierFreeZeroStarGuidance {'guidance_rescale': 0.7}: 100% of the latents are NaN
#          ClassifierFreeZeroStarGuidance {'guidance_rescale': 0.7, 'zero_init_steps': 0}: 0% of the latents are NaN
#          ClassifierFreeGuidance {'guidance_rescale': 0.7}: 0% of the latents are NaN
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import UniPCMultistepScheduler, WanModularPipeline, WanTransformer3DModel, guiders
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=1, rope_max_seq_len=32,
)  # fmt: skip
embeds = {"prompt_embeds": torch.randn(1, 6, 16), "negative_prompt_embeds": torch.randn(1, 6, 16)}
noise = torch.randn(1, 4, 2, 8, 8)


def sample(guider):
    pipe = WanModularPipeline(blocks=WanCoreDenoiseStep())
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe.update_components(transformer=transformer, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    return pipe(**embeds, latents=noise, height=64, width=64, num_frames=5, num_inference_steps=8, output="latents")


for kind, options in (
    (guiders.ClassifierFreeZeroStarGuidance, {}),
    (guiders.ClassifierFreeZeroStarGuidance, {"guidance_rescale": 0.7}),
    (guiders.ClassifierFreeZeroStarGuidance, {"guidance_rescale": 0.7, "zero_init_steps": 0}),
    (guiders.ClassifierFreeGuidance, {"guidance_rescale": 0.7}),
):
    lost = float(sample(kind(5.0, **options)).isnan().float().mean())
    print(f"{kind.__name__} {options}: {lost:.0%} of the latents are NaN")
    assert lost == (options == {"guidance_rescale": 0.7} and kind is guiders.ClassifierFreeZeroStarGuidance)
PY
