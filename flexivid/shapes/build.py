"""The parts of the embedded model: real diffusers and transformers classes, small enough to train on two cores."""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from flexivid.files import replacing
from flexivid.shapes.world import all_scenes
from flexivid.training.config import TransformerConfig, VaeConfig

TEXT_DIM = 64


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of the shapes world; `<unk>` for any other."""
    words = sorted({word for scene in all_scenes() for word in scene.caption.split()})
    vocabulary = {token: i for i, token in enumerate(["<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def build_text_encoder(vocabulary_size: int, seed: int) -> UMT5EncoderModel:
    """A frozen random encoder. Its word vectors are orthogonal, so that no two words look alike."""
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=vocabulary_size, d_model=TEXT_DIM, d_kv=16, num_heads=4, d_ff=128, num_layers=1)
    encoder = UMT5EncoderModel(config).eval().requires_grad_(False)
    torch.nn.init.orthogonal_(encoder.shared.weight, gain=TEXT_DIM**0.5)
    return encoder


def build_vae(config: VaeConfig) -> AutoencoderKLWan:
    """A fresh autoencoder, whose latents are not yet normalised."""
    vae = AutoencoderKLWan(
        base_dim=config.base_dim,
        z_dim=config.z_dim,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * config.z_dim,
        latents_std=[1.0] * config.z_dim,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    # PyTorch's default shrinks the signal at every convolution until biases drown it: 300 steps then learn no colour.
    for module in vae.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
    for module in vae.modules():
        if type(module).__name__ == "WanResidualBlock":
            torch.nn.init.zeros_(module.conv2.weight)
        elif type(module).__name__ == "WanAttentionBlock":
            torch.nn.init.zeros_(module.proj.weight)
    return vae


def build_transformer(config: TransformerConfig, channels: int) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=config.heads,
        attention_head_dim=64,
        in_channels=channels,
        out_channels=channels,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=config.ffn_dim,
        num_layers=config.layers,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )


def build_pipeline(vae, transformer, tokenizer, text_encoder, flow_shift: float) -> WanPipeline:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=flow_shift, num_train_timesteps=1000
    )
    return WanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
    )


def tile_clips(clips: torch.Tensor, path: Path, every: int = 4) -> None:
    """Writes clips (B, 3, T, H, W) in [-1, 1] as one picture: a row a clip, a column every few frames."""
    frames = clips[:, :, ::every].permute(0, 3, 2, 4, 1)
    rows = frames.reshape(frames.shape[0] * frames.shape[1], -1, 3)
    with replacing(path) as partial:
        Image.fromarray(((rows.float() + 1) * 127.5).round().byte().numpy()).save(partial, format="png")
