import numpy as np
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor

from training.datasets import Split
from training.holdouts import folds, parts


def noise(counts: list[int], seed: int = 0) -> Split:
    """So many different pictures of each class."""
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (sum(counts), 1, 8, 8), dtype=np.uint8)
    labels = np.repeat(np.arange(len(counts)), counts)
    return Split(torch.from_numpy(images), torch.from_numpy(labels))


def counts_of(split: Split, chosen: Tensor) -> list[int]:
    return torch.bincount(split.labels[chosen]).tolist()


def test_each_class_is_divided_by_the_same_shares() -> None:
    split = noise([200, 100])
    divided = parts(split, None, seed=0)
    assert counts_of(split, divided.test) == [30, 15]
    assert counts_of(split, divided.validation) == [30, 15]
    assert counts_of(split, divided.train) == [140, 70]


@given(st.lists(st.integers(5, 60), min_size=2, max_size=5), st.integers(0, 5))
@hypothesis_settings(max_examples=30, deadline=None)
def test_every_picture_is_in_one_part(counts: list[int], seed: int) -> None:
    divided = parts(noise(counts, seed), None, seed)
    together = torch.cat([divided.train, divided.validation, divided.test])
    assert sorted(together.tolist()) == list(range(sum(counts)))


def test_a_given_test_part_stays() -> None:
    split = noise([100, 100])
    given_ = torch.arange(200) % 4 == 0
    divided = parts(split, given_, seed=0)
    assert divided.test.tolist() == list(range(0, 200, 4))
    assert counts_of(split, divided.validation) == [13, 13]  # 15 of 85 shares of 75


def test_another_order_of_the_same_pictures_divides_them_alike() -> None:
    split = noise([50, 50])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))
    first, second = parts(split, None, 3), parts(split[order], None, 3)
    assert sorted(order[second.test].tolist()) == first.test.tolist()


def test_another_seed_divides_them_otherwise() -> None:
    split = noise([50, 50])
    assert parts(split, None, 0).test.tolist() != parts(split, None, 1).test.tolist()


def test_near_duplicates_fall_into_one_part() -> None:
    random = np.random.default_rng(0)
    coarse = random.integers(0, 2, (40, 1, 4, 4), dtype=np.uint8) * 200
    images = np.repeat(np.repeat(np.repeat(coarse, 6, axis=2), 6, axis=3), 3, axis=0)  # three of each
    images = images + random.integers(0, 3, images.shape, dtype=np.uint8)  # not to the byte
    split = Split(torch.from_numpy(images), torch.arange(120) // 3 % 2)
    fold = folds(split, seed=0).view(-1, 3)
    assert bool((fold == fold[:, :1]).all())
    assert len(fold.unique()) == 5


def test_folds_are_equal_in_each_class() -> None:
    split = noise([50, 25])
    fold = folds(split, seed=0)
    for label, size in ((0, 10), (1, 5)):
        assert torch.bincount(fold[split.labels == label]).tolist() == [size] * 5
