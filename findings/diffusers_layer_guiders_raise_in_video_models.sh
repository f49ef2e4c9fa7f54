#!/usr/bin/env bash
# Guess:   PerturbedAttentionGuidance and SkipLayerGuidance work in the video models of diffusers, given a list of
#          layers.
# Happens: perturbed attention raises in each of six, at the first step that it is to act in: their attention
#          processors are not in its list, which has Wan's under its former name, or their attention does not know
#          is_cross_attention. And a list of layers, skip_layer_guidance_layers=[1], raises in any model, as it does
#          for AutoGuidance: an int is passed where a list is wanted. SkipLayerGuidance with a LayerSkipConfig works,
#          but in SkyReels-V2.
# Where:   diffusers 0.42.1, torch 2.13.0; small random models of the real classes.
# Seen:    Wan          perturbed attention: ValueError, WanAttnProcessor not registered
#                       skip layer, a config: works; a list: TypeError, object of type 'int' has no len()
#          SkyReelsV2   perturbed attention: ValueError, SkyReelsV2AttnProcessor not registered
#                       skip layer, a config: ValueError, SkyReelsV2TransformerBlock not registered; a list: TypeError
#          LTXVideo     perturbed attention: AttributeError, 'LTXAttention' has no attribute 'is_cross_attention'
#          CogVideoX    perturbed attention: ValueError, CogVideoXAttnProcessor2_0 not registered
#          Mochi        perturbed attention: AttributeError, 'MochiAttention' has no attribute 'is_cross_attention'
#          HunyuanVideo perturbed attention: ValueError, HunyuanVideoAttnProcessor2_0 not registered
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import re

import diffusers
import torch
from diffusers import LayerSkipConfig, guiders

torch.manual_seed(0)
latents = {
    "hidden_states": torch.randn(1, 4, 2, 8, 8), "timestep": torch.tensor([500]),
    "encoder_hidden_states": torch.randn(1, 6, 16),
}  # fmt: skip
mask = {"encoder_attention_mask": torch.ones(1, 6)}
wan = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
small = {"num_attention_heads": 2, "num_layers": 2}
MODELS = {
    "Wan": (wan, latents),
    "SkyReelsV2": (wan, latents),
    "LTXVideo": (
        small | {
            "in_channels": 8, "out_channels": 8, "attention_head_dim": 8, "cross_attention_dim": 16,
            "caption_channels": 16,
        },
        latents | mask | {"hidden_states": torch.randn(1, 32, 8), "num_frames": 2, "height": 4, "width": 4},
    ),
    "CogVideoX": (
        small | {
            "in_channels": 4, "out_channels": 4, "attention_head_dim": 8, "time_embed_dim": 2, "text_embed_dim": 16,
            "sample_width": 8, "sample_height": 8, "sample_frames": 5, "max_text_seq_length": 6,
        },
        latents | {"hidden_states": torch.randn(1, 2, 4, 8, 8)},
    ),
    "Mochi": (
        small | {
            "in_channels": 4, "attention_head_dim": 8, "pooled_projection_dim": 16, "text_embed_dim": 16,
            "time_embed_dim": 4, "max_sequence_length": 6,
        },
        latents | mask,
    ),
    "HunyuanVideo": (
        small | {
            "in_channels": 4, "out_channels": 4, "attention_head_dim": 10, "num_single_layers": 1,
            "num_refiner_layers": 1, "patch_size": 1, "text_embed_dim": 16, "pooled_projection_dim": 8,
            "rope_axes_dim": (2, 4, 4), "guidance_embeds": False,
        },
        latents | mask | {"pooled_projections": torch.randn(1, 8)},
    ),
}  # fmt: skip
SCORES = {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False}
STACK = {"Wan": "blocks", "SkyReelsV2": "blocks"}


def attempt(guider, model, inputs):
    """what the guider's third call, the perturbed one, of the second step does"""
    guider.set_state(step=1, num_inference_steps=4, timestep=torch.tensor(500))
    outputs = []
    try:
        for _ in range(3):
            guider.prepare_models(model)
            with torch.no_grad():
                outputs.append(model(**inputs).sample)
            guider.cleanup_models(model)
    except (AttributeError, TypeError, ValueError) as error:
        unknown = re.search(r"(\w+)'> not registered", str(error))
        return f"{type(error).__name__}, {unknown[1] + ' not registered' if unknown else error}"
    return "works" if (outputs[2] - outputs[0]).abs().max() > 1e-3 else "does nothing"


for name, (config, inputs) in MODELS.items():
    stack = STACK.get(name, "transformer_blocks")
    build = getattr(diffusers, f"{name}Transformer3DModel")
    perturbed = guiders.PerturbedAttentionGuidance(
        perturbed_guidance_config=LayerSkipConfig([1], stack, **SCORES), perturbed_guidance_stop=1.0
    )
    seen = attempt(perturbed, build(**config), inputs)
    listed = attempt(
        guiders.SkipLayerGuidance(skip_layer_guidance_layers=[1], skip_layer_guidance_stop=1.0), build(**config), inputs
    )
    configured = attempt(
        guiders.SkipLayerGuidance(skip_layer_config=LayerSkipConfig([1], stack), skip_layer_guidance_stop=1.0),
        build(**config), inputs,
    )  # fmt: skip
    print(f"{name:12} perturbed attention: {seen}\n{'':12} skip layer, a config: {configured}; a list: {listed}")
    assert "Error" in seen and listed.startswith("TypeError")
    assert "Error" in configured if name == "SkyReelsV2" else configured == "works"
PY
