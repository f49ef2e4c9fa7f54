"""MiniMax-H3: text, sound, given frames and the clip are one sequence of tokens, of which the clip alone is folded."""

import math
from types import SimpleNamespace

import pytest
import torch
from diffusers.hooks import apply_group_offloading
from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep
from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import (
    MiniMaxH3AutoDenoiseStep,
    MiniMaxH3Blocks,
    MiniMaxH3CoreDenoiseStep,
    MiniMaxH3FL2VACoreDenoiseStep,
    MiniMaxH3Ref2VACoreDenoiseStep,
)
from diffusers.modular_pipelines.minimax_h3.modular_pipeline import align_num_frames, video_latent_num_frames
from diffusers.modular_pipelines.modular_pipeline import PipelineState
from families import STEPS, attach, equal, inputs, minimax_h3_pipeline, minimax_h3_text, tiny
from peft import LoraConfig

import flexivid
from flexivid.model.call import Call
from flexivid.model.hooks import hook_of
from flexivid.model.rows import minimax_h3
from flexivid.model.rows.minimax_h3 import MINIMAX_H3
from flexivid.patches.folding import Folding
from flexivid.running import call_of, enabled_runner
from flexivid.sampling.flops import flop_counter_mode
from flexivid.sampling.schedule import REUSED

FRAMES, SIZE = 22, (7, 16, 24)  # of the clip, and of its latents: five frames and two, each behind a first one
LEVELS = {"video": 0.2, "sound": 0.6, "given": 0.999, "given sound": 1.0}


def given_parts(kind: str) -> dict:
    """What is given beside the prompt: the first and last frame, or an image, a sound and a clip with its sound."""
    generator = torch.Generator().manual_seed(3)

    def video(*size: int) -> torch.Tensor:
        return torch.randn(1, 24, *size, generator=generator)

    def sound(rows: int) -> torch.Tensor:
        return torch.randn(rows, 32, generator=generator)

    if kind == "frames":
        frames = [video(1, *SIZE[1:]) for _ in range(2)]
        return {"condition_latents": frames, "keyframe_anchors": ("first", "last")}
    if kind == "references":
        references = [("image", False), ("audio", True), ("video", True)]
        return {
            "normalized_references": [SimpleNamespace(kind=kind, has_audio=has) for kind, has in references],
            "condition_latents": [video(1, 8, 12), video(2, 6, 4)],
            "audio_condition_latents": [sound(6), sound(4)],
        }
    return {}


BLOCKS = {
    "text": MiniMaxH3CoreDenoiseStep,
    "frames": MiniMaxH3FL2VACoreDenoiseStep,
    "references": MiniMaxH3Ref2VACoreDenoiseStep,
}
every_kind = pytest.mark.parametrize("kind", BLOCKS)


def tiny_modular(kind: str):
    """(pipeline, arguments of a call): of text alone, of frames, or of references, for which it has a transformer."""
    name = "transformer_ref" if kind == "references" else "transformer"
    pipe = minimax_h3_pipeline(BLOCKS[kind](), **{name: tiny("minimax-h3")})
    sizes = {"num_frames": FRAMES, "height": 256, "width": 384, "num_inference_steps": STEPS + 1}
    return pipe, minimax_h3_text() | sizes | given_parts(kind)


@torch.no_grad()
def sample(pipe, call: dict) -> list[torch.Tensor]:
    """Latents of video and sound."""
    outputs = pipe(**call, generator=torch.Generator().manual_seed(0), output=["latents", "audio_latents"])
    return list(outputs.values())


def transformer_in(pipe):
    return getattr(pipe, "transformer", None) or pipe.transformer_ref


