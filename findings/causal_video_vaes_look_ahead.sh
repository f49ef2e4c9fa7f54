#!/usr/bin/env bash
# Guess:   the "causal" video VAEs see no later frame: the latents of a clip's first frames are those of the clip cut
#          there, and an image's latent is the first one of a clip that starts with it.
# Happens: true of Wan only. The convolutions of HunyuanVideo and CogVideoX are causal, their GroupNorms are not:
#          the statistics run over all frames that pass at once. Change the last frame and every latent of
#          HunyuanVideo changes, the first included, and every decoded frame; CogVideoX passes 8 frames (2 latents) at a
#          time, so the leak ends at the chunk and depends on where chunks begin. LTX-Video encodes causally and
#          decodes with all frames in sight. Cached latents cannot be trimmed like frames for these, nor a clip be
#          decoded in pieces. With statistics per frame both are causal, so it is the norms.
# Where:   diffusers 0.42.1, torch 2.13.0; small random models of the real classes, 17 frames. The size of the leak
#          depends on the weights, that there is one does not.
# Seen:    the last frame is changed, 1 for a latent that changes; the last latent, 1 for a frame that changes
#          Wan                            encode 00001  decode 00000000000001111
#          HunyuanVideo                   encode 11111  decode 11111111111111111
#          CogVideoX                      encode 00011  decode 00000000011111111
#          LTX-Video                      encode 001  decode 11111111111111111
#          HunyuanVideo, norms per frame  encode 00001  decode 00000000000001111   (CogVideoX likewise)
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLHunyuanVideo, AutoencoderKLLTXVideo, AutoencoderKLWan

torch.manual_seed(0)
wide, groups = {"block_out_channels": (8,) * 4, "latent_channels": 4}, {"layers_per_block": 1, "norm_num_groups": 2}
kinds = {"down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4}
layers = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "decoder_block_out_channels": (8,) * 4}
vaes = {
    "Wan": AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
    "HunyuanVideo": AutoencoderKLHunyuanVideo(**wide, **groups),
    "CogVideoX": AutoencoderKLCogVideoX(**wide, **groups, **kinds),
    "LTX-Video": AutoencoderKLLTXVideo(**wide, **layers),
}


@torch.no_grad()
def changes(run, tensor):
    """For each frame that comes out, whether it depends on the last one that goes in."""
    other = tensor.clone()
    other[:, :, -1] = torch.randn_like(other[:, :, -1])
    one, two = run(tensor), run(other)
    return "".join(str(int(moved > 1e-6)) for moved in ((one - two).abs().amax((0, 1, 3, 4)) / one.abs().max()))


def both(vae):
    def encode(video):
        return vae.encode(video).latent_dist.mode()

    def decode(latents):
        return vae.decode(latents).sample

    video = torch.randn(1, 3, 17, 64, 64)
    with torch.no_grad():
        latents = torch.randn_like(encode(video))
    return changes(encode, video), changes(decode, latents)


def per_frame(norm):
    """The same GroupNorm, with statistics of each frame; attention comes as (batch, channels, frames of 8 x 8)."""
    stock = norm.forward
    norm.forward = lambda x: torch.cat([stock(f) for f in x.split(1 if x.ndim == 5 else 64, dim=2)], dim=2)


seen = {name: both(vae.eval()) for name, vae in vaes.items()}
for name in ("HunyuanVideo", "CogVideoX"):
    for module in vaes[name].modules():
        if isinstance(module, torch.nn.GroupNorm):
            per_frame(module)
    seen[name + ", norms per frame"] = both(vaes[name])
for name, (encoded, decoded) in seen.items():
    print(f"{name:30} encode {encoded}  decode {decoded}")
causal = ("00001", "0" * 13 + "1111")
expected = [causal, ("11111", "1" * 17), ("00011", "0" * 9 + "1" * 8), ("001", "1" * 17), causal, causal]
assert list(seen.values()) == expected
PY
