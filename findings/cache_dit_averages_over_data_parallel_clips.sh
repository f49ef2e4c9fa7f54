#!/usr/bin/env bash
# Guess:   two processes that each make their own clip (torchrun, one clip a process, nothing sharded) get from cache-dit
#          what each would get alone: a cache decides by the clip it is in.
# Happens: as soon as a process group of more than one exists, cache-dit averages its measure of change over the default
#          group, context parallel or not. Every process then decides by the mean over all clips: which steps are
#          computed, and so the clip, depend on what the other processes happen to make. Nothing says so, and there is no
#          setting for it. The collective is made in the forward pass, so that all processes have to make as many forwards.
# Where:   cache-dit 1.5.3, diffusers 0.42.1, torch 2.13.0; a tiny random Wan, DBCache with one block before it decides, 12
#          steps, the same prompt and seed, two processes on gloo; the other clip is of noise with another amplitude.
# Seen:    steps computed of clip A, of clip B: alone 4 2
#          steps computed of clip A, of clip B: at once in two processes 3 3
#          clip A at once equals clip A alone: False
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6 \
	ftfy==6.3.1 cache-dit==1.5.3
cd "$d"
cat >clip.py <<'PY'
import sys

import cache_dit
import torch
import torch.distributed as dist
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel


def clip(which):
    """Latents of clip A or B, and in how many steps the blocks behind the first were computed."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=4,
    )
    pipe = WanPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer,
        vae=AutoencoderKLWan(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.set_progress_bar_config(disable=True)
    steps = []
    transformer.blocks[-1].register_forward_hook(lambda *_: steps.append(1))
    cache_dit.enable_cache(
        pipe,
        cache_config=cache_dit.DBCacheConfig(
            Fn_compute_blocks=1, Bn_compute_blocks=0, max_warmup_steps=1, residual_diff_threshold=THRESHOLD,
            num_inference_steps=12,
        ),
    )
    noise = torch.randn(1, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1)) * (1.0 if which == "A" else 8.0)
    made = pipe(
        prompt_embeds=torch.randn(1, 4, 8, generator=torch.Generator().manual_seed(2)), latents=noise, height=64,
        width=64, num_frames=5, num_inference_steps=12, guidance_scale=1.0, output_type="latent",
    ).frames
    return made, len(steps)


THRESHOLD = 0.2
torch.set_num_threads(1)
if len(sys.argv) > 1:  # alone
    made, steps = clip(sys.argv[1])
    torch.save(made, f"alone-{sys.argv[1]}.pt")
    print("alone", sys.argv[1], steps)
else:
    dist.init_process_group("gloo")
    made, steps = clip("AB"[dist.get_rank()])
    counts = [torch.zeros(1), torch.zeros(1)]
    dist.all_gather(counts, torch.tensor([float(steps)]))
    if dist.get_rank() == 0:
        print("at once", *(int(count) for count in counts), torch.equal(made, torch.load("alone-A.pt")))
    dist.destroy_process_group()
PY
a=$(venv/bin/python clip.py A 2>/dev/null | sed -n 's/^alone A //p')
b=$(venv/bin/python clip.py B 2>/dev/null | sed -n 's/^alone B //p')
read -r both_a both_b equal < <(venv/bin/torchrun --standalone --nproc_per_node 2 clip.py 2>/dev/null | sed -n 's/^at once //p')
echo "steps computed of clip A, of clip B: alone $a $b"
echo "steps computed of clip A, of clip B: at once in two processes $both_a $both_b"
echo "clip A at once equals clip A alone: $equal"
[ "$a" != "$b" ] && [ "$both_a" = "$both_b" ] && [ "$equal" = False ]