@every_kind
def test_a_pipeline_at_a_budget(kind):
    pipe, call = tiny_modular(kind)
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    assert stock[0].shape == (1, 24, *SIZE)
    flexivid.enable(pipe, budget=1.0)
    assert all(equal(sample(pipe, call), stock))
    for budget, modes in ((0.6, None), (0.3, ["2x4x4"])):
        flexivid.enable(pipe, budget=budget, modes=modes, order="interleaved")
        weak = sample(pipe, call)
        assert not any(equal(weak, stock)) and all(part.isfinite().all() for part in weak)
        with flop_counter_mode() as counter:
            assert all(equal(sample(pipe, call), weak))
        summary = flexivid.summary(pipe)
        assert len(summary.steps) == STEPS and 0.5 * budget < summary.ratio <= budget
        assert summary.flops_full == full.get_total_flops()
        assert summary.flops_used == counter.get_total_flops()
    flexivid.disable(pipe)
    assert all(equal(sample(pipe, call), stock))


def test_one_pipeline_with_both_transformers():
    """What it is given says which of them runs."""
    both = {name: tiny("minimax-h3") for name in ("transformer", "transformer_ref")}
    pipe = minimax_h3_pipeline(MiniMaxH3AutoDenoiseStep(), **both)
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    for kind, trigger in (("references", "references"), ("frames", "image"), ("text", None)):
        alone, call = tiny_modular(kind)
        flexivid.enable(alone, budget=0.6, order="interleaved")
        state = PipelineState()
        if trigger is not None:  # an input of blocks before these
            state.set(trigger, "given")
        assert all(equal(sample(pipe, call | {"state": state}), sample(alone, call)))
        assert flexivid.summary(pipe).steps == flexivid.summary(alone).steps
    flexivid.disable(pipe)
    assert all("flexivid" not in part._diffusers_hook.hooks for part in both.values())


def test_the_precisions_of_its_checkpoint():
    """Embedders and heads are in float32, the blocks in bfloat16."""
    transformer = tiny("minimax-h3").to(torch.bfloat16)
    for name in transformer._keep_in_fp32_modules:
        transformer.get_submodule(name).float()
    flex = attach(transformer, ["1x4x4"])
    call = one_forward("frames")
    with torch.no_grad():
        stock = transformer(**call)
        flex.fix("1x4x4")
        for fine, weak in zip(stock, transformer(**call), strict=True):
            assert weak.dtype == fine.dtype == torch.float32 and weak.isfinite().all() and not torch.equal(weak, fine)


def test_a_plan_counts_the_forwards_of_the_steps_that_are_asked_for():
    pipe, call = tiny_modular("text")
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    planned = flexivid.plan(pipe, FRAMES, 256, 384, STEPS + 1, text_length=7)
    sample(pipe, call)
    assert len(planned.steps) == STEPS and flexivid.summary(pipe).schedule == planned
    # Of what patches are drawn by, too.
    complete = call_of(pipe, enabled_runner(pipe), FRAMES, 256, 384, text_length=7)
    assert MINIMAX_H3.folding(complete, (2, 2, 2), (1, 2, 2)).coarse_grid == (5, 4, 6)


def test_its_pipeline_has_no_guider():
    """Guidance is in the weights: every step is one forward."""
    parts = {component.name for component in MiniMaxH3Blocks().expected_components}
    assert {"transformer", "transformer_ref", "scheduler"} <= parts and not any("guid" in name for name in parts)


@pytest.mark.parametrize("frames", [1, 5, 6, 22, 23, 124, 346])
def test_latent_frames_are_those_of_the_pipeline(frames):
    pipe, _ = tiny_modular("text")
    expected = video_latent_num_frames(align_num_frames(frames, 17, 5), 17, 5)
    assert MINIMAX_H3.latent_size(pipe, frames, 64, 96) == (expected, 4, 6)


def test_what_is_counted_is_laid_out_as_in_the_pipeline():
    transformer = tiny("minimax-h3")
    example = MINIMAX_H3.example(transformer.config, SIZE, 7)
    places, tags, video, sound, text, *_ = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
        torch.ones(7, dtype=torch.long), *SIZE, 37, (1, 2, 2), 2, 2, 0
    )
    for name, expected in (("token_tags", tags), ("video_indices", video), ("audio_indices", sound)):
        assert torch.equal(example[name], expected)
    assert torch.equal(example["text_indices"], text)
    assert torch.equal(example["position_ids"][:, 0][sound], places[:, 0][sound])
    assert example["hidden_states"].shape[1] == len(video) and example["audio_hidden_states"].shape[1] == len(sound)


