#!/usr/bin/env bash
# Guess:   the mask of Wan VACE says for each frame what is kept: a first frame that is kept is kept in the latents'
#          mask too.
# Happens: the mask is brought to latent frames by taking the nearest of evenly spaced frames, while the VAE puts
#          frame 0 into the first latent frame and every four that follow into the next. Of 81 frames the masks of 21
#          count, and neither the first nor the last is among them: an image-to-video mask that keeps frame 0 alone
#          says that all is to be made (the frame itself is in the inactive latents still). Until frame 25 it is the
#          mask of a frame that lies in the next latent frame. Kept frames 0 and 1 keep latent frame 0. VACE's own
#          code does the same, so the model may be used to it.
# Where:   diffusers 0.42.1, torch 2.13.0; prepare_masks of WanVACEPipeline, 81 frames.
# Seen:    frames whose mask counts: 21 of 81, [1, 5, 9, 13, 17, 21, 25, 28, 32, 36, 40, 44, 48, 52, 55, 59, 63, ...]
#          of these, in another latent frame than the mask: [1, 5, 9, 13, 17, 21, 25]
#          kept frames [0]: kept latent frames []
#          kept frames [80]: kept latent frames []
#          kept frames [0, 1]: kept latent frames [0]
#          kept frames [25, 26, 27, 28]: kept latent frames [6, 7]
#          kept frames [0, 1, 2, 3]: kept latent frames [0]
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanVACEPipeline, WanVACETransformer3DModel

FRAMES, LATENTS = 81, 21
transformer = WanVACETransformer3DModel(
    num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32,
    num_layers=2, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=8,
)  # fmt: skip
pipe = WanVACEPipeline(None, None, None, FlowMatchEulerDiscreteScheduler(), transformer)


def masked(frames):
    """the latent frames whose mask says that they are to be made, if these frames are"""
    mask = torch.zeros(1, 3, FRAMES, 32, 32)
    mask[:, :, list(frames)] = 1
    latent = pipe.prepare_masks(mask, [[]])[0]  # no reference images
    shares = latent.mean(dim=(0, 2, 3)).tolist()
    assert len(shares) == LATENTS and set(shares) <= {0.0, 1.0}
    return [i for i, share in enumerate(shares) if share]


def kept(frames):
    made = masked(set(range(FRAMES)) - set(frames))
    return [i for i in range(LATENTS) if i not in made]


alone = {frame: masked([frame]) for frame in range(FRAMES)}
read = [frame for frame, latent in alone.items() if latent]
beside = [frame for frame in read if alone[frame] != [(frame + 3) // 4]]  # the VAE: 0, then 1 to 4, 5 to 8 and so on
print(f"frames whose mask counts: {len(read)} of {FRAMES}, {read}")
print(f"of these, in another latent frame than the mask: {beside}")
for frames in ((0,), (80,), (0, 1), range(25, 29), range(4)):
    print(f"kept frames {list(frames)}: kept latent frames {kept(frames)}")
assert len(read) == LATENTS and not {0, 80} & set(read) and len(beside) == 7
assert kept([0]) == kept([80]) == [] and kept([0, 1]) == [0]
PY
