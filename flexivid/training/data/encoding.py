"""Clips to latents and back, as the pipeline of a VAE normalises them."""

import torch


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