def one_forward(kind: str) -> dict:
    """The arguments of a forward midway, as the pipeline gives them, at noise levels that are all different."""
    pipe, call = tiny_modular(kind)
    seen = []
    transformer_in(pipe).register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    sample(pipe, call | {"num_inference_steps": 4})
    middle = dict(seen[1])
    levels = middle["timestep"].clone()
    of_all = {"video": middle["video_indices"][-1:], "sound": middle["audio_indices"][-1:]}
    if kind != "text":
        of_all["given"] = middle["video_indices"][:1]
    if kind == "references":
        of_all["given sound"] = middle["audio_indices"][:1]
    for name, index in of_all.items():
        levels[middle["timestep_indices"][index]] = LEVELS[name]
    return middle | {"timestep": levels}


def folded(kind: str, patch_size: str):
    """(arguments of a forward, those of the stock one in its weak pass, folding, what comes out)."""
    transformer, call = tiny("minimax-h3"), one_forward(kind)
    flex = attach(transformer, [patch_size])
    stock = hook_of(transformer).fn_ref
    forward, shown = stock.original_forward, []

    def note(**kwargs):
        shown.append(kwargs)
        return forward(**kwargs)

    stock.original_forward = note
    flex.fix(patch_size)
    foldings = []
    enter = flex.enter

    def note_folding(*args):
        enter(*args)
        foldings.append(flex.folding)

    flex.enter = note_folding
    with torch.no_grad():
        output = transformer(**call)
    return call, shown[0], foldings[0], output


def rows(call: dict, name: str) -> torch.Tensor:
    return call[f"{name}_indices"]


def level_of_tokens(call: dict) -> torch.Tensor:
    return call["timestep"][call["timestep_indices"]]


@every_kind
@pytest.mark.parametrize("patch_size", ["1x4x4", "2x2x2", "4x4x4"])
def test_the_sequence_around_coarse_tokens(kind, patch_size):
    call, weak, folding, output = folded(kind, patch_size)
    coarse, count = math.prod(folding.coarse_grid), math.prod(folding.grid)
    assert coarse < count == 7 * 8 * 12
    given = len(rows(call, "video")) - count
    length = len(call["position_ids"]) - count + coarse
    every = torch.cat([rows(weak, name) for name in ("text", "video", "audio")])
    assert torch.equal(every.sort().values, torch.arange(length))  # each token is one of them
    assert len(weak["token_tags"]) == len(weak["timestep_indices"]) == len(weak["position_ids"]) == length
    for name in ("text", "audio"):
        mine, theirs = rows(weak, name), rows(call, name)
        for what in ("token_tags", "position_ids"):
            assert torch.equal(weak[what][mine], call[what][theirs])
    mine, theirs = rows(weak, "video"), rows(call, "video")
    assert (weak["token_tags"][mine] == minimax_h3.VIDEO).all()
    for what in ("audio_hidden_states", "encoder_hidden_states"):
        assert torch.equal(weak[what], call[what])
    # What is given stays as it is, and where it is.
    assert torch.equal(weak["position_ids"][mine[:given]], call["position_ids"][theirs[:given]])
    assert torch.equal(weak["hidden_states"][:, :given, :96], call["hidden_states"][:, :given])
    # A coarse token stands at the mean of the places of what it covers.
    own = call["position_ids"][theirs[given:]].unflatten(0, folding.grid)
    for token, place in enumerate(weak["position_ids"][mine[given:]]):
        t, h, w = torch.unravel_index(torch.tensor(token), folding.coarse_grid)
        covered = [sources[index].unique() for sources, index in zip(blocks(folding), (t, h, w), strict=True)]
        corners = own[covered[0]][:, covered[1]][:, :, covered[2]]
        torch.testing.assert_close(place, corners.flatten(0, 2).mean(0))
    # Video, and text with it, is told its coarse noise level; all else its own.
    level, told, was = LEVELS["video"], level_of_tokens(weak), level_of_tokens(call)
    assert torch.equal(told[mine[:given]], was[theirs[:given]])
    noise = (1 - level) * float(folding.kappa.median())
    torch.testing.assert_close(told[mine[given:]], torch.full((coarse,), level / (level + noise)))
    assert torch.equal(told[rows(weak, "text")], told[mine[-1:]].expand(len(rows(weak, "text"))))
    assert torch.equal(told[rows(weak, "audio")], was[rows(call, "audio")])
    # What comes out is as long as what went in, with nothing predicted for what is given.
    assert output[0].shape == call["hidden_states"].shape and not output[0][:, :given].any()
    assert output[1].shape == call["audio_hidden_states"].shape


