#!/usr/bin/env bash
# Guess:   the guiders of diffusers take the predictions of any model, as they are.
# Happens: MagnitudeAwareGuidance takes the norm over all dimensions but the first with torch.norm, which makes a
#          matrix norm of a list of dimensions and takes two at most. Packed tokens, as of Flux or LTX-Video, have
#          two; the latents of Wan and HunyuanVideo-1.5 have four, those of images three: the first guided step
#          raises. The other guiders that combine two predictions take all three. linalg.vector_norm would.
# Where:   diffusers 0.42.1, torch 2.13.0; guiders alone, and the modular Wan pipeline with a random transformer.
# Seen:    predictions of tokens (3 dimensions), images (4), videos (5)
#          ClassifierFreeGuidance           works works works
#          ClassifierFreeZeroStarGuidance   works works works
#          AdaptiveProjectedGuidance        works works works
#          AdaptiveProjectedMixGuidance     works works works
#          TangentialClassifierFreeGuidance works works works
#          MagnitudeAwareGuidance           works raises raises
#          modular Wan with MagnitudeAwareGuidance: linalg.matrix_norm: dim must be a 2-tuple. Got 1 2 3 4
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import UniPCMultistepScheduler, WanModularPipeline, WanTransformer3DModel, guiders
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

torch.manual_seed(0)


def attempt(guider, shape):
    guider.set_state(step=8, num_inference_steps=12, timestep=torch.tensor(500))
    try:
        assert guider.forward(torch.randn(shape), torch.randn(shape)).pred.shape == shape
    except RuntimeError as error:
        assert "dim must be a 2-tuple" in str(error)
        return "raises"
    return "works"


for name in (
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "TangentialClassifierFreeGuidance",
    "MagnitudeAwareGuidance",
):
    seen = [attempt(getattr(guiders, name)(), shape) for shape in ((1, 32, 4), (1, 4, 8, 8), (1, 4, 2, 8, 8))]
    print(f"{name:32}", *seen)
    assert seen == (["works", "raises", "raises"] if name == "MagnitudeAwareGuidance" else ["works"] * 3)

transformer = WanTransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=1, rope_max_seq_len=32,
)  # fmt: skip
scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
pipe = WanModularPipeline(blocks=WanCoreDenoiseStep())
pipe.update_components(transformer=transformer, scheduler=scheduler, guider=guiders.MagnitudeAwareGuidance(3.0))
pipe.set_progress_bar_config(disable=True)
embeds = {"prompt_embeds": torch.randn(1, 6, 16), "negative_prompt_embeds": torch.randn(1, 6, 16)}
try:
    pipe(
        **embeds, latents=torch.randn(1, 4, 2, 8, 8), height=64, width=64, num_frames=5, num_inference_steps=4,
        output="latents",
    )  # fmt: skip
except RuntimeError as error:
    print("modular Wan with MagnitudeAwareGuidance:", error)
    assert "Got 1 2 3 4" in str(error)
else:
    raise SystemExit("modular Wan took MagnitudeAwareGuidance")
PY
