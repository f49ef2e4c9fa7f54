#!/usr/bin/env bash
# Guess:   a pipeline and its modular twin, with the same weights, scheduler and noise, tell the transformer the same
#          timesteps.
# Happens: the modular ones of Wan and LTX-Video cast the timestep to the model's dtype first. bfloat16 has 8 bits, so
#          that between 512 and 1024 only multiples of 4 exist: the network is told a noise level that is up to 2 of
#          1000 off, and at the shift of 12 of Wan2.2 three times in 40 steps the same one as in the step before,
#          while the scheduler goes on. The stock pipelines hand over the scheduler's own timestep. So a seed need
#          not give the same clip after moving to the modular pipeline. In float32 nothing is rounded.
# Where:   diffusers 0.42.1, torch 2.13.0; random transformers in bfloat16, shift 12, 40 steps.
# Seen:    timesteps that the transformer is given, how far the worst is from the scheduler's, the first eight
#          Wan       stock    40 of 40, off by 0.0: 999 997 995 993 990 988 985 982
#          Wan       modular  37 of 40, off by 2.0: 1000 996 996 992 992 988 984 984
#          LTX-Video stock    40 of 40, off by 0.0: 1000 998 996 993 991 988 986 983
#          LTX-Video modular  37 of 40, off by 2.0: 1000 996 996 992 992 988 984 984
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    LTXModularPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    UniPCMultistepScheduler,
    WanModularPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.modular_pipelines.ltx.modular_blocks_ltx import LTXCoreDenoiseStep
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

torch.manual_seed(0)
wan = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=1, rope_max_seq_len=32,
).bfloat16()  # fmt: skip
ltx = LTXVideoTransformer3DModel(
    num_attention_heads=2, attention_head_dim=18, in_channels=4, out_channels=4, caption_channels=16,
    cross_attention_dim=36, num_layers=1,
).bfloat16()  # fmt: skip
unipc = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=12.0)
euler = FlowMatchEulerDiscreteScheduler(shift=12.0)
mask = torch.ones(1, 6, dtype=torch.bool)
prompt = {"prompt_embeds": torch.randn(1, 6, 16).bfloat16()}
call_wan = prompt | {"height": 64, "width": 64, "num_frames": 5, "latents": torch.randn(1, 4, 2, 8, 8)}
call_ltx = prompt | {"height": 128, "width": 128, "num_frames": 9, "prompt_attention_mask": mask}


def told(pipe, transformer, **call):
    """The timesteps that the transformer is given in 40 steps."""
    seen = []
    handle = transformer.register_forward_pre_hook(
        lambda model, args, kwargs: seen.append(float(kwargs["timestep"].flatten()[0])), with_kwargs=True
    )
    pipe.set_progress_bar_config(disable=True)
    pipe(**call, num_inference_steps=40)
    handle.remove()
    return seen


parts = {"tokenizer": None, "text_encoder": None, "vae": None}
latents = {"output_type": "latent", "guidance_scale": 1.0}
negative = {"negative_prompt_embeds": prompt["prompt_embeds"], "negative_prompt_attention_mask": mask}
for name, transformer, scheduler, call, pipeline, twin, blocks in (
    ("Wan", wan, unipc, call_wan, WanPipeline, WanModularPipeline, WanCoreDenoiseStep()),
    ("LTX-Video", ltx, euler, call_ltx, LTXPipeline, LTXModularPipeline, LTXCoreDenoiseStep()),
):
    stock = pipeline(**parts, transformer=transformer, scheduler=scheduler)
    modular = twin(blocks=blocks)
    modular.update_components(transformer=transformer, scheduler=scheduler, guider=ClassifierFreeGuidance(1.0))
    taken = {parameter.name for parameter in blocks.inputs}
    more = {key: value for key, value in (call | negative).items() if key in taken}
    for kind, seen in (
        ("stock", told(stock, transformer, **call, **latents)),
        ("modular", told(modular, transformer, **more, output="latents")),
    ):
        off = max(abs(a - float(b)) for a, b in zip(seen, scheduler.timesteps, strict=True))
        print(f"{name:9} {kind:8} {len(set(seen))} of 40, off by {off:.1f}:", *map(round, seen[:8]))
        assert (len(set(seen)), round(off)) == ((40, 0) if kind == "stock" else (37, 2))
PY
