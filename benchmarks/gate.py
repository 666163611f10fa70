"""How often the gate errs, on made-up classifiers whose worth is known: python -m benchmarks.gate

Prints the tables of docs/gate.md. A classifier's confidence is drawn first and is the very chance that it is right, so
it is calibrated; two of them share most of what makes a picture hard, and most of their luck.
"""

import argparse
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit
from scipy.stats import norm

from training import gate, significance
from training.gate import Evidence, Guard, Verdict

SHARED = 0.9  # correlation of two classifiers' luck
SPREAD = 2.0  # of the logit of confidence


class Classifier(NamedTuple):
    probabilities: NDArray[np.float64]  # [N, K]
    right: NDArray[np.bool_]  # [N]


def labels_of(random: np.random.Generator, n: int, classes: int) -> NDArray[np.int64]:
    return random.permutation(np.arange(n) % classes)


def classifiers(
    random: np.random.Generator, labels: NDArray[np.int64], classes: int, *accuracies: float, sharpen: float = 1.0
) -> list[Classifier]:
    """One for each accuracy; `sharpen` above 1 makes the first surer than it may be."""
    hard, lucky = random.standard_normal((2, len(labels)))
    made = []
    for index, accuracy in enumerate(accuracies):
        confidence = expit(centre(accuracy) + SPREAD * share(random, hard))
        confidence = np.maximum(confidence, 1 / classes + 1e-3)
        right = norm.cdf(share(random, lucky)) < confidence
        wrong = (labels + random.integers(1, classes, len(labels))) % classes
        answers = np.where(right, labels, wrong)
        power = sharpen if index == 0 else 1.0
        said = confidence**power / (confidence**power + (1 - confidence) ** power)
        probabilities = np.repeat(((1 - said) / (classes - 1))[:, None], classes, axis=1)
        probabilities[np.arange(len(labels)), answers] = np.maximum(said, 1 / classes + 1e-3)
        made.append(Classifier(probabilities, right))
    return made


def share(random: np.random.Generator, common: NDArray[np.float64]) -> NDArray[np.float64]:
    return SHARED * common + np.sqrt(1 - SHARED**2) * random.standard_normal(len(common))


def centre(accuracy: float) -> float:
    """The middle logit at which confidence is right on average."""
    spread = SPREAD * norm.ppf((np.arange(2000) + 0.5) / 2000)
    return float(brentq(lambda middle: expit(middle + spread).mean() - accuracy, -20, 20))


def names(classes: int) -> list[str]:
    return [f"class-{index}" for index in range(classes)]


# --- kinds of jobs ---


def same_classes(
    n: int, classes: int, gain: float, *, active: float = 0.8, cross_validated: bool = False, sharpen: float = 1.0
) -> Callable[[int], Verdict]:
    """The candidate is better by `gain` than an active version of this accuracy."""

    def job(seed: int) -> Verdict:
        random = np.random.default_rng([1, seed])
        labels = labels_of(random, n, classes)
        new, old = classifiers(random, labels, classes, active + gain, active, sharpen=sharpen)
        return gate.judge(
            Evidence(names(classes), labels, new.probabilities, old.probabilities, cross_validated=cross_validated)
        )

    return job


def one_class_lost(n: int, classes: int, gain: float, fall: float) -> Callable[[int], Verdict]:
    """Better in all, but one class's pictures are given away to another."""

    def job(seed: int) -> Verdict:
        random = np.random.default_rng([2, seed])
        labels = labels_of(random, n, classes)
        new, old = classifiers(random, labels, classes, 0.8 + gain, 0.8)
        lost = (labels == 0) & (random.random(n) < (fall + gain) / (0.8 + gain))
        new.probabilities[lost, 0], new.probabilities[lost, 1] = 0.01, 0.9
        return gate.judge(Evidence(names(classes), labels, new.probabilities, old.probabilities))

    return job


def new_classes(n: int, classes: int, accuracy: float, nearest: float) -> Callable[[int], Verdict]:
    def job(seed: int) -> Verdict:
        random = np.random.default_rng([3, seed])
        labels = labels_of(random, n, classes)
        new, mean = classifiers(random, labels, classes, accuracy, nearest)
        known = names(classes)
        return gate.judge(
            Evidence(known, labels, new.probabilities, nearest_mean=mean.probabilities.argmax(1), new_classes=known)
        )

    return job


def shuffled(n: int, classes: int, *, equal: bool = True, beside_active: bool = False) -> Callable[[int], Verdict]:
    """Answers that know nothing of the labels; so do the others'. Unequal: the first class has half of the pictures."""

    def job(seed: int) -> Verdict:
        random = np.random.default_rng([4, seed])
        sizes = np.full(classes, 1.0) if equal else np.array([classes - 1.0] + [1.0] * (classes - 1))
        labels = np.sort(
            np.concatenate([np.arange(classes), random.choice(classes, n - classes, p=sizes / sizes.sum())])
        )
        new, old = random.dirichlet(sizes, (2, n))
        known = names(classes)
        if beside_active:
            return gate.judge(Evidence(known, labels, new, old))
        return gate.judge(Evidence(known, labels, new, nearest_mean=old.argmax(1), new_classes=known))

    return job


def guarded(n: int, loss: float, margin: float) -> Callable[[int], Verdict]:
    """A good candidate that loses so much of what the base knows: 2 % of its answers change besides."""

    def job(seed: int) -> Verdict:
        random = np.random.default_rng([5, seed])
        labels = labels_of(random, 100, 5)
        new, old = classifiers(random, labels, 5, 0.99, 0.5)
        draws = random.random(n)
        base = draws > 0.01  # the others, the candidate fixes
        guard = Guard(candidate=draws < 0.99 - loss, base=base)
        evidence = Evidence(names(5), labels, new.probabilities, old.probabilities, guard=guard)
        return gate.judge(evidence, guard_margin=margin)

    return job


