"""Objective `pretrain`: flow matching at the base patch size; makes the embedded base model."""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKLWan, WanPipeline

from flexivid.diffusion import shift_sigma
from flexivid.model.families import family_of
from flexivid.shapes.build import (
    build_pipeline,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    tile_clips,
)
from flexivid.shapes.data import ShapesCaptions, ShapesData
from flexivid.shapes.embedded import SAMPLING
from flexivid.shapes.oracle import adherence_shares
from flexivid.shapes.prompts import load_prompts
from flexivid.training.batches import micro_batch_rows, on_values, own_rows, step_generator
from flexivid.training.config import Config, DataConfig
from flexivid.training.objective import configure_speed
from flexivid.training.read_ahead import ReadAhead, on_device


@torch.no_grad()
def sample_and_judge(
    pipeline: WanPipeline, path: Path | None, steps: int, count: int, **more: float
) -> dict[str, float]:
    """Samples the first `count` seen prompts, tiles them into a picture, returns the oracle's adherence per factor.

    path: of the picture, None for no picture. more: other arguments of the pipeline's call than SAMPLING has.
    """
    scenes = load_prompts()["seen"][:count]
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        [scene.caption for scene in scenes],
        **{**SAMPLING, "num_inference_steps": steps, **more},
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
    ).frames
    clips = video.transpose(1, 2) * 2 - 1
    if path is not None:
        tile_clips(clips[:12], path)
    return adherence_shares(clips, scenes)


class ShapesWorld:
    """What a distillation needs of the world: its clips, and pictures that can be judged."""

    def data(self, config: DataConfig, pipeline: WanPipeline) -> ShapesData:
        return ShapesData(config, pipeline.vae, pipeline.tokenizer, pipeline.text_encoder)

    def captions(self, config: DataConfig, pipeline: WanPipeline) -> ShapesCaptions:
        size = family_of(pipeline.transformer).latent_size(pipeline, config.frames, config.size, config.size)
        return ShapesCaptions(config, size, pipeline.tokenizer, pipeline.text_encoder)

    def judge(self, pipeline: WanPipeline, path: Path | None, steps: int, **more: float) -> dict[str, float]:
        return sample_and_judge(pipeline, path, steps, count=32, **more)


class PretrainObjective:
    """Starts from a VAE folder with a fresh transformer, or goes on from a whole pipeline folder."""

    facts = {}

    def __init__(self, config: Config, accelerator: Accelerator):
        self.config, self.accelerator = config, accelerator
        if not (config.base and config.base.is_dir()):
            raise ValueError(f"base must be the folder of what pretrain starts from, not {config.base}")
        if (config.base / "model_index.json").exists():
            self.pipeline = WanPipeline.from_pretrained(config.base, dtype=torch.float32, use_safetensors=True)
        else:
            tokenizer = build_tokenizer()
            torch.manual_seed(config.seed)
            vae = AutoencoderKLWan.from_pretrained(config.base, use_safetensors=True)
            self.pipeline = build_pipeline(
                vae,
                build_transformer(config.transformer, vae.config.z_dim),
                tokenizer,
                build_text_encoder(len(tokenizer), config.seed),
                config.flow_shift,
            )
        self.model = self.pipeline.transformer
        with accelerator.main_process_first():
            self.data = ShapesWorld().data(config.data, self.pipeline)
        configure_speed(self.model, config)
        self.batches = ReadAhead(self.read, config.steps)

    def read(self, step: int) -> tuple[torch.Tensor, ...]:
        """(x_0, text, noise, sigma) of this process's rows."""
        config, generator = self.config, step_generator(self.config.seed, step)
        images = step < config.transformer.image_steps
        count = config.transformer.image_batch if images else config.batch_size
        rows = own_rows(self.accelerator, config, count)
        x_0, conditions = self.data.batch(count, generator, rows, images)
        noise = torch.randn(count, *x_0.shape[1:], generator=generator)
        sigma = shift_sigma(torch.sigmoid(torch.randn(count, generator=generator)), config.flow_shift)
        values = x_0, conditions["encoder_hidden_states"], noise[rows], sigma[rows]
        return on_values(values, lambda tensor: on_device(tensor, self.accelerator.device))

    def loss(self, model, step, micro_batch):
        values = self.batches.of(step)
        rows = micro_batch_rows(self.config, len(values[0]), micro_batch)
        x_0, text, noise, sigma = (tensor[rows] for tensor in values)
        level = sigma.view(-1, 1, 1, 1, 1)
        # Flow matching (Lipman et al. 2023): x_t on the straight line from data to noise, the velocity is its slope.
        x_t = (1 - level) * x_0 + level * noise
        velocity = model(x_t, sigma * 1000, text, return_dict=False)[0]
        return F.mse_loss(velocity.float(), noise - x_0)

    def flops(self, step: int) -> int:
        return 0  # not counted

    def sample(self, path):
        print("\nadherence", sample_and_judge(self.pipeline, path, steps=20, count=32), "->", path)

    def save(self, folder):
        self.pipeline.to(dtype=torch.float16).save_pretrained(folder)
