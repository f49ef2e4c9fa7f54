#!/usr/bin/env bash
# Guess:   SkyReels-V2's diffusion forcing with causal_block_size denoises all frames, or raises if blocks do not
#          divide them.
# Happens: it makes whole blocks only. The latent frames left over are never updated, and are decoded as the noise
#          that they started as: with the recommended block size of 5 the last four frames of 121 (31 latent frames),
#          without a warning. 97 frames (25) fit. The pipeline warns only where num_frames - 1 is no multiple of 4.
# Where:   diffusers 0.42.1, torch 2.13.0; SkyReelsV2DiffusionForcingPipeline with a random transformer, 4 steps.
# Seen:    num_frames=97, causal_block_size=None, ar_step=0: 25 latent frames, still noise: []
#          num_frames=97, causal_block_size=5, ar_step=0: 25 latent frames, still noise: []
#          num_frames=97, causal_block_size=5, ar_step=2: 25 latent frames, still noise: []
#          num_frames=121, causal_block_size=5, ar_step=0: 31 latent frames, still noise: [30]
#          num_frames=121, causal_block_size=5, ar_step=2: 31 latent frames, still noise: [30]
#          num_frames=97, causal_block_size=7, ar_step=0: 25 latent frames, still noise: [21, 22, 23, 24]
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

torch.manual_seed(0)
text = torch.randn(1, 6, 16)


def sample(frames, block, ar_step):
    """(latents that sampling ends with, the noise that it started from)"""
    transformer = SkyReelsV2Transformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=64,
    )  # fmt: skip
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    pipe = SkyReelsV2DiffusionForcingPipeline(None, None, transformer, None, scheduler)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        None, prompt_embeds=text, height=32, width=32, num_frames=frames, base_num_frames=frames, guidance_scale=1.0,
        num_inference_steps=4, generator=torch.Generator().manual_seed(2), output_type="latent",
        causal_block_size=block, ar_step=ar_step,
    ).frames  # fmt: skip
    return latents, torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))


for frames, block, ar_step in ((97, None, 0), (97, 5, 0), (97, 5, 2), (121, 5, 0), (121, 5, 2), (97, 7, 0)):
    latents, noise = sample(frames, block, ar_step)
    count = latents.shape[2]
    untouched = [i for i in range(count) if torch.equal(latents[:, :, i], noise[:, :, i])]
    print(f"num_frames={frames}, causal_block_size={block}, ar_step={ar_step}: {count} latent frames,", end=" ")
    print(f"still noise: {untouched}")
    assert untouched == (list(range(count - count % block, count)) if block else [])
PY
