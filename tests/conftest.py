"""Tiny random models out of the real diffusers classes."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.utils import logging

import vbench_sweep
from flexivid.training.embedded import TEXT_DIM, build_pipeline, build_text_encoder, build_tokenizer

logging.set_verbosity_error()


def tiny_transformer(seed: int = 0, **overrides) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    settings = dict(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=TEXT_DIM,
        freq_dim=16,
        ffn_dim=64,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
    )
    return WanTransformer3DModel(**{**settings, **overrides}).eval()


def tiny_vae() -> AutoencoderKLWan:
    torch.manual_seed(1)
    return AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    ).eval()


def tiny_pipeline() -> WanPipeline:
    tokenizer = build_tokenizer()
    pipe = build_pipeline(tiny_vae(), tiny_transformer(), tokenizer, build_text_encoder(len(tokenizer), 0), 3.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def transformer():
    return tiny_transformer()


@pytest.fixture
def pipe():
    return tiny_pipeline()


def forward_inputs(batch: int = 2, frames: int = 5, height: int = 8, width: int = 12, length: int = 7, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, frames, height, width, generator=generator),
        "timestep": torch.full((batch,), 800.0),
        "encoder_hidden_states": torch.randn(batch, length, TEXT_DIM, generator=generator),
    }


def sample(pipe, steps: int = 6, seed: int = 0, **overrides):
    settings = dict(
        prompt="a plain red circle growing on a black background",
        height=32,
        width=32,
        num_frames=9,
        num_inference_steps=steps,
        guidance_scale=3.0,
        max_sequence_length=16,
        output_type="latent",
        generator=torch.Generator().manual_seed(seed),
    )
    return pipe(**{**settings, **overrides}).frames


SWEEP_STEPS = 6
SWEEP = [
    *("--max-prompts", "2", "--videos-per-prompt", "2", "--batch", "3", "--steps", str(SWEEP_STEPS)),
    *("--budgets", "1.0", "0.5", "--methods", "adapter", "steps", "magcache", "--report-prompts", "1"),
]


def sweep(folder: Path, *more: str) -> dict:
    """A small sweep of the embedded model; its results.json."""
    assert vbench_sweep.main([*SWEEP, "--output", str(folder), *more]) == 0
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="session")
def finished_sweep(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("sweep")
    return folder, sweep(folder)
