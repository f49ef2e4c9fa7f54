#!/usr/bin/env bash
# Guess:   two prompts with num_videos_per_prompt=2 give the clips that each prompt gives alone.
# Happens: LTX-Video, LTX-2, Mochi and Sana-Video repeat each prompt's embedding in place (a, a, b, b) and the masks
#          of padding as a whole (a, b, a, b). The second clip of the first prompt has the mask of the second prompt,
#          and the other way round: the clip of a long prompt is made of as many of its words as the short one has,
#          and that of the short one attends to padding. No error; with one prompt, one clip each or prompts of one
#          length all is right.
# Where:   diffusers 0.42.1, transformers 5.23.0, torch 2.13.0; random text encoders, prompts of 1 and 8 words.
# Seen:    LTX-Video   prompts of the clips [0, 0, 1, 1], words that count [1, 8, 1, 8], that should [1, 1, 8, 8]
#          LTX-2       prompts of the clips [0, 0, 1, 1], words that count [1, 8, 1, 8], that should [1, 1, 8, 8]
#          Mochi       prompts of the clips [0, 0, 1, 1], words that count [1, 8, 1, 8], that should [1, 1, 8, 8]
#          Sana-Video  prompts of the clips [0, 0, 1, 1], words that count [1, 8, 1, 8], that should [1, 1, 8, 8]
#          LTX-Video, clips off from those made alone: short prompt 0.0000 and 0.1738, long one 0.1584 and 0.0000
set -euo pipefail
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
python3 -m venv "$d/venv"
"$d/venv/bin/pip" install -q torch==2.13.0 diffusers==0.42.1 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$d"
venv/bin/python - <<'PY'
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    MochiPipeline,
    SanaVideoPipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

LONG = "a cat walks through the tall green grass"
PROMPTS, LENGTH = ["cat", LONG], 10
torch.manual_seed(0)
words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<eos>", *LONG.split()])}, unk_token="<eos>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
t5 = T5EncoderModel(T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()
gemma = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip
gemma2, gemma3 = Gemma2Model(Gemma2Config(**gemma)).eval(), Gemma3ForCausalLM(Gemma3TextConfig(**gemma)).eval()
transformer = LTXVideoTransformer3DModel(
    in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16, num_layers=2,
    caption_channels=16,
).eval()  # fmt: skip
euler = FlowMatchEulerDiscreteScheduler()
ltx = LTXPipeline(euler, None, t5, tokenizer, transformer)
PIPELINES = {
    "LTX-Video": ltx,
    "LTX-2": LTX2Pipeline(euler, None, None, gemma3, tokenizer, None, None, None),
    "Mochi": MochiPipeline(euler, None, t5, tokenizer, None),
    "Sana-Video": SanaVideoPipeline(tokenizer, gemma2, None, None, euler),
}


@torch.no_grad()
def encode(pipe, prompts, clips):
    out = pipe.encode_prompt(
        prompts, do_classifier_free_guidance=False, num_videos_per_prompt=clips, max_sequence_length=LENGTH
    )
    return out[0], out[1]


for name, pipe in PIPELINES.items():
    embeds, mask = encode(pipe, PROMPTS, 2)
    alone = [encode(pipe, [prompt], 1) for prompt in PROMPTS]
    rows = [
        next(i for i, (one, _) in enumerate(alone) if torch.allclose(row, one[0], atol=1e-4))  # of which prompt
        for row in embeds
    ]
    lengths, right = mask.sum(1).tolist(), [int(alone[row][1].sum()) for row in rows]
    print(f"{name:11} prompts of the clips {rows}, words that count {lengths}, that should {right}")
    assert rows == [0, 0, 1, 1] and right == [1, 1, 8, 8] and lengths == [1, 8, 1, 8]

noise = torch.randn(4, 2 * 2 * 2, 8)
options = {
    "height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 1.0,
    "max_sequence_length": LENGTH, "output_type": "latent",
}  # fmt: skip
ltx.set_progress_bar_config(disable=True)
together = ltx(PROMPTS, num_videos_per_prompt=2, latents=noise, **options).frames
for i, clip in enumerate(together):
    away = float((clip - ltx(PROMPTS[i // 2], latents=noise[i : i + 1], **options).frames[0]).abs().max())
    print(f"LTX-Video, clip {i % 2 + 1} of {PROMPTS[i // 2]!r}: off from itself made alone by {away:.4f}")
    assert away > 1e-3 if i in (1, 2) else away < 1e-4
PY
