#!/usr/bin/env bash
# Guess:   each call of a pipeline starts its cache afresh.
# Happens: the caches of diffusers are reset at the end of a call, and only there. A call that is left early (Ctrl-C,
#          a callback that raises, out of memory) leaves step counter and features behind, and the next call
#          goes on from them: TaylorSeer skips its warm-up and predicts the first, decisive steps of the new clip from
#          features of the abandoned one, FirstBlockCache adds the abandoned clip's residual, MagCache skips at
#          other steps. No error, and one call later all is right again, so it looks like a bad seed. SeaCache is told
#          the step by the Wan pipeline and is right. transformer._reset_stateful_cache() before a call is the way out.
# Where:   diffusers 0.42.1, torch 2.13.0; WanPipeline with random models, 12 steps, the call before left after 7.
# Seen:    repeated call / call after an abandoned one: same clip? (last block computed, of 24)
#          MagCache        True (8) / False (8), off by 0.06 of the standard deviation
#          TaylorSeerCache True (10) / False (4), off by 0.18 of the standard deviation
#          FirstBlockCache True (4) / False (1), off by 0.58 of the standard deviation
#          SeaCache        True (18) / True (18), off by 0.00 of the standard deviation
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
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    MagCacheConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
    WanTransformer3DModel,
)

torch.manual_seed(0)
transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=4, rope_max_seq_len=32,
)  # fmt: skip
vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
pipe = WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer)
pipe.set_progress_bar_config(disable=True)
prompt, other, negative = torch.randn(3, 1, 6, 16)
computed = []
transformer.blocks[3].ffn.register_forward_hook(lambda *_: computed.append(1))


def sample(prompt, leave_after=None):
    def leave(pipe, step, timestep, values):
        if step == leave_after:
            raise KeyboardInterrupt
        return values

    computed.clear()
    return pipe(
        prompt_embeds=prompt, negative_prompt_embeds=negative, height=64, width=64, num_frames=5,
        num_inference_steps=12, output_type="latent", generator=torch.Generator().manual_seed(1),
        callback_on_step_end=leave,
    ).frames, len(computed)  # fmt: skip


for config, caught in (
    (MagCacheConfig(mag_ratios=[1.0] * 12, num_inference_steps=12), True),
    (TaylorSeerCacheConfig(cache_identifiers=[r"blocks\.\d+"]), True),
    (FirstBlockCacheConfig(threshold=0.3), True),
    (SeaCacheConfig(), False),
):
    transformer.enable_cache(config)
    (first, _), (again, usual) = sample(prompt), sample(prompt)
    try:
        sample(other, leave_after=6)
    except KeyboardInterrupt:
        pass
    (after, unusual), (later, _) = sample(prompt), sample(prompt)
    transformer.disable_cache()
    off = float((after - first).abs().max() / first.std())
    print(f"{type(config).__name__[:-6]:16}{torch.equal(first, again)} ({usual}) /", end=" ")
    print(f"{torch.equal(first, after)} ({unusual}), off by {off:.2f} of the standard deviation")
    assert torch.equal(first, again) and torch.equal(first, later) and torch.equal(first, after) != caught
PY
