"""Means over prompts and how sure they are: bootstrap 95 % intervals, plain and paired."""

import numpy as np
from scipy.stats import bootstrap

DRAWS = 2000


def _drawn(values: np.ndarray, statistic, draws: int):
    """scipy's bootstrap, Efron 1979, percentile method: of a statistic of values, one a prompt."""
    values = np.repeat(values, 2) if len(values) == 1 else values  # one alone is refused; its draws are all alike
    return bootstrap((values,), statistic, n_resamples=draws, method="percentile", rng=np.random.default_rng(0))


def interval(per_prompt: np.ndarray) -> tuple[float, float]:
    """95 % bootstrap interval of the mean of one value a prompt: (prompts,)."""
    low, high = _drawn(per_prompt, np.mean, DRAWS).confidence_interval
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
    spread = 1.96 * np.std(_drawn(np.arange(count), statistic, draws).bootstrap_distribution)
    return {"mean": float(value), "low": float(value - spread), "high": float(value + spread)}
