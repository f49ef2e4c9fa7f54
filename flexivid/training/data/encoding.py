"""Clips to latents and back, as the pipeline of a VAE normalises them."""

import torch
from diffusers import AutoencoderKLMiniMaxH3
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def latent_statistics(vae: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, standard deviation) by which pipelines normalise a VAE's latents, each (1, C or 1, 1, 1, 1)."""

    def found(name: str, otherwise: float) -> torch.Tensor:
        value = vae.config.get(name)
        value = dict(vae.named_buffers(recurse=False)).get(name) if value is None else value  # as LTX keeps them
        return torch.as_tensor(otherwise if value is None else value, dtype=torch.float32).view(1, -1, 1, 1, 1)

    return found("latents_mean", 0.0), found("latents_std", 1.0) / (vae.config.get("scaling_factor") or 1.0)


@torch.no_grad()
def encode(vae: torch.nn.Module, clips: torch.Tensor) -> torch.Tensor:
    """Clips (B, 3, T, H, W) in [-1, 1] -> latents as the pipeline's transformer sees them, (B, C, T', H', W')."""
    if isinstance(vae, AutoencoderKLMiniMaxH3):  # whose pipeline gives it pixels as ImageNet has them
        of_pixels = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        mean, std = (clips.new_tensor(values).view(1, -1, 1, 1, 1) for values in of_pixels)
        clips = ((clips + 1) / 2 - mean) / std
    return normalised(vae, vae.encode(clips).latent_dist.mode())


def normalised(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """Latents as a VAE has them -> as the pipeline's transformer sees them, (B, C, T', H', W')."""
    mean, std = (statistic.to(latents) for statistic in latent_statistics(vae))
    return (latents - mean) / std


@torch.no_grad()
def decode(vae: torch.nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `encode`."""
    mean, std = (statistic.to(latents) for statistic in latent_statistics(vae))
    return vae.decode(latents * std + mean).sample.clamp(-1, 1)
