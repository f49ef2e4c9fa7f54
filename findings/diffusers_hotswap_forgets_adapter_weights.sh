#!/usr/bin/env bash
# Guess:   hotswapping replaces an adapter's weights under its name, and the weight set by set_adapters stays.
# Happens: each layer that the new file has is put back to the file's own scaling, that is to a weight of 1; a layer
#          that it lacks keeps the old weight for the next swap. After set_adapters("style", 0.5) and a swap the new
#          LoRA acts at full strength, and after one with fewer layers different layers have different weights.
#          set_adapters has to be called again after every swap.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; a random WanTransformer3DModel.
# Seen:    weights after set_adapters(0.5), after a swap to a file with to_q only, after a swap to one with both
#          as it is
#              {'to_q': 0.5, 'to_k': 0.5}
#              {'to_q': 1.0, 'to_k': 0.5}
#              {'to_q': 1.0, 'to_k': 1.0}
#          enable_lora_hotswap first: the same
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

torch.manual_seed(0)


def lora(rank, layers):
    file = {}
    for layer in layers:
        file[f"transformer.blocks.0.{layer}.lora_A.weight"] = torch.randn(rank, 24)
        file[f"transformer.blocks.0.{layer}.lora_B.weight"] = torch.randn(24, rank)
    return file


def pipeline():
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    return WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer)


def weights(pipe):
    attention = pipe.transformer.blocks[0].attn1
    return {name: float(getattr(attention, name).scaling["style"]) for name in ("to_q", "to_k")}


both, query_only = ["attn1.to_q", "attn1.to_k"], ["attn1.to_q"]
for prepared in (False, True):
    pipe = pipeline()
    if prepared:
        pipe.enable_lora_hotswap(target_rank=8)
    pipe.load_lora_weights(lora(4, both), adapter_name="style")
    pipe.set_adapters("style", 0.5)
    seen = [weights(pipe)]
    for file in (lora(8, query_only), lora(4, both)):
        pipe.load_lora_weights(file, adapter_name="style", hotswap=True)
        seen.append(weights(pipe))
    print("enable_lora_hotswap first" if prepared else "as it is", *seen, sep="\n    ")
    assert seen == [{"to_q": 0.5, "to_k": 0.5}, {"to_q": 1.0, "to_k": 0.5}, {"to_q": 1.0, "to_k": 1.0}]
PY
