"""The statistics under the paper's Table 1, against slow references."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "paper"))
import table1


@pytest.mark.parametrize("n", [3, 4, 7, 36])
def test_interquartile_mean(n):
    """Each value four times over: then a quarter of the copies is n of them, and can be cut off whole."""
    scores = np.random.default_rng(n).normal(size=n) ** 3
    copies = sorted(value for value in scores for _ in range(4))
    assert table1.interquartile_mean(scores) == pytest.approx(np.mean(copies[n : 3 * n]))
    outlier = np.where(scores == scores.max(), 1e6, scores)
    assert n < 4 or table1.interquartile_mean(outlier) == pytest.approx(table1.interquartile_mean(scores))


def test_bootstrap_interval():
    """Draws stay within a dataset: the differences between datasets do not widen the interval, those of seeds do."""
    rng = np.random.default_rng(0)
    level = 100 * np.arange(12)
    alike = [[value] * 3 for value in level]
    low, high = table1.bootstrap_interval(alike)
    assert low == high == pytest.approx(np.mean(level[3:9]))
    spread = [list(value + rng.normal(0, 3, 3)) for value in level]
    low, high = table1.bootstrap_interval(spread)
    middle = np.concatenate(spread)
    assert low < table1.interquartile_mean(middle) < high
    # The middle half are 18 runs; seeds of 3 draws have a deviation of 3 sqrt(2 / 3) around their mean.
    assert 0.5 < (high - low) / (2 * 1.96 * 3 * (2 / 3) ** 0.5 / 18**0.5) < 1.5