# --- tables ---


HEAD = """
| job | promoted | kept | refused | needs review | checks that failed |
|---|---|---|---|---|---|"""


def table(title: str, rows: Iterable[tuple[str, Callable[[int], Verdict]]], jobs: int) -> None:
    """One row for each kind of job: the share of each decision, and the checks that failed most."""
    print(f"\n{title}, {jobs} jobs each\n{HEAD}")
    for name, job in rows:
        verdicts = [job(seed) for seed in range(jobs)]
        decisions = Counter(verdict.decision for verdict in verdicts)
        failed = Counter(check.name for verdict in verdicts for check in verdict.checks if check.passed is False)
        shares = [percent(decisions[which] / jobs) for which in ("promote", "keep", "refuse", "needs_review")]
        often = ", ".join(f"{check} {percent(count / jobs)}" for check, count in failed.most_common(3))
        print(f"| {name} | {' | '.join(shares)} | {often} |", flush=True)


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def wilson_rule(n: int, classes: int, accuracy: float, nearest: float, jobs: int) -> float:
    """How often the lower bound of accuracy is above the nearest class mean's figure: the rule that ours replaced."""
    passed = 0
    for seed in range(jobs):
        random = np.random.default_rng([3, seed])
        new, mean = classifiers(random, labels_of(random, n, classes), classes, accuracy, nearest)
        passed += significance.wilson(int(new.right.sum()), n).low > mean.right.mean()
    return passed / jobs


def ece_rule(n: int, classes: int, gain: float, jobs: int) -> float:
    """How often ECE is within a point of the active version's, both as measured: the rule that ours replaced."""
    passed = 0
    for seed in range(jobs):
        random = np.random.default_rng([1, seed])
        found = classifiers(random, labels_of(random, n, classes), classes, 0.8 + gain, 0.8)
        new, old = (significance.calibration_error(made.probabilities.max(1), made.right) for made in found)
        passed += new <= old + 0.01
    return passed / jobs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200, help="for each row; shuffled labels get more")
    jobs = parser.parse_args().jobs
    table(
        "Same classes, active version right on 80 %",
        [
            (f"{n} pictures of {classes} classes, truly {100 * gain:+.0f} points", same_classes(n, classes, gain))
            for n, classes, gains in (
                (45, 5, (0.0, 0.05, 0.1)),
                (150, 5, (-0.03, 0.0, 0.03, 0.05, 0.1)),
                (300, 10, (-0.03, 0.0, 0.03, 0.05, 0.1)),
                (1500, 10, (0.0, 0.03)),
            )
            for gain in gains
        ],
        jobs,
    )
    table(
        "The same, cross-validated",
        [
            (
                f"{n} pictures of 5 classes, truly {100 * gain:+.0f} points",
                same_classes(n, 5, gain, cross_validated=True),
            )
            for n in (50, 250)
            for gain in (0.0, 0.05, 0.1)
        ],
        jobs,
    )
    table(
        "A fault beside a gain of 10 points",
        [
            ("one class of 5 loses 20 points, 300 pictures", one_class_lost(300, 5, 0.1, 0.2)),
            ("one class of 10 loses 40 points, 300 pictures", one_class_lost(300, 10, 0.1, 0.4)),
            ("one class of 10 loses 20 points, 1500 pictures", one_class_lost(1500, 10, 0.1, 0.2)),
            ("twice too sure, 300 pictures", same_classes(300, 5, 0.1, sharpen=2)),
            ("twice too sure, 1500 pictures", same_classes(1500, 10, 0.1, sharpen=2)),
        ],
        jobs,
    )
    table(
        "Guard, 2 % of the answers changed",
        [
            (f"{n} test pictures, truly {100 * loss:g} points lost, {100 * margin:g} allowed", guarded(n, loss, margin))
            for n, margin in ((10_000, 0.003), (10_000, 0.005), (2_000, 0.005), (2_000, 0.01), (1_000, 0.015))
            for loss in (0.0, margin, 2 * margin)
        ],
        jobs,
    )
    table(
        "New classes",
        [
            (
                f"{n} pictures of {classes} classes, truly {percent(accuracy)}, nearest class mean {percent(nearest)}",
                new_classes(n, classes, accuracy, nearest),
            )
            for n, classes in ((25, 5), (100, 5), (1000, 20))
            for accuracy, nearest in ((0.8, 0.75), (0.8, 0.8), (0.7, 0.8), (0.6, 0.8))
        ],
        jobs,
    )
    table(
        "Shuffled labels",
        [(f"{n} pictures of 5 classes", shuffled(n, 5)) for n in (20, 50, 100, 300)],
        25 * jobs // 2,
    )
    table(
        "Shuffled labels",
        [
            *((f"{n} pictures, half of them of one class", shuffled(n, 5, equal=False)) for n in (20, 300)),
            *((f"{n} pictures, beside an active version", shuffled(n, 5, beside_active=True)) for n in (20, 300)),
        ],
        2 * jobs,
    )
    print("\nRules that these replaced:\n")
    for n in (100, 150, 1000):
        rate = percent(wilson_rule(n, 5, 0.85, 0.8, jobs))
        print(f"- Wilson's lower bound above the nearest class mean, {n} pictures, truly 85 % and 80 %: {rate} pass")
    for n in (45, 150, 300, 1500):
        rate = percent(ece_rule(n, 5, 0.05, jobs))
        print(f"- ECE within a point as measured, {n} pictures, both calibrated, truly +5 points: {rate} pass")


if __name__ == "__main__":
    main()
