"""Mixed patch sizes: fine tokens in some blocks of a clip and coarse ones elsewhere, in one forward."""

import math

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from families import (
    STEPS,
    TINY,
    attach,
    coarse_patch_sizes,
    every,
    family_named,
    grid_for,
    inputs,
    randomise_adapter,
    tiny,
    tiny_pipeline,
)
from test_calls import sample

import flexivid
from flexivid.model.call import Call
from flexivid.model.families import family_of
from flexivid.model.family import patch_size_of
from flexivid.model.hooks import attached
from flexivid.model.lora import add_lora
from flexivid.model.mixed import MixedForward, predict_mixed, stock_by_residual, stock_with_residual
from flexivid.patches.choose import detail, largest
from flexivid.patches.folding import Folding, folding_for
from flexivid.patches.mixed import Selection
from flexivid.patches.sizes import MixedSize, format_mode, format_patch_size, parse_mixed_size
from flexivid.sampling import mixing
from flexivid.sampling.flops import flop_counter_mode
from flexivid.sampling.schedule import WITH_RESIDUAL, Schedule, explicit_schedule

COSTS = {"1x2x2": 100, "1x4x4": 20}
MIXED = "1x2x2+1x4x4@0.5"
CHOOSING = 0.005  # what it costs to choose blocks is not in the plan; of these tiny models that shows
LOOSE = [name for name in TINY if not isinstance(family_named(name).loose, str)]
every_family = every(LOOSE)
every_kind = pytest.mark.parametrize("kind", [0, -1])  # larger in space; in time too


class TestNotation:
    def test_it_is_read_and_written(self):
        assert parse_mixed_size("1x2x2 + 1x4x4@.350") == MixedSize("1x2x2", "1x4x4", 0.35)
        assert format_mode("01x2x2+1x4x4@.350") == "1x2x2+1x4x4@0.35"
        schedule = explicit_schedule("1x2x2:1,1x2x2+1x4x4@.5:2,reused:1,1x2x2+1x4x4@0.5/kept:1", 5, 2, list(COSTS))
        assert schedule.steps[1] == (MIXED, MIXED) and schedule.steps[4] == (MIXED, "kept")
        assert Schedule.from_json(schedule.to_json()) == schedule
        assert explicit_schedule(schedule.to_text(), 5, 2, list(COSTS)) == schedule
        assert str(schedule) == f"1 x 1x2x2, 2 x {MIXED}, 1 x reused, 1 x {MIXED}/kept"

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("1x2x2+1x4x4@1", "between 0 and 1"),
            ("1x2x2+1x4x4@0", "between 0 and 1"),
            ("1x2x2+1x4x4@half", "between 0 and 1"),
            ("1x2x2+1x4x4", "not fine.coarse@share"),
            ("1x4x4+1x2x2@.5", "not an integer multiple"),
            ("1x2x2+1x2x2@.5", "with itself"),
            ("1x2x2+1x4x4-guided@.5", "not a patch size"),
        ],
    )
    def test_what_is_none_is_refused(self, text, said):
        with pytest.raises(ValueError, match=said):
            explicit_schedule(f"1x2x2:1,{text}:1", 2, 2, list(COSTS))

    def test_what_steps_cannot_be_is_refused(self):
        for steps in ("{}:2", "{}:1,1x2x2:1"):
            with pytest.raises(ValueError, match="first step has no x0 yet"):
                explicit_schedule(steps.format(MIXED), 2, 2, list(COSTS))
        with pytest.raises(ValueError, match="both guidance branches"):
            explicit_schedule(f"1x2x2:1,{MIXED}/1x4x4:1", 2, 2, list(COSTS))
        with pytest.raises(ValueError, match="2x4x4 in the schedule is not a patch size of this model"):
            explicit_schedule("1x2x2:1,1x2x2+2x4x4@.5:1", 2, 2, list(COSTS))

    def test_forwards_before_and_after_a_powerful_step(self):
        schedule = explicit_schedule(f"1x4x4:1,{MIXED}:1,1x2x2:1,{MIXED}:1,1x4x4:1", 5, 2, list(COSTS))
        weak, mixed, powerful = ["1x4x4"] * 2, [MIXED] * 2, ["1x2x2"] * 2
        assert schedule.forwards("1x2x2") == [
            *(*weak, *mixed, *powerful),
            *weak,  # what the powerful step is compared with
            *(name + WITH_RESIDUAL for name in mixed),
            *weak,
        ]
        assert [schedule.leaves_residual(index, "1x2x2", 0) for index in range(5)] == [0, 0, 1, 0, 0]
        with pytest.raises(ValueError, match="no cost is given"):
            schedule.cost(COSTS)


