"""Means over prompts and how sure they are: bootstrap 95 % intervals, plain and paired."""

import numpy as np

DRAWS = 2000


def interval(per_prompt: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of one value a prompt: (prompts,). Efron 1979, percentile method."""
    picks = np.random.default_rng(0).integers(len(per_prompt), size=(DRAWS, len(per_prompt)))
    low, high = np.percentile(per_prompt[picks].mean(1), [2.5, 97.5])
    return float(low), float(high)


def estimate(per_prompt: np.ndarray) -> dict[str, float]:
    """Mean and interval, as results.json holds them. Clips of one prompt are averaged first: they depend on it."""
    low, high = interval(per_prompt)
    return {"mean": float(per_prompt.mean()), "low": low, "high": high}


def estimate_of_sets(statistic, count: int, draws: int = 50) -> dict[str, float]:
    """The same for a statistic of a whole set of prompts, such as a Fréchet distance.

    statistic: takes the indices of the prompts that are drawn, (prompts,) with repetitions, and returns a number.
    The percentile interval of a distance that grows with repetitions would lie above it, so that the spread of the
    draws is put around the value itself.
    """
    value = statistic(np.arange(count))
    generator = np.random.default_rng(0)
    spread = 1.96 * np.std([statistic(generator.integers(count, size=count)) for _ in range(draws)])
    return {"mean": float(value), "low": float(value - spread), "high": float(value + spread)}
