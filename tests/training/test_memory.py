"""What a bundle remembers of its data fits into a megabyte, however many classes and pictures there are."""

from pathlib import Path

import numpy as np
import pytest
import torch

from training.bundle.replay import REPLAY, Replay, read_replay, write_replay
from training.datasets import Split
from training.memory import remember
from training.networks import ConvNet


def noise(count: int, classes: int, seed: int) -> Split:
    """Pictures 8 x 8, no two alike, of each class in turn."""
    images = np.random.default_rng(seed).integers(0, 256, (count, 1, 8, 8), dtype=np.uint8)
    return Split(torch.from_numpy(images), torch.arange(count) % classes)


def remembered(folder: Path, classes: int, width: int, tested: int) -> tuple[Replay, int]:
    """What a network with so many features takes along, as it is read again, and the size of the file."""
    network = ConvNet(channels=1, classes=classes, widths=[width], stem_width=2, stem_kernel=3).eval()
    write_replay(folder / REPLAY, remember(network, noise(3 * classes, classes, 0), noise(tested, classes, 1), classes))
    found = read_replay(folder / REPLAY)
    assert found is not None
    return found, (folder / REPLAY).stat().st_size


@pytest.mark.parametrize(
    ("classes", "width", "tested", "kept", "digests"),
    [
        (2, 16, 40, 3, 40),  # all of the training pictures
        (1000, 64, 2_000, 3, 2_000),
        (1000, 128, 2_000, 1, 2_000),
        (1000, 256, 2_000, 0, 2_000),
        (10, 16, 120_000, 3, 100_000),
    ],
)
def test_as_much_is_kept_of_each_class_as_a_megabyte_holds(
    tmp_path: Path, classes: int, width: int, tested: int, kept: int, digests: int
) -> None:
    found, size = remembered(tmp_path, classes, width, tested)
    assert size <= 1_000_000
    assert found.features.shape == (kept * classes, width)
    assert np.bincount(found.labels, minlength=classes).tolist() == [kept] * classes
    assert len(found.guard_labels) == len(found.guard_features) > 0 or kept == 0
    assert len(found.test_digests) == digests


def test_the_test_pictures_are_known_again_and_the_training_pictures_are_not(tmp_path: Path) -> None:
    found, _ = remembered(tmp_path, 2, 4, 40)
    tested, trained = noise(40, 2, 1).images.numpy(), noise(6, 2, 0).images.numpy()
    assert [found.is_test_picture(picture) for picture in (*tested, *trained)] == [True] * 40 + [False] * 6
