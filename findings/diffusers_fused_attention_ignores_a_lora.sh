#!/usr/bin/env bash
# Guess:   a LoRA and fuse_qkv_projections() work together in either order, or one of them refuses.
# Happens: fused attention computes q, k and v with a to_qkv made of the bare weights. The adapter is still put on to_q,
#          to_k and to_v, which stand there unused: it is loaded, listed as active, and changes nothing, whether it came
#          before or after; no error, no warning. Trained so it gets no gradients. Where a LoRA has other
#          targets too (to_out, ffn) a part of it works, so the clip is neither the base model's nor the adapter's.
#          unfuse_qkv_projections() brings it back.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; a random WanTransformer3DModel.
# Seen:    effect of the adapter on the output: unfused 0.25
#          LoRA, then fused: 0.00, active ['default'], gradients of 0 of 12 LoRA weights, after unfusing 0.25
#          fused, then LoRA: 0.00, active ['default'], gradients of 0 of 12 LoRA weights, after unfusing 0.25
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


def model():
    torch.manual_seed(1)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def add_lora(model):
    torch.manual_seed(2)
    targets = r"blocks\.\d\.attn1\.to_[qkv]"
    model.add_adapter(LoraConfig(r=4, target_modules=targets, init_lora_weights=False))


def output(model):
    return model(video, torch.tensor([500]), text).sample


base = output(model())
lora = model()
add_lora(lora)
full = float((output(lora) - base).detach().abs().max())
print(f"effect of the adapter on the output: unfused {full:.2f}")
assert full > 0.1

for order in ("LoRA, then fused", "fused, then LoRA"):
    both = model()
    for step in order.split(", then "):
        add_lora(both) if step == "LoRA" else both.fuse_qkv_projections()
    out = output(both)
    effect = float((out - base).detach().abs().max())
    if out.requires_grad:  # fused first, nothing that the output depends on does
        out.square().mean().backward()
    weights = [p for name, p in both.named_parameters() if "lora_" in name]
    trained = sum(p.grad is not None for p in weights)
    active = both.active_adapters()
    both.unfuse_qkv_projections()
    back = float((output(both) - base).detach().abs().max())
    print(f"{order}: {effect:.2f}, active {active}, gradients of {trained} of {len(weights)} LoRA weights,", end=" ")
    print(f"after unfusing {back:.2f}")
    assert effect < 1e-4 and active == ["default"] and trained == 0 and abs(back - full) < 1e-3
PY
