#!/usr/bin/env bash
# Guess:   SkipLayerGuidance with guidance_scale=1, for a model that needs no negative prompt, guides by the skipped
#          layers alone.
# Happens: no layer is skipped. The guider counts its calls and skips in the third, and without classifier-free
#          guidance there are two. What is more, the second is given the negative prompt, so what comes out is
#          classifier-free guidance at skip_layer_guidance_scale, bit for bit, whatever the layers. No warning. Beside
#          classifier-free guidance it skips as told.
# Where:   diffusers 0.42.1, torch 2.13.0; the modular Wan pipeline with a random transformer of 3 blocks, 12 steps,
#          scale 5.
# Seen:    beside classifier-free guidance: the skipped block runs 24 times in 35 calls
#          alone: it runs 23 times in 23 calls
#          alone, from classifier-free guidance at the same scale: 0.00
#          alone, what other layers change: 0.00, what another negative prompt changes: 0.71
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import LayerSkipConfig, UniPCMultistepScheduler, WanModularPipeline, WanTransformer3DModel, guiders
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

STEPS = 12
torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=3, rope_max_seq_len=32,
)  # fmt: skip
prompt, negative, other_negative = (torch.randn(1, 6, 16) for _ in range(3))
noise = torch.randn(1, 4, 2, 8, 8)
runs = []
transformer.blocks[1].ffn.register_forward_pre_hook(lambda *_: runs.append(1))


def skip_layer(scale, layers=(1,)):
    return guiders.SkipLayerGuidance(
        scale, 5.0, skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0,
        skip_layer_config=LayerSkipConfig(list(layers)),
    )  # fmt: skip


def sample(guider, negative=negative):
    """(latents, runs of the second block)"""
    runs.clear()
    pipe = WanModularPipeline(blocks=WanCoreDenoiseStep())
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe.update_components(transformer=transformer, scheduler=scheduler, guider=guider)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, latents=noise, height=64, width=64, num_frames=5,
        num_inference_steps=STEPS, output="latents",
    )  # fmt: skip
    return latents, len(runs)


# skip layer guidance begins after the first step at the earliest
free, _ = sample(guiders.ClassifierFreeGuidance(5.0, start=1 / STEPS))
both, count = sample(skip_layer(3.0))
print(f"beside classifier-free guidance: the skipped block runs {count} times in {3 * STEPS - 1} calls")
assert count == 2 * STEPS
alone, count = sample(skip_layer(1.0))
print(f"alone: it runs {count} times in {2 * STEPS - 1} calls")
away = float((alone - free).abs().max())
print(f"alone, from classifier-free guidance at the same scale: {away:.2f}")
assert count == 2 * STEPS - 1 and torch.equal(alone, free)
layers = float((sample(skip_layer(1.0, [0, 2]))[0] - alone).abs().max())
text = float((sample(skip_layer(1.0), other_negative)[0] - alone).abs().max())
print(f"alone, what other layers change: {layers:.2f}, what another negative prompt changes: {text:.2f}")
assert layers == 0 and text > 0.1
PY
