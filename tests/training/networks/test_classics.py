"""The textbook networks: shapes and costs worked out by hand, and that folding changes no answer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.networks import build, macs, parameters
from training.networks.network import Network

PIXELS = {"channels": 1, "classes": 3, "height": 12, "width": 10}
PERCEPTRON: dict[str, Any] = PIXELS | {"widths": [5, 4]}
LENET: dict[str, Any] = PIXELS | {"filters": [2, 4], "hidden": [6], "kernel": 3}
RESNET: dict[str, Any] = {"channels": 3, "classes": 3, "blocks": [1, 2], "width": 4}


def pictures(count: int, channels: int, height: int, width: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8, generator=random)


@pytest.mark.parametrize(("name", "arguments"), [("perceptron", PERCEPTRON), ("lenet", LENET), ("resnet", RESNET)])
def test_pixels_become_logits(name: str, arguments: dict[str, Any]) -> None:
    network = build(name, arguments)
    network.initialize(pictures(20, arguments["channels"], 12, 10))
    for count in (1, 4):
        images = pictures(count, arguments["channels"], 12, 10)
        assert network.eval()(images).shape == (count, 3)
        assert network.features(images).shape == (count, network.head.in_features)


def test_parameters_and_macs_of_a_perceptron() -> None:
    network = build("perceptron", PERCEPTRON)
    weights = 120 * 5 + 5 * 4 + 4 * 3
    assert (parameters(network), macs(network, (1, 12, 10))) == (weights + 5 + 4 + 3, weights)
    assert macs(build("perceptron", PIXELS | {"widths": []}), (1, 12, 10)) == 120 * 3


def test_parameters_and_macs_of_a_lenet() -> None:
    network = build("lenet", LENET)
    # 12 x 10 becomes 10 x 8, pooled 5 x 4, then 3 x 2, pooled 1 x 1
    convolutions, layers = 80 * 2 * 9 + 6 * 4 * 2 * 9, 4 * 6 + 6 * 3
    assert macs(network, (1, 12, 10)) == convolutions + layers
    assert parameters(network) == 2 * 9 + 2 + 4 * 2 * 9 + 4 + layers + 6 + 3


@pytest.mark.parametrize(
    ("filters", "hidden", "expected"),
    [([], [6], 120 * 6 + 6 + 6 * 3 + 3), ([2], [], 2 * 9 + 2 + 2 * 5 * 4 * 3 + 3), ([], [], 120 * 3 + 3)],
)
def test_a_lenet_may_do_without_convolutions_or_hidden_layers(
    filters: list[int], hidden: list[int], expected: int
) -> None:
    network = build("lenet", LENET | {"filters": filters, "hidden": hidden})
    assert parameters(network) == expected
    assert network.eval()(pictures(2, 1, 12, 10)).shape == (2, 3)


def test_parameters_of_resnet_18_and_34_are_the_published_ones() -> None:
    for blocks, millions in (([2, 2, 2, 2], 11.17), ([3, 4, 6, 3], 21.28)):
        network = build("resnet", {"channels": 3, "classes": 10, "blocks": blocks})
        assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.005)


def trained_a_little(network: Network, images: Tensor) -> Network:
    network.initialize(images)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    for _ in range(5):
        nn.functional.cross_entropy(network(images), torch.arange(len(images)) % 3).backward()
        optimizer.step()
    return network.eval()


def test_folding_a_resnet_changes_no_answer() -> None:
    torch.manual_seed(0)
    images = pictures(16, 3, 12, 8)
    network = trained_a_little(build("resnet", RESNET), images)
    folded = network.folded()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    with torch.no_grad():
        assert torch.allclose(folded(images), network(images), atol=1e-4)


@pytest.mark.parametrize(
    ("how", "weights", "biases"),
    [("normal", 1.0, 1.0), ("scaled normal", 0.1, 1.0), ("xavier", (2 / 200) ** 0.5, 0.0), ("he", 0.02**0.5, 0.0)],
)
def test_weights_are_drawn_as_is_said(how: str, weights: float, biases: float) -> None:
    torch.manual_seed(0)
    arguments = {"channels": 1, "classes": 2, "height": 10, "width": 10, "widths": [100], "initialization": how}
    layer = build("perceptron", arguments).get_submodule("layers.1")
    assert isinstance(layer, nn.Linear)
    assert layer.weight.std().item() == pytest.approx(weights, rel=0.05)
    assert layer.bias.std().item() == pytest.approx(biases, rel=0.3)


def test_pixels_from_0_to_1_are_what_the_textbook_has() -> None:
    network = build("perceptron", PERCEPTRON | {"normalization": "unit"})
    network.initialize(pictures(20, 1, 12, 8))
    assert network.normalize(torch.tensor([0, 51, 255]).view(3, 1, 1, 1)).flatten().tolist() == pytest.approx(
        [0, 0.2, 1]
    )


def test_outputs_of_sigmoid_neurons_lie_between_0_and_1() -> None:
    network = build("perceptron", PERCEPTRON | {"output": "sigmoid", "initialization": "normal"})
    outputs = network(pictures(50, 1, 12, 10))
    assert 0 <= outputs.min() < outputs.max() <= 1


def test_dropout_is_for_training_only() -> None:
    network = build("perceptron", PERCEPTRON | {"dropout": 0.5})
    images = pictures(10, 1, 12, 10)
    assert not torch.equal(network.train()(images), network(images))
    assert torch.equal(network.eval()(images), network(images))
