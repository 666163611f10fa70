"""Significance: published and hand-worked values, slow methods beside the fast ones, and what must rise with what."""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from training import calibrate
from training.significance import (
    calibration_bias,
    calibration_error,
    calibration_noise,
    guessing,
    macro_f1,
    macro_f1_gains,
    macro_recall,
    mcnemar,
    paired_difference,
    sign_test,
    wilson,
)

counts = st.integers(0, 60)


def seeded(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize(  # Newcombe (1998), table I, method 3
    ("right", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_is_the_published_one(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(
    ("fixed", "broken", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 1 / 32),
        (7, 1, 9 / 256),
        (3, 3, 42 / 64),
        (0, 5, 1.0),
        (41, 6, sum(math.comb(47, k) for k in range(41, 48)) / 2**47),
    ],
)
def test_mcnemars_p_is_a_share_of_coin_tosses(fixed: int, broken: int, p: float) -> None:
    assert mcnemar(fixed, broken) == pytest.approx(p)


@given(counts, counts)
def test_to_fix_one_more_never_makes_it_less_sure_and_to_break_one_more_never_surer(fixed: int, broken: int) -> None:
    assert mcnemar(fixed + 1, broken) <= mcnemar(fixed, broken) <= mcnemar(fixed, broken + 1)


@given(counts, counts)
def test_fixing_and_breaking_are_mirror_images(fixed: int, broken: int) -> None:
    ties = math.comb(fixed + broken, fixed) / 2 ** (fixed + broken)
    assert mcnemar(fixed, broken) + mcnemar(broken, fixed) == pytest.approx(1 + ties)


def test_a_sign_test_counts_heads() -> None:
    assert (sign_test(8, 10), sign_test(0, 0)) == (pytest.approx((45 + 10 + 1) / 1024), 1.0)


def test_a_sign_test_of_ten_thousand_tosses_is_exact_too() -> None:
    assert sign_test(5001, 10_000) == pytest.approx((1 - math.comb(10_000, 5000) / 2**10_000) / 2)
    assert sign_test(9_999, 10_000) == 0.0  # 10,001 in 2 ** 10,000: less than a float can hold


def test_a_paired_difference_worked_out_by_hand() -> None:
    centre, half = 5 / 100, 1.959964 * math.sqrt((17 / 100 - 0.05**2) / 100)
    assert paired_difference(10, 5, 98) == pytest.approx((centre - half, centre + half))


@given(counts, counts, st.integers(0, 200))
def test_a_paired_difference_holds_its_middle_and_mirrors(fixed: int, broken: int, same: int) -> None:
    n = fixed + broken + same + 1
    low, high = paired_difference(fixed, broken, n)
    assert -1 <= low <= (fixed - broken) / (n + 2) <= high <= 1
    assert paired_difference(broken, fixed, n) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("n", "gained", "lost"), [(20, 0.1, 0.1), (60, 0.15, 0.05), (1000, 0.01, 0.01)])
def test_a_paired_difference_covers_the_truth_as_often_as_it_says(n: int, gained: float, lost: float) -> None:
    drawn = seeded().multinomial(n, [gained, lost, 1 - gained - lost], size=2000)
    covered = [low <= gained - lost <= high for low, high in (paired_difference(*row[:2], n) for row in drawn.tolist())]
    assert 0.94 <= np.mean(covered) <= 0.99


# Three classes, six pictures: 0 0 0 1 1 2, answered 0 0 1 1 2 2.
LABELS = np.array([0, 0, 0, 1, 1, 2])
ANSWERS = np.array([0, 0, 1, 1, 2, 2])


def test_recall_and_f1_are_means_over_classes() -> None:
    assert macro_recall(LABELS, ANSWERS) == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert macro_f1(LABELS, ANSWERS) == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)


def test_a_class_that_no_picture_has_counts_for_nothing_but_its_wrong_answers() -> None:
    labels, answers = np.array([1, 1, 4]), np.array([1, 3, 6])
    assert macro_recall(labels, answers) == pytest.approx((1 / 2 + 0) / 2)
    assert macro_f1(labels, answers) == pytest.approx((2 / 3 + 0) / 2)


def test_the_chance_of_guessing_so_well_is_that_over_all_orders() -> None:
    found = macro_recall(LABELS, ANSWERS)
    every = [macro_recall(np.array(order), ANSWERS) >= found - 1e-9 for order in permutations(LABELS.tolist())]
    assert guessing(LABELS, ANSWERS, seeded(), 50_000) == pytest.approx(np.mean(every), abs=0.01)


def test_to_answer_always_the_same_is_to_guess() -> None:
    assert guessing(LABELS, np.zeros_like(LABELS), seeded()) == 1.0


def test_to_be_always_right_is_no_guess() -> None:
    labels = np.arange(40) % 2
    assert guessing(labels, labels, seeded()) == pytest.approx(1 / 5001)


def noisy(labels: NDArray[np.int64], share: float, seed: int) -> NDArray[np.int64]:
    """Labels, of which this share is drawn anew."""
    random = seeded(seed)
    return np.where(random.random(len(labels)) < share, random.integers(0, labels.max() + 1, len(labels)), labels)


def test_the_bootstrap_of_counts_is_the_bootstrap_of_pictures() -> None:
    labels = np.repeat([0, 1, 2, 3], [60, 30, 12, 8])
    candidate, active = noisy(labels, 0.2, 1), noisy(labels, 0.4, 2)
    random = seeded(3)
    slow = []
    for _ in range(3000):
        picked = np.concatenate(
            [random.choice(np.flatnonzero(labels == index), (labels == index).sum()) for index in range(4)]
        )
        slow.append(macro_f1(labels[picked], candidate[picked]) - macro_f1(labels[picked], active[picked]))
    fast = macro_f1_gains(labels, candidate, active, seeded())
    assert fast.shape == (10_000,)
    assert np.quantile(fast, [0.05, 0.5, 0.95]) == pytest.approx(np.quantile(slow, [0.05, 0.5, 0.95]), abs=0.01)


def test_a_classifier_gains_nothing_on_itself() -> None:
    answers = noisy(LABELS.repeat(5), 0.3, 1)
    assert not macro_f1_gains(LABELS.repeat(5), answers, answers, seeded(), 100).any()


@given(st.integers(0, 2**32 - 1))
def test_calibration_error_is_the_one_of_the_report(seed: int) -> None:
    random = seeded(seed)
    logits, labels = random.normal(size=(40, 4)).astype(np.float32), random.integers(0, 4, 40)
    chances = torch.from_numpy(logits).double().softmax(1).numpy()
    expected = calibrate.expected_calibration_error(torch.from_numpy(logits), torch.from_numpy(labels), 1.0)
    assert calibration_error(chances.max(1), chances.argmax(1) == labels) == pytest.approx(expected, abs=1e-9)


def test_few_pictures_give_a_perfect_confidence_this_calibration_error() -> None:
    chances = [math.comb(10, k) * 0.8**k * 0.2 ** (10 - k) for k in range(11)]
    expected = sum(chance * abs(k / 10 - 0.8) for k, chance in enumerate(chances))
    assert calibration_bias(np.full(10, 0.8), seeded(), 20_000) == pytest.approx(expected, abs=2e-3)


def test_the_noise_of_a_difference_of_calibration_errors() -> None:
    """Of one bin each, far from calibrated, so that the error is a mean: its standard error is known."""
    random = seeded()
    first, second = random.random(400) < 0.6, random.random(400) < 0.7
    sure = np.full(400, 0.95)
    gaps = first.astype(float) - second
    noise = calibration_noise((sure, first), (sure, second), random, 4000)
    assert noise == pytest.approx(gaps.std() / math.sqrt(400), rel=0.06)
    assert calibration_noise((sure, first), (sure, first), random) == 0.0
