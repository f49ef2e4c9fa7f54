"""The patches of a run, drawn over its clip."""

import numpy as np
import pytest
import torch
from families import STEPS, tiny_pipeline
from test_calls import sample

import flexivid
from flexivid.patch_grid import BAR, COARSE, FINE, LATER, FineBlocks, patches_drawn, stretches, tokens_of
from flexivid.patches.folding import folding_for
from flexivid.patches.mixed import to_latents
from flexivid.sampling import mixing
from flexivid.video import LABEL_HEIGHT

MIXED = "1x2x2+1x4x4@0.5"


def test_steps_that_show_one_grid_are_one_stretch():
    steps = [["1x4x4", "kept"]] * 2 + [["1x2x2"] * 2, ["reused"] * 2, ["reused"] * 2, ["1x2x2"] * 2] + [[MIXED]] * 2
    assert [stretch.label(len(steps)) for stretch in stretches(steps)] == [
        "steps 1-2 of 8: 1x4x4/kept",
        "steps 3-5 of 8: 1x2x2, held for 2",
        "step 6 of 8: 1x2x2",
        f"step 7 of 8: {MIXED}",
        f"step 8 of 8: {MIXED}",
    ]


@pytest.mark.parametrize("multiple", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (3, 1, 2)])
@pytest.mark.parametrize("causal", [True, False])
def test_latents_lie_in_the_tokens_that_hold_them(multiple, causal):
    """Odd grids, so that some blocks hold padding."""
    folding = folding_for((5, 6, 10), multiple, (1, 2, 2), causal)
    expected = to_latents(folding.owners[None, :, None, None, None, None].expand(1, -1, 1, 1, 2, 2), folding.grid)
    tokens, time = tokens_of(folding)
    assert np.array_equal(tokens, expected[0, 0]) and len(np.unique(tokens)) == tokens.max() + 1
    per_frame = np.unique(tokens[0]).size
    assert np.array_equal(time, tokens[:, 0, 0] // per_frame)


def test_patches_that_end_within_base_ones_are_drawn_too():
    tokens, time = tokens_of(folding_for((6, 4, 4), (2, 1, 1), (2, 2, 2), True))
    assert time.tolist() == [0, 0, 0, 1, 1, 1] and tokens.shape == (6, 4, 4)


def drawn(schedule: str, chosen: FineBlocks) -> list[np.ndarray]:
    """Frames of a black clip of tiny Wan, under the bar and the label."""
    pipe, call = tiny_pipeline("wan")
    flexivid.enable(pipe, schedule=schedule, modes=["1x4x4", "2x4x4"])
    clip = sample(pipe, call)
    with flexivid.observe(pipe, chosen):
        assert torch.equal(sample(pipe, call), clip)
    black = np.zeros((call["num_frames"], call["height"], call["width"], 3), np.uint8)
    frames = list(patches_drawn(pipe, black, flexivid.summary(pipe).steps, chosen, fps=8))
    return [frame[BAR + LABEL_HEIGHT :] for frame in frames]


def colours_in(frame: np.ndarray) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.unique(frame.reshape(-1, 3), axis=0).tolist()} - {(0, 0, 0)}


def later(colour) -> tuple[int, ...]:
    return tuple(int(LATER * part) for part in colour)


def test_edges_are_those_of_the_patch_size_and_tell_blocks_of_time():
    frames = drawn(f"1x2x2:1,2x4x4:{STEPS - 1}", FineBlocks())
    base, coarse = frames[:17], frames[17:]
    assert len(coarse) == 17 and base[0].shape == (512, 768, 3)
    # A latent is 8 pixels, written 8 times as large; an edge is the first pixel of the next patch.
    rows = [np.flatnonzero(frame.any((1, 2)) & frame.any(2).all(1)).tolist() for frame in (base[0], coarse[0])]
    assert rows == [[128, 256, 384], [256]]
    # Five latent frames: the first is a block of its own, then two and two.
    assert [colours_in(frame) for frame in base[::4]] == [{FINE}, {later(FINE)}, {FINE}, {later(FINE)}, {FINE}]
    blocks = [{COARSE}] + [{later(COARSE)}] * 2 + [{COARSE}] * 2
    assert [colours_in(frame) for frame in coarse[::4]] == blocks
    assert [colours_in(frame) for frame in (coarse[1], coarse[8], coarse[9])] == [blocks[1], blocks[1], blocks[3]]


def test_fine_blocks_are_drawn_where_they_were(monkeypatch):
    found = []

    def largest(*arguments):
        found.append(stock(*arguments))
        return found[-1]

    stock = mixing.largest
    monkeypatch.setattr(mixing, "largest", largest)
    chosen = FineBlocks()
    frames = drawn(f"1x2x2:1,{MIXED}:{STEPS - 1}", chosen)
    assert sorted(chosen.by_step) == list(range(1, STEPS)) and len(frames) == 17 * STEPS
    for step, selection in zip(range(1, STEPS), found[-(STEPS - 1) :], strict=True):
        fine = selection.fine_latents()[-1, 0]
        assert torch.equal(chosen.by_step[step], fine[None]) and 0 < fine.float().mean() < 1
        for t in range(len(fine)):
            frame = frames[17 * step + 4 * t]
            # The middle of a block of four latents a side: fine ones have a corner of four patches there.
            for row in range(0, fine.shape[1], 4):
                for column in range(0, fine.shape[2], 4):
                    side = 64
                    y, x = (row + 2) * side, (column + 2) * side
                    assert frame[y, x].any() == bool(fine[t, row, column])
