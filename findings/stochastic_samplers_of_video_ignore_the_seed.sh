#!/usr/bin/env bash
# Guess:   a pipeline that is given generator=torch.Generator().manual_seed(7) makes the same clip every time, whatever
#          its scheduler: the schedulers that add noise at every step take a generator.
# Happens: they take one and are not given it. WanPipeline and LTXPipeline (and those of HunyuanVideo, Mochi, Cosmos,
#          read from their code) call scheduler.step without it, so that noise of every step comes from torch's global
#          generator: two calls of one seed are two clips, with FlowMatchEulerDiscreteScheduler(stochastic_sampling),
#          FlowMatchLCMScheduler and DPMSolverMultistepScheduler(sde-dpmsolver++), which are what few-step distilled models
#          are sampled with. Only torch.manual_seed before each call pins them. Clips of a batch do not have a seed each
#          either. CogVideoXPipeline passes it on.
# Where:   diffusers 0.42.1, torch 2.13.0; tiny random models of the real classes, latents, 4 steps.
# Seen:    1 for the same clip
#          Wan, Euler                       same generator 1  same torch.manual_seed too 1
#          Wan, Euler, stochastic_sampling  same generator 0  same torch.manual_seed too 1
#          Wan, LCM                         same generator 0  same torch.manual_seed too 1
#          Wan, sde-dpmsolver++             same generator 0  same torch.manual_seed too 1
#          CogVideoX, DDIM with eta 1       same generator 1  same torch.manual_seed too 1
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 ftfy==6.3.1
cd "$d"
venv/bin/python - <<'PY' 2>/dev/null
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    WanPipeline,
    WanTransformer3DModel,
)

torch.manual_seed(0)
wan = WanPipeline(
    tokenizer=None,
    text_encoder=None,
    vae=AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    transformer=WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=1,
    ),
)
cog = CogVideoXPipeline(
    tokenizer=None,
    text_encoder=None,
    vae=AutoencoderKLCogVideoX(
        block_out_channels=(8,) * 4, latent_channels=4, layers_per_block=1, norm_num_groups=2,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
    ),
    scheduler=CogVideoXDDIMScheduler(),
    transformer=CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=8, num_layers=1, sample_width=4, sample_height=4, sample_frames=9, max_text_seq_length=8,
    ),
)
text = torch.randn(1, 8, 8)


def clip(pipe, global_seed):
    pipe.set_progress_bar_config(disable=True)
    torch.manual_seed(global_seed)
    more = {"eta": 1.0} if pipe is cog else {}
    return pipe(
        prompt_embeds=text, height=32, width=32, num_frames=9, num_inference_steps=4, guidance_scale=1.0,
        generator=torch.Generator().manual_seed(7), output_type="latent", **more,
    ).frames


flow = {"num_train_timesteps": 1000, "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
cases = {
    "Wan, Euler": (wan, FlowMatchEulerDiscreteScheduler(shift=3.0)),
    "Wan, Euler, stochastic_sampling": (wan, FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)),
    "Wan, LCM": (wan, FlowMatchLCMScheduler(shift=3.0)),
    "Wan, sde-dpmsolver++": (wan, DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **flow)),
    "CogVideoX, DDIM with eta 1": (cog, cog.scheduler),
}
seen = {}
for name, (pipe, scheduler) in cases.items():
    pipe.scheduler = scheduler
    first = clip(pipe, 1)
    seen[name] = (int(torch.equal(first, clip(pipe, 2))), int(torch.equal(first, clip(pipe, 1))))
    print(f"{name:<32} same generator {seen[name][0]}  same torch.manual_seed too {seen[name][1]}")
assert seen == {
    "Wan, Euler": (1, 1),
    "Wan, Euler, stochastic_sampling": (0, 1),
    "Wan, LCM": (0, 1),
    "Wan, sde-dpmsolver++": (0, 1),
    "CogVideoX, DDIM with eta 1": (1, 1),
}, seen
PY
