"""The shapes world, its committed prompts, and the oracle that judges clips of it."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import avg_pool3d, pad

from flexivid.shapes import prompts
from flexivid.shapes.oracle import adherence, judge
from flexivid.shapes.world import (
    BACKGROUNDS,
    COLOURS,
    FACTORS,
    HELD_OUT,
    MOTIONS,
    PATTERNS,
    SHAPES,
    Scene,
    all_scenes,
    fixed_layout,
    parse_caption,
    render,
    sample_clips,
    sample_layout,
)

WORDS = {"pattern": PATTERNS, "colour": COLOURS, "shape": SHAPES, "motion": MOTIONS, "background": BACKGROUNDS}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_clips(count: int, seed: int) -> tuple[torch.Tensor, list[Scene]]:
    """Clips in random layouts of different scenes out of all, held out or not; 9 frames, all that a judge looks at."""
    generator, scenes = seeded(seed), all_scenes()
    scenes = [scenes[pick] for pick in torch.randperm(len(scenes), generator=generator)[:count].tolist()]
    return render(scenes, [sample_layout(scene, generator) for scene in scenes], frames=9), scenes


def reference_clips(scenes: list[Scene], frames: int = 17) -> torch.Tensor:
    return render(scenes, [fixed_layout(scene) for scene in scenes], frames)


def hit_rates(verdicts: list[dict], scenes: list[Scene]) -> dict[str, float]:
    hits = [
        [shown[f] == word for f, word in vars(scene).items()] for shown, scene in zip(verdicts, scenes, strict=True)
    ]
    hits = torch.tensor([row + [all(row)] for row in hits]).float()
    return dict(zip((*FACTORS, "all"), hits.mean(0).tolist(), strict=True))


@pytest.fixture(scope="module")
def clean() -> tuple[list[dict], list[Scene]]:
    clips, scenes = random_clips(300, seed=1)
    return [judge(clip) for clip in clips], scenes


# The world


def test_sampling_depends_on_the_seed_only():
    (clips, scenes), (again, scenes_again) = (sample_clips(4, seeded(3)) for _ in range(2))
    assert scenes == scenes_again and torch.equal(clips, again)
    assert clips.shape == (4, 3, 17, 64, 64) and clips.dtype == torch.float32 and clips.abs().max() <= 1
    other, _ = sample_clips(4, seeded(4))
    assert not torch.equal(clips, other)


def test_a_clip_shows_its_colours_at_its_place():
    clip = reference_clips([Scene("plain", "red", "square", "moving right", "gray")])[0] / 2 + 0.5
    red, gray = torch.tensor(COLOURS["red"]), torch.full((3,), BACKGROUNDS["gray"])
    assert torch.allclose(clip[:, 0, 32, 20], red, atol=1e-3) and torch.allclose(clip[:, 0, 32, 44], gray, atol=1e-3)
    assert torch.allclose(clip[:, -1, 32, 44], red, atol=1e-3) and torch.allclose(clip[:, -1, 32, 20], gray, atol=1e-3)


def test_objects_stay_inside_the_frame():
    generator = seeded(0)
    scenes = [s for s in all_scenes() if (s.pattern, s.colour, s.background) == ("plain", "red", "black")] * 20
    random = render(scenes, [sample_layout(scene, generator) for scene in scenes], frames=5)
    clips = torch.cat([random, reference_clips(scenes[:24], frames=5)])
    coverage = (clips[:, 0] / 2 + 0.5 - BACKGROUNDS["black"]) / (COLOURS["red"][0] - BACKGROUNDS["black"])
    assert (coverage.sum((2, 3)) > 20).all(), "an object in every frame"
    for edge in (coverage[..., 0, :], coverage[..., -1, :], coverage[..., 0], coverage[..., -1]):
        assert edge.sum(-1).max() < 1, "a turning square's corner may touch the last pixel, but nothing is cut off"


def test_held_out_combinations_are_never_sampled():
    _, scenes = sample_clips(1500, seeded(0), frames=1, size=8)
    pairs = {(scene.colour, scene.shape) for scene in scenes}
    assert not any(scene.held_out for scene in scenes) and not pairs & HELD_OUT
    assert len(pairs) == len(COLOURS) * len(SHAPES) - len(HELD_OUT), "every other combination is"


def test_captions_parse_back():
    assert all(parse_caption(scene.caption) == scene for scene in all_scenes()[::97])
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption("a cat")


# The prompts


def test_committed_prompts_are_what_the_generator_makes():
    made = prompts.make_prompts()
    assert prompts.load_prompts() == made
    assert json.loads(prompts.PATH.read_text()) == {k: [scene.caption for scene in v] for k, v in made.items()}


def test_prompts_are_split_and_balanced():
    loaded = prompts.load_prompts()
    assert [len(loaded["seen"]), len(loaded["held_out"])] == [128, 64]
    for split, scenes in loaded.items():
        assert len(set(scenes)) == len(scenes) and all(scene.held_out == (split == "held_out") for scene in scenes)
        for factor in FACTORS:
            counts = Counter(getattr(scene, factor) for scene in scenes)
            assert max(counts.values()) - min(counts.values()) <= 1, (split, counts)
            # Three colours and shapes are all that the held-out rule leaves.
            assert len(counts) == (3 if split == "held_out" and factor in ("colour", "shape") else len(WORDS[factor]))


# The oracle


def test_oracle_reads_clean_clips(clean):
    verdicts, scenes = clean
    assert all({getattr(scene, factor) for scene in scenes} == set(words) for factor, words in WORDS.items())
    assert {(scene.colour, scene.shape) for scene in scenes} >= HELD_OUT
    rates = hit_rates(verdicts, scenes)
    assert min(rates.values()) >= 0.99, rates


def test_oracle_reads_every_reference_clip():
    scenes = sum(prompts.load_prompts().values(), [])
    rates = {key: hits.float().mean().item() for key, hits in adherence(reference_clips(scenes), scenes).items()}
    assert list(rates) == [*FACTORS, "all"] and min(rates.values()) >= 0.99, rates


def test_oracle_reads_blurred_and_noisy_clips():
    clips, scenes = random_clips(120, seed=2)
    clips = avg_pool3d(pad(clips, (1, 1, 1, 1, 0, 0), mode="replicate"), (1, 3, 3), stride=1)
    clips += 0.05 * torch.randn(clips.shape, generator=seeded(3))
    rates = hit_rates([judge(clip) for clip in clips], scenes)
    assert min(rates[factor] for factor in FACTORS) >= 0.95, rates


@pytest.mark.parametrize("frames, size", [(5, 64), (9, 96)])
def test_oracle_takes_other_lengths_and_sizes(frames, size):
    scenes = prompts.load_prompts()["seen"][:12]
    hits = adherence(render(scenes, [fixed_layout(scene) for scene in scenes], frames, size), scenes)
    assert hits["all"].all()


def test_shuffled_prompts_score_at_chance(clean):
    verdicts, scenes = clean
    count = len(scenes)
    shuffled = [scenes[pick] for pick in torch.randperm(count, generator=seeded(5)).tolist()]
    rates = hit_rates(verdicts, shuffled)
    for factor in FACTORS:
        asked = Counter(getattr(scene, factor) for scene in scenes)
        shown = Counter(verdict[factor] for verdict in verdicts)
        chance = sum(asked[word] * shown[word] for word in asked) / count**2
        assert abs(rates[factor] - chance) < 4 * (chance * (1 - chance) / count) ** 0.5, (factor, rates, chance)
    assert rates["all"] < 0.02


def test_adherence_is_of_the_asked_scene():
    scene = Scene("dotted", "cyan", "triangle", "turning", "white")
    other = {"pattern": "plain", "colour": "blue", "shape": "square", "motion": "growing", "background": "black"}
    asked = [scene] + [replace(scene, **{factor: other[factor]}) for factor in FACTORS]
    hits = adherence(reference_clips([scene]).expand(len(asked), -1, -1, -1, -1), asked)
    for row, factor in enumerate(FACTORS, start=1):
        assert [missed for missed in FACTORS if not hits[missed][row]] == [factor]
    assert hits["all"].tolist() == [True] + [False] * len(FACTORS)


def test_motion_is_read_from_the_order_of_frames():
    scenes = [Scene("striped", "green", "cross", motion, "gray") for motion in MOTIONS]
    motions = [judge(clip.flip(1))["motion"] for clip in reference_clips(scenes)]
    assert motions == ["moving right", "moving left", "moving down", "moving up", "turning", None]


def test_a_still_object_has_no_motion():
    clips, scenes = random_clips(24, seed=6)
    still = clips[:, :, 4:5].expand(-1, -1, 9, -1, -1)
    verdicts = [judge(clip + 0.05 * torch.randn(clip.shape, generator=seeded(7))) for clip in still]
    assert [verdict["motion"] for verdict in verdicts] == [None] * len(scenes)
    assert hit_rates(verdicts, scenes)["shape"] > 0.9, "but the object is seen"


def test_a_clip_without_an_object_fails():
    blank = torch.zeros(3, 17, 64, 64)
    nothing = dict.fromkeys(FACTORS)
    assert judge(blank) == nothing | {"background": "gray"}
    assert judge(blank - 0.5) == nothing, "a grey that is no word"
    assert judge(blank * torch.nan) == nothing
    noise = torch.rand(blank.shape, generator=seeded(0)) * 2 - 1
    assert judge(noise) == nothing | {"background": "gray"}
    hits = adherence(blank[None], [Scene("plain", "red", "circle", "growing", "gray")])
    assert {key: hit.item() for key, hit in hits.items()} == dict.fromkeys(hits, False) | {"background": True}
