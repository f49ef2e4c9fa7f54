#!/usr/bin/env bash
# Guess:   MagCache either works in a pipeline, or raises that no cache context is set, as FirstBlockCache and
#          TaylorSeer do.
# Happens: where a pipeline opens no cache context, MagCache takes one of its own for all calls. Wan's video-to-video
#          pipeline is such a one, and calls the transformer twice a step: both branches of guidance share one
#          residual and one counter. A step's prompted call is given what the unprompted one left, and where both are
#          skipped the two predictions differ by nothing at all, so that guidance is off in half of the steps. The
#          counter counts calls, not steps, so it is through in the middle of the clip and warms up a second time. No
#          error, no warning; text-to-video with the same transformer and settings is right.
# Where:   diffusers 0.42.1, torch 2.13.0; both pipelines around one random transformer, 12 steps, mag_ratios of 1.
# Seen:    computed (C) and skipped (.) calls with and without the prompt, steps at which guidance has an effect (1)
#          WanPipeline              CC...C...C..  CC...C...C..  111111111111, off by 0.02
#          WanVideoToVideoPipeline  C.....C.....  C.C.C.C.C.C.  101010101010, off by 0.15
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    WanPipeline,
    WanTransformer3DModel,
    WanVideoToVideoPipeline,
)
from PIL import Image

torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=4, rope_max_seq_len=32,
)  # fmt: skip
vae = AutoencoderKLWan(
    base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
)
scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "scheduler": scheduler, "transformer": transformer}
prompt, negative = torch.randn(2, 1, 6, 16)
pixels = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
video = {"video": [Image.fromarray(frame) for frame in pixels], "strength": 1.0}

calls, predictions = [], []
transformer.register_forward_pre_hook(lambda *_: calls.append("."))
transformer.blocks[2].ffn.register_forward_hook(lambda *_: calls.__setitem__(-1, "C"))
transformer.register_forward_hook(lambda model, inputs, output: predictions.append(output[0]))


def sample(pipe, **more):
    calls.clear(), predictions.clear()
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=5.0, height=64, width=64,
        num_inference_steps=12, output_type="latent", generator=torch.Generator().manual_seed(1), **more,
    ).frames  # fmt: skip


for pipe, more, expected in (
    (WanPipeline(**parts), {"num_frames": 5}, ["CC...C...C..", "CC...C...C..", "1" * 12]),
    (WanVideoToVideoPipeline(**parts), video, ["C.....C.....", "C.C.C.C.C.C.", "10" * 6]),
):
    stock = sample(pipe, **more)
    transformer.enable_cache(MagCacheConfig(mag_ratios=[1.0] * 12, num_inference_steps=12))
    cached = sample(pipe, **more)
    transformer.disable_cache()
    differ = "".join(str(int(not torch.allclose(a, b))) for a, b in zip(predictions[::2], predictions[1::2]))
    seen = ["".join(calls[::2]), "".join(calls[1::2]), differ]
    off = float((cached - stock).norm() / stock.norm())
    print(f"{type(pipe).__name__:24}", "  ".join(seen) + f", off by {off:.2f}")
    assert seen == expected
PY
