from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from training.bundle.replay import REPLAY, Replay, ReplayMalformed, pixel_digest, read_replay, write_replay


def picture(value: int) -> NDArray[np.uint8]:
    return np.full((3, 4, 4), value, np.uint8)


def replay(*values: int) -> Replay:
    return Replay(
        features=np.arange(6, dtype=np.float16).reshape(3, 2),
        labels=np.array([0, 1, 1]),
        guard_features=np.ones((1, 2), np.float16),
        guard_labels=np.array([1]),
        test_digests=np.stack([pixel_digest(picture(value)) for value in values]),
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    written = replay(1, 2)
    write_replay(tmp_path / REPLAY, written)
    found = read_replay(tmp_path / REPLAY)
    assert found is not None
    for name, array in vars(written).items():
        np.testing.assert_array_equal(getattr(found, name), array, strict=True)


def test_a_picture_of_the_test_set_is_known_by_its_pixels() -> None:
    remembered = replay(1, 2)
    assert remembered.is_test_picture(picture(2))
    assert remembered.is_test_picture(picture(2).transpose(0, 2, 1))  # the same pixels, laid out otherwise
    assert not remembered.is_test_picture(picture(3))


def test_a_bundle_without_it_is_no_worse(tmp_path: Path) -> None:
    assert read_replay(tmp_path / REPLAY) is None


def test_a_damaged_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / REPLAY).write_bytes(b"no tensors")
    with pytest.raises(ReplayMalformed, match=r"^replay\.safetensors can't be read: "):
        read_replay(tmp_path / REPLAY)
