"""The sound of a clip as latents, for models that make sound beside the video: LTX-2 and MiniMax-H3.

MiniMax-H3's encoder takes waves. LTX-2's pipelines make sound and take none, so that the spectrogram before the encoder
is none of diffusers': it is that of the model's authors (`AudioProcessor` in github.com/Lightricks/LTX-2).
"""

import torch
from diffusers import AutoencoderKLMiniMaxH3Audio, DiffusionPipeline
from transformers.audio_utils import mel_filter_bank

WINDOW = 1024  # samples of a window of the spectrogram
FLOOR = 1e-5  # of its magnitudes, below which all is silence


def log_mel(samples: torch.Tensor, rate: int, hop: int, bins: int) -> torch.Tensor:
    """(channels, samples) at `rate` a second -> (channels, frames, bins): logarithms of magnitudes, a frame each `hop`.

    Of WINDOW samples around it, reflected at both ends; triangles on Slaney's mel scale, each of area 1.
    """
    window = torch.hann_window(WINDOW)
    spectrum = torch.stft(samples.float(), WINDOW, hop, window=window, pad_mode="reflect", return_complex=True).abs()
    filters = mel_filter_bank(WINDOW // 2 + 1, bins, 0.0, rate / 2, rate, norm="slaney", mel_scale="slaney")
    return (spectrum.mT @ torch.from_numpy(filters).float()).clamp(min=FLOOR).log()


def packed_sound(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Latents of sound as pipelines give them, (B, C, L, M) -> as the transformer takes them, (B, L, C*M).

    Those of MiniMax-H3, (2, C, L), have a row a channel of one clip: (1, 2*L, C).
    """
    vae = pipe.audio_vae
    if isinstance(vae, AutoencoderKLMiniMaxH3Audio):
        return latents.mT.reshape(1, -1, latents.shape[1])
    return pipe._normalize_audio_latents(pipe._pack_audio_latents(latents), vae.latents_mean, vae.latents_std)


@torch.no_grad()
def encode_sound(pipe: DiffusionPipeline, samples: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sound (2, samples) at the rate of the pipeline's VAE -> its first `tokens` latents, (tokens, C)."""
    vae = pipe.audio_vae
    if isinstance(vae, AutoencoderKLMiniMaxH3Audio):
        return _encode_waves(pipe, samples, tokens)
    stride = pipe.audio_vae_temporal_compression_ratio
    # As in the video, the first frame is encoded alone.
    frames = stride * (tokens - 1) + 1
    whole = torch.nn.functional.pad(samples, (0, WINDOW))  # the last of its windows ends behind the clip
    mel = log_mel(whole, pipe.audio_sampling_rate, pipe.audio_hop_length, vae.config.mel_bins)[None, :, :frames]
    return packed_sound(pipe, vae.encode(mel.to(vae.device, vae.dtype)).latent_dist.mode())[0]


def _encode_waves(pipe: DiffusionPipeline, samples: torch.Tensor, tokens: int) -> torch.Tensor:
    """As MiniMax-H3's pipeline encodes the sound of a reference: each channel by itself, the mean of its posterior."""
    vae = pipe.audio_vae
    wanted = tokens // len(samples) * vae.hop_length
    samples = torch.nn.functional.pad(samples, (0, max(wanted - samples.shape[1], 0)))[:, :wanted]
    latents = vae.encode(samples[:, None].to(vae.device)).latent_dist.mode()
    mean, std = (latents.new_tensor(vae.config[name]).view(1, -1, 1) for name in ("latents_mean", "latents_std"))
    return packed_sound(pipe, (latents - mean) / std)[0]
