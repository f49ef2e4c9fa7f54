#!/usr/bin/env bash
# Guess:   set_adapters("style", {"transformer": {"blocks.1": 0.0}}) sets the weight of block 1, and a name that fits
#          nothing raises.
# Happens: a name counts wherever it is part of a module's name, and the first that fits wins: "blocks.1" is block 1
#          and 10 to 19 as well, and an entry for "blocks.10" after it is never reached. "blocks.1." is block 1 alone.
#          A name that fits nothing is ignored without a word.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; WanPipeline with a random transformer of 40 blocks, a LoRA on
#          to_q.
# Seen:    {'blocks.3': 0.0}                switches off [3, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39]
#          {'blocks.3.': 0.0}               switches off [3]
#          {'blocks.1': 0.0, 'blocks.10': 1.0} switches off [1, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19]
#          {'blocks.10': 1.0, 'blocks.1': 0.0} switches off [1, 11, 12, 13, 14, 15, 16, 17, 18, 19]
#          {'block.3': 0.0}                 switches off []
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from peft import LoraConfig

LAYERS = 40  # as many as Wan 14B has
transformer = WanTransformer3DModel(
    num_attention_heads=1, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8, ffn_dim=8,
    num_layers=LAYERS, rope_max_seq_len=32,
)  # fmt: skip
transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"]), "tuned")
pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer)


def off(weights):
    pipe.set_adapters("tuned", {"transformer": weights})
    return [i for i, block in enumerate(transformer.blocks) if block.attn1.to_q.scaling["tuned"] == 0]


for weights, expected in (
    ({"blocks.3": 0.0}, [3, *range(30, 40)]),
    ({"blocks.3.": 0.0}, [3]),
    ({"blocks.1": 0.0, "blocks.10": 1.0}, [1, *range(10, 20)]),
    ({"blocks.10": 1.0, "blocks.1": 0.0}, [1, *range(11, 20)]),
    ({"block.3": 0.0}, []),
):
    found = off(weights)
    print(f"{weights!s:32} switches off {found}")
    assert found == expected
PY