class TestChoice:
    folding = folding_for((5, 6, 10), (2, 2, 2), (1, 2, 2), True)

    def test_detail_is_what_the_coarse_grid_does_not_hold(self):
        x_0 = self.folding.upsample(torch.ones(2, 3, *self.folding.kappa.shape[2:]))
        assert detail(x_0, self.folding).abs().max() < 1e-10
        x_0[1, :, 3, 4, 9] += 1.0
        found = detail(x_0, self.folding)
        t, h, w = self.folding.coarse_grid
        assert found.shape == (2, t * h * w) and not found[0].any()
        # Frames 1 | 2 3 | 4 5, rows and columns of 4: the last of its kind. Up-sampling carries a little of it on.
        assert found[1].argmax() == (2 * h + 1) * w + 2

    @pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99, 1.0])
    def test_every_clip_has_as_many_tokens_of_each_kind(self, share):
        blocks = math.prod(self.folding.coarse_grid)
        counts = {
            largest(torch.randn(4, blocks, generator=torch.Generator().manual_seed(seed)), self.folding, share).counts
            for seed in range(5)
        }
        assert len(counts) == 1
        coarse, fine = counts.pop()
        kinds = self.folding.kinds
        assert sum(held * len(which) for held, which in kinds.items()) == math.prod(self.folding.grid)
        assert coarse == blocks - sum(round(share * len(which)) for which in kinds.values())
        assert fine == sum(held * round(share * len(which)) for held, which in kinds.items())

    def test_the_largest_are_chosen(self):
        scores = torch.zeros(2, math.prod(self.folding.coarse_grid))
        for kind in self.folding.kinds.values():
            scores[0, kind[-1]], scores[1, kind[0]] = 1, 2
        share = 1 / max(map(len, self.folding.kinds.values()))
        selection = largest(scores, self.folding, share)
        chosen = [{int(self.folding.owners[token]) for token in row} for row in selection.fine]
        for row in (0, 1):
            assert chosen[row] <= {int(index) for index in scores[row].nonzero()} and chosen[row]

    def test_tokens_go_where_they_came_from(self):
        folding, (t, h, w) = self.folding, self.folding.grid
        scores = torch.randn(2, math.prod(folding.coarse_grid), generator=torch.Generator().manual_seed(0))
        selection = largest(scores, folding, 0.5)
        coarse, fine = torch.randn(2, scores.shape[1], 3), torch.randn(2, t * h * w, 3)
        back = selection.scatter(selection.gather(coarse, fine))
        assert torch.equal(back[1], torch.where(selection.is_fine[..., None], fine, 0.0))
        is_coarse = torch.ones(2, scores.shape[1], dtype=torch.bool).scatter(1, folding.owners[selection.fine], False)
        assert torch.equal(back[0], torch.where(is_coarse[..., None], coarse, 0.0))
        by_latent = selection.is_fine.view(2, 1, t, h, w).repeat_interleave(2, 3).repeat_interleave(2, 4)
        assert torch.equal(selection.fine_latents(), by_latent)


class Mixed:
    """Runs one forward with a share of blocks at random fine. permuted: the tokens of the sequence in another order."""

    def __init__(self, patch_size: str, share: float, permuted: bool = False):
        self.patch_size, self.share, self.permuted = patch_size, share, permuted

    def selection(self, flex, call) -> Selection:
        folding = flex.family.folding(call.arguments, flex.weak_modes[self.patch_size].multiple, flex.base_patch)
        batch, blocks = len(call.latents), math.prod(folding.coarse_grid)
        scores = torch.rand(batch, blocks, generator=torch.Generator().manual_seed(1))
        selection = largest(scores, folding, self.share)
        if self.permuted:
            coarse, fine = (part[:, torch.randperm(part.shape[1])] for part in (selection.coarse, selection.fine))
            selection = Selection(folding, coarse, fine, selection.is_fine)
        return selection

    def run(self, flex, call):
        selection, level = self.selection(flex, call), call.level(flex.diffusion)
        return call.output_of(predict_mixed(flex, call, self.patch_size, selection, flex.diffusion, level))


