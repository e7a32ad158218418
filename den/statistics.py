"""What a difference between two networks is worth: several seeds, and paired tests over the same test images.

Pure functions on arrays. "Correct" is a boolean array over the test images in one fixed order, true where the network
was right; `correct` makes it of the arrays in a run folder's evaluations.

Suffixes: N test images, S seeds (trained networks of one kind), R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class Spread:
    """Several seeds of one number: how many, their mean, and their standard deviation (None for a single one)."""

    seeds: int
    mean: float
    std: float | None


@dataclass(frozen=True)
class McNemar:
    """The exact test of two networks on the same images.

    only_a, only_b: images that the one had right and the other wrong. p: two-sided.
    """

    only_a: int
    only_b: int
    p: float


@dataclass(frozen=True)
class Difference:
    """Accuracy of a less accuracy of b, in percentage points, with a confidence interval [low, high].

    p: two-sided, of the difference being 0: twice the share of resamples on the far side of 0, at least 1 / resamples.
    """

    points: float
    low: float
    high: float
    p: float


def correct(prediction: ArrayLike, label: ArrayLike) -> NDArray[np.bool_]:
    """Where predictions [N] are the labels [N]. Raises ValueError for arrays that are empty or of other shapes."""
    predictions, labels = np.asarray(prediction), np.asarray(label)
    if predictions.shape != labels.shape or predictions.ndim != 1 or not len(predictions):
        raise ValueError(
            f"prediction has shape {predictions.shape} and label {labels.shape}; both must be [N], a number an image"
        )
    return predictions == labels


def spread(values: Sequence[float] | ArrayLike) -> Spread:
    """Mean and sample standard deviation (over n - 1) of one number a seed. Raises ValueError for none at all."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"values has shape {array.shape}; it must be [S], a number a seed")
    return Spread(len(array), float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else None)


def mcnemar(correct_a: ArrayLike, correct_b: ArrayLike) -> McNemar:
    """McNemar's exact test (McNemar 1947) of two networks over the same images.

    Of the images on which one network alone is right, each falls to either side with probability 1/2 if the networks
    are equally good: p is the two-sided binomial probability of a split at least as uneven.

    Args:
        correct_a, correct_b: boolean [N], the same images in the same order.

    Raises: ValueError for arrays of other shapes or kinds.
    """
    a_N, b_N = _pair(correct_a, correct_b)
    only_a, only_b = int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum())
    n, fewer = only_a + only_b, min(only_a, only_b)
    if only_a == only_b:
        return McNemar(only_a, only_b, 1.0)
    log_terms = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    top = max(log_terms)
    log_tail = top + math.log(math.fsum(math.exp(term - top) for term in log_terms)) - n * math.log(2)
    return McNemar(only_a, only_b, min(1.0, 2 * math.exp(log_tail)))


def paired_bootstrap(
    correct_a: ArrayLike, correct_b: ArrayLike, *, resamples: int = 10_000, confidence: float = 0.95, seed: int = 0
) -> Difference:
    """Difference in accuracy of two networks, over test images drawn anew (Efron's percentile bootstrap).

    Every resample draws N images with replacement, the same for both networks.

    Args:
        correct_a, correct_b: boolean [N], the same images in the same order.
        resamples: how many. confidence: of the interval, between 0 and 1. seed: of the draws.

    Raises: ValueError for arrays of other shapes or kinds, and for numbers out of range.
    """
    a_N, b_N = _pair(correct_a, correct_b)
    return bootstrap_seeds(a_N[None], b_N[None], resamples=resamples, confidence=confidence, seed=seed)


def bootstrap_seeds(
    correct_a: ArrayLike,
    correct_b: ArrayLike,
    *,
    resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    paired: bool = False,
) -> Difference:
    """The same of the mean accuracies of several seeds: test images and, independently, each side's seeds drawn anew.

    So the interval covers both the test set's and the training's chance. Few seeds make it too narrow by a factor near
    sqrt((S - 1) / S), as every bootstrap of few values.

    Args:
        correct_a, correct_b: boolean [S, N] of each kind of network, the same images in the same order; their S may
            differ.
        resamples, confidence, seed: as in `paired_bootstrap`.
        paired: the seeds of both are the same trained networks, and are drawn together.

    Raises: ValueError for arrays of other shapes or kinds, and for numbers out of range.
    """
    a_SN, b_SN = _boolean("correct_a", correct_a, 2), _boolean("correct_b", correct_b, 2)
    if a_SN.shape[1] != b_SN.shape[1]:
        raise ValueError(f"correct_a has {a_SN.shape[1]} images and correct_b {b_SN.shape[1]}; they must be the same")
    if paired and len(a_SN) != len(b_SN):
        raise ValueError(f"correct_a has {len(a_SN)} seeds and correct_b {len(b_SN)}; paired, they must be the same")
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must be between 0 and 1")
    generator = np.random.default_rng(seed)
    both_SN = np.concatenate([a_SN, b_SN])
    images = both_SN.shape[1]
    # Images with the same outcomes are interchangeable, so a resample is a draw of how many fall on each pattern.
    pattern, count = np.unique(both_SN, axis=1, return_counts=True)
    drawn = generator.multinomial(images, count / images, size=resamples)
    accuracy_RS = drawn @ pattern.T.astype(np.float64) / images
    drawn_RS = generator.integers(len(a_SN), size=(resamples, len(a_SN)))
    other_RS = drawn_RS if paired else generator.integers(len(b_SN), size=(resamples, len(b_SN)))
    means = [
        np.take_along_axis(accuracy_RS, chosen_RS, axis=1).mean(1) for chosen_RS in (drawn_RS, len(a_SN) + other_RS)
    ]
    difference_R = 100 * (means[0] - means[1])
    outside = (1 - confidence) / 2
    low, high = np.quantile(difference_R, (outside, 1 - outside))
    side = min((difference_R <= 0).mean(), (difference_R >= 0).mean())
    return Difference(
        points=float(100 * (a_SN.mean() - b_SN.mean())),
        low=float(low),
        high=float(high),
        p=float(min(1.0, max(2 * side, 1 / resamples))),
    )


def _boolean(name: str, value: Any, dimensions: int) -> NDArray[np.bool_]:
    array = np.asarray(value)
    shape = "[N]" if dimensions == 1 else "[S, N]"
    if array.dtype != np.bool_:
        raise ValueError(f"{name} has dtype {array.dtype}; it must be boolean {shape}: correct(prediction, label)")
    if array.ndim != dimensions or not array.size:
        raise ValueError(f"{name} has shape {array.shape}; it must be {shape}, and not empty")
    return array


def _pair(correct_a: Any, correct_b: Any) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    a_N, b_N = _boolean("correct_a", correct_a, 1), _boolean("correct_b", correct_b, 1)
    if len(a_N) != len(b_N):
        raise ValueError(f"correct_a has {len(a_N)} images and correct_b {len(b_N)}; they must be the same images")
    return a_N, b_N
