#!/usr/bin/env bash
# Guess:   a causal video VAE that compresses time by 4 takes 4n + 1 frames and raises, or pads, for another number.
# Happens: each takes any number, without a word, and does something else with it. Wan and LTX-Video leave the frames
#          over out: they change nothing in the latents. HunyuanVideo puts all of them in and gives fewer back, so
#          that the clip is played faster; CogVideoX does either of both; Cosmos gives back more than it got. Compared
#          frame by frame with its reconstruction, such a clip is off in all but Wan and LTX-Video, and there it is
#          shorter.
# Where:   diffusers 0.42.1, torch 2.13.0; small random VAEs of the real classes.
# Seen:    frames of the clip, frames that change the latents, frames that are decoded
#          Wan           of 9 9 used, 9 back  of 12 9 used, 9 back  of 16 13 used, 13 back
#          HunyuanVideo  of 9 9 used, 9 back  of 12 12 used, 9 back  of 16 16 used, 13 back
#          CogVideoX     of 9 9 used, 9 back  of 12 12 used, 9 back  of 16 16 used, 16 back
#          LTX-Video     of 9 9 used, 9 back  of 12 9 used, 9 back  of 16 9 used, 9 back
#          Cosmos        of 9 9 used, 9 back  of 12 9 used, 9 back  of 16 16 used, 17 back
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
)

torch.manual_seed(0)
four, five = (8, 8, 8, 8), (1, 1, 1, 1, 1)
small = {"latent_channels": 4, "layers_per_block": 1, "block_out_channels": four, "norm_num_groups": 4}
cog = {f"{way}_block_types": (f"CogVideoX{way.title()}Block3D",) * 4 for way in ("down", "up")}
VAES = {
    "Wan": AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
    ),
    "HunyuanVideo": AutoencoderKLHunyuanVideo(**small),
    "CogVideoX": AutoencoderKLCogVideoX(**small, **cog),
    "LTX-Video": AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=four, decoder_block_out_channels=four, layers_per_block=five,
        decoder_layers_per_block=five,
    ),
    "Cosmos": AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=four, decode_block_out_channels=four, num_layers=1,
        attention_resolutions=(8,), resolution=64,
    ),
}  # fmt: skip


@torch.no_grad()
def measure(vae, frames):
    """(frames that change the latents, frames that come back)"""
    video = torch.randn(1, 3, frames, 32, 32)
    latents = vae.encode(video).latent_dist.mode()
    count = frames
    while count:
        other = video.clone()
        other[:, :, count - 1] += 1
        if not torch.equal(vae.encode(other).latent_dist.mode(), latents):
            break
        count -= 1
    return count, vae.decode(latents).sample.shape[2]


EXPECTED = {
    "Wan": [(9, 9), (9, 9), (13, 13)],
    "HunyuanVideo": [(9, 9), (12, 9), (16, 13)],
    "CogVideoX": [(9, 9), (12, 9), (16, 16)],
    "LTX-Video": [(9, 9), (9, 9), (9, 9)],
    "Cosmos": [(9, 9), (9, 9), (16, 17)],
}
for name, vae in VAES.items():
    seen = [measure(vae.eval(), frames) for frames in (9, 12, 16)]
    print(f"{name:13}", "  ".join(f"of {n} {used} used, {back} back" for n, (used, back) in zip((9, 12, 16), seen)))
    assert seen == EXPECTED[name]
PY
