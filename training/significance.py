"""How much of a difference between two classifiers is noise. Arrays in, figures out; what draws, draws from `random`.

A classifier's errors and another's on the same pictures are paired: `fixed` counts the pictures that only the first has
right, `broken` those that only the second has right. docs/gate.md has the references.
"""

from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]  # [N], indices of classes
Flags = NDArray[np.bool_]  # [N]
Shares = NDArray[np.float64]

ELEMENTS_AT_ONCE = 2_000_000  # of drawn arrays; bounds memory, changes no result


class Interval(NamedTuple):
    low: float
    high: float


def wilson(right: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided interval of a share (Wilson, 1927)."""
    z = _quantile(confidence)
    middle = (right + z**2 / 2) / (n + z**2)
    half = z / (n + z**2) * (right * (n - right) / n + z**2 / 4) ** 0.5
    return Interval(max(0.0, middle - half), min(1.0, middle + half))


def mcnemar(fixed: int, broken: int) -> float:
    """The chance of fixing so many if fixing and breaking were equally likely: exact and one-sided (McNemar, 1947)."""
    return sign_test(fixed, fixed + broken)


def sign_test(heads: int, tosses: int) -> float:
    """The chance that a fair coin shows at least so many heads: exact, by counting all that it can show."""
    ways = total = 1  # to show `shown` heads, and at least so many; from all heads downward
    for shown in range(tosses, heads, -1):
        ways = ways * shown // (tosses - shown + 1)
        total += ways
    return total / 2**tosses


def paired_difference(fixed: int, broken: int, n: int, confidence: float = 0.95) -> Interval:
    """Two-sided interval of the gain in accuracy on n pictures (Bonett and Price, 2012).

    Wald's with one more picture fixed and one more broken, so that it has a width where nothing changed.
    """
    gained, lost = (fixed + 1) / (n + 2), (broken + 1) / (n + 2)
    half = _quantile(confidence) * np.sqrt((gained + lost - (gained - lost) ** 2) / (n + 2))
    return Interval(max(-1.0, float(gained - lost - half)), min(1.0, float(gained - lost + half)))


def _quantile(confidence: float) -> float:
    """How many standard deviations to either side of its mean hold this share of a normal distribution."""
    return NormalDist().inv_cdf((1 + confidence) / 2)


def macro_recall(labels: Labels, answers: Labels) -> float:
    """The mean over classes of the share that is right: 1/K for whoever guesses, however unequal the classes are."""
    table = _table(labels, answers)
    there = table.sum(1) > 0
    return float((table.diagonal()[there] / table.sum(1)[there]).mean())


def guessing(labels: Labels, answers: Labels, random: np.random.Generator, shuffles: int = 5_000) -> float:
    """The chance of such a mean recall if the labels had nothing to do with the pictures: a permutation test."""
    there = np.bincount(labels, minlength=int(answers.max()) + 1)
    worth = 1 / np.maximum(there, 1)[answers]  # [N], of a picture that is right, up to the number of classes
    as_good = 0
    for count in _batches(shuffles, len(labels)):
        shuffled = random.permuted(np.broadcast_to(labels, (count, len(labels))), axis=1)
        as_good += int(((shuffled == answers) @ worth >= (labels == answers) @ worth - 1e-9).sum())
    return (as_good + 1) / (shuffles + 1)


def macro_f1(labels: Labels, answers: Labels) -> float:
    """The mean over classes that are there of 2 x right / (there + answered)."""
    table = _table(labels, answers)
    there = table.sum(1) > 0
    return float((2 * table.diagonal() / np.maximum(table.sum(0) + table.sum(1), 1))[there].mean())


def macro_f1_gains(
    labels: Labels, candidate: Labels, active: Labels, random: np.random.Generator, resamples: int = 10_000
) -> Shares:
    """Macro-F1 of one less that of the other, [resamples]: a paired bootstrap, stratified by class.

    Pictures of one class that got the same two answers are alike, so their numbers are drawn, not the pictures.
    """
    classes = int(max(labels.max(), candidate.max(), active.max())) + 1
    right = np.zeros((2, classes, resamples), np.int32)
    answered = np.zeros((2, classes, resamples), np.int32)
    sizes = np.bincount(labels, minlength=classes)
    for label in np.flatnonzero(sizes):
        mine = labels == label
        kinds, counts = np.unique(np.stack([candidate[mine], active[mine]]), axis=1, return_counts=True)  # [2, kinds]
        drawn = random.multinomial(sizes[label], counts / sizes[label], size=resamples).astype(np.int32)
        for answers, number in zip(kinds.T, drawn.T, strict=True):
            for which, answer in enumerate(answers):
                answered[which, answer] += number
                if answer == label:
                    right[which, answer] += number
    there = sizes > 0
    f1 = 2 * right[:, there] / (answered[:, there] + sizes[there, None])  # [2, classes, resamples]
    gains: Shares = (f1[0] - f1[1]).mean(0)
    return gains


def calibration_error(confidence: Shares, right: Flags, bins: int = 15) -> float:
    """ECE: how far confidence is from accuracy over equal bins of confidence, weighted by their share of pictures."""
    return float(np.abs((right - confidence) @ _binned(confidence, bins)).sum() / len(right))


def calibration_bias(confidence: Shares, random: np.random.Generator, draws: int = 1_000) -> float:
    """The ECE that this many pictures give when confidence is the very truth (Vaicenavicius et al., 2019)."""
    binned = _binned(confidence)
    total = 0.0
    for count in _batches(draws, len(confidence)):
        right = random.random((count, len(confidence))) < confidence
        total += float(np.abs((right - confidence) @ binned).sum())
    return total / len(confidence) / draws


def calibration_noise(
    first: tuple[Shares, Flags], second: tuple[Shares, Flags], random: np.random.Generator, resamples: int = 1_000
) -> float:
    """The standard error of the difference of two ECEs on the same pictures: a paired bootstrap."""
    n = len(first[0])
    gaps = [(right - confidence)[:, None] * _binned(confidence) for confidence, right in (first, second)]  # [N, bins]
    differences = []
    for count in _batches(resamples, n):
        picked = random.integers(n, size=(count, n)) + n * np.arange(count)[:, None]
        weights = np.bincount(picked.ravel(), minlength=count * n).reshape(count, n)  # how often each was picked
        one, other = (np.abs(weights @ gap).sum(1) / n for gap in gaps)
        differences.append(one - other)
    return float(np.concatenate(differences).std())


def _table(labels: Labels, answers: Labels) -> NDArray[np.int64]:
    """Counts [K, K]: row is the true class, column the answer."""
    classes = int(max(labels.max(), answers.max())) + 1
    return np.bincount(labels * classes + answers, minlength=classes**2).reshape(classes, classes)


def _binned(confidence: Shares, bins: int = 15) -> Shares:
    """[N, bins]: 1 in the bin that holds the confidence, else 0."""
    index = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    member: Shares = (index[:, None] == np.arange(bins)).astype(np.float64)
    return member


def _batches(draws: int, width: int) -> list[int]:
    """Draws in groups that fit in memory."""
    most = max(1, ELEMENTS_AT_ONCE // width)
    whole, rest = divmod(draws, most)
    return [most] * whole + [rest] * bool(rest)
