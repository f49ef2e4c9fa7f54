#!/usr/bin/env bash
# Guess:   PyramidAttentionBroadcast reuses what an attention layer gave in the step before, in each branch of
#          guidance.
# Happens: its state knows no branches, only the call before. Wan and SkyReels-V2 call the transformer with the prompt
#          and then without it, so that with a skip range of 2 the prompted call always computes and the unprompted
#          one gets its result. Of cross-attention that is the prompt itself, which enters nowhere else: both
#          predictions are equal bit for bit, and guidance does nothing at any scale between the timesteps 800 and
#          100, with no error and no warning. With 3 the branches take turns in being the other's. The prompted branch
#          saves nothing at all with 2. FirstBlockCache, MagCache, TaylorSeer and SeaCache keep a state for each
#          cache_context.
# Where:   diffusers 0.42.1, torch 2.13.0; random models of the real classes, 12 steps,
#          cross_attention_block_skip_range.
# Seen:    1 for a step whose predictions with and without the prompt differ, 0 if not (runs of a cross-attention of 24)
#          Wan          skip range 2: 111110000001 (18)  3: 111110010011 (16)
#          SkyReels-V2  skip range 2: 111110000001 (18)  3: 111110010011 (16)
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    PyramidAttentionBroadcastConfig,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    WanPipeline,
    WanTransformer3DModel,
)

torch.manual_seed(0)
small = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
prompt, negative = torch.randn(2, 1, 6, 16)


def effects(pipe, skip):
    """(for each step 1 if the predictions with and without the prompt differ, else 0; runs of a cross-attention)"""
    predictions, runs = [], []
    handles = [
        pipe.transformer.register_forward_hook(lambda model, inputs, output: predictions.append(output[0])),
        pipe.transformer.blocks[0].attn2.to_q.register_forward_hook(lambda *_: runs.append(1)),
    ]
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            cross_attention_block_skip_range=skip, current_timestep_callback=lambda: pipe.current_timestep
        )
    )
    pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=5.0, height=64, width=64,
        num_frames=5, num_inference_steps=12, output_type="latent", generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    pipe.transformer.disable_cache()
    for handle in handles:
        handle.remove()
    return "".join(str(int(not a.equal(b))) for a, b in zip(predictions[::2], predictions[1::2])), len(runs)


parts = {"tokenizer": None, "text_encoder": None, "vae": None}
for name, pipeline, transformer in (
    ("Wan", WanPipeline, WanTransformer3DModel(**small)),
    ("SkyReels-V2", SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel(**small)),
):
    pipe = pipeline(**parts, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    (two, runs_two), (three, runs_three) = effects(pipe, 2), effects(pipe, 3)
    print(f"{name:12} skip range 2: {two} ({runs_two})  3: {three} ({runs_three})")
    assert (two, three) == ("111110000001", "111110010011") and runs_two < 24 and runs_three < 24
PY
