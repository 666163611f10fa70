"""Calibration: known temperatures are found, and errors are those worked out by hand."""

import pytest
import torch
from torch import Tensor

from training.bundle.manifest import Score
from training.calibrate import (
    TEMPERATURES,
    expected_calibration_error,
    fit_ood,
    fit_temperature,
    negative_log_likelihood,
)


def drawn(temperature: float, count: int = 60_000, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from what they say at a temperature."""
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(count, classes, generator=random)
    chances = (logits.double() / temperature).softmax(1)
    return logits, torch.multinomial(chances, 1, generator=random).squeeze(1)


def two_classes(*pictures: tuple[float, bool]) -> tuple[Tensor, Tensor]:
    """Logits that are this confident of class 0, and labels that make them right or wrong."""
    confidence = torch.tensor([confident for confident, _ in pictures], dtype=torch.float64)
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1).float()
    return logits, torch.tensor([0 if right else 1 for _, right in pictures])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5, 8.0])
def test_a_known_temperature_is_found(temperature: float) -> None:
    assert fit_temperature(*drawn(temperature)).temperature == pytest.approx(temperature, rel=0.06)


def test_a_better_temperature_lowers_loss_and_calibration_error() -> None:
    logits, labels = drawn(2.5)
    found = fit_temperature(logits, labels).temperature
    assert negative_log_likelihood(logits, labels, found) < negative_log_likelihood(logits, labels, 1.0)
    assert expected_calibration_error(logits, labels, found) < expected_calibration_error(logits, labels, 1.0) / 3


def test_logits_that_say_nothing_keep_temperature_1() -> None:
    assert fit_temperature(torch.zeros(10, 3), torch.arange(10) % 3).temperature == 1.0


def test_the_temperature_stays_in_bounds_where_every_answer_is_right() -> None:
    logits = torch.eye(3).repeat(5, 1)
    assert fit_temperature(logits, logits.argmax(1)).temperature == pytest.approx(TEMPERATURES[0], rel=1e-3)


@pytest.mark.parametrize(
    ("pictures", "error"),
    [
        ([(0.8, True)] * 8 + [(0.8, False)] * 2, 0.0),
        ([(0.8, True)] * 5 + [(0.8, False)] * 5, 0.3),
        ([(0.8, True)] * 10, 0.2),
        # Two bins, too sure in one and not sure enough in the other: they don't cancel.
        ([(0.9, True), (0.9, False), (0.6, True), (0.6, True)], (0.4 + 0.4) / 2),
        # 0.61 and 0.65 share one of 15 bins, where their errors cancel.
        ([(0.61, True), (0.65, False)], 0.63 - 0.5),
    ],
)
def test_the_calibration_error_is_the_one_worked_out_by_hand(pictures: list[tuple[float, bool]], error: float) -> None:
    assert expected_calibration_error(*two_classes(*pictures), temperature=1.0) == pytest.approx(error, abs=1e-6)


def test_full_confidence_falls_into_the_last_bin() -> None:
    logits, labels = torch.tensor([[1000.0, 0.0], [1000.0, 0.0]]), torch.tensor([0, 1])
    assert expected_calibration_error(logits, labels, 1.0) == 0.5


def test_the_loss_is_in_nats() -> None:
    logits, labels = two_classes((0.8, True), (0.5, False))
    assert negative_log_likelihood(logits, labels, 1.0) == pytest.approx(-torch.tensor([0.8, 0.5]).log().mean().item())


@pytest.mark.parametrize("score", ["energy", "max_logit", "max_probability"])
@pytest.mark.parametrize("rate", [0.95, 0.5])
def test_the_wanted_share_of_the_hold_out_passes_the_threshold(score: Score, rate: float) -> None:
    ood = fit_ood(drawn(1.0, count=1000)[0], score, 1.5, rate)
    assert ood.score == score
    assert ood.true_positive_rate == pytest.approx(rate, abs=0.002)


def test_a_hold_out_of_one_picture_passes() -> None:
    assert fit_ood(torch.tensor([[1.0, 4.0]]), "max_logit", 1.0).model_dump() == {
        "score": "max_logit",
        "threshold": 4.0,
        "true_positive_rate": 1.0,
    }
