#!/usr/bin/env bash
# Guess:   FlopCounterMode counts the same forward of a transformer alike on every device, or at least all matrix
#          products.
# Happens: it knows attention by the names of kernels, and that of the CPU is not among them: what
#          scaled_dot_product_attention runs there counts as nothing, forward and backward, without a warning. On the
#          meta device, or with the "_native_math" backend of diffusers, the same model costs more than three times as
#          much here; the longer the clip, the larger the part that is missing. So FLOPs counted on the CPU and on the
#          meta device cannot be compared, and a cache that skips attention seems to save nothing.
# Where:   torch 2.13.0, diffusers 0.42.1; a random WanTransformer3DModel, 256 tokens.
# Seen:    CPU                                 5.6 million FLOPs, of attention   0.0
#          CPU, math backend                  18.4 million FLOPs, of attention  12.9
#          meta                               18.4 million FLOPs, of attention  12.9
#          CPU, with backward                 16.5 million FLOPs, of attention   0.0
#          CPU, math backend, with backward   55.1 million FLOPs, of attention  38.6
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import WanTransformer3DModel
from torch.utils.flop_counter import FlopCounterMode

torch.manual_seed(0)


def count(device="cpu", backend="native", backward=False):
    """(FLOPs, those of attention's products)"""
    with torch.device(device):
        model = WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        )  # fmt: skip
        inputs = torch.randn(1, 4, 4, 16, 16), torch.tensor([500]), torch.randn(1, 6, 16)
    model.set_attention_backend(backend)
    with FlopCounterMode(display=False) as counter:
        output = model(*inputs).sample
        if backward:
            output.sum().backward()
    model.set_attention_backend("native")  # for it is everybody's, not this model's
    kinds = counter.get_flop_counts()["Global"]
    return counter.get_total_flops(), sum(n for kind, n in kinds.items() if "bmm" in str(kind) or "dot" in str(kind))


for name, options in {
    "CPU": {},
    "CPU, math backend": {"backend": "_native_math"},
    "meta": {"device": "meta"},
    "CPU, with backward": {"backward": True},
    "CPU, math backend, with backward": {"backend": "_native_math", "backward": True},
}.items():
    total, attention = count(**options)
    print(f"{name:33} {total / 1e6:5.1f} million FLOPs, of attention {attention / 1e6:5.1f}")
    assert (attention == 0) == (name.startswith("CPU") and "math" not in name)
PY
