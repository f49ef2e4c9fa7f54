#!/usr/bin/env bash
# Guess:   a LoRA can be loaded before or after enable_layerwise_casting(float8_e4m3fn); LoRA layers are not cast.
# Happens: they are left out of the casting only if they are there when it is enabled. One that is loaded later takes
#          the dtype of the layer's weight, which is then the storage: float8_e4m3fn knows nothing between 0 and
#          0.002, so nearly all of a typical lora_B is rounded to zero for good, and as no hook casts it back, the
#          forward fails on a multiplication that float8 does not have. Load first, cast then.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; a random WanTransformer3DModel.
# Seen:    LoRA first: stored as torch.float32, 0% of lora_B is 0, forward: runs
#          casting first: stored as torch.float8_e4m3fn, 97% of lora_B is 0, forward: NotImplementedError
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

torch.manual_seed(0)
video, text = torch.randn(1, 4, 2, 8, 8), torch.randn(1, 6, 16)
lora = {}
for layer in ("attn1.to_q", "attn1.to_v", "attn2.to_q"):
    lora[f"transformer.blocks.0.{layer}.lora_A.weight"] = torch.randn(4, 24) / 24**0.5
    lora[f"transformer.blocks.0.{layer}.lora_B.weight"] = torch.randn(24, 4) * 5e-4  # as small as they often are


def attempt(first):
    torch.manual_seed(1)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    for step in (first, "casting" if first == "LoRA" else "LoRA"):
        if step == "LoRA":
            model.load_lora_adapter(dict(lora), adapter_name="tuned")
        else:
            model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = model.blocks[0].attn1.to_q.lora_B["tuned"].weight
    zeros = float((stored.float() == 0).float().mean())
    try:
        with torch.no_grad():
            model(video, torch.tensor([500]), text)
        runs = "runs"
    except (NotImplementedError, RuntimeError) as error:
        runs = type(error).__name__
    print(f"{first} first: stored as {stored.dtype}, {zeros:.0%} of lora_B is 0, forward: {runs}")
    return stored.dtype, zeros, runs


assert attempt("LoRA") == (torch.float32, 0.0, "runs")
dtype, zeros, runs = attempt("casting")
assert dtype == torch.float8_e4m3fn and zeros > 0.9 and runs.endswith("Error")
PY
