"""The conformance suite: what has to hold for every row of the table of families."""

import dataclasses

import pytest
import torch
from families import TINY, attach, coarse_patch_sizes, inputs, tiny

from flexivid.adapter import AdapterConfig, load_adapter, read_config, save_adapter, transformer_shape
from flexivid.families import FAMILIES, family_of, patch_size_of
from flexivid.flexible import Choice, FlexTransformer
from flexivid.flops import FlopCounter, flop_counter_mode
from flexivid.folding import folding_for
from flexivid.lora import add_lora, remove_lora
from flexivid.modes import WeakMode
from flexivid.parametrisation import noise_level, output_for_x0
from flexivid.resize import resize_matrix
from flexivid.schedules import multiple_of, parse_patch_size

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")  # Mochi asks for one in float32
every_family = pytest.mark.parametrize("name", TINY)
SPACE, TIME, BOTH = range(3)


def run(transformer, call: dict) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**call, return_dict=False)[0]


def size_for(transformer) -> tuple[int, int, int]:
    """An odd number of token rows and columns, and of frames."""
    p_t, p_h, p_w = patch_size_of(transformer.config)
    return 5 * p_t, 5 * p_h, 3 * p_w


def randomise(flex: FlexTransformer, scale: float = 0.05) -> None:
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in flex.weak_modes.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
        for name, parameter in flex.transformer.named_parameters():
            if "lora_B.flexivid" in name:
                parameter.copy_(scale * torch.randn_like(parameter))


def test_every_row_is_tested():
    assert {type(tiny(name)).__name__ for name in TINY} == {family.transformer_class for family in FAMILIES}


@every_family
@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_stock_forward_is_untouched_and_weak_ones_keep_shapes(name, parametrisation):
    transformer = tiny(name)
    call = inputs(transformer, size=size_for(transformer))
    stock, keys = run(transformer, call), list(transformer.state_dict())
    flex = attach(transformer, coarse_patch_sizes(transformer), parametrisation)
    add_lora(flex, rank=4)
    randomise(flex)
    assert torch.equal(run(transformer, call), stock)
    for patch_size in flex.weak_modes:
        flex.policy = flex.fixed_policy(patch_size)
        weak = run(transformer, call)
        assert weak.shape == stock.shape and weak.isfinite().all() and not torch.equal(weak, stock)
        flex.policy = flex.fixed_policy(flex.powerful)
        assert torch.equal(run(transformer, call), stock)
    flex.remove()
    remove_lora(flex)
    assert torch.equal(run(transformer, call), stock)
    assert list(transformer.state_dict()) == keys


def upsampled(latents: torch.Tensor, base_patch, coarse_patch) -> torch.Tensor:
    """R on every base patch: (B, C, T, H, W) -> (B, C, T m_t, H m_h, W m_w)."""
    (p_t, p_h, p_w), matrix = base_patch, resize_matrix(base_patch, coarse_patch).float()
    patches = latents.unfold(2, p_t, p_t).unfold(3, p_h, p_h).unfold(4, p_w, p_w).flatten(5)
    large = (patches @ matrix.T).unflatten(-1, coarse_patch)
    return large.permute(0, 1, 2, 5, 3, 6, 4, 7).flatten(6).flatten(4, 5).flatten(2, 3)


def with_positions(transformer, flex, folding, small: dict, large: dict) -> dict:
    """Makes the stock transformer run at the positions of the coarse grid: its call, and the module's forward."""
    family = flex.family
    module = transformer.get_submodule(family.positions)
    stock = type(module).forward
    if family.rope_argument in small:
        small = small | {family.rope_argument: coarse_tables(flex, folding, large[family.rope_argument])}
    if family.name != "cogvideox":
        module.forward = lambda *args, **kwargs: family.centred(
            module, lambda *a, **k: stock(module, *a, **k), folding, *args, **kwargs
        )
    elif module.use_positional_embeddings:

        def forward(text, latents):
            return family.centred(module, lambda *a: stock(module, *a), folding, text, latents)

        module.forward = forward
    return small


