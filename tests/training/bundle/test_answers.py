"""Logits to answers: probabilities that sum to one, ranks, and whether to believe them."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tests.tiny import make_bundle
from training.bundle import store
from training.bundle.answers import Answer, Logits, Ranked, answers, familiarity, probabilities
from training.bundle.manifest import Calibration, Manifest, OutOfDistribution

COLOURS = ("red", "green", "blue")


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of three colours; an input is known where its best logit is 1 or more."""
    ref = make_bundle(tmp_path)
    ood = OutOfDistribution(score="max_logit", threshold=1.0, true_positive_rate=0.95)
    update = {"classes": COLOURS, "calibration": Calibration(temperature=2.0), "ood": ood}
    return store.read_manifest(tmp_path, ref).model_copy(update=update)


def logits(*rows: list[float]) -> Logits:
    return np.array(rows, dtype=np.float32)


def test_the_answer_is_ranked_calibrated_and_judged(manifest: Manifest) -> None:
    red, green, blue = np.exp([1.0, 0.0, 2.0]) / np.exp([1.0, 0.0, 2.0]).sum()
    scores = [
        Ranked(label="blue", index=2, probability=pytest.approx(blue)),
        Ranked(label="red", index=0, probability=pytest.approx(red)),
        Ranked(label="green", index=1, probability=pytest.approx(green)),
    ]
    assert answers(logits([2, 0, 4]), manifest, top_k=3) == [Answer(scores, in_distribution=True)]


def test_top_k_shortens_the_list_but_not_the_probabilities(manifest: Manifest) -> None:
    [long], [short] = (answers(logits([2, 0, 4]), manifest, top_k) for top_k in (3, 1))
    assert short.scores == long.scores[:1] == [long.best]


def test_each_picture_has_its_own_answer(manifest: Manifest) -> None:
    given_ = answers(logits([5, 0, 0], [0, 5, 0], [0.9, 0, 0]), manifest, top_k=1)
    assert [(answer.best["label"], answer.in_distribution) for answer in given_] == [
        ("red", True),
        ("green", True),
        ("red", False),
    ]


def test_equal_logits_keep_the_order_of_the_classes(manifest: Manifest) -> None:
    [answer] = answers(logits([1, 1, 1]), manifest, top_k=3)
    assert [score["label"] for score in answer.scores] == list(COLOURS)


def test_the_threshold_itself_is_in_distribution(manifest: Manifest) -> None:
    below, at = answers(logits([np.nextafter(np.float32(1), np.float32(0)), 0, 0], [1, 0, 0]), manifest, top_k=1)
    assert (below.in_distribution, at.in_distribution) == (False, True)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        ("max_logit", 3.0),
        ("energy", np.log(np.exp(3.0) + np.exp(1.0))),
        ("max_probability", 1 / (1 + np.exp(-2.0 / 4))),
    ],
)
def test_familiarity_is_what_it_says(score: str, expected: float) -> None:
    assert familiarity(logits([3, 1]), score, temperature=4.0) == pytest.approx([expected])


@given(
    values=arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, max_side=8),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    ),
    temperature=st.floats(0.05, 20),
)
def test_probabilities_sum_to_one_whatever_the_logits(values: Logits, temperature: float) -> None:
    rows = probabilities(values, temperature)
    assert rows.sum(axis=1) == pytest.approx(1)
    assert (rows.max(axis=1) == rows[np.arange(len(rows)), values.argmax(axis=1)]).all()


@given(offset=st.floats(-100, 100, width=32, allow_subnormal=False), temperature=st.floats(0.05, 20))
def test_a_constant_added_to_all_logits_changes_nothing(offset: float, temperature: float) -> None:
    values = logits([1, 2, 4])
    assert probabilities(values + np.float32(offset), temperature) == pytest.approx(
        probabilities(values, temperature), abs=1e-3
    )


def test_huge_logits_have_a_finite_energy() -> None:
    assert familiarity(logits([3e4, 3e4]), "energy", 1.0) == pytest.approx([3e4 + np.log(2)])
