#!/usr/bin/env bash
# Guess:   enable_group_offload(offload_to_disk_path=...) keeps the weights of every model of a pipeline apart.
# Happens: a file is named by a hash of the name of the module or block in its model, and one that exists is not
#          written again. So the second model of a class never writes its weights, frees them, and loads the
#          first one's, without a word. Wan2.2 has two transformers of one class: its pipeline, offloaded to disk with
#          one call of pipe.enable_group_offload, runs the expert of the high noise levels at the low ones too.
#          A folder left by an earlier run does the same to the next checkpoint. A folder for each model is right.
# Where:   diffusers 0.42.1, torch 2.13.0, both offload types; random WanTransformer3DModels, all on the CPU.
# Seen:    block_level: second expert, distance to its own output 2.62, to the first expert's 0.00
#          leaf_level: second expert, distance to its own output 2.62, to the first expert's 0.00
#          one folder each: second expert, distance to its own output 0.00, to the first expert's 2.62
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import tempfile

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel


def expert(seed):
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


@torch.no_grad()
def output(model):
    generator = torch.Generator().manual_seed(7)
    video, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 2, 8, 8), (1, 6, 16)))
    return model(video, torch.tensor([500]), text).sample


def offloaded(kind, folders):
    """The output of the second expert once both are offloaded to disk."""
    first, second = expert(0), expert(1)
    how = {"onload_device": torch.device("cpu"), "offload_type": kind, "num_blocks_per_group": 1}
    if len(folders) == 1:
        vae = AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
        scheduler = FlowMatchEulerDiscreteScheduler()
        pipe = WanPipeline(None, None, vae, scheduler, first, second, boundary_ratio=0.5)
        pipe.enable_group_offload(**how, offload_to_disk_path=folders[0])
    else:
        for model, folder in zip((first, second), folders):
            model.enable_group_offload(**how, offload_to_disk_path=folder)
    output(first)
    return output(second)


of_first, of_second = output(expert(0)), output(expert(1))
for name, kind, number in (
    ("block_level", "block_level", 1),
    ("leaf_level", "leaf_level", 1),
    ("one folder each", "leaf_level", 2),
):
    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        got = offloaded(kind, [a, b][:number])
    own, other = (float((got - wanted).abs().max()) for wanted in (of_second, of_first))
    print(f"{name}: second expert, distance to its own output {own:.2f}, to the first expert's {other:.2f}")
    wrong, right = (own, other) if number == 1 else (other, own)
    assert wrong > 0.5 and right < 1e-4
PY
