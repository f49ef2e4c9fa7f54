#!/usr/bin/env bash
# Guess:   tiled in time, the VAEs of LTX-Video and LTX-2 decode the same frames as whole, but for seams;
#          enable_tiling with a number of frames does so, and use_framewise_encoding is for encoding.
# Happens: none of it. A tile's first latent frame makes one frame of its own, which the tile before has already;
#          HunyuanVideo's VAE drops it, and these two drop the last frame of the tile. So all that follows the first
#          tile comes one frame late, against the sound in LTX-2, and seams blend frames that do not belong together.
#          enable_tiling takes the numbers and tiles no time before use_framewise_decoding is set; that flag tiles the
#          encoder as well, and use_framewise_encoding does nothing.
# Where:   diffusers 0.42.1, torch 2.13.0; small random VAEs of the real classes, 129 frames in tiles of 64, 48 apart.
# Seen:    distance to the frames of whole decoding, in deviations
#          LTX-Video first tile: same frame 0.10, the one before 0.98; later tiles: same frame 0.97, the one before 0.26
#          LTX-Video calls of the encoder with {'use_framewise_encoding': 1, 'use_framewise_decoding': 3}
#          LTX-2     first tile: same frame 0.00, the one before 0.88; later tiles: same frame 0.91, the one before 0.47
#          LTX-2     calls of the encoder with {'use_framewise_encoding': 1, 'use_framewise_decoding': 3}
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import AutoencoderKLLTX2Video, AutoencoderKLLTXVideo

FRAMES, TILE, STRIDE = 129, 64, 48
torch.manual_seed(0)
five = (1, 1, 1, 1, 1)
VAES = {
    "LTX-Video": AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=five, decoder_layers_per_block=five,
    ),
    "LTX-2": AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8, 16, 32, 64), decoder_block_out_channels=(8, 16, 32),
        layers_per_block=five, decoder_layers_per_block=five[:4], temporal_compression_ratio=8,
        spatial_compression_ratio=32,
    ),
}  # fmt: skip


@torch.no_grad()
def late(vae):
    """distance of tiled decoding to frames of the whole one, at the same place and one before, in two parts"""
    latents = torch.randn(1, 4, (FRAMES - 1) // 8 + 1, 2, 2)
    whole = vae.decode(latents).sample
    vae.enable_tiling(tile_sample_min_num_frames=TILE, tile_sample_stride_num_frames=STRIDE)
    assert torch.allclose(vae.decode(latents).sample, whole, atol=1e-4)  # no tiles in time yet
    vae.use_framewise_decoding = True
    tiled = vae.decode(latents).sample
    assert tiled.shape == whole.shape
    parts = []
    for frames in (range(1, STRIDE), range(TILE + 1, FRAMES)):
        for back in (0, 1):
            distance = (tiled[:, :, list(frames)] - whole[:, :, [t - back for t in frames]]).abs().mean()
            parts.append(float(distance / whole.std()))
    return parts


@torch.no_grad()
def encoder_calls(vae):
    calls, counts = [], {}
    handle = vae.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    for name in ("use_framewise_encoding", "use_framewise_decoding"):
        vae.use_framewise_encoding = vae.use_framewise_decoding = False
        setattr(vae, name, True)
        calls.clear()
        vae.encode(torch.randn(1, 3, FRAMES, 64, 64))
        counts[name] = len(calls)
    handle.remove()
    return counts


for name, vae in VAES.items():
    first, first_late, rest, rest_late = late(vae.eval())
    print(f"{name:9} first tile: same frame {first:.2f}, the one before {first_late:.2f};", end=" ")
    print(f"later tiles: same frame {rest:.2f}, the one before {rest_late:.2f}")
    counts = encoder_calls(vae)
    print(f"{name:9} calls of the encoder with {counts}")
    assert first < first_late / 3 and rest_late < 0.7 * rest
    assert counts == {"use_framewise_encoding": 1, "use_framewise_decoding": 3}
PY
