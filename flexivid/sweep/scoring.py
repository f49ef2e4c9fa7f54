"""Scores the clips of a sweep from the files that were written, one file of values a batch."""

from functools import cached_property, lru_cache, partial
from pathlib import Path

import numpy as np
import torch

from flexivid.files import replacing
from flexivid.shapes.world import Scene
from flexivid.sweep.bootstrap import estimate, estimate_of_sets
from flexivid.sweep.metrics import (
    RENDERED_CLIPS,
    Features,
    Gaussian,
    adherence,
    displacement,
    features_of_rendered,
    fidelity,
    frechet_distance,
    perceptual_distance,
    spread,
)
from flexivid.sweep.sampling import Sampler, read_clip
from flexivid.sweep.vbench import values_of_clips

FEATURES, DISPLACEMENT = "features", "displacement"  # of which no mean is given


class Drawn:
    """features: (prompts, ..., dimensions), pooled, of which prompts are drawn.

    The draws are those of every arm, so that what is compared with all of them is worked out once.
    """

    def __init__(self, features: np.ndarray):
        self.features, self._gaussians = features, {}

    def __getitem__(self, picks: np.ndarray) -> Gaussian:
        key = picks.tobytes()
        if key not in self._gaussians:
            self._gaussians[key] = Gaussian(self.features[picks].reshape(-1, self.features.shape[-1]))
        return self._gaussians[key]


def _distance(ours: Drawn, theirs: Drawn, picks: np.ndarray) -> float:
    """Fréchet distance over some prompts."""
    return frechet_distance(ours[picks], theirs[picks])


def _ratio(ours: np.ndarray, full: np.ndarray) -> dict[str, float]:
    """The mean of one value a prompt, (prompts,), relative to that of the full run's."""
    return estimate_of_sets(lambda picks: ours[picks].mean() / max(full[picks].mean(), 1e-9), len(ours), draws=500)


class Scorer:
    """scenes: what every prompt asks for in the embedded world, None in the real one."""

    def __init__(self, sampler: Sampler, scenes: dict[str, Scene] | None, device: torch.device):
        self.sampler, self.scenes = sampler, scenes
        self.features = Features(device)
        self._full: Drawn | None = None
        self._of_full = lru_cache(maxsize=None)(self._of_full)

    @cached_property
    def data(self) -> Drawn | None:
        if not self.scenes:
            return None
        return self._rendered(RENDERED_CLIPS, seed=0)

    def _rendered(self, count: int, seed: int) -> Drawn:
        sizes = (self.sampler.call[name] for name in ("frames", "height"))
        return Drawn(features_of_rendered(list(self.scenes.values()), count, self.features, *sizes, seed))

    def floor(self, videos_per_prompt: int) -> dict[str, float] | None:
        """The Fréchet distance to the data of as many other rendered clips as an arm has: what a perfect model gets."""
        if not self.scenes:
            return None
        perfect = self._rendered(videos_per_prompt, seed=1)
        return estimate_of_sets(lambda picks: _distance(perfect, self.data, picks), len(perfect.features))

    def _path(self, arm, number: int) -> Path:
        return self.sampler.folder / "scores" / arm.name / f"{number}.npz"

    def _read(self, arm_name: str, clip) -> np.ndarray:
        return read_clip(self.sampler.folder / "videos" / arm_name / clip.file_name, self.sampler.call["height"])

    def score(self, arms: list, number: int) -> None:
        """Scores a batch of every arm that is not scored yet. Distances are taken to the full run's clips of it."""
        self._of_full.cache_clear()
        for arm in arms:
            if not self._path(arm, number).exists():
                self._score_batch(arm, number, self.sampler.batches[number])

    def _of_full(self, clip) -> tuple[np.ndarray, list[torch.Tensor]]:
        """Frames and maps of features of a full run's clip: every arm is compared with them."""
        frames = self._read("full", clip)
        return frames, self.features(frames)[0]

    def _score_batch(self, arm, number: int, clips: list) -> None:
        rows, features = [], []
        for clip in clips:
            frames = self._read(arm.name, clip)
            maps, pooled = self.features(frames)
            row = adherence(frames, self.scenes[clip.prompt]) if self.scenes else {}
            row[DISPLACEMENT] = displacement(frames)
            if arm.name != "full":
                full, full_maps = self._of_full(clip)
                row |= fidelity(frames, full)
                row["perceptual_distance"] = perceptual_distance(maps, full_maps)
            rows.append(row)
            features.append(pooled)
        path = self._path(arm, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        values = {name: np.array([row[name] for row in rows]) for name in rows[0]}
        with replacing(path) as partial:
            np.savez(partial, **values, features=np.stack(features))

    def values(self, arm) -> dict[str, np.ndarray]:
        """By metric, one value a clip, (clips,); under "features", (clips, frames, 320)."""
        parts = []
        for number in range(len(self.sampler.batches)):
            with np.load(self._path(arm, number)) as part:
                parts.append(dict(part))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def estimates(self, arm, full_arm, videos_per_prompt: int, vbench: dict[str, dict]) -> tuple[dict, dict]:
        """(metrics, differences to the full run), each by metric {"mean", "low", "high"} over prompts.

        vbench: by arm what `vbench.score_arms` found; a dimension that says a value for every clip is a metric too.
        """

        def by_prompt(values: np.ndarray) -> np.ndarray:
            return values.reshape(-1, videos_per_prompt, *values.shape[1:])

        ours, full = (
            self.values(which) | values_of_clips(vbench[which.name], self.sampler.clips) for which in (arm, full_arm)
        )
        own_features, full_features = (by_prompt(values.pop(FEATURES)) for values in (ours, full))
        moved, full_moved = (by_prompt(values.pop(DISPLACEMENT)).mean(1) for values in (ours, full))
        metrics = {name: estimate(by_prompt(values).mean(1)) for name, values in ours.items()}
        differences = {
            name: estimate(by_prompt(values - full[name]).mean(1)) for name, values in ours.items() if name in full
        }
        self._full = self._full or Drawn(full_features)
        count, name, own, full = len(own_features), "frechet_distance_to_data", Drawn(own_features), self._full
        to_data = partial(_distance, own, self.data)

        def further_than_full(picks: np.ndarray) -> float:
            return to_data(picks) - _distance(full, self.data, picks)

        if arm.name != "full":
            metrics["frechet_distance"] = estimate_of_sets(partial(_distance, own, full), count)
            metrics["motion"] = _ratio(moved, full_moved)
            if videos_per_prompt > 1:
                metrics["diversity"] = _ratio(spread(own_features), spread(full_features))
        if self.data is not None:
            metrics[name] = estimate_of_sets(to_data, count)
            differences[name] = estimate_of_sets(further_than_full, count)
        return metrics, differences
