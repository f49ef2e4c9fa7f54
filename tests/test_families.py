"""The conformance suite: what has to hold for every row of the table of families."""

import dataclasses
import math
import re

import pytest
import torch
from families import (
    CHANNELS,
    TINY,
    add_lora_if_possible,
    attach,
    coarse_patch_sizes,
    every,
    family_named,
    grid_for,
    inputs,
    randomise_adapter,
    tiny,
    upsampled,
)
from test_family_pipelines import check_clock

from flexivid.diffusion import Level
from flexivid.model.adapter import AdapterConfig, load_adapter, read_config, save_adapter
from flexivid.model.call import Call
from flexivid.model.families import FAMILIES, family_of
from flexivid.model.family import Family, patch_size_of
from flexivid.model.flexible import FlexTransformer
from flexivid.model.lora import add_lora, remove_lora
from flexivid.model.rows.kandinsky import KANDINSKY5
from flexivid.model.weak_mode import WeakMode
from flexivid.patches import folding as folding_module
from flexivid.patches import positions
from flexivid.patches.folding import folding_for
from flexivid.patches.sizes import multiple_of, parse_patch_size
from flexivid.sampling.clock import Clock
from flexivid.sampling.flops import FlopCounter, flop_counter_mode

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for one in float32
every_family = pytest.mark.parametrize("name", TINY)
SPACE, TIME, COARSEST = 0, 1, -1
BESIDE = re.compile("indices_|latents_")  # arguments that name the frames of a section, and those beside it


def run(transformer, call: dict) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**call)[0]


def odd_size(transformer) -> tuple[int, int, int]:
    """An odd number of token rows and columns, and of frames."""
    return grid_for(transformer, 5, 3)


def test_every_row_is_tested():
    assert {type(tiny(name)).__name__ for name in TINY} == {family.transformer_class for family in FAMILIES}


@every_family
@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_stock_forward_is_untouched_and_weak_ones_keep_shapes(name, parametrisation):
    transformer = tiny(name)
    call = inputs(transformer, odd_size(transformer))
    stock, keys = run(transformer, call), list(transformer.state_dict())
    flex = attach(transformer, coarse_patch_sizes(transformer), parametrisation)
    add_lora_if_possible(flex)
    randomise_adapter(flex)
    assert torch.equal(run(transformer, call), stock)
    for patch_size in flex.weak_modes:
        flex.fix(patch_size)
        weak = run(transformer, call)
        assert weak.shape == stock.shape and weak.isfinite().all() and not torch.equal(weak, stock)
        flex.fix(flex.powerful)
        assert torch.equal(run(transformer, call), stock)
    flex.remove()
    remove_lora(flex)
    assert torch.equal(run(transformer, call), stock)
    assert list(transformer.state_dict()) == keys


def at_coarse_positions(transformer, flex: FlexTransformer, folding, small: dict, large: dict) -> dict:
    """Makes the stock transformer run at the positions of the coarse grid; returns the arguments to call it with."""
    family = flex.family

    def place(module):
        stock = module.forward

        def forward(*args, **kwargs):
            module.forward = stock  # what `centred` calls
            try:
                return family.centred(module, stock, folding, *args, **kwargs)
            finally:
                module.forward = forward

        module.forward = forward

    for path in (family.positions, *family.more_positions):
        place(transformer.get_submodule(path))
    if "video_coords" in large:
        small = small | {"video_coords": large["video_coords"]}
    if family.sequence is not None:
        of_coarse = family.sequence.stock(family.completed(large), folding)
        small = small | {"position_ids": of_coarse["position_ids"]}
    if family.section_frames:  # frames beside a section stay on the grid of the large one
        small = small | {name: value for name, value in family.completed(large).items() if BESIDE.match(name)}
    if family.rope_argument in small:
        small = small | {family.rope_argument: family.centred_argument(large[family.rope_argument], folding)}
    return small


def behind_the_same(small: dict, large: dict) -> dict:
    """What names the tokens of a sequence: the clip of the large call, behind text and sound of the small one."""
    here, there = (int(call["video_indices"][0]) for call in (small, large))
    by_token = ("token_tags", "position_ids", "timestep_indices")
    return {
        **{name: torch.cat([small[name][:here], large[name][there:]]) for name in by_token},
        **{name: small[name] for name in ("text_indices", "audio_indices")},
        "video_indices": large["video_indices"] - there + here,
    }


