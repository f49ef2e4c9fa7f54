#!/usr/bin/env bash
# Guess:   latents that a callback_on_step_end returns are what sampling goes on from, with any scheduler.
# Happens: not under UniPC, the scheduler of Wan and SkyReels-V2. Its corrector takes each step anew from the latents
#          before it and throws away those that it is handed; all that is left of the edit is what the network's next
#          prediction makes of it. Replace the latents in the middle by those of another clip and the result is the
#          first clip still; Euler ends as the other clip, DPM-Solver++ nearly so. (How much is left depends on the
#          network.) Blending known regions in, freezing frames or adding noise in a callback fades in the same way,
#          without a word, and only the last step's edit stays. disable_corrector=[step] of the scheduler lets the
#          edit made after that step count.
# Where:   diffusers 0.42.1, torch 2.13.0; WanPipeline with a random transformer, 12 steps, replaced after the sixth.
# Seen:    how far the result is on the way from the own clip (0) to the other one (1)
#          FlowMatchEuler                 1.00
#          DPM-Solver++                   1.05
#          UniPC                          0.10
#          UniPC, no corrector there      1.01
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
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=2, rope_max_seq_len=32,
)  # fmt: skip
vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
pipe = WanPipeline(None, None, vae, None, transformer)
pipe.set_progress_bar_config(disable=True)
prompt = torch.randn(1, 6, 16)
STEP = 5


def sample(scheduler, seed, replacement=None):
    """The clip's latents, and those after STEP, where the callback returns the replacement."""
    there = []

    def callback(pipe, step, timestep, values):
        if step == STEP:
            there.append(values["latents"])
            values["latents"] = values["latents"] if replacement is None else replacement
        return values

    pipe.scheduler = scheduler
    clip = pipe(
        prompt_embeds=prompt, guidance_scale=1.0, height=64, width=64, num_frames=5, num_inference_steps=12,
        output_type="latent", generator=torch.Generator().manual_seed(seed), callback_on_step_end=callback,
    ).frames  # fmt: skip
    return clip, there[0]


flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
for name, scheduler, kept in (
    ("FlowMatchEuler", FlowMatchEulerDiscreteScheduler(shift=3.0), True),
    ("DPM-Solver++", DPMSolverMultistepScheduler(**flow), True),
    ("UniPC", UniPCMultistepScheduler(**flow), False),
    ("UniPC, no corrector there", UniPCMultistepScheduler(**flow, disable_corrector=[STEP]), True),
):
    own, _ = sample(scheduler, 1)
    other, latents = sample(scheduler, 2)
    got, _ = sample(scheduler, 1, replacement=latents)
    share = float(((got - own) * (other - own)).sum() / (other - own).square().sum())
    print(f"{name:30} {share:.2f}")
    assert share > 0.9 if kept else share < 0.2
PY