def coarse_tables(flex, folding, tables):
    from flexivid.families import centred_tables

    return centred_tables(tables, folding, token_axis=0)


def check_scaling(name: str, kind: int) -> None:
    """A coarse pass over R x equals R of the base pass over x, when the base run is given the coarse positions."""
    transformer = tiny(name)
    base_patch = patch_size_of(transformer.config)
    patch_size = coarse_patch_sizes(transformer)[kind]
    coarse_patch = parse_patch_size(patch_size)
    multiple = multiple_of(coarse_patch, base_patch)
    small_size = tuple(n * p for n, p in zip((2, 3, 2), base_patch, strict=True))
    large_size = tuple(n * m for n, m in zip(small_size, multiple, strict=True))
    small, large = inputs(transformer, 1, small_size), inputs(transformer, 1, large_size)
    family = family_of(transformer)
    latents = family.latents(small)
    changed = {"hidden_states", family.rope_argument, *(argument for _, argument in family.sizes)}
    large = {key: value if key in changed else small[key] for key, value in large.items()}
    large |= family.arguments_for(upsampled(latents, base_patch, coarse_patch))

    flex = attach(transformer, [patch_size], "direct")
    # Every base frame became m_t frames, none of which stands alone.
    object.__setattr__(flex, "family", dataclasses.replace(family, causal=False))
    flex.policy = flex.fixed_policy(patch_size)
    coarse = family.latents(large | {"hidden_states": run(transformer, large)})
    folding = folding_for(large_size, multiple, base_patch, False)
    flex.remove()
    small = with_positions(transformer, flex, folding, small, large)
    base = family.latents(small | {"hidden_states": run(transformer, small)})
    torch.testing.assert_close(coarse, upsampled(base, base_patch, coarse_patch), atol=1e-4, rtol=0)


@every_family
@pytest.mark.parametrize("kind", [SPACE, TIME, BOTH])
def test_direct_coarse_pass_over_upsampled_latents_is_the_base_pass_at_coarse_positions(name, kind):
    check_scaling(name, kind)


@every_family
def test_a_perfect_network_at_the_coarse_noise_level_gives_the_coarse_x0(name):
    """Whatever clock and prediction a family has: U(D x0) comes out, of latents that are noised as it noises."""
    transformer = tiny(name)
    patch_size = coarse_patch_sizes(transformer)[SPACE]
    flex = attach(transformer, [patch_size])
    family, mode = flex.family, flex.weak_modes[patch_size]
    # Blocks with padding would have a noise level of their own, which the network is not told.
    size = tuple(n * p for n, p in zip((5, 4, 6), flex.base_patch, strict=True))
    call = inputs(transformer, size=size)

    def level_at(timestep):
        alpha, s = noise_level(family.prediction, timestep, family.time_scale, flex.alphas_cumprod)
        return alpha.view(-1, 1, 1, 1, 1), s.view(-1, 1, 1, 1, 1)

    folding = folding_for(size, mode.multiple, flex.base_patch, family.causal)
    alpha, s = level_at(call["timestep"])
    stock = family.latents(call)
    x_0 = torch.randn(stock[:, : mode.out_channels].shape)
    x_t = alpha * x_0 + s * torch.randn_like(x_0)
    call |= family.arguments_for(torch.cat([x_t, stock[:, mode.out_channels :]], 1))

    def perfect(**changed):
        alpha_coarse, s_coarse = level_at(changed["timestep"])
        # Averaging over 4 latents halves the noise, on every clock.
        assert torch.allclose(s_coarse / alpha_coarse, s / alpha / 2, rtol=1e-2)
        noisy = family.latents(changed).unflatten(1, (4, -1)).mean(1)[:, : mode.out_channels]
        coarse = output_for_x0(family.prediction, noisy, folding.block_mean(x_0), alpha_coarse, s_coarse)
        residual = coarse.new_zeros(len(coarse), 4 * mode.out_channels, *coarse.shape[2:])
        return (family.packed(torch.cat([coarse, residual], 1)),)

    prediction = flex._weak_forward(perfect, call, Choice(patch_size))
    expected = output_for_x0(family.prediction, x_t, folding.upsample(folding.block_mean(x_0)), alpha, s)
    torch.testing.assert_close(prediction, expected, atol=2e-2, rtol=1e-2)


