"""The embedded model and its adapter, as they ship."""

import json

import pytest
import torch
from diffusers import WanPipeline

import flexivid
from flexivid.shapes.embedded import ADAPTER, ASSETS, MODEL, SAMPLING
from flexivid.shapes.oracle import adherence
from flexivid.shapes.prompts import load_prompts
from flexivid.shapes.world import FACTORS, all_scenes, fixed_layout, render
from flexivid.training.data.encoding import decode, encode


@pytest.fixture(scope="module")
def embedded():
    pipe = WanPipeline.from_pretrained(MODEL, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, scenes, steps=40, **overrides):
    settings = {**SAMPLING, "num_inference_steps": steps, "output_type": "pt", **overrides}
    return pipe([scene.caption for scene in scenes], generator=torch.Generator().manual_seed(0), **settings).frames


def test_the_assets_stay_under_30_megabytes():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) < 30e6


def test_every_word_of_the_world_is_in_the_vocabulary(embedded):
    ids = embedded.tokenizer([scene.caption for scene in all_scenes()]).input_ids
    assert all(embedded.tokenizer.unk_token_id not in row for row in ids)


def test_the_autoencoder_keeps_what_the_oracle_looks_at(embedded):
    scenes = load_prompts()["seen"][:24]
    clips = render(scenes, [fixed_layout(scene) for scene in scenes])
    hits = adherence(decode(embedded.vae, encode(embedded.vae, clips)), scenes)
    shares = {factor: hits[factor].float().mean().item() for factor in FACTORS}
    assert min(shares.values()) >= 0.9, shares


@pytest.mark.slow
def test_the_model_follows_prompts_at_full_compute_and_at_a_quarter(embedded):
    """Far above chance (1/7 colours, 1/3 backgrounds); the figures proper are in docs/results.md."""
    scenes = load_prompts()["seen"][:8]
    for budget in (1.0, 0.25):
        flexivid.enable(embedded, adapter=ADAPTER, budget=budget)
        hits = adherence(sample(embedded, scenes).transpose(1, 2) * 2 - 1, scenes)
        assert flexivid.summary(embedded).ratio <= budget
        assert hits["colour"].float().mean() >= 0.75 and hits["background"].float().mean() >= 0.75
    flexivid.disable(embedded)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0.75, 0.5])
@pytest.mark.parametrize("adapter", [None, ADAPTER])
def test_mixed_guidance_keeps_the_latents_standard_deviation(embedded, adapter, budget):
    """Guided by the difference of a powerful and a weak prediction, latents blow up."""
    stds = {}
    for guidance in ("same", "weak-uncond"):
        settings = {"budget": budget, "guidance": guidance, "order": "weak-first"}
        flexivid.enable(embedded, adapter=adapter, modes=["1x4x4"], **settings)
        seen = []

        def remember(pipe, step, timestep, kwargs, seen=seen):
            seen.append(kwargs["latents"].std())
            return kwargs

        sample(embedded, load_prompts()["seen"][:4], steps=20, output_type="latent", callback_on_step_end=remember)
        mixed = sum(len(set(step)) == 2 for step in flexivid.summary(embedded).steps)
        assert (mixed > 5) == (guidance == "weak-uncond")
        stds[guidance] = torch.stack(seen)
    flexivid.disable(embedded)
    assert torch.allclose(stds["same"], stds["weak-uncond"], rtol=0.1)


def test_the_adapter_says_what_it_was_trained_for():
    config = json.loads((ADAPTER / "flexivid_config.json").read_text())
    assert config["max_sequence_length"] == 32 and config["training"]["steps"] > 0
