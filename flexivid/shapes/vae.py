"""Objective `vae`: the autoencoder of the embedded model, trained on crops around the object.

With a `base`, its encoder and the statistics of its latents stay as they are and the decoder alone is trained on, so
that models and cached latents made with that encoder stay valid.
"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKLWan
from tqdm import tqdm

from flexivid.shapes.build import build_vae, tile_clips
from flexivid.shapes.oracle import adherence_shares
from flexivid.shapes.world import sample_clips
from flexivid.training.batches import micro_batch_rows, own_rows, step_generator
from flexivid.training.config import Config
from flexivid.training.data.encoding import decode, encode, latent_statistics
from flexivid.training.read_ahead import ReadAhead, on_device


class Autoencoder(torch.nn.Module):
    """Encode, sample, decode in one forward, so that data parallelism sees one module."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        posterior = self.vae.encode(clips).latent_dist
        return self.vae.decode(posterior.sample()).sample, posterior.kl()


class FrozenEncoderAutoencoder(Autoencoder):
    """The same with an encoder that learns nothing, and noise of `latent_noise` on its normalised latents."""

    def __init__(self, vae, latent_noise: float):
        super().__init__(vae)
        for part in (vae.encoder, vae.quant_conv):
            part.requires_grad_(False)
        self.latent_noise = latent_noise

    def forward(self, clips: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            latents = self.vae.encode(clips).latent_dist.mode()
            latents += self.latent_noise * latent_statistics(self.vae)[1].to(latents) * torch.randn_like(latents)
        return self.vae.decode(latents).sample, latents.new_zeros(())


def crop_around_object(clips: torch.Tensor, crop: int, frames: int, generator: torch.Generator) -> torch.Tensor:
    """A window (crop x crop pixels, `frames` frames) of each clip, jittered about where the object is."""
    windows = []
    draws = torch.rand(len(clips), 3, generator=generator).tolist()
    for clip, (u_time, u_x, u_y) in zip(clips, draws, strict=True):
        start = int(u_time * (clip.shape[1] - frames + 1))
        piece = clip[:, start : start + frames]
        distance = (piece[:, 0] - piece[:, 0, :1, :1]).abs().sum(0)  # from the background, in the top left corner
        weight = distance / distance.sum()
        corner = []
        for axis, u in ((1, u_y), (0, u_x)):
            centre = (weight.sum(axis) * torch.arange(len(distance))).sum().item()
            corner.append(int(min(max(centre - crop / 2 + (u - 0.5) * crop / 2, 0), len(distance) - crop)))
        windows.append(piece[:, :, corner[0] : corner[0] + crop, corner[1] : corner[1] + crop])
    return torch.stack(windows)


class VaeObjective:
    facts = {}

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        torch.manual_seed(config.seed)
        if config.base:
            vae = AutoencoderKLWan.from_pretrained(config.base, dtype=torch.float32, use_safetensors=True)
            self.model = FrozenEncoderAutoencoder(vae, config.vae.latent_noise)
        else:
            self.model = Autoencoder(build_vae(config.vae))
        self.batches = ReadAhead(self.read, config.steps)

    def read(self, step: int) -> torch.Tensor:
        """The clips of this process's rows, (B, 3, T, H, W)."""
        config, generator = self.config, step_generator(self.config.seed, step)
        images = step < config.vae.image_steps
        whole = torch.rand(1, generator=generator).item() < config.vae.full_share
        count = config.vae.image_batch if images else config.batch_size
        count = count // 4 if whole else count
        clips, _ = sample_clips(count, generator, frames=3 if images else config.data.frames, size=config.data.size)
        crop = config.data.size if whole else config.vae.crop
        clips = crop_around_object(clips, crop, 1 if images else config.vae.frames, generator)
        return on_device(clips[own_rows(self.accelerator, config, count)], self.accelerator.device)

    def loss(self, model, step, micro_batch):
        clips = self.batches.of(step)
        clips = clips[micro_batch_rows(self.config, len(clips), micro_batch)]
        torch.manual_seed(step)  # the posterior's sample
        reconstruction, kl = model(clips)
        # The squared error moves colours while they are far off; the absolute error sharpens edges later.
        reconstruction = reconstruction.float()
        error = F.l1_loss(reconstruction, clips) + F.mse_loss(reconstruction, clips)
        return error + self.config.vae.kl * kl.mean()

    def flops(self, step: int) -> int:
        return 0  # not counted

    def sample(self, path: Path):
        clips, scenes = sample_clips(24, torch.Generator().manual_seed(123), size=self.config.data.size)
        vae = self.model.vae.cpu()
        reconstruction = decode(vae, encode(vae, clips))
        vae.to(self.accelerator.device)
        error = (clips - reconstruction).div(2).square().mean().item()
        psnr = -10 * math.log10(error)
        print(f"\nreconstruction PSNR {psnr:.2f} dB, kept {adherence_shares(reconstruction, scenes)} -> {path}")
        tile_clips(torch.stack([clips[:4], reconstruction[:4]], 1).flatten(0, 1), path)

    def save(self, folder: Path):
        """The VAE folder; of a fresh VAE with the mean and standard deviation of the latents of its training clips."""
        # Rounded to what is shipped, so that cached latents belong to that.
        vae = self.model.vae.cpu().half().float()
        if not self.config.base:
            self._register_latent_statistics(vae)
        vae.half().save_pretrained(folder)

    def _register_latent_statistics(self, vae: AutoencoderKLWan) -> None:
        latents = []
        for seed in tqdm(range(12), desc="latent statistics"):
            clips, _ = sample_clips(16, torch.Generator().manual_seed(1_000_000 + seed), size=self.config.data.size)
            latents.append(encode(vae, clips))
        values = torch.cat(latents).transpose(0, 1).flatten(1)
        vae.register_to_config(latents_mean=values.mean(1).tolist(), latents_std=values.std(1).tolist())
