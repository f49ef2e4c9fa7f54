#!/usr/bin/env bash
# Guess:   SmoothedEnergyGuidance guides away from a prediction with blurred attention.
# Happens: nothing is blurred. Its hooks are put in when a third call has been counted, and this guider, other than
#          SkipLayerGuidance, never counts. The third call of each step is the first one again, their difference is
#          zero, and the latents are those of classifier-free guidance bit for bit, at any scale and for any layers,
#          for half as much again of the cost. No warning.
# Where:   diffusers 0.42.1, torch 2.13.0; the modular Wan pipeline with a random transformer, 12 steps.
# Seen:    calls of the transformer, those in which a layer has a hook, distance of the latents
#          classifier-free guidance                     calls 24, with a hook 0
#          smoothed energy, scale 2.8                   calls 35, with a hook 0, away from it by 0.00
#          smoothed energy, scale 1000.0                calls 35, with a hook 0, away from it by 0.00
#          skip layer, scale 2.8                        calls 35, with a hook 11, away from it by 1.59
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import LayerSkipConfig, UniPCMultistepScheduler, WanModularPipeline, WanTransformer3DModel, guiders
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=3, rope_max_seq_len=32,
)  # fmt: skip
embeds = {"prompt_embeds": torch.randn(1, 6, 16), "negative_prompt_embeds": torch.randn(1, 6, 16)}
noise = torch.randn(1, 4, 2, 8, 8)
calls, hooked = [], []


def look(module, args, kwargs):
    calls.append(1)
    hooked.append(sum(bool(getattr(m, "_diffusers_hook", None) and m._diffusers_hook.hooks) for m in module.modules()))


transformer.register_forward_pre_hook(look, with_kwargs=True)


def sample(guider):
    """(latents, calls of the transformer, calls during which one of its layers had a hook)"""
    calls.clear(), hooked.clear()
    pipe = WanModularPipeline(blocks=WanCoreDenoiseStep())
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe.update_components(transformer=transformer, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(**embeds, latents=noise, height=64, width=64, num_frames=5, num_inference_steps=12, output="latents")
    return latents, len(calls), sum(map(bool, hooked))


base, *counts = sample(guiders.ClassifierFreeGuidance(5.0))
print(f"{'classifier-free guidance':44} calls {counts[0]}, with a hook {counts[1]}")
smoothed = {
    f"smoothed energy, scale {scale}, {name}": guiders.SmoothedEnergyGuidance(5.0, scale, **layers)
    for scale in (2.8, 1000.0)
    for name, layers in {
        "seg_guidance_layers": {"seg_guidance_layers": [1]},
        "seg_guidance_config": {"seg_guidance_config": SmoothedEnergyGuidanceConfig([0, 1, 2])},
    }.items()
}
skipped = guiders.SkipLayerGuidance(
    5.0, 2.8, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0, skip_layer_config=LayerSkipConfig([1])
)
for name, guider in (smoothed | {"skip layer, scale 2.8": skipped}).items():
    latents, *counts = sample(guider)
    away = float((latents - base).abs().max())
    print(f"{name:44} calls {counts[0]}, with a hook {counts[1]}, away from it by {away:.2f}")
    assert counts == ([35, 11] if guider is skipped else [35, 0])
    assert away > 0.1 if guider is skipped else torch.equal(latents, base)
PY