def in_one(family: Family):
    """What completes its calls, if all frames were one clip, where a VAE makes several of them."""

    def completed(call: dict) -> dict:
        completed = family.completed(call)
        return completed if family.sequence is None else completed | {"num_frames": sum(completed["num_frames"])}

    return completed


def check_scaling(name: str, kind: int) -> None:
    """A coarse pass over R x equals R of the base pass over x, when the base run is given the coarse positions."""
    transformer = tiny(name)
    base_patch = patch_size_of(transformer.config)
    patch_size = coarse_patch_sizes(transformer)[kind]
    coarse_patch = parse_patch_size(patch_size)
    multiple = multiple_of(coarse_patch, base_patch)
    small_size = grid_for(transformer, 3, 2)
    large_size = tuple(n * m for n, m in zip(small_size, multiple, strict=True))
    small, large = inputs(transformer, small_size, 1), inputs(transformer, large_size, 1)
    family = family_of(transformer)
    latents = family.latents(small)
    changed = {"hidden_states", "video_coords", family.rope_argument, *(argument for _, argument in family.sizes)}
    changed |= {
        *family.conditions,
        *family.for_all_clips,
        "visual_rope_pos",
        "condition_mask",
        *filter(BESIDE.match, large),
    }
    if family.frame_timesteps is not None:
        changed |= {"timestep", family.destination}
    large = {key: value if key in changed else small[key] for key, value in large.items()}
    if family.sequence is not None:
        large |= behind_the_same(small, large)
    large |= family.arguments_for(upsampled(latents, base_patch, coarse_patch))

    flex = attach(transformer, [patch_size], "direct")
    # Every base frame became m_t frames, none of which stands alone.
    object.__setattr__(flex, "family", dataclasses.replace(family, causal=False, completed=in_one(family)))
    flex.fix(patch_size)
    coarse = family.latents(large | {"hidden_states": run(transformer, large)})
    folding = folding_for(large_size, multiple, base_patch, False)
    flex.remove()
    small = at_coarse_positions(transformer, flex, folding, small, large)
    if "visual_rope_pos" in large:
        small["visual_rope_pos"] = large["visual_rope_pos"]
    for condition in family.conditions:
        of_it = folding_for(tuple(large[condition].shape[2:]), multiple, base_patch, False)
        small[condition] = of_it.block_mean(large[condition])
    with family.around(transformer, folding, small):
        base = family.latents(small | {"hidden_states": run(transformer, small)})
    # Kandinsky5 rounds what attends to bfloat16, whatever it runs in.
    tolerance = 2e-2 if name == "kandinsky5" else 1e-4
    torch.testing.assert_close(coarse, upsampled(base, base_patch, coarse_patch), atol=tolerance, rtol=0)


@every_family
@pytest.mark.parametrize("kind", [SPACE, TIME, COARSEST])
def test_direct_coarse_pass_over_upsampled_latents_is_the_base_pass_at_coarse_positions(name, kind):
    check_scaling(name, kind)


def positions_of(transformer, call: dict) -> list[torch.Tensor]:
    """The tables that a forward works with: rotary ones as phasors, and what is added to tokens."""
    family, found = family_of(transformer), []
    # CogVideoX embeds text and latents in one.
    length = call["encoder_hidden_states"].shape[1] if family.name in ("cogvideox", "consisid") else 0
    before = int(call["video_indices"][0]) if family.sequence is not None else 0  # text and sound

    def of_module(module, args, output):
        if family.name == "anyflow":
            output = output["query"][0]
        if family.name == "helios":
            output = tuple(output.flatten(2).transpose(1, 2).chunk(2, 2))
        if family.name.startswith("kandinsky"):  # rotation matrices
            output = output[0] if family.name == "kandinsky5" else output
            output = output[..., 0, :, :, 0].flatten(0, 2).unbind(-1)
        if before:
            output = tuple(table[before:] for table in output)
        found.append(torch.complex(*output) if isinstance(output, tuple) else output[:, length:])

    def of_block(block, args, kwargs):
        rope = kwargs["image_rotary_emb"]
        if family.name == "allegro":  # a table for each axis, and which row of it a token has
            phasors = [torch.complex(*table)[rows[0]] for table, rows in zip(*rope, strict=True)]
            found.append(torch.cat(phasors, 1))
        elif rope is not None:
            found.append(torch.complex(*rope))

    # Allegro's are all in its argument.
    paths = () if family.name == "allegro" else (family.positions, *family.more_positions)
    handles = [transformer.get_submodule(path).register_forward_hook(of_module) for path in paths]
    if family.rope_argument:
        block = transformer.transformer_blocks[0]
        handles.append(block.register_forward_pre_hook(of_block, with_kwargs=True))
    run(transformer, call)
    for handle in handles:
        handle.remove()
    return found[:1] if family.section_frames else found  # then those of frames before the section


