"""Seeds and paired tests, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from den.statistics import bootstrap_seeds, correct, mcnemar, paired_bootstrap, spread


def outcomes(both: int, only_a: int, only_b: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Two networks' outcomes with these counts."""
    counts = (both, only_a, only_b, neither)
    return np.repeat([True, True, False, False], counts), np.repeat([True, False, True, False], counts)


def test_spread_by_hand() -> None:
    found = spread([90.0, 92.0, 94.0])
    assert (found.seeds, found.mean, found.std) == (3, 92.0, 2.0)
    assert spread([91.5]).std is None
    with pytest.raises(ValueError, match="values has shape"):
        spread([])


def test_mcnemar_by_hand() -> None:
    """One against five: 2 * (1 + 6) / 2**6."""
    found = mcnemar(*outcomes(80, 1, 5, 14))
    assert (found.only_a, found.only_b) == (1, 5)
    assert found.p == pytest.approx(2 * 7 / 64)
    assert mcnemar(*outcomes(80, 5, 5, 10)).p == 1


@given(only_a=st.integers(0, 300), only_b=st.integers(0, 300))
def test_mcnemar_is_scipys_binomial_test(only_a: int, only_b: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(*outcomes(700, only_a, only_b, 50)).p == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_of_many_images_does_not_underflow() -> None:
    assert 0 < mcnemar(*outcomes(1000, 700, 100, 0)).p < 1e-100


def test_paired_bootstrap_agrees_with_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = outcomes(700, 90, 60, 150)
    found = paired_bootstrap(a, b, resamples=20_000)
    expected = stats.bootstrap(
        (a, b),
        lambda x, y, axis=-1: 100 * (x.mean(axis) - y.mean(axis)),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=4000,
        batch=500,
        rng=np.random.default_rng(1),
    ).confidence_interval
    assert found.points == pytest.approx(3.0)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.2)
    normal = 100 * np.sqrt((150 / 1000 - 0.03**2) / 1000)  # deviation of the mean of +1, 0, -1
    assert found.high - found.low == pytest.approx(2 * 1.96 * normal, rel=0.05)
    assert found.p == pytest.approx(2 * stats.norm.sf(3.0 / normal), rel=0.3)


def test_pairing_matters() -> None:
    """The same accuracies, on the same images or on others: the paired interval is the narrower."""
    same, apart = outcomes(895, 5, 0, 100), outcomes(800, 100, 95, 5)
    widths = [paired_bootstrap(*pair).high - paired_bootstrap(*pair).low for pair in (same, apart)]
    assert widths[0] < widths[1] / 3


def test_seeds_widen_the_interval() -> None:
    """Seeds that differ by ten points each way say less than seeds that agree, at the same mean difference."""
    images = 2000
    rows = lambda shares: np.stack([np.arange(images) < share * images for share in shares])  # noqa: E731
    agree = bootstrap_seeds(rows([0.8, 0.8, 0.8]), rows([0.7, 0.7, 0.7]))
    differ = bootstrap_seeds(rows([0.7, 0.8, 0.9]), rows([0.6, 0.7, 0.8]))
    assert agree.points == pytest.approx(differ.points) == pytest.approx(10)
    assert agree.p < 0.01 < differ.p
    # By hand: the deviation of a mean of three draws from {0.7, 0.8, 0.9} is sqrt(2/3) * 10 / sqrt(3) points.
    deviation = (differ.high - differ.low) / (2 * 1.96)
    assert deviation == pytest.approx(np.sqrt(2) * np.sqrt(2 / 3) * 10 / np.sqrt(3), rel=0.06)


def test_seeds_of_the_same_networks_are_drawn_together() -> None:
    """Seeds ten points apart, each a point better one way than the other: apart they say nothing, together all."""
    images = 2000
    rows = lambda shares: np.stack([np.arange(images) < share * images for share in shares])  # noqa: E731
    a, b = rows([0.71, 0.81, 0.91]), rows([0.70, 0.80, 0.90])
    together, apart = bootstrap_seeds(a, b, paired=True), bootstrap_seeds(a, b)
    assert together.points == apart.points == pytest.approx(1)
    assert together.p < 0.01
    assert apart.p > 0.3
    with pytest.raises(ValueError, match="correct_a has 3 seeds and correct_b 2; paired, they must be the same"):
        bootstrap_seeds(a, b[:2], paired=True)


def test_bootstrap_is_reproducible() -> None:
    a, b = outcomes(50, 9, 4, 37)
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, seed=3) != paired_bootstrap(a, b, seed=4)


def test_bad_arrays_are_named() -> None:
    right = correct([1, 2, 3], [1, 0, 3])
    assert right.tolist() == [True, False, True]
    with pytest.raises(ValueError, match=r"prediction has shape \(3,\) and label \(2,\)"):
        correct([1, 2, 3], [1, 2])
    with pytest.raises(ValueError, match="correct_b has dtype int64; it must be boolean"):
        mcnemar(right, [1, 0, 1])
    with pytest.raises(ValueError, match="correct_a has 3 images and correct_b 2"):
        mcnemar(right, right[:2])
    with pytest.raises(ValueError, match=r"correct_a has shape \(3,\); it must be \[S, N\]"):
        bootstrap_seeds(right, right[None])
    with pytest.raises(ValueError, match="confidence is 95"):
        paired_bootstrap(right, right, confidence=95)
