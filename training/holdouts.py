"""What is kept back of a few pictures: parts that are drawn by content, so that the same pictures fall the same way.

Near-duplicates stay together: a picture must not be tested that was all but trained on. Classes keep their shares.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.bundle.replay import pixel_digest
from training.datasets import Split
from training.duplicates import group_ids

CROSS_VALIDATED_BELOW = 300  # pictures: a hold-out of a seventh of fewer could tell nothing apart
FOLDS = 5
TEST_SHARE = 0.15
VALIDATION_SHARE = 0.15
TRUSTED_TEST = 100  # pictures: a test split of the uploader's own that is smaller is drawn anew with the rest


@dataclass(frozen=True)
class Parts:
    """Indices of the pictures to train on, to choose and calibrate with, and to test on once."""

    train: Tensor  # [n]
    validation: Tensor  # [v]
    test: Tensor  # [t]


def parts(split: Split, is_test: Tensor | None, seed: int) -> Parts:
    """Divide 70 : 15 : 15; where a test part `is_test` [N] was given, divide the rest in the same proportion."""
    places = torch.zeros(len(split), dtype=torch.float64)  # evenly over 0 … 1 in each class
    if is_test is None:
        places = _places(split, seed)
        is_test = places < TEST_SHARE
    else:
        places[~is_test] = TEST_SHARE + (1 - TEST_SHARE) * _places(split[~is_test], seed)
    validation = ~is_test & (places < TEST_SHARE + VALIDATION_SHARE)
    return Parts(*(part.nonzero().squeeze(1) for part in (~is_test & ~validation, validation, is_test)))


def folds(split: Split, seed: int, count: int = FOLDS) -> Tensor:
    """Which of `count` equal folds each picture is in: [N]."""
    return (_places(split, seed) * count).long().clamp(max=count - 1)


def digest(images: Tensor) -> str:
    """Of a hold-out [N, C, H, W]: the same pictures have the same, in whatever order."""
    return hashlib.sha256(b"".join(sorted(pixel_digest(image).tobytes() for image in images.numpy()))).hexdigest()


def _places(split: Split, seed: int) -> Tensor:
    """A place on 0 … 1 for each picture [N]: the pictures of a class lie evenly, in an order drawn from what they show
    and the seed; a group of near-duplicates lies in one place."""
    images = split.images.numpy()
    digests = [pixel_digest(image).tobytes() for image in images]
    groups = group_ids(images)
    first: dict[int, bytes] = {}
    for group, digest in zip(groups.tolist(), digests, strict=True):
        first[group] = min(first.get(group, digest), digest)
    keys = np.array([hashlib.sha256(b"%d " % seed + first[group]).digest()[:8] for group in groups.tolist()])
    places = torch.zeros(len(split), dtype=torch.float64)
    for label in split.labels.unique():
        members = (split.labels == label).nonzero().squeeze(1).numpy()
        _, rank, sizes = np.unique(keys[members], return_inverse=True, return_counts=True)
        starts = np.cumsum(sizes) - sizes  # a group's place is where its first picture would lie
        places[members] = torch.from_numpy((starts[rank] + 0.5) / len(members))
    return places
