"""Clips of a sweep with the patch grids that an arm ran at."""

import json
from unittest.mock import Mock

import av
import pytest
import torch

from flexivid.patch_grid import FineBlocks, stretches
from flexivid.sweep import grids, sampling
from flexivid.sweep.arms import Arm
from flexivid.sweep.sampling import Sampler, clips_of

MIXED = "1x2x2+1x4x4@0.5"
CALL = {"frames": 9, "height": 32, "width": 32, "steps": 5, "guidance_scale": 3.0, "text_length": 16, "fps": 8}


def made(pipe, folder, schedule: str | None):
    """Two clips of one batch, of which the page shows the first; the arm."""
    enable = None if schedule is None else {"schedule": schedule, "modes": ["1x4x4"]}
    arm = Arm("own", "calibrated", 0.5, CALL["steps"], flexivid=enable)
    clips = clips_of(["a red circle", "a blue square growing"], 1, 0)
    sampler = Sampler(pipe, clips, folder, CALL, 2, tuple(clips[:1]))
    sampler.make(arm, [0], Mock())
    return sampler, arm


def test_what_is_said_of_a_patch_size():
    steps = [["1x2x2"] * 2, ["1x4x4", "kept"], ["1x2x2"] * 2, ["reused"] * 2, [MIXED] * 2, [MIXED] * 2]
    found = grids.by_patch_size(steps)
    assert [grids.line(name, own, len(steps)) for name, own in found.items()] == [
        "1x2x2: 2 of 6 steps, held for 1 more",
        "1x4x4/kept: 1 of 6 steps",
        f"{MIXED}: 2 of 6 steps; as at step 6",
    ]
    assert [own for own in found.values()][0] == [stretches(steps)[0], stretches(steps)[2]]


def test_the_clip_that_is_shown_has_its_own_fine_blocks(pipe, tmp_path, monkeypatch):
    chosen, drawn = [], {}

    class Seen(FineBlocks):
        def fine_blocks(self, step, selection):
            super().fine_blocks(step, selection)
            chosen.append((step, selection.fine_latents()[:, 0]))

    def with_grid(pipe, frames, name, fine=None, **more):
        drawn[name] = fine
        return stock(pipe, frames, name, fine, **more)

    stock = grids.with_grid
    monkeypatch.setattr(sampling, "FineBlocks", Seen)
    monkeypatch.setattr(grids, "with_grid", with_grid)
    sampler, arm = made(pipe, tmp_path, f"1x2x2:1,1x4x4:1,{MIXED}:2,1x4x4:1")

    step, fine = chosen[-1]
    assert step == 3 and not torch.equal(fine[0], fine[1])
    assert list(drawn) == ["1x2x2", "1x4x4", MIXED] and torch.equal(drawn[MIXED], fine[0])
    clip, lines = grids.grid_paths(tmp_path, arm.name, sampler.clips[0].file_name)
    assert {path.name for path in clip.parent.iterdir()} == {clip.name, lines.name}
    assert json.loads(lines.read_text())["lines"] == [
        "1x2x2: 1 of 5 steps",
        "1x4x4: 2 of 5 steps",
        f"{MIXED}: 2 of 5 steps; as at step 4",
    ]
    with av.open(str(clip)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 3 * CALL["frames"] and frames[0].shape == (256, 256, 3)
    # Two pixels wide, yellow where the model's own patches begin; a coarse one of the second pass has none there.
    edge, inside = (frame[70:120, 64:66].astype(int).mean((0, 1)) for frame in (frames[0], frames[CALL["frames"]]))
    assert edge[0] - edge[2] > 100 > inside[0] - inside[2]


@pytest.mark.parametrize("schedule", [None, "1x2x2:5", "1x2x2:1,1x2x2/kept:4"])
def test_clips_without_weak_steps_have_no_grids(pipe, tmp_path, schedule):
    made(pipe, tmp_path, schedule)
    assert (tmp_path / "videos/own").is_dir() and not (tmp_path / "grids").exists()
