"""The sound of a clip as latents, for models that make sound beside the video: LTX-2.

Its pipelines make sound and take none, so that the spectrogram before the encoder is none of diffusers': it is that of
the model's authors (`AudioProcessor` in github.com/Lightricks/LTX-2).
"""

import torch
from diffusers import DiffusionPipeline
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
    """Latents of sound as the VAE has them, (B, C, L, M) -> as the transformer takes them, (B, L, C*M)."""
    vae = pipe.audio_vae
    return pipe._normalize_audio_latents(pipe._pack_audio_latents(latents), vae.latents_mean, vae.latents_std)


@torch.no_grad()
def encode_sound(pipe: DiffusionPipeline, samples: torch.Tensor, tokens: int) -> torch.Tensor:
    """Sound (2, samples) at the rate of the pipeline's VAE -> its first `tokens` latents, (tokens, C)."""
    vae, stride = pipe.audio_vae, pipe.audio_vae_temporal_compression_ratio
    # As in the video, the first frame is encoded alone.
    frames = stride * (tokens - 1) + 1
    whole = torch.nn.functional.pad(samples, (0, WINDOW))  # the last of its windows ends behind the clip
    mel = log_mel(whole, pipe.audio_sampling_rate, pipe.audio_hop_length, vae.config.mel_bins)[None, :, :frames]
    return packed_sound(pipe, vae.encode(mel.to(vae.device, vae.dtype)).latent_dist.mode())[0]
