"""Intervals and paired tests of accuracies."""

from __future__ import annotations

import math

import numpy as np

__all__ = ["mcnemar", "paired_difference", "wilson"]

_Z = 1.959963984540054  # 97.5 % of the normal distribution


def wilson(correct: int, count: int) -> tuple[float, float]:
    """The 95 % interval of a share ``correct / count``, 0 to 1.

    Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212. It stays inside 0 to 1 and works for few samples.
    """
    if not count:
        return 0.0, 1.0
    share, square = correct / count, _Z**2 / count
    middle = (share + square / 2) / (1 + square)
    half = _Z / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar(before: np.ndarray, after: np.ndarray) -> float:
    """The two-sided exact p value of McNemar's test: are as many samples lost as won?

    Args:
        before, after: whether each sample is correct, ``[N]`` bool, the same samples in both.
    """
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    n, fewer = lost + won, min(lost, won)
    below = sum(math.comb(n, k) for k in range(fewer + 1))
    return float(min(1, 2 * below / 2**n))


def paired_difference(
    before: np.ndarray, after: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """The change of the accuracy and its 95 % interval, by a bootstrap over the samples (both results drawn together).

    Args:
        before, after: as for :func:`mcnemar`.

    Returns:
        Change, lower and upper end, as shares.
    """
    # A sample changes by -1, 0 or 1, so the counts of the three are all that a resample draws.
    changes = after.astype(int) - before.astype(int)
    n = len(changes)
    shares = np.bincount(changes + 1, minlength=3) / n
    drawn = np.random.default_rng(seed).multinomial(n, shares, size=resamples)
    low, high = np.quantile((drawn[:, 2] - drawn[:, 0]) / n, [0.025, 0.975])
    return float(changes.mean()), float(low), float(high)