def build(name: str, kind: int, lora: bool = True):
    """(transformer, its flexible one, arguments of a forward over an odd grid, weak patch size)."""
    transformer = tiny(name)
    patch_size = coarse_patch_sizes(transformer)[kind]
    flex = attach(transformer, [patch_size])
    if lora:
        add_lora(flex, rank=4)
        randomise_adapter(flex)
    return transformer, flex, inputs(transformer, grid_for(transformer, 5, 3)), patch_size


def output(transformer, call: dict) -> torch.Tensor:
    with torch.no_grad():
        return transformer(**call, return_dict=False)[0]


@every_family
@every_kind
def test_all_blocks_fine_is_powerful_and_none_is_weak_bit_for_bit(name, kind):
    transformer, flex, call, patch_size = build(name, kind)
    stock = output(transformer, call)
    flex.runner = Mixed(patch_size, 1.0)
    assert torch.equal(output(transformer, call), stock)
    flex.fix(patch_size)
    weak = output(transformer, call)
    flex.runner = Mixed(patch_size, 0.0)
    assert torch.equal(output(transformer, call), weak)
    flex.runner = Mixed(patch_size, 0.5)
    mixed = output(transformer, call)
    assert mixed.isfinite().all() and not torch.equal(mixed, weak) and not torch.equal(mixed, stock)
    flex.fix(flex.powerful)
    assert torch.equal(output(transformer, call), stock)


def check_order(name: str) -> None:
    transformer, flex, call, patch_size = build(name, -1)
    outputs = []
    for permuted in (False, True):
        flex.runner = Mixed(patch_size, 0.5, permuted)
        outputs.append(output(transformer, call))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-4)


@every_family
def test_the_order_of_blocks_does_not_matter(name):
    check_order(name)


def check_constant_blocks(name: str, monkeypatch) -> None:
    """Where blocks are constant, noise too, and do not look at each other, every patch size predicts the same."""
    transformer, flex, call, patch_size = build(name, 0, lora=False)
    folding = flex.family.folding(call, flex.weak_modes[patch_size].multiple, flex.base_patch)
    one = torch.ones(1, 1, 1, 1, 1)
    monkeypatch.setattr(Folding, "noise_gains", lambda self, device: (one, one))  # of noise that is constant, too
    copies = math.prod(folding.multiple)
    monkeypatch.setattr(Folding, "upsample", lambda self, x: self.unfold(x.repeat(1, copies, 1, 1, 1)))
    p_t, p_h, p_w = flex.base_patch
    with torch.no_grad():
        for layer, part in transformer.named_modules():
            if layer.endswith("attn1.to_out.0"):
                part.weight.zero_()
        by_pixel = (p_t * p_h * p_w, -1)
        for rows in (flex.head.weight, flex.head.bias):
            rows.copy_(
                rows.unflatten(0, by_pixel).mean(0, keepdim=True).expand_as(rows.unflatten(0, by_pixel)).flatten(0, 1)
            )
    weights = transformer.state_dict()
    flex.remove()
    transformer = tiny(name)
    transformer.load_state_dict(weights)
    flex = attach(transformer, [patch_size])
    latents = flex.family.latents(call)
    values = torch.randn(*latents.shape[:2], *folding.coarse_grid, generator=torch.Generator().manual_seed(2))
    for axis, patch in enumerate(flex.base_patch):
        values = values.repeat_interleave(patch, axis + 2)
    call |= flex.family.arguments_for(folding.unfold(values.repeat(1, copies, 1, 1, 1)))
    stock = output(transformer, call)
    for share in (0.0, 0.3, 0.7):
        flex.runner = Mixed(patch_size, share)
        torch.testing.assert_close(output(transformer, call), stock, atol=1e-4, rtol=0)


@every_family
def test_blocks_that_are_constant_are_predicted_alike(name, monkeypatch):
    check_constant_blocks(name, monkeypatch)


