"""MNIST and CIFAR-10 as archives; their files are made up here."""

import io
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.builtin import BuiltIn
from training.layout import DatasetError

LABELS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with an MNIST of ten pictures in each split."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (10, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, 10) + bytes(LABELS))
    return tmp_path


def test_all_of_a_built_in_set_is_divided_as_it_was_published(data: Path) -> None:
    built_in = BuiltIn("mnist", data, None)
    files = built_in.files()
    assert [str(path) for path in files] == [
        f"{split}/{label}/{index:05}.png" for split in ("train", "test") for index, label in enumerate(LABELS)
    ]
    [(_, content)] = built_in.contents({files[0]})
    image = Image.open(io.BytesIO(content))
    assert (image.mode, image.size, image.format) == ("L", (28, 28), "PNG")


def test_a_limit_takes_equally_many_of_each_class_from_train(data: Path) -> None:
    files = [str(path) for path in BuiltIn("mnist", data, 7).files()]
    assert sorted(name[0] for name in files) == list("1234569")
    assert files == [str(path) for path in BuiltIn("mnist", data, 7).files()]
    assert len(BuiltIn("mnist", data, 1000).files()) == 10


def test_without_the_data_the_place_that_was_looked_in_is_named(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"^no MNIST: looked for .*train-images-idx3-ubyte"):
        BuiltIn("mnist", tmp_path, 100)
