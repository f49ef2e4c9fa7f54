#!/usr/bin/env bash
# Guess:   load_lora_weights applies all of a Wan LoRA file, or warns of what it leaves out.
# Happens: LoRA files that are extracted from fine-tuned or distilled Wan models hold more than LoRA: whole
#          differences ("diff") of what is no linear layer, and of biases ("diff_b"). diffusers applies the biases of
#          linear layers, and drops the differences of norms, modulation and patch embedding; it says so at the level
#          of debug or info, which is off. The model then is neither the base nor the tuned one. The differences have
#          to be added to the weights by hand.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; a random WanTransformer3DModel whose change is written as such
#          a file, in Wan's own names.
# Seen:    share of the change that acts after loading
#          blocks.0.self_attn.q, LoRA      1.00
#          blocks.0.self_attn.q.diff_b     1.00
#          blocks.0.self_attn.norm_q.diff  0.00
#          blocks.0.norm3.diff             0.00
#          blocks.0.modulation.diff        0.00
#          head.modulation.diff            0.00
#          patch_embedding.diff            0.00
#          warnings: 0
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import logging

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel

warnings = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: warnings.append(record.getMessage())
diffusers.utils.logging.add_handler(handler)


def model():
    torch.manual_seed(1)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip


@torch.no_grad()
def output(model):
    generator = torch.Generator().manual_seed(7)
    video, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 2, 8, 8), (1, 6, 16)))
    return model(video, torch.tensor([500]), text).sample


def loaded(file):
    pipe = WanPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), model())
    pipe.load_lora_weights(file)
    return output(pipe.transformer)


generator = torch.Generator().manual_seed(2)
down, up = (torch.randn(shape, generator=generator) for shape in ((2, 24), (24, 2)))
query = "diffusion_model.blocks.0.self_attn.q"
lora = {f"{query}.lora_down.weight": down, f"{query}.lora_up.weight": up}
tuned = model()
tuned.blocks[0].attn1.to_q.weight.data += up @ down
base, with_lora = output(model()), output(tuned)

seen = {}
for name, parameter in {
    "blocks.0.self_attn.q, LoRA": None,
    "blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
    "blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    "blocks.0.norm3.diff": "blocks.0.norm2.weight",
    "blocks.0.modulation.diff": "blocks.0.scale_shift_table",
    "head.modulation.diff": "scale_shift_table",
    "patch_embedding.diff": "patch_embedding.weight",
}.items():
    file, before, wanted = dict(lora), base, with_lora
    if parameter is not None:
        weight = tuned.get_parameter(parameter).data
        change = torch.randn(weight.shape, generator=generator)
        file[f"diffusion_model.{name}"] = change
        weight += change
        before, wanted = with_lora, output(tuned)
        weight -= change
    got = loaded(file)
    share = float(((got - before) * (wanted - before)).sum() / (wanted - before).square().sum())
    seen[name] = round(share, 4) + 0.0  # no -0
    print(f"{name:31} {seen[name]:.2f}")
print("warnings:", len(warnings))
shares = list(seen.values())
assert min(shares[:2]) > 0.99 and max(map(abs, shares[2:])) < 0.01 and not warnings
PY
