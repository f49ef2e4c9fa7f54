#!/usr/bin/env bash
# Guess:   after load_lora_weights, fuse_lora and unload_lora_weights, the usual way to a plain model, the LoRA is in
#          all weights that it was loaded into.
# Happens: Wan2.2 has two experts. Adapters are loaded into each, set_adapters and unload_lora_weights see both, but
#          fuse_lora fuses "transformer" alone. As long as the adapters stay, nothing shows, since the second one's
#          works unfused; unloading then takes it away, and the low noise levels run without. So a few-step LoRA or a
#          style is missing where the detail is drawn. fused_loras lists the adapter, no warning is given.
#          components=["transformer", "transformer_2"] is right.
# Where:   diffusers 0.42.1, peft 0.21.2, torch 2.13.0; WanPipeline with two random transformers.
# Seen:    how much of the adapter acts in the high-noise and the low-noise expert
#          loaded: 1.00 1.00, fuse_lora(): 1.00 1.00 and fused_loras {'turbo'}, unload_lora_weights(): 1.00 0.00
#          both components: unload_lora_weights(): 1.00 1.00
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
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict


def expert(seed):
    torch.manual_seed(seed)
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=32, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def lora(seed):
    model = expert(0)
    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(model).items()}


def loaded():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = WanPipeline(None, None, None, scheduler, expert(1), expert(2), boundary_ratio=0.9)
    pipe.load_lora_weights(lora(3), adapter_name="turbo")
    pipe.load_lora_weights(lora(4), adapter_name="turbo", load_into_transformer_2=True)
    return pipe


@torch.no_grad()
def outputs(*models):
    generator = torch.Generator().manual_seed(7)
    video, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 2, 8, 8), (1, 6, 16)))
    return [model(video, torch.tensor([500]), text).sample for model in models]


pipe = loaded()
without, adapted = outputs(expert(1), expert(2)), outputs(pipe.transformer, pipe.transformer_2)


def shares(pipe):
    """How far each expert is on the way from without the adapter (0) to with it (1)."""
    now = outputs(pipe.transformer, pipe.transformer_2)
    return [float(((n - w) * (a - w)).sum() / (a - w).square().sum()) for n, w, a in zip(now, without, adapted)]


def text(shares):
    return " ".join(f"{share:.2f}" for share in shares)


print("loaded:", text(shares(pipe)), end=", ")
pipe.fuse_lora()
fused, listed = shares(pipe), pipe.fused_loras
pipe.unload_lora_weights()
left = shares(pipe)
print(f"fuse_lora(): {text(fused)} and fused_loras {listed}, unload_lora_weights(): {text(left)}")
assert min(fused) > 0.99 and listed == {"turbo"} and left[0] > 0.99 and abs(left[1]) < 0.01
pipe = loaded()
pipe.fuse_lora(components=["transformer", "transformer_2"])
pipe.unload_lora_weights()
print("both components: unload_lora_weights():", text(shares(pipe)))
assert min(shares(pipe)) > 0.99
PY
