"""Pictures of what a network is shown and has learnt."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import insight
from training.networks import build
from training.networks.network import Network
from training.optimizers import gradient_norms

CONVNET = {"channels": 3, "classes": 2, "widths": [4, 6], "stem_width": 5, "stem_kernel": 3}
PERCEPTRON = {"channels": 1, "classes": 2, "height": 12, "width": 12, "widths": [7]}
PICTURES = torch.randint(0, 256, (20, 3, 12, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def size(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


def rows_and_columns(path: Path, line: int = 0) -> tuple[int, int]:
    width, height = size(path)
    return height // (insight.SIDE + 2 + line), width // (insight.SIDE + 2)


def test_a_batch_is_shown_with_its_classes_and_strangers_after_them(tmp_path: Path) -> None:
    insight.inputs(tmp_path / "inputs.png", PICTURES, torch.arange(18) % 2, ("cat", "dog"))
    assert rows_and_columns(tmp_path / "inputs.png", insight.LINE) == (2, insight.COLUMNS)
    with Image.open(tmp_path / "inputs.png") as sheet:
        first = np.asarray(sheet)[: insight.SIDE, : insight.SIDE]
    assert np.array_equal(first[3::6, 3::6], PICTURES[0].permute(1, 2, 0).numpy())  # each pixel six times as large


@pytest.mark.parametrize(
    ("name", "arguments", "layout"), [("convnet", CONVNET, (1, 5)), ("perceptron", PERCEPTRON, (1, 7))]
)
def test_filters_are_those_of_the_first_layer(
    tmp_path: Path, name: str, arguments: dict[str, object], layout: tuple[int, int]
) -> None:
    insight.filters(tmp_path / "filters.png", build(name, arguments))
    assert rows_and_columns(tmp_path / "filters.png") == layout


def test_each_convolution_has_a_row_of_feature_maps(tmp_path: Path) -> None:
    insight.feature_maps(tmp_path / "maps.png", build("convnet", CONVNET), PICTURES[0])
    assert rows_and_columns(tmp_path / "maps.png") == (5, 6)


def test_without_convolutions_there_are_no_maps(tmp_path: Path) -> None:
    insight.feature_maps(tmp_path / "maps.png", build("perceptron", PERCEPTRON), PICTURES[0, :1])
    assert not (tmp_path / "maps.png").exists()


def backward(network: Network) -> Network:
    network(torch.rand(4, 1, 12, 12)).sum().backward()
    return network


def test_a_gradient_that_vanishes_on_its_way_back_can_be_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    deep = {"widths": [16] * 5, "activation": "sigmoid", "initialization": "xavier", "normalization": "unit"}
    norms = gradient_norms(backward(build("perceptron", PERCEPTRON | deep)))
    assert list(norms) == [f"layers.{place}" for place in (1, 4, 7, 10, 13)] + ["head"]
    lengths = list(norms.values())
    assert lengths[0] < 0.05 * lengths[-1]
    insight.gradients(tmp_path / "gradients.png", [norms, norms])
    assert size(tmp_path / "gradients.png") == (800, 420)