def blocks(folding: Folding) -> list[torch.Tensor]:
    """Per axis, the base tokens that each coarse one covers."""
    return [
        sources.reshape(len(sources) // patch, -1) // patch
        for sources, patch in zip(folding.sources, folding.patch_size, strict=True)
    ]


def test_first_frames_stand_alone():
    """The VAE encodes 17 frames at a time, the first of them alone."""
    _, _, folding, _ = folded("text", "2x2x2")
    covered = [sorted(set(frames.tolist())) for frames in folding.sources[0]]
    assert covered == [[0], [1, 2], [3, 4], [5], [6]]


@every_kind
def test_what_the_clip_is_made_of(kind):
    """The means of neighbours, in the order of the coarse grid, each with its own four tokens."""
    call, weak, folding, _ = folded(kind, "1x4x4")
    given = call["hidden_states"].shape[1] - math.prod(folding.grid)
    # token (t, y, x) of 2 x 2 latents, channels before them
    stock = call["hidden_states"][0, given:].view(7, 4, 2, 6, 2, 24, 2, 2)
    latents = stock.permute(5, 0, 1, 2, 6, 3, 4, 7)  # channel, t, then rows and columns of four latents
    latents = latents.reshape(24, 7, 8, 2, 12, 2)  # blocks of two by two latents
    means = latents.mean((3, 5))
    level = LEVELS["video"]
    coarse = weak["hidden_states"][0, given:].view(7, 4, 6, 4, 24, 2, 2)  # of each latent of a block
    coarse = coarse.mean(3).permute(3, 0, 1, 4, 2, 5).reshape(24, 7, 8, 12)
    torch.testing.assert_close(coarse, means / (level + (1 - level) / 2))


@every_kind
@pytest.mark.parametrize("users_lora", [False, True])
def test_given_frames_are_embedded_by_the_stock_layer(kind, users_lora):
    transformer, call = tiny("minimax-h3"), one_forward(kind)
    flex = attach(transformer, ["1x4x4"])
    if users_lora:
        transformer.add_adapter(LoraConfig(r=2, target_modules=["proj_in"], init_lora_weights=False), "style")
    seen = []
    with torch.no_grad():
        for parameter in flex.weak_modes.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))

        def note(module, args):
            seen.append(args[0])

        transformer.transformer_blocks[0].register_forward_pre_hook(note)
        for patch_size in (flex.powerful, "1x4x4"):
            flex.fix(patch_size)
            transformer(**call)
    stock, weak = seen
    clip = 7 * 8 * 12
    assert weak.shape[1] == stock.shape[1] - clip + 7 * 4 * 6
    assert torch.equal(weak[:, : -7 * 4 * 6], stock[:, :-clip])  # text, given frames and sounds, and sound


def test_steps_that_are_reused_hold_sound_at_its_own_noise_level():
    pipe, call = tiny_modular("references")
    given, outputs = [], []

    def note(module, args, kwargs, output):
        copies = {name: value.clone() for name, value in kwargs.items() if torch.is_tensor(value)}
        given.append(copies)  # the pipeline writes into its own
        outputs.append(output)

    handle = pipe.transformer_ref.register_forward_hook(note, with_kwargs=True)
    flexivid.enable(pipe, schedule=f"1x2x2:2,1x4x4:2,reused:{STEPS - 5},1x2x2:1")
    sample(pipe, call)
    handle.remove()
    assert [REUSED in step for step in flexivid.summary(pipe).steps] == [False] * 4 + [True] * (STEPS - 5) + [False]

    def x0(step: int) -> tuple[torch.Tensor, torch.Tensor]:
        levels = level_of_tokens(given[step])
        video, sound = (levels[rows(given[step], name)][None, :, None] for name in ("video", "audio"))
        clip = given[step]["hidden_states"] + (1 - video) * outputs[step][0]
        return clip[:, -7 * 8 * 12 :], given[step]["audio_hidden_states"] + (1 - sound) * outputs[step][1]

    for step in range(4, STEPS - 1):
        for held, last in zip(x0(step), x0(3), strict=True):
            torch.testing.assert_close(held, last, atol=1e-4, rtol=1e-3)
    assert (x0(STEPS - 1)[1] - x0(3)[1]).abs().max() > 1e-3