@every_family
def test_gradients_arrive_in_what_is_trained_and_nowhere_else(name):
    transformer = tiny(name).requires_grad_(False)
    patch_size = coarse_patch_sizes(transformer)[BOTH]
    flex = attach(transformer, [patch_size])
    add_lora(flex, rank=4)
    flex.weak_modes.requires_grad_(True)
    lora = [parameter for key, parameter in transformer.named_parameters() if "lora_" in key]
    for parameter in lora:
        parameter.requires_grad_(True)
    randomise(flex)
    flex.policy = flex.fixed_policy(patch_size)
    call = inputs(transformer, size=size_for(transformer))
    transformer(**call, return_dict=False)[0].square().mean().backward()
    trained = [*flex.weak_modes.parameters(), *lora]
    assert len(lora) >= 12
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
    add_lora(flex, rank=4)
    randomise(flex)
    call = inputs(transformer, size=size_for(transformer))
    for parameters in (flex.weak_modes.parameters(), (p for k, p in transformer.named_parameters() if "lora_" in k)):
        for parameter in parameters:
            parameter.data = parameter.data.half().float()  # as adapters are stored
    before = {}
    for patch_size in modes:
        flex.policy = flex.fixed_policy(patch_size)
        before[patch_size] = run(transformer, call)
    config = AdapterConfig(
        patch_sizes=modes,
        parametrisation="snr",
        lora_rank=4,
        components=["transformer"],
        base_model="tiny",
        transformer_class=type(transformer).__name__,
        transformer_shape=transformer_shape(flex),
    )
    save_adapter(tmp_path, config, {"transformer": flex})
    fresh = tiny(name)
    flex = attach(fresh, modes)
    load_adapter(tmp_path, read_config(tmp_path), {"transformer": flex})
    for patch_size in modes:
        flex.policy = flex.fixed_policy(patch_size)
        assert torch.equal(run(fresh, call), before[patch_size])


@every_family
@pytest.mark.parametrize("parametrisation", ["snr", "direct"])
def test_counted_flops_are_those_of_a_real_forward(name, parametrisation):
    transformer = tiny(name)
    flex = attach(transformer, coarse_patch_sizes(transformer), parametrisation)
    add_lora(flex, rank=4)
    call = inputs(transformer, batch=1, size=size_for(transformer))
    counter = FlopCounter(flex)
    for patch_size in flex.patch_sizes:
        flex.policy = flex.fixed_policy(patch_size)
        with flop_counter_mode() as real:
            run(transformer, call)
        assert counter.count(patch_size, call) == real.get_total_flops(), patch_size
    costs = [counter.count(patch_size, call) for patch_size in flex.patch_sizes]
    assert costs[-1] == max(costs)


class TestPlantedFaults:
    """What the suite is for: each of these must fail it."""

    @pytest.mark.parametrize("name", ["wan", "hunyuan-video", "mochi", "cogvideox-1.5"])
    def test_a_head_in_the_wrong_channel_order(self, name, monkeypatch):
        stock = WeakMode.__init__

        def turned(self, patch_size, embedder, head, base_patch, channels_last, parametrisation):
            stock(self, patch_size, embedder, head, base_patch, not channels_last, parametrisation)

        monkeypatch.setattr(WeakMode, "__init__", turned)
        with pytest.raises(AssertionError):
            check_scaling(name, SPACE)
