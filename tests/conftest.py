"""Tiny random models out of the real diffusers classes, small runs and small files."""

import os

# A worker has one core, on which the threads of numpy's linear algebra wait for each other: 320 eigenvalues took 1.03 s
# with two threads and .006 s with one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import json
import subprocess
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from diffusers.utils import logging
from filelock import FileLock

from flexivid.commands import sweep as vbench_sweep
from flexivid.shapes.build import TEXT_DIM, build_pipeline, build_text_encoder, build_tokenizer
from flexivid.video import write_mp4

logging.set_verbosity_error()


def pytest_configure():
    """A core of its own for each worker: small models gain nothing from a second, and waiting threads cost others."""
    # A child that hangs fails its test, and does not hold up the others.
    subprocess.run = partial(subprocess.run, timeout=300)
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def usual_priority():
    """Whatever leaves this process at real-time priority (libsvtav1 does, as root) would hang what starts later."""
    before = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    yield
    assert before is None or os.sched_getscheduler(0) == before


@pytest.fixture(autouse=True)
def usual_attention_backend():
    """`set_attention_backend` of diffusers changes that of every model, and so of every test that comes after."""
    before = _AttentionBackendRegistry.get_active_backend()[0]
    yield
    _AttentionBackendRegistry.set_active_backend(before)


def every_of(names, quick) -> pytest.MarkDecorator:
    """Runs a test of `name` for each of these: for all in `make test-all`, for those that are quick in `make test`."""
    params = [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
    return pytest.mark.parametrize("name", params)


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
    """One for all workers: the first makes it, the others read it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "sweep"
    results = folder / "results.json"
    with FileLock(folder.with_suffix(".lock")):
        return folder, json.loads(results.read_text()) if results.exists() else sweep(folder)


@pytest.fixture
def training_config(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "base")
    return dict(
        objective="distill",
        base=str(tmp_path / "base"),
        steps=12,
        batch_size=4,
        log_every=1,
        save_every=3,
        sample_every=1000,
        optim={"warmup": 2, "ema": 0.9},
        data={"clips": 24, "frames": 5, "size": 16, "cache": str(tmp_path / "latents"), "text_lengths": {16: 1.0}},
        distill={"modes": ["1x4x4", "2x4x4"], "rank": 4},
    )


def write_clip(path, frames=20, height=32, width=48, fps=10):
    """Every frame is one shade of grey: ten times its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shades = np.arange(frames, dtype=np.uint8) * 10
    write_mp4(np.broadcast_to(shades[:, None, None, None], (frames, height, width, 3)), path, fps, crf=0)
    return path


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three good clips, one of them portrait, and five kinds of broken ones."""
    root = tmp_path / "data"
    for name, size in (("a", (32, 48)), ("b", (32, 48)), ("tall", (48, 32))):
        write_clip(root / f"{name}.mp4", height=size[0], width=size[1])
    (root / "empty.mp4").write_bytes(b"")
    whole = write_clip(root / "truncated.mp4").read_bytes()
    (root / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    write_audio(root / "audio.mp4")
    (root / "text.mp4").write_text("this is no video")
    write_clip(root / "short.mp4", frames=1)
    for path in root.glob("*.mp4"):
        path.with_suffix(".txt").write_text("a red circle" if path.stem != "b" else "a striped blue square growing")
    return root
