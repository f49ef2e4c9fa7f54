#!/usr/bin/env bash
# Guess:   a guider's start and stop limit guidance to a part of the steps in any pipeline that takes a guider.
# Happens: the pipelines of Motif-Video ask the guider how many predictions it wants before they tell it the step, so
#          the answer is of the step before. With start > 0 the first guided step has no negative prompt at hand and
#          raises IndexError, in the middle of the clip. With stop < 1 the first call works, and leaves the guider at
#          its last step: the second call of the same pipeline raises at its first step. A new guider for each call is
#          the way out for stop; start cannot be used.
# Where:   diffusers 0.42.1, torch 2.13.0; MotifVideoPipeline with a random transformer, 8 steps.
# Seen:    {}: call 1 ok, call 2 ok
#          {'start': 0.25}: call 1 IndexError at step 2, call 2 IndexError at step 2
#          {'stop': 0.5}: call 1 ok, call 2 IndexError at step 0
#          {'stop': 0.5}, a new guider for each call: call 1 ok, call 2 ok
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import (
    AutoencoderKLWan,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)

torch.manual_seed(0)
transformer = MotifVideoTransformer3DModel(
    in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1, num_single_layers=1,
    text_embed_dim=16, rope_axes_dim=(4, 6, 6),
)  # fmt: skip
vae = AutoencoderKLWan(
    base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
)
parts = {"tokenizer": None, "text_encoder": None, "vae": vae, "transformer": transformer}
prompt, negative, mask = torch.randn(1, 6, 16), torch.randn(1, 6, 16), torch.ones(1, 6, dtype=torch.bool)


def calls(anew=False, **interval):
    """What two calls of one pipeline end with."""
    scheduler, ends = FlowMatchEulerDiscreteScheduler(shift=3.0), []
    pipe = MotifVideoPipeline(**parts, scheduler=scheduler, guider=ClassifierFreeGuidance(3.0, **interval))
    pipe.set_progress_bar_config(disable=True)
    for _ in range(2):
        if anew:
            pipe.guider = ClassifierFreeGuidance(3.0, **interval)
        try:
            pipe(
                prompt_embeds=prompt, prompt_attention_mask=mask, negative_prompt_embeds=negative,
                negative_prompt_attention_mask=mask, height=64, width=64, num_frames=5, num_inference_steps=8,
                output_type="latent",
            )  # fmt: skip
            ends.append("ok")
        except IndexError:
            ends.append(f"IndexError at step {pipe.guider.get_state()['step']}")
    print(f"{interval}{', a new guider for each call' * anew}: call 1 {ends[0]}, call 2 {ends[1]}")
    return ends


assert calls() == ["ok", "ok"]
assert calls(start=0.25) == ["IndexError at step 2"] * 2
assert calls(stop=0.5) == ["ok", "IndexError at step 0"]
assert calls(stop=0.5, anew=True) == ["ok", "ok"]
PY
