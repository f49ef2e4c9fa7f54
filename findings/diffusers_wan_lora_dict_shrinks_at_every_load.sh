#!/usr/bin/env bash
# Guess:   a Wan LoRA that is held in memory as a dict can be loaded into both transformers of Wan2.2.
# Happens: for cross-attention and feed-forward layers of a file with alpha, alpha / rank is multiplied into the
#          dict's own tensors (for self-attention into new ones). The second load scales them again, so the second
#          transformer has the square; and as the first one uses the same tensors, its strength drops in the same
#          moment. Loaded from a file, or from a copy of the tensors each time, both are right. No error, no warning.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; WanPipeline with two random transformers, a LoRA in Wan's own
#          names, rank 8, alpha 2.
# Seen:    strength at which each layer's change is there (1: as it should be)
#          transformer, loaded from the dict      self_attn.q 1.0000  cross_attn.q 1.0000  ffn.0 1.0000
#          transformer, after loading the second  self_attn.q 1.0000  cross_attn.q 0.2500  ffn.0 0.2500
#          transformer_2                          self_attn.q 1.0000  cross_attn.q 0.2500  ffn.0 0.2500
#          transformer, from a copy each          self_attn.q 1.0000  cross_attn.q 1.0000  ffn.0 1.0000
#          transformer_2, from a copy each        self_attn.q 1.0000  cross_attn.q 1.0000  ffn.0 1.0000
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

RANK, ALPHA = 8, 2.0
OURS = {"self_attn.q": "attn1.to_q", "cross_attn.q": "attn2.to_q", "ffn.0": "ffn.net.0.proj"}


def model():
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


torch.manual_seed(0)
file, change = {}, {}
for theirs, ours in OURS.items():
    rows, columns = model().get_parameter(f"blocks.0.{ours}.weight").shape
    down, up = torch.randn(RANK, columns), torch.randn(rows, RANK)
    change[theirs] = up @ down * ALPHA / RANK
    name = f"diffusion_model.blocks.0.{theirs}"
    file |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}


@torch.no_grad()
def strengths(transformer):
    """how much of its change the adapter makes, for each layer"""
    found = {}
    for theirs, ours in OURS.items():
        made = transformer.get_submodule(f"blocks.0.{ours}").get_delta_weight("tuned")
        found[theirs] = float((made * change[theirs]).sum() / change[theirs].square().sum())
    return found


def show(when, transformer):
    found = strengths(transformer)
    print(f"{when:38}", "  ".join(f"{name} {value:.4f}" for name, value in found.items()))
    return [round(value, 4) for value in found.values()]


def clones():
    return {name: tensor.clone() for name, tensor in file.items()}


copied, shared = (
    WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), model(), transformer_2=model()) for _ in range(2)
)
for pipe, of in ((copied, clones), (shared, lambda: file)):
    pipe.load_lora_weights(of(), adapter_name="tuned")
    if pipe is shared:
        assert show("transformer, loaded from the dict", pipe.transformer) == [1, 1, 1]
    pipe.load_lora_weights(of(), adapter_name="tuned", load_into_transformer_2=True)
squared = [1, ALPHA / RANK, ALPHA / RANK]
assert show("transformer, after loading the second", shared.transformer) == squared
assert show("transformer_2", shared.transformer_2) == squared
assert show("transformer, from a copy each", copied.transformer) == [1, 1, 1]
assert show("transformer_2, from a copy each", copied.transformer_2) == [1, 1, 1]
PY
