"""Trials: what is done to the pictures is what is said, and the area under the curve is what it means."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import SPEC, squares
from training.bundle.manifest import OutOfDistribution
from training.trials import SPOILERS, area_under_roc, trials

CPU = torch.device("cpu")
scores = st.lists(st.integers(0, 5).map(float), min_size=1, max_size=20)


@given(scores, scores)
def test_the_area_is_how_often_one_from_inside_scores_higher(inside: list[float], outside: list[float]) -> None:
    won = [(a > b) + (a == b) / 2 for a in inside for b in outside]
    assert area_under_roc(np.array(inside), np.array(outside)) == pytest.approx(sum(won) / len(won))


@pytest.mark.parametrize("name", SPOILERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_spoilt_pictures_are_pictures_of_the_same_kind_and_not_the_same(name: str, channels: int) -> None:
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 200, (20, channels, 16, 12), dtype=torch.uint8, generator=random)
    spoilt = SPOILERS[name](images, random)
    assert (spoilt.shape, spoilt.dtype) == (images.shape, torch.uint8)
    assert not torch.equal(spoilt, images)


def spoil(name: str, images: Tensor) -> Tensor:
    return SPOILERS[name](images, torch.Generator().manual_seed(0))


def test_each_picture_is_spoilt_as_is_said() -> None:
    flat = torch.full((400, 1, 8, 8), 100, dtype=torch.uint8)
    assert (spoil("half as bright again", flat) == 150).all()
    assert (spoil("half as bright again", flat + 100) == 255).all()
    assert (spoil("blur, deviation 1 pixel", flat) == 100).all()
    assert spoil("noise, deviation 20 of 255", flat).float().std().item() == pytest.approx(20, rel=0.02)
    dot = torch.zeros(400, 1, 9, 9, dtype=torch.uint8)
    dot[:, :, 4, 4] = 255
    places = spoil("moved by 2 pixels, both ways", dot).flatten(1).argmax(1)
    assert {divmod(place, 9) for place in places.tolist()} == {(2, 2), (2, 6), (6, 2), (6, 6)}
    blurred = spoil("blur, deviation 1 pixel", dot)[0, 0]
    assert (blurred[4, 5] / blurred[4, 4]).item() == pytest.approx(0.6065, abs=0.02)


def test_without_data_there_are_no_strangers() -> None:
    test = squares().test

    def classify(pixels: Tensor) -> Tensor:
        mean = pixels.float().mean((1, 2, 3))
        return torch.stack([mean, 255 - mean], dim=1)

    ood = OutOfDistribution(score="energy", threshold=0.0, true_positive_rate=0.95)
    found = trials(classify, test, SPEC, ood, 1.0, CPU, None, "squares")
    assert found.strangers == {}
    assert list(found.robustness) == list(SPOILERS)
    assert all(0 <= share <= 1 for share in found.robustness.values())
