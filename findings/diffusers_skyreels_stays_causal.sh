#!/usr/bin/env bash
# Guess:   causal_block_size of SkyReels-V2's diffusion forcing holds for the call that it is given to.
# Happens: it is written into the transformer's config and stays there: later calls without it attend in the same
#          causal blocks, and a model that is saved afterwards has it in its config.json. The same call with the same
#          seed gives another clip after somebody has used the option. Only causal_block_size=1, given explicitly,
#          brings full attention back.
# Where:   diffusers 0.42.1, torch 2.13.0; SkyReelsV2DiffusionForcingPipeline with a random transformer, 6 steps.
# Seen:    the same call, once more and after calls with the option
#          again                    off by 0.0000, num_frame_per_block in the config: 1
#          causal_block_size=2      off by 0.0107, num_frame_per_block in the config: 2
#          after it, as the first   off by 0.0107, num_frame_per_block in the config: 2
#          causal_block_size=1      off by 0.0000, num_frame_per_block in the config: 1
#          after that, as the first off by 0.0000, num_frame_per_block in the config: 1
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
transformer = SkyReelsV2Transformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=2, rope_max_seq_len=32,
)  # fmt: skip
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
pipe = SkyReelsV2DiffusionForcingPipeline(None, None, transformer, None, scheduler)
pipe.set_progress_bar_config(disable=True)


def sample(**options):
    return pipe(
        None, prompt_embeds=text, negative_prompt_embeds=-text, height=64, width=64, num_frames=13,
        num_inference_steps=6, generator=torch.Generator().manual_seed(2), output_type="latent", **options,
    ).frames  # fmt: skip


first = sample()
for name, options in (
    ("again", {}),
    ("causal_block_size=2", {"causal_block_size": 2}),
    ("after it, as the first", {}),
    ("causal_block_size=1", {"causal_block_size": 1}),
    ("after that, as the first", {}),
):
    away = float((sample(**options) - first).norm() / first.norm())
    blocks = transformer.config.num_frame_per_block
    print(f"{name:24} off by {away:.4f}, num_frame_per_block in the config: {blocks}")
    assert away > 1e-3 if name in ("causal_block_size=2", "after it, as the first") else away == 0
PY
