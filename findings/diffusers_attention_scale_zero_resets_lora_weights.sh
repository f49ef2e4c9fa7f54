#!/usr/bin/env bash
# Guess:   attention_kwargs={"scale": s} scales the LoRAs for this one call, and afterwards all is as before.
# Happens: so it is for any scale but 0, where it cannot divide. After a call with 0, by which one would switch the
#          LoRAs off for a step or compare with the base model, the weight of every active adapter is 1, whatever
#          set_adapters had set: later clips have them at full strength. No warning.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; a random WanTransformer3DModel with two adapters.
# Seen:    weights 0.3 and 0.8, one call with scale 0.5, then: {'style': 0.3, 'motion': 0.8}, output moved by 0.000
#          weights 0.3 and 0.8, one call with scale 0.0, then: {'style': 1.0, 'motion': 1.0}, output moved by 0.039
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig

torch.manual_seed(0)
video, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 6, 16)
model = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=1, rope_max_seq_len=32,
)  # fmt: skip
for name in ("style", "motion"):
    model.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), name)
layer = model.blocks[0].attn1.to_q


@torch.no_grad()
def output(scale=None):
    return model(video, torch.tensor([500]), text, attention_kwargs=None if scale is None else {"scale": scale}).sample


for scale in (0.5, 0.0):
    model.set_adapters(["style", "motion"], [0.3, 0.8])
    before = output()
    output(scale)
    after = output()
    moved = float((after - before).norm() / before.norm())
    weights = {name: round(float(weight), 3) for name, weight in layer.scaling.items()}
    print(f"weights 0.3 and 0.8, one call with scale {scale}, then: {weights}, output moved by {moved:.3f}")
    assert weights == ({"style": 0.3, "motion": 0.8} if scale else {"style": 1.0, "motion": 1.0})
    assert moved < 1e-5 if scale else moved > 0.02
PY
