"""What a step lowers, worked out by hand."""

import math

import pytest
import torch
from torch import nn

from tests.tiny import TINY
from training.costs import (
    MARGIN,
    MARGIN_WEIGHT,
    cost,
    distance_from_teacher,
    energy_margin,
    held_out_cost,
    penalty,
    squared_error,
)
from training.recipes import Recipe, Teacher

OUTPUTS = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
LABELS = torch.tensor([0, 0])
PLAIN = TINY.model_copy(update={"label_smoothing": 0.0})


def entropies() -> list[float]:
    """Of both outputs with the first class: -log softmax."""
    return [math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))]


def test_cross_entropy_is_the_mean_of_all() -> None:
    assert cost(PLAIN, OUTPUTS, LABELS, None).item() == pytest.approx(sum(entropies()) / 2)


def test_smoothed_labels_give_each_class_its_share() -> None:
    recipe = PLAIN.model_copy(update={"label_smoothing": 0.2})
    others = [entropy + difference for entropy, difference in zip(entropies(), (2, -1), strict=True)]
    expected = sum(0.9 * own + 0.1 * other for own, other in zip(entropies(), others, strict=True)) / 2
    assert cost(recipe, OUTPUTS, LABELS, None).item() == pytest.approx(expected)
    assert held_out_cost(recipe, OUTPUTS, LABELS) == pytest.approx(sum(entropies()) / 2)


def test_the_squared_error_is_half_the_squared_distance_to_the_true_class() -> None:
    expected = ((2 - 1) ** 2 + 0 + (0 - 1) ** 2 + 1) / 2 / 2
    assert squared_error(OUTPUTS, LABELS).item() == pytest.approx(expected)
    recipe = PLAIN.model_copy(update={"cost": "squared error"})
    assert cost(recipe, OUTPUTS, LABELS, None).item() == held_out_cost(recipe, OUTPUTS, LABELS) == expected


def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn() -> None:
    assert distance_from_teacher(OUTPUTS, OUTPUTS + 3, 4.0).item() == pytest.approx(0, abs=1e-6)
    assert distance_from_teacher(OUTPUTS, -OUTPUTS, 4.0).item() > 0.1


def test_the_gradient_towards_a_teacher_is_as_large_whatever_the_temperature() -> None:
    lengths = []
    for temperature in (4.0, 40.0):
        logits = OUTPUTS.clone().requires_grad_()
        distance_from_teacher(logits, -OUTPUTS, temperature).backward()
        assert logits.grad is not None
        lengths.append(logits.grad.norm().item())
    assert lengths[0] == pytest.approx(lengths[1], rel=0.1)


def test_labels_and_teacher_share_the_cost() -> None:
    recipe = PLAIN.model_copy(update={"teacher": Teacher(recipe="mnist", temperature=2.0, share=0.75)})
    taught = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    labels, teacher = cost(PLAIN, OUTPUTS, LABELS, None), distance_from_teacher(OUTPUTS, taught, 2.0)
    assert cost(recipe, OUTPUTS, LABELS, taught).item() == pytest.approx(float(0.25 * labels + 0.75 * teacher))


def with_energy(energy: float, difference: float) -> list[float]:
    """Two logits, so far from each other, of this log-sum-exp."""
    low = energy - math.log(1 + math.exp(difference))
    return [low, low + difference]


def test_strangers_cost_by_how_far_their_energy_is_above_that_of_zeros_and_others_by_how_far_theirs_isn_t() -> None:
    zeros = math.log(2)
    known = torch.tensor([with_energy(zeros + MARGIN - 3, 1), with_energy(zeros + MARGIN + 1, 2)])
    strange = torch.tensor([with_energy(zeros + 2, 9), with_energy(zeros + 1, 0), with_energy(zeros - 4, 3)])
    expected = MARGIN_WEIGHT * (3**2 + 2**2 + 1) / 2
    assert energy_margin(known, strange).item() == pytest.approx(expected, rel=1e-4)
    whole = cost(PLAIN, torch.cat([known, strange]), LABELS, None)
    assert whole.item() == pytest.approx(cost(PLAIN, known, LABELS, None).item() + expected, rel=1e-4)


def test_what_class_a_stranger_resembles_is_free() -> None:
    known = torch.tensor([with_energy(10, 1)])
    for difference in (0.0, 5.0):
        assert energy_margin(known, torch.tensor([with_energy(math.log(2) - 0.01, difference)])).item() == 0


@pytest.mark.parametrize("l1", [0.0, 0.5])
def test_l1_counts_weights_and_not_biases(l1: float) -> None:
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, -3)
    nn.init.constant_(layer.bias, 100)
    recipe: Recipe = PLAIN.model_copy(update={"l1": l1})
    assert float(torch.as_tensor(penalty(recipe, layer)).detach()) == l1 * 6