def check_levels(name: str) -> None:
    """Every token is told its own noise level: coarse ones that of the mean of what they cover."""
    transformer, flex, call, patch_size = build(name, -1)
    latents = flex.family.latents(call)
    frames, rows, columns = (n // p for n, p in zip(latents.shape[2:], flex.base_patch, strict=True))
    tokens = frames * rows * columns
    given = torch.linspace(100, 900, 2 * frames).view(2, frames).repeat_interleave(rows * columns, 1)
    if flex.family.name == "skyreels-v2":  # a timestep for each token only where we bring it
        given = torch.tensor([200.0, 700.0])
    call["timestep"], told = given, []
    embedder = "condition_embedder" if hasattr(transformer, "condition_embedder") else "time_embed"
    handle = transformer.get_submodule(embedder).register_forward_pre_hook(lambda _, args: told.append(args[0]))
    runner = flex.runner = Mixed(patch_size, 0.5)
    output(transformer, call)
    handle.remove()
    given = given.view(2, -1).expand(2, tokens)
    with_call = Call(flex.family, flex.base_patch, call, None)
    selection = runner.selection(flex, with_call)
    coarse, fine = selection.counts
    found = told[0].view(2, coarse + fine)
    torch.testing.assert_close(found[:, coarse:], given.gather(1, selection.fine))
    owners, multiple = selection.folding.owners, math.prod(selection.folding.multiple)
    for row in range(2):
        for place, block in enumerate(selection.coarse[row]):
            covered = given[row, owners == block] / 1000
            if len(covered) != multiple:
                continue  # copies, which weigh as much as what they are copies of
            s, kappa = covered.mean(), selection.folding.kappa.median()
            expected = 1000 * s * kappa / (1 - s + s * kappa)
            assert found[row, place] == pytest.approx(float(expected), abs=1e-2)


@every_family
def test_every_token_is_told_its_own_noise_level(name):
    check_levels(name)


def test_planted_faults_are_found(monkeypatch):
    """Tokens at the places of others, heads for others, noise levels of others."""
    stock_gather, stock_scatter = Selection.gather, Selection.scatter

    def rolled(self, *parts):
        return stock_gather(Selection(self.folding, self.coarse.roll(1, 1), self.fine, self.is_fine), *parts)

    def scattered(self, sequence):
        return stock_scatter(Selection(self.folding, self.coarse, self.fine.flip(1), self.is_fine), sequence)

    stock_of_tokens = MixedForward._of_tokens

    def moved_levels(self, name):
        return stock_of_tokens(self, name).roll(1, 1)

    faults = [
        (Selection, "gather", rolled, lambda patch: check_constant_blocks("wan", patch)),
        (Selection, "scatter", scattered, lambda patch: check_constant_blocks("wan", patch)),
        (MixedForward, "_of_tokens", moved_levels, lambda patch: check_levels("wan")),
        (MixedForward, "positions", _positions_in_order, lambda patch: check_order("wan")),
    ]
    for owner, attribute, fault, check in faults:
        with monkeypatch.context() as patch:
            check(patch)
            patch.undo()
            patch.setattr(owner, attribute, fault)
            with pytest.raises(AssertionError):
                check(patch)


def _positions_in_order(self, centred):
    """A fault: tokens at places in the order of the grid, whatever their order in the sequence."""
    base = self.flex.family.folding(self.call.arguments, (1, 1, 1), self.flex.base_patch)
    tables = zip(centred(self.selection.folding), centred(base), strict=True)
    selection = self.selection
    ordered = Selection(selection.folding, selection.coarse.sort(1)[0], selection.fine.sort(1)[0], selection.is_fine)
    return tuple(ordered.gather(*parts) for parts in tables)


@every_family
def test_gradients_reach_every_lora_and_the_weak_mode(name):
    transformer, flex, call, patch_size = build(name, -1)
    transformer.requires_grad_(False)
    trained = [p for key, p in transformer.named_parameters() if "lora_" in key] + [*flex.weak_modes.parameters()]
    for parameter in trained:
        parameter.requires_grad_(True)
    flex.runner = Mixed(patch_size, 0.5)
    transformer(**call, return_dict=False)[0].square().mean().backward()
    assert len(trained) > 8
    missing = [tuple(p.shape) for p in trained if p.grad is None or not p.grad.any()]
    assert not missing
    assert all(p.grad is None for p in transformer.parameters() if not p.requires_grad)


@every_family
def test_a_residual_gives_the_stock_output_back_and_is_renewed_where_fine(name):
    transformer, flex, call, patch_size = build(name, 0)
    stock, seen = output(transformer, call), []

    class Runner(Mixed):
        def run(self, flex, call):
            given, residual = stock_with_residual(flex, call)
            seen.append((given[0], stock_by_residual(flex, call, residual)))
            before, level, selection = residual.clone(), call.level(flex.diffusion), self.selection(flex, call)
            mixed = predict_mixed(flex, call, patch_size, selection, flex.diffusion, level, residual)
            changed = (residual != before).any(2)
            assert torch.equal(changed, selection.is_fine)
            # What is coarse here is what the stock model said with the residual that was there.
            away = flex.family.latents(call.arguments | {"hidden_states": seen[0][1]})
            kept = ~selection.fine_latents().expand_as(away)
            torch.testing.assert_close(mixed[kept], away[kept])
            return call.output_of(mixed)

    flex.runner = Runner(patch_size, 0.5)
    output(transformer, call)
    assert torch.equal(seen[0][0], stock)
    torch.testing.assert_close(seen[0][1], stock, atol=1e-4, rtol=1e-4)


def patch_sizes_of(pipe) -> tuple[str, str]:
    """The model's own, and a weak one."""
    return format_patch_size(patch_size_of(pipe.transformer.config)), coarse_patch_sizes(pipe.transformer)[0]


def schedule_of(pipe, shares=(0.5, 0.25)) -> str:
    """Mixed steps before and after a powerful one, after reused ones, and beside others."""
    powerful, weak = patch_sizes_of(pipe)
    first, second = (f"{powerful}+{weak}@{share}" for share in shares)
    assert STEPS == 8
    return f"{weak}:1,{first}:1,{powerful}:1,{second}:2,reused:1,{first}:1,reused:1"


PIPELINES = [name for name in LOOSE if name != "wan-i2v"]
every_pipeline = every(PIPELINES)


@every_pipeline
def test_a_pipeline_spends_what_it_says_and_chooses_the_same_blocks_in_both_branches(name, monkeypatch):
    pipe, call = tiny_pipeline(name)
    with flop_counter_mode() as full:
        stock = sample(pipe, call)
    schedule = schedule_of(pipe)
    flexivid.enable(pipe, schedule=schedule)
    chosen = []

    def spied(flex, call, patch_size, selection, *rest):
        halves = selection.is_fine.chunk(2) if flex.family.guidance == "batched" else [selection.is_fine]
        chosen.extend((selection.counts, half) for half in halves)
        return predict_mixed(flex, call, patch_size, selection, *rest)

    monkeypatch.setattr(mixing, "predict_mixed", spied)
    first = sample(pipe, call)
    assert first.isfinite().all() and not torch.equal(first, stock)
    assert len(chosen) == 2 * 4
    assert all(torch.equal(one[1], other[1]) for one, other in zip(chosen[::2], chosen[1::2], strict=True))
    assert len({counts for counts, _ in chosen}) == 2  # of the shares
    with flop_counter_mode() as counter:
        assert torch.equal(sample(pipe, call), first)
    summary = flexivid.summary(pipe)
    outside = full.get_total_flops() - summary.flops_full  # what ChronoEdit's pipeline does with its image
    assert counter.get_total_flops() - outside == pytest.approx(summary.flops_used, rel=CHOOSING)
    assert summary.steps[1][0] in schedule
    flexivid.disable(pipe)
    assert torch.equal(sample(pipe, call), stock)


def check_choice(name: str, monkeypatch) -> None:
    """Blocks are those of most detail in the guided x0 that the step before has given."""
    pipe, call = tiny_pipeline(name)
    flexivid.enable(pipe, schedule=schedule_of(pipe))
    x_0, seen = {}, []
    scale, batched = call["guidance_scale"], family_of(pipe.transformer).guidance == "batched"

    def spied(flex, asked, patch_size, selection, *rest):
        if asked.branch == 0:
            halves = x_0[0].chunk(2) if batched else (x_0[1], x_0[0])
            guided = halves[0] + scale * (halves[1] - halves[0])
            seen.append(
                torch.equal(
                    largest(detail(guided, selection.folding), selection.folding, share.pop(0)).is_fine,
                    selection.is_fine[: len(guided)],
                )
            )
        return predict_mixed(flex, asked, patch_size, selection, *rest)

    share = [0.5, 0.25, 0.25, 0.5]
    monkeypatch.setattr(mixing, "predict_mixed", spied)
    runner = attached(pipe.transformer).runner
    stock_run = runner.run

    def run(flex, asked):
        result = stock_run(flex, asked)
        run_, at = runner._run, runner.clock._last
        if flexivid.summary(pipe).steps[-1][-1] != "reused":
            level = asked.level(run_.diffusion, at.sigma)
            predicted = asked.latents_of(result[0]).float()
            x_0[asked.branch] = run_.diffusion.x0(asked.latents.float(), predicted, level)
        return result

    monkeypatch.setattr(runner, "run", run)
    sample(pipe, call)
    assert len(seen) == 4 and all(seen)


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_blocks_are_chosen_by_the_guided_x0(name, monkeypatch):
    check_choice(name, monkeypatch)


def test_a_choice_by_the_other_branch_is_found(monkeypatch):
    stock = mixing.Mixing._chosen

    def swapped(self, flex, call, size, held):
        return stock(self, flex, call, size, {0: held[1], 1: held[0]})

    monkeypatch.setattr(mixing.Mixing, "_chosen", swapped)
    with pytest.raises(AssertionError):
        check_choice("wan", monkeypatch)


def test_guidance_is_kept_and_a_run_without_any():
    pipe, call = tiny_pipeline("wan")
    flexivid.enable(pipe, schedule=f"1x2x2:2,{MIXED}/kept:2,reused:2,{MIXED}:2")
    first = sample(pipe, call)
    with flop_counter_mode() as counter:
        assert torch.equal(sample(pipe, call), first)
    assert counter.get_total_flops() == pytest.approx(flexivid.summary(pipe).flops_used, rel=CHOOSING)
    flexivid.enable(pipe, schedule=f"1x2x2:2,{MIXED}:6")
    with flop_counter_mode() as counter:
        assert sample(pipe, call | {"guidance_scale": 1.0}).isfinite().all()
    assert counter.get_total_flops() == pytest.approx(flexivid.summary(pipe).flops_used, rel=CHOOSING)


def refused(pipe, call: dict, said: str, schedule: str, **settings) -> None:
    flexivid.enable(pipe, schedule=schedule, **settings)
    with pytest.raises(ValueError, match=said):
        sample(pipe, call)
    flexivid.disable(pipe)


@every(name for name in TINY if name not in LOOSE)
def test_a_family_that_cannot_says_why(name):
    pipe, call = tiny_pipeline(name)
    family, (powerful, weak) = family_of(pipe.transformer), patch_sizes_of(pipe)
    assert len(family.loose) > 20
    said = f"{family.name} does not run .*: {family.loose}"
    refused(pipe, call, said, f"{powerful}:{STEPS - 1},{powerful}+{weak}@0.5:1")


def test_what_does_not_go_with_mixed_steps_is_refused():
    pipe, call = tiny_pipeline("wan")
    refused(pipe, call, "not direct", f"1x2x2:7,{MIXED}:1", parametrisation="direct")
    flexivid.enable(pipe, schedule=f"1x2x2:7,{MIXED}:1")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="other tokens at every step"):
        sample(pipe, call)


def test_each_of_two_transformers_has_residuals_of_its_own(monkeypatch):
    """Wan2.2-A14B: what the blocks of one add to a token says nothing of the other's."""
    pipe, call = tiny_pipeline("wan")
    pipe.register_modules(transformer_2=tiny("wan"))
    pipe.register_to_config(boundary_ratio=0.7)
    flexivid.enable(pipe, schedule=f"1x2x2:1,{MIXED}:{STEPS - 1}")
    seen = []

    def spied(flex, call, patch_size, selection, diffusion, level, residual):
        seen.append((flex.transformer is pipe.transformer, residual is not None))
        return predict_mixed(flex, call, patch_size, selection, diffusion, level, residual)

    monkeypatch.setattr(mixing, "predict_mixed", spied)
    first = sample(pipe, call)
    assert set(seen) == {(True, True), (False, False)}
    with flop_counter_mode() as counter:
        assert torch.equal(sample(pipe, call), first)
    assert counter.get_total_flops() == pytest.approx(flexivid.summary(pipe).flops_used, rel=CHOOSING)