def check_positions(name: str) -> None:
    """A coarse token stands at the mean of the positions of the four base tokens that it covers."""
    transformer = tiny(name)
    patch_size = coarse_patch_sizes(transformer)[SPACE]
    flex = attach(transformer, [patch_size], "direct")
    size = grid_for(transformer, 4, 6)
    call = inputs(transformer, size, 1)
    call["hidden_states"] = torch.zeros_like(call["hidden_states"])  # of tokens only what is added to them is left
    base = positions_of(transformer, call)
    flex.fix(patch_size)
    coarse = positions_of(transformer, call)
    assert len(base) == len(coarse) >= 1
    # Positions of frames that are tokens of their own, or one table for each of them (Latte).
    t, h, w = (n // p for n, p in zip(size, flex.base_patch, strict=True))
    for fine, of_coarse in zip(base, coarse, strict=True):
        axis, t = next((i, n // (h * w)) for i, n in enumerate(fine.shape) if n in (t * h * w, h * w))
        fine = fine.movedim(axis, 0).unflatten(0, (t, h // 2, 2, w // 2, 2)).transpose(2, 3)
        of_coarse = of_coarse.movedim(axis, 0).unflatten(0, (t, h // 2, w // 2))
        corners = fine.flatten(3, 4)
        # Angles add up where phasors are multiplied.
        expected = corners.prod(3) if fine.is_complex() else corners.mean(3)
        torch.testing.assert_close(of_coarse**4 if fine.is_complex() else of_coarse, expected, atol=1e-2, rtol=0)


@every_family
def test_coarse_tokens_stand_at_the_centre_of_what_they_cover(name):
    check_positions(name)


MULTIPLES_IN_TIME = (2, 3, 4)


def frames_covered(clips: tuple[int, ...], multiple: int, patch: int, causal: bool) -> list[tuple[int, int]]:
    """First and last latent frame of each coarse token, which has `patch` blocks of `multiple` frames: of a causal
    model the first frame of a clip is a block of its own. Padding is no frame."""
    covered, before = [], 0
    for frames in clips:
        first = range(1 - multiple if causal else 0, frames, multiple * patch)
        ends = [(max(start, 0), min(start + multiple * patch, frames) - 1) for start in first]
        covered += [(start + before, end + before) for start, end in ends]
        before += frames
    return covered


def check_positions_in_time(name: str, frames: int) -> None:
    """A coarse token stands at the centre of the frames that it covers, in frames of the base grid, and no padding."""
    transformer = tiny(name)
    p_t, p_h, p_w = patch_size_of(transformer.config)
    flex = attach(transformer, [f"{multiple * p_t}x{p_h}x{p_w}" for multiple in MULTIPLES_IN_TIME], "direct")
    size = (frames * p_t, 2 * p_h, 3 * p_w)
    call = inputs(transformer, size, 1)
    call["hidden_states"] = torch.zeros_like(call["hidden_states"])
    base = positions_of(transformer, call)
    for multiple, patch_size in zip(MULTIPLES_IN_TIME, flex.weak_modes, strict=True):
        flex.fix(patch_size)
        clips = size[:1] if flex.family.sequence is None else flex.family.completed(call)["num_frames"]
        covered = frames_covered(clips, multiple, p_t, flex.family.causal)
        # Twice the centres, in latent frames after that of the first base token.
        places = [first + last - (p_t - 1) for first, last in covered]
        for fine, of_coarse in zip(base, positions_of(transformer, call), strict=True):
            axis = next(i for i, n in enumerate(fine.shape) if n == frames * 6)
            fine, of_coarse = (table.movedim(axis, 0).unflatten(0, (-1, 6)) for table in (fine, of_coarse))
            assert len(of_coarse) == len(covered)
            for place, found in zip(places, of_coarse, strict=True):
                left = min(place // (2 * p_t), frames - 2)  # past the last base token lies the end of its patch
                after = place - left * 2 * p_t
                if fine.is_complex():  # angles add up where phasors are multiplied
                    found = found ** (2 * p_t)
                    expected = fine[left] ** (2 * p_t - after) * fine[left + 1] ** after
                else:
                    expected = fine[left] + (fine[left + 1] - fine[left]) * after / (2 * p_t)
                torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)


@every(name for name in TINY if family_named(name).temporal)
@pytest.mark.parametrize("frames", [4, 5, 6, 7])
def test_coarse_tokens_stand_at_the_centre_of_the_frames_they_cover(name, frames):
    """At each multiple one length is whole blocks, and others end in a padded one."""
    check_positions_in_time(name, frames)


@pytest.mark.parametrize("name", ["wan", "ltx", "ltx-2"])
@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_a_timestep_per_token(name, parametrisation):
    """Wan2.2 TI2V and LTX image-to-video: clean tokens have timestep 0, and stay what they are."""
    transformer = tiny(name)
    patch_size = coarse_patch_sizes(transformer)[COARSEST]
    flex = attach(transformer, [patch_size], parametrisation)
    flex.fix(patch_size)
    size = odd_size(transformer)
    call, frames = inputs(transformer, size), size[0]
    if flex.family.streams:  # sound has one timestep
        call["audio_timestep"] = call["timestep"]
    of_all = run(transformer, call)
    tokens = math.prod(n // p for n, p in zip(size, flex.base_patch, strict=True))
    call["timestep"] = torch.full((2, tokens), 800.0)
    torch.testing.assert_close(run(transformer, call), of_all, atol=1e-5, rtol=1e-4)
    call["timestep"].view(2, frames, -1)[:, 0] = 0
    told = []
    transformer.get_submodule("condition_embedder" if name == "wan" else "time_embed").register_forward_pre_hook(
        lambda module, args: told.append(args[0])
    )
    output = flex.family.latents(call | {"hidden_states": run(transformer, call)})
    assert output.isfinite().all()
    levels = told[0].view(2, -(-(frames - 1) // 2) + 1, -1)
    assert (levels[:, 0] == 0).all() and (levels[:, 1:] > 0).all()
    if parametrisation == "snr":
        assert not output[:, :, 0].any() and output[:, :, 1:].any()


@every_family
def test_a_perfect_network_at_the_coarse_noise_level_gives_the_coarse_x0(name):
    """Whatever clock and prediction a family has: U(D x0) comes out, of latents that are noised as it noises."""
    transformer = tiny(name)
    patch_size = coarse_patch_sizes(transformer)[SPACE]
    flex = attach(transformer, [patch_size])
    family, mode = flex.family, flex.weak_modes[patch_size]
    # Blocks with padding would have a noise level of their own, which the network is not told.
    size = grid_for(transformer, 4, 6)
    call = inputs(transformer, size)

    def level_at(timestep):
        level = flex.diffusion.level(timestep.flatten(1)[:, 0] if timestep.ndim > 1 else timestep)
        return Level(level.alpha.view(-1, 1, 1, 1, 1), level.s.view(-1, 1, 1, 1, 1))

    folding = folding_for(size, mode.multiple, flex.base_patch, family.causal)
    level = level_at(call["timestep"])
    alpha, s = level.alpha, level.s
    stock = family.latents(call)
    channels = min(mode.out_channels, stock.shape[1])
    x_0 = torch.randn(stock[:, :channels].shape)
    x_t = alpha * x_0 + s * torch.randn_like(x_0)
    call |= family.arguments_for(torch.cat([x_t, stock[:, channels:]], 1))

    def perfect(**changed):
        level_coarse = level_at(changed["timestep"])
        # Averaging over 4 latents halves the noise, on every clock.
        assert torch.allclose(level_coarse.s / level_coarse.alpha, s / alpha / 2, rtol=1e-2)
        folded = family.latents(changed)
        if family.as_many_channels:  # behind them are empty ones
            folded = folded[:, : 4 * stock.shape[1]]
        noisy = folded.unflatten(1, (4, -1)).mean(1)[:, :channels]
        coarse = flex.diffusion.output(noisy, folding.block_mean(x_0), level_coarse)
        rest = 5 * mode.out_channels - channels  # what image models predict beside, and the residual
        return (family.packed(torch.cat([coarse, coarse.new_zeros(len(coarse), rest, *coarse.shape[2:])], 1)),)

    asked = Call(family, flex.base_patch, call, perfect)
    prediction = flex.predict(asked, patch_size, flex.diffusion, asked.level(flex.diffusion))[:, :channels]
    expected = flex.diffusion.output(x_t, folding.upsample(folding.block_mean(x_0)), level)
    torch.testing.assert_close(prediction, expected, atol=2e-2, rtol=1e-2)


@every_family
def test_gradients_arrive_in_what_is_trained_and_nowhere_else(name):
    transformer = tiny(name).requires_grad_(False)
    patch_size = coarse_patch_sizes(transformer)[COARSEST]
    flex = attach(transformer, [patch_size])
    add_lora_if_possible(flex)
    flex.weak_modes.requires_grad_(True)
    lora = [parameter for key, parameter in transformer.named_parameters() if "lora_" in key]
    for parameter in lora:
        parameter.requires_grad_(True)
    randomise_adapter(flex)
    flex.fix(patch_size)
    call = inputs(transformer, odd_size(transformer))
    transformer(**call, return_dict=False)[0].square().mean().backward()
    trained = [*flex.weak_modes.parameters(), *lora]
    assert len(lora) >= (8 if flex.family.lora_targets else 0)
    # The last block of some families throws its text stream away.
    missing = [parameter for parameter in trained if parameter.grad is None or not parameter.grad.any()]
    assert not missing, [tuple(parameter.shape) for parameter in missing]
    ours = {id(parameter) for parameter in trained}
    assert all(parameter.grad is None for parameter in transformer.parameters() if id(parameter) not in ours)


@every_family
def test_adapters_come_back_as_they_were_saved(name, tmp_path):
    transformer = tiny(name)
    modes = coarse_patch_sizes(transformer)[:2]
    flex = attach(transformer, modes)
    rank = add_lora_if_possible(flex)
    randomise_adapter(flex)
    call = inputs(transformer, odd_size(transformer))
    for parameters in (flex.weak_modes.parameters(), (p for k, p in transformer.named_parameters() if "lora_" in k)):
        for parameter in parameters:
            parameter.data = parameter.data.half().float()  # as adapters are stored
    before = {}
    for patch_size in modes:
        flex.fix(patch_size)
        before[patch_size] = run(transformer, call)
    config = AdapterConfig.of(
        flex,
        lora_rank=rank,
        components=["transformer"],
        base_model="tiny",
    )
    save_adapter(tmp_path, config, {"transformer": flex})
    fresh = tiny(name)
    flex = attach(fresh, modes)
    load_adapter(tmp_path, read_config(tmp_path), {"transformer": flex})
    for patch_size in modes:
        flex.fix(patch_size)
        assert torch.equal(run(fresh, call), before[patch_size])


@every(TINY)
@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_counted_flops_are_those_of_a_real_forward(name, parametrisation):
    transformer = tiny(name)
    flex = attach(transformer, coarse_patch_sizes(transformer), parametrisation)
    add_lora_if_possible(flex)
    call = inputs(transformer, odd_size(transformer), 1)
    counter = FlopCounter(flex)
    for patch_size in flex.patch_sizes:
        flex.fix(patch_size)
        with flop_counter_mode() as real:
            run(transformer, call)
        assert counter.costs(call)[patch_size] == real.get_total_flops(), patch_size
    costs = [counter.costs(call)[patch_size] for patch_size in flex.patch_sizes]
    assert costs[-1] == max(costs)


def test_a_timestep_per_frame_is_refused():
    """Diffusion forcing of SkyReels-V2."""
    transformer = tiny("skyreels-v2")
    flex = attach(transformer, ["1x4x4"])
    flex.fix("1x4x4")
    call = inputs(transformer, odd_size(transformer))
    call["timestep"] = torch.full((2, 5), 800.0)
    with pytest.raises(ValueError, match="5 timesteps for a clip of 5x5x3 tokens"):
        run(transformer, call)


def test_what_a_class_does_not_take_is_refused():
    with pytest.raises(ValueError, match="patches of latte may be larger in space only, such as 1x4x4"):
        attach(tiny("latte"), ["2x2x2"])
    with pytest.raises(ValueError, match="DiTTransformer2DModel of diffusers takes no LoRA"):
        add_lora(attach(tiny("dit"), ["1x4x4"]), rank=4)
    with pytest.raises(ValueError, match="token_replace is not supported"):
        attach(tiny("hunyuan-video", image_condition_type="token_replace"), ["1x4x4"])
    with pytest.raises(ValueError, match="Kandinsky5Transformer3DModel with attention_type nabla is not supported"):
        attach(tiny("kandinsky5", attention_type="nabla"), ["1x4x4"])
    for channels in (32, 33):  # of its models for control, and for images and inpainting
        with pytest.raises(ValueError, match=f"EasyAnimateTransformer3DModel with in_channels {channels} is not supp"):
            attach(tiny("easyanimate", in_channels=channels, out_channels=16), ["1x4x4"])
    latents = torch.ones(1, 5, 4, 4, 2 * CHANNELS + 1)  # whose mask says that frames are given
    with pytest.raises(ValueError, match="Kandinsky5 image-to-video is not supported: the first frame is clean"):
        KANDINSKY5.check({"hidden_states": latents})


class TestPlantedFaults:
    """What the suite is for: each of these must fail it."""

    @pytest.mark.parametrize(
        "name",
        ["wan", "helios", "hunyuan-video", "framepack", "kandinsky5", "kandinsky6", "mochi", "cogvideox-1.5", "cosmos"],
    )
    def test_a_head_in_the_wrong_channel_order(self, name, monkeypatch):
        stock = WeakMode.__init__

        def turned(self, patch_size, embedder, head, base_patch, channels_last, *more):
            stock(self, patch_size, embedder, head, base_patch, not channels_last, *more)

        monkeypatch.setattr(WeakMode, "__init__", turned)
        with pytest.raises(AssertionError):
            check_scaling(name, SPACE)

    @pytest.mark.parametrize(
        "name",
        [
            *("wan", "anyflow", "helios", "ltx", "ltx-2", "cogvideox-2b", "cogvideox-5b", "consisid", "cosmos"),
            *("hunyuan-video", "framepack", "allegro", "easyanimate", "kandinsky5", "kandinsky6"),
        ],
    )
    def test_positions_that_are_not_strided(self, name, monkeypatch):
        def first_ones(table, centres):
            t, h, w = map(len, centres)
            return table[:t, :h, :w]

        monkeypatch.setattr(positions, "middle", first_ones)
        with pytest.raises(AssertionError):
            check_positions(name)

    @pytest.mark.parametrize("name", ["wan", "ltx", "ltx-2", "cogvideox-2b", "cogvideox-1.5", "mochi"])
    def test_positions_half_a_frame_early(self, name, monkeypatch, request):
        stock = folding_module.token_centres
        monkeypatch.setattr(
            folding_module, "token_centres", lambda sources, patch: (stock(sources, patch) - 0.5).clamp(min=0)
        )
        folding_for.cache_clear()
        request.addfinalizer(folding_for.cache_clear)
        with pytest.raises(AssertionError):
            check_positions_in_time(name, 5)

    @pytest.mark.parametrize("name", ["wan", "cogvideox-2b", "cosmos", "mochi"])
    def test_a_clock_off_by_one(self, name, monkeypatch):
        stock = Clock._step

        def late(self, *args):
            step, steps = stock(self, *args)
            return min(step + 1, steps - 1), steps

        monkeypatch.setattr(Clock, "_step", late)
        with pytest.raises((AssertionError, ValueError)):
            check_clock(name)