@pytest.mark.parametrize("order", [None, "weak-first"])
def test_the_order_that_is_usual(order):
    pipe, call = tiny_modular("frames")
    flexivid.enable(pipe, budget=0.5, order=order)
    first = sample(pipe, call)
    assert all(equal(sample(pipe, call), first)) and all(part.isfinite().all() for part in first)
    assert flexivid.summary(pipe).ratio <= 0.5


def test_group_offload():
    pipe, call = tiny_modular("text")
    flexivid.enable(pipe, budget=0.6, order="interleaved")
    expected = sample(pipe, call)
    here = torch.device("cpu")
    settings = {"onload_device": here, "offload_device": here, "offload_type": "block_level", "num_blocks_per_group": 1}
    apply_group_offloading(pipe.transformer, **settings)
    assert all(equal(sample(pipe, call), expected))


def test_several_clips_in_a_forward():
    """They share the layout of their sequence."""
    transformer = tiny("minimax-h3")
    flex = attach(transformer, ["1x4x4"])
    flex.fix("1x4x4")
    call = inputs(transformer, SIZE)
    call["timestep"] = call["timestep"][:1]
    alone = {key: value[1:] for key, value in call.items() if key.endswith("hidden_states")}
    with torch.no_grad():
        for both, one in zip(transformer(**call)[:2], transformer(**call | alone)[:2], strict=True):
            torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-4)


def test_a_sequence_comes_back_from_its_latents():
    call = one_forward("references")
    complete = MINIMAX_H3.completed(call)
    assert complete["hidden_states"].shape == (1, 24, *SIZE) and complete["num_frames"] == (5, 2)
    assert MINIMAX_H3.completed(complete) is complete
    stock = MINIMAX_H3.sequence.stock(complete, None)
    assert stock.keys() == call.keys()
    assert all(torch.equal(stock[key], value) for key, value in call.items() if torch.is_tensor(value))
    asked = Call(MINIMAX_H3, (1, 2, 2), call, None)
    output = asked.output_of(asked.latents)
    given = complete["given_tokens"].shape[1]
    assert torch.equal(output[0][:, given:], call["hidden_states"][:, given:]) and not output[0][:, :given].any()


def test_what_minimax_h3_does_not_take_is_refused():
    with pytest.raises(ValueError, match=r"MiniMaxH3Transformer3DModel with patch_size \(1, 1, 1\) is not supported"):
        attach(tiny("minimax-h3", patch_size=(1, 1, 1)), ["1x2x2"])
    pipe, _ = tiny_modular("text")
    with pytest.raises(ValueError, match="kept needs a pipeline that calls its guidance branches apart; minimax-h3"):
        flexivid.enable(pipe, budget=0.6, guidance="kept")
    flexivid.enable(pipe, schedule=f"1x2x2:1,1x2x2+1x4x4@0.5:{STEPS - 1}")
    with pytest.raises(ValueError, match="minimax-h3 does not run .* text and sound stand beside the video"):
        flexivid.plan(pipe, FRAMES, 256, 384, STEPS + 1, text_length=7)
    transformer, call = tiny("minimax-h3"), one_forward("text")
    attach(transformer, ["1x4x4"]).fix("1x4x4")
    places = call["position_ids"].clone()
    places[-3] += 1
    with pytest.raises(ValueError, match="no frames of one size, row by row"):
        transformer(**call | {"position_ids": places})
