"""The network: its shapes, its folding, its whitening, and its cost, worked out by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor

from training.networks import ConvNet, build, cost, macs, parameters
from training.networks.convnet import whitening_filters
from training.recipes import RECIPES

TINY: dict[str, Any] = {"channels": 1, "classes": 3, "widths": [4], "stem_width": 2, "stem_kernel": 3}


def pictures(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def correlated(count: int = 200, side: int = 12) -> Tensor:
    """Coloured clouds: neighbours and channels go together, as they do in photographs."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, side // 3, side // 3, generator=random)
    mixed = coarse + coarse.mean(1, keepdim=True)
    return (torch.nn.functional.interpolate(mixed, size=side, mode="bilinear") * 127).to(torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 20), (33, 17), (64, 64)])
@pytest.mark.parametrize("classes", [2, 10, 37])
def test_any_picture_size_and_class_count_will_do(channels: int, height: int, width: int, classes: int) -> None:
    network = ConvNet(channels=channels, classes=classes, widths=[4, 6], stem_width=5, stem_kernel=2, stem_stride=1)
    for count in (1, 3):
        assert network.eval()(pictures(count, channels, height, width)).shape == (count, classes)


@pytest.mark.parametrize("activation", ["sigmoid", "tanh", "relu", "relu6", "leaky relu", "gelu", "silu"])
@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("convolutions", [2, 3])
def test_folding_changes_no_answer(activation: Any, whiten: bool, convolutions: Any) -> None:
    torch.manual_seed(0)
    network = ConvNet(
        channels=3,
        classes=4,
        widths=[8, 12],
        stem_width=24,
        stem_kernel=2,
        convolutions=convolutions,
        whiten=whiten,
        activation=activation,
    )
    network.initialize(correlated())
    for seed in range(5):
        torch.nn.functional.cross_entropy(network(pictures(16, 3, 12, 12, seed=seed)), torch.arange(16) % 4).backward()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.sub_(0.05 * (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad))
    images = pictures(32, 3, 12, 12, seed=9)
    with torch.no_grad():
        assert torch.allclose(network.folded()(images), network.eval()(images), atol=1e-4)


def test_folding_leaves_the_network_itself_alone() -> None:
    network = ConvNet(**TINY)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    folded = network.folded()
    assert network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())


def test_normalisation_takes_mean_and_deviation_of_the_data() -> None:
    network = ConvNet(channels=3, classes=2, widths=[4], stem_width=2, stem_kernel=3)
    images = correlated()
    network.initialize(images)
    normal = network.normalize(images).double()
    assert normal.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert normal.std((0, 2, 3), correction=0).tolist() == pytest.approx([1, 1, 1], abs=1e-5)


def test_whitened_patches_are_uncorrelated_with_variance_1() -> None:
    images = torch.randn(500, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = images + images.mean(1, keepdim=True) + 0.5 * images.roll(1, 3)
    responses = torch.nn.functional.conv2d(images, whitening_filters(images, 2))  # [N, 12, 7, 7]
    values = responses.permute(1, 0, 2, 3).reshape(12, -1).double()
    assert torch.allclose(values @ values.T / values.shape[1], torch.eye(12, dtype=torch.double), atol=0.02)


def test_whitening_does_not_blow_up_a_direction_without_variance() -> None:
    grey = torch.randn(100, 1, 8, 8, generator=torch.Generator().manual_seed(0)).expand(-1, 3, -1, -1)
    assert whitening_filters(grey, 2).flatten(1).norm(dim=1).max() < 1 / 5e-4**0.5 + 1


def test_the_whitening_stem_is_the_filters_and_their_negatives_and_stays() -> None:
    network = ConvNet(channels=3, classes=2, widths=[4], stem_width=24, stem_kernel=2, whiten=True)
    images = correlated()
    network.initialize(images)
    stem = network.stem.weight
    assert torch.equal(stem[:12], whitening_filters(network.normalize(images), 2))
    assert torch.equal(stem[12:], -stem[:12])
    assert not stem.requires_grad


def test_a_constant_training_set_gives_finite_answers() -> None:
    network = ConvNet(**TINY | {"whiten": True, "stem_width": 18})
    images = torch.full((8, 1, 8, 8), 7, dtype=torch.uint8)
    network.initialize(images)
    assert network.eval()(images).isfinite().all()


def test_parameters_and_macs_are_those_worked_out_by_hand() -> None:
    network = ConvNet(**TINY)
    stem, conv1, conv2, norms, head = 2 * 9 + 2, 4 * 2 * 9, 4 * 4 * 9, 2 * 2 * 4, 3 * 4
    assert parameters(network) == stem + conv1 + conv2 + norms + head
    # 8 x 8 in: the stem gives 6 x 6, pooling 3 x 3.
    assert macs(network, (1, 8, 8)) == 36 * 2 * 9 + 36 * 4 * 2 * 9 + 9 * 4 * 4 * 9 + 3 * 4


@pytest.mark.parametrize("name", RECIPES)
def test_the_cost_of_a_recipe_is_that_of_its_network(name: str) -> None:
    recipe = RECIPES[name]
    network = build(recipe.network, recipe.arguments | {"channels": recipe.input.channels, "classes": 10})
    assert cost(recipe) == (parameters(network), macs(network, recipe.input.shape))


def test_an_unknown_network_and_a_wrong_argument_are_errors() -> None:
    with pytest.raises(KeyError):
        build("transformer", TINY)
    with pytest.raises(TypeError):
        build("convnet", TINY | {"depth": 3})
