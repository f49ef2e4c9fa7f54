"""Helios and Framepack: clips of any length, section after section, each beside frames that stay as they are."""

import pytest
import torch
from diffusers import HeliosPyramidPipeline
from families import attach, coarse_patch_sizes, grid_for, inputs, tiny, tiny_pipeline, with_text
from test_family_pipelines import sample

import flexivid
from flexivid.inputs import check_sizes
from flexivid.model.families import family_of
from flexivid.sampling.flops import flop_counter_mode
from flexivid.stock_pipelines import usual_arguments
from flexivid.training.config import Config
from flexivid.training.forecast import check_model

SECTIONS = ("helios", "framepack")
FIRST_BLOCK = {"helios": "blocks.0", "framepack": "transformer_blocks.0"}


@torch.no_grad()
def first_block(transformer, name: str, call: dict) -> list[torch.Tensor]:
    """What the first block is given: tokens (B, tokens, D), and their positions with tokens on axis -2."""
    seen = []

    def keep(block, args):
        tables = [table for table in args if isinstance(table, tuple)] or [args[3]]
        seen.extend([args[0], *(tables[0] if isinstance(tables[0], tuple) else tables)])

    handle = transformer.get_submodule(FIRST_BLOCK[name]).register_forward_pre_hook(keep)
    transformer(**call)
    handle.remove()
    return seen


@pytest.mark.parametrize("name", SECTIONS)
@pytest.mark.parametrize("size", [(4, 6), (5, 3)])
def test_frames_beside_a_section_stay_as_they_are(name, size):
    transformer = tiny(name)
    call = inputs(transformer, grid_for(transformer, *size))
    stock = first_block(transformer, name, call)
    flex = attach(transformer, coarse_patch_sizes(transformer))
    beside = stock[0].shape[1] - 5 * size[0] * size[1]
    assert beside > 2 * size[0] * size[1]  # two frames at the model's own patch size, and more at larger ones
    for patch_size in flex.weak_modes:
        flex.fix(patch_size)
        for own, weak in zip(stock, first_block(transformer, name, call), strict=True):
            assert torch.equal(weak[..., :beside, :], own[..., :beside, :])
            assert weak.shape[-2] < own.shape[-2]
    assert "_pad_rotary_emb" not in vars(transformer)


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_runs_the_plan(name):
    pipe, call = tiny_pipeline(name)
    call |= {"num_frames": 34, "height": 32, "width": 48, "num_inference_steps": 3}
    if name == "framepack":  # which cuts the text of one clip to its valid tokens, where all are counted
        call["prompt_attention_mask"] = torch.ones_like(call["prompt_attention_mask"])
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    ran = []
    flexivid.enable(pipe, schedule="1x2x2:1,1x4x4:1,1x2x2:1")
    pipe.transformer.register_forward_hook(lambda module, args, output: ran.append(len(flexivid.summary(pipe).steps)))
    planned = flexivid.plan(pipe, 34, 32, 48, 3, text_length=7)
    with flop_counter_mode() as used:
        weak = sample(pipe, call)
    summary = flexivid.summary(pipe)
    branches = len(summary.steps[0])
    assert weak.isfinite().all() and weak.shape == stock.shape and not torch.equal(weak, stock)
    assert summary.schedule == planned and ran == 2 * [step for step in (1, 2, 3) for _ in range(branches)]
    saved = full.get_total_flops() - used.get_total_flops()
    assert saved == pytest.approx(2 * (summary.flops_full - summary.flops_used), rel=1e-3)


def test_a_bare_chunk_has_nothing_beside_it():
    transformer = tiny("helios")
    call = inputs(transformer, grid_for(transformer, 4, 6))
    alone = {name: value for name, value in call.items() if not name.startswith(("latents_", "indices_"))}
    with torch.no_grad():
        stock = transformer(**alone)[0]
        flex = attach(transformer, ["1x4x4"])
        assert torch.equal(transformer(**alone)[0], stock)
        flex.fix("1x4x4")
        weak = transformer(**alone)[0]
    assert weak.shape == stock.shape and weak.isfinite().all() and not torch.equal(weak, stock)


def test_sizes_are_those_of_sections():
    pipe, _ = tiny_pipeline("helios")
    usual = usual_arguments(pipe)
    assert (usual["frames"], usual["height"], usual["width"], usual["fps"]) == (132, 384, 640, 24)
    check_sizes(pipe, 132, 384, 640)  # four sections of 33 frames
    assert family_of(pipe.transformer).latent_size(pipe, 132, 384, 640) == (9, 96, 160)  # of a VAE of 4 pixels


def test_a_pyramid_of_sizes_is_refused():
    pipe, _ = tiny_pipeline("helios")
    pyramid = HeliosPyramidPipeline(**pipe.components)
    with pytest.raises(ValueError, match="HeliosPyramidPipeline is not supported: it has stages at lower sizes"):
        flexivid.enable(pyramid, budget=0.5)
    assert flexivid.enable(pipe, budget=0.5) is None  # its own transformer goes on being free


def test_training_is_refused(tmp_path):
    with_text(tiny_pipeline("helios")[0]).save_pretrained(tmp_path / "base")
    config = Config(
        objective="distill",
        base=tmp_path / "base",
        output=tmp_path / "out",
        steps=1,
        clips={"folder": tmp_path, "buckets": ["33x32x48"]},
        distill={"modes": ["1x4x4"], "rank": 4},
    )
    with pytest.raises(ValueError, match="HeliosTransformer3DModel makes sections beside frames that are there"):
        check_model(config)
