#!/usr/bin/env bash
# Guess:   a HunyuanVideo LoRA in the original's names makes the same change in diffusers as there, in each layer that
#          it has.
# Happens: not in final_layer.adaLN_modulation, which sets scale and shift of the output. diffusers has the two in the
#          other order, so the converter exchanges the halves of every weight of that name: of lora_B, which is right,
#          and of lora_A, whose halves are those of the rank. Each half of lora_B then meets the wrong half of lora_A,
#          and the change is another one, of the same size. No error, no warning; the other layers are right. Exchange
#          lora_A's halves in the file to undo it.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; HunyuanVideoPipeline with a random transformer, rank 8.
# Seen:    double_blocks.0.img_attn_qkv    1.00 of its change made, off by 0.00 of it
#          double_blocks.0.img_mod.linear  1.00 of its change made, off by 0.00 of it
#          final_layer.linear              1.00 of its change made, off by 0.00 of it
#          final_layer.adaLN_modulation.1  0.25 of its change made, off by 1.20 of it
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 \
    peft==0.21.2 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import warnings

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

warnings.filterwarnings("ignore", category=RuntimeWarning)  # peft's, about names that fit other layers too
HIDDEN, RANK = 20, 8
LAYERS = {  # in the original's names: rows of the weight, and where diffusers has them
    "double_blocks.0.img_attn_qkv": (3 * HIDDEN, ["transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_k",
                                                  "transformer_blocks.0.attn.to_v"]),
    "double_blocks.0.img_mod.linear": (6 * HIDDEN, ["transformer_blocks.0.norm1.linear"]),
    "final_layer.linear": (4, ["proj_out"]),
    "final_layer.adaLN_modulation.1": (2 * HIDDEN, ["norm_out.linear"]),
}  # fmt: skip
torch.manual_seed(0)
transformer = HunyuanVideoTransformer3DModel(
    in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1, num_single_layers=1,
    num_refiner_layers=1, patch_size=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
)  # fmt: skip
file, change = {}, {}
for name, (rows, _) in LAYERS.items():
    down, up = torch.randn(RANK, HIDDEN), torch.randn(rows, RANK)
    file |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    change[name] = up @ down
shift, scale = change["final_layer.adaLN_modulation.1"].chunk(2)  # diffusers has them in the other order
change["final_layer.adaLN_modulation.1"] = torch.cat([scale, shift])

pipe = HunyuanVideoPipeline(None, None, transformer, None, FlowMatchEulerDiscreteScheduler(), None, None)
pipe.load_lora_weights(file, adapter_name="tuned")
for name, (_, places) in LAYERS.items():
    with torch.no_grad():
        made = torch.cat([transformer.get_submodule(place).get_delta_weight("tuned") for place in places])
    wanted = change[name]
    share = float((made * wanted).sum() / wanted.square().sum())
    off = float((made - wanted).norm() / wanted.norm())
    print(f"{name:31} {share:.2f} of its change made, off by {off:.2f} of it")
    if name == "final_layer.adaLN_modulation.1":
        down, up = (torch.cat(file[f"{name}.lora_{part}.weight"].chunk(2)[::-1]) for part in "AB")  # halves exchanged
        assert abs(share) < 0.5 and off > 0.8 and torch.allclose(made, up @ down, atol=1e-4)
    else:
        assert off < 1e-5
PY
