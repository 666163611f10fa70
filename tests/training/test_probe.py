"""Probes: the fit against scikit-like closed cases, the cut against the network it was cut from."""

import pytest
import torch
from torch import Tensor

from training import probe
from training.networks import ConvNet
from training.probe import Head, Place

CPU = torch.device("cpu")
ARGUMENTS = {"channels": 1, "classes": 3, "widths": [6, 4], "stem_width": 2, "stem_kernel": 3}


@pytest.fixture
def network() -> ConvNet:
    torch.manual_seed(0)
    network = ConvNet(**ARGUMENTS)  # type: ignore[arg-type]
    for _ in range(3):
        network(pictures(16).float())  # the norms see something
    return network.eval()


def pictures(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, 16, 16), dtype=torch.uint8, generator=random)


def clouds(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Three clouds of points [N, 5] of very different scales, and which one each is of."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    centres = torch.randn(3, 5, generator=torch.Generator().manual_seed(9)) * 2
    points = centres[labels] + torch.randn(count, 5, generator=random)
    return points * torch.tensor([1e-3, 1.0, 10.0, 1e3, 1.0]) + 5, labels


def test_the_features_before_the_head_are_the_networks_own(network: ConvNet) -> None:
    images, own = pictures(7), Place(2, "max")
    found = probe.features(network, images, [own], CPU, batch=3)[own]
    with torch.no_grad():
        assert torch.allclose(found, network.features(images), atol=1e-6)


@pytest.mark.parametrize("depth", [1, 2])
def test_a_cut_network_answers_as_features_and_head_do(network: ConvNet, depth: int) -> None:
    place, images = Place(depth, "mean and max"), pictures(9)
    width = 2 * ARGUMENTS["widths"][depth - 1]  # type: ignore[index]
    head = Head(torch.randn(4, width), torch.randn(4))
    cut = probe.cut(network, probe.arguments_at(ARGUMENTS, place, 4), head)
    expected = head(probe.features(network, images, [place], CPU)[place])
    with torch.no_grad():
        assert torch.allclose(cut(images), expected, atol=1e-5)
        assert torch.allclose(cut.folded()(images), expected, atol=1e-4)


def test_a_head_separates_what_can_be_separated_whatever_the_scales() -> None:
    points, labels = clouds(300)
    unseen, truth = clouds(300, seed=1)
    head = probe.fit_head(points, labels, 3, penalty=1e-3)
    assert (head(unseen).argmax(1) == truth).float().mean() > 0.9


def test_without_a_penalty_the_fit_is_where_the_gradient_vanishes() -> None:
    points, labels = clouds(300)
    head = probe.fit_head(points, labels, 3, penalty=0, iterations=500)
    shares = head(points).softmax(1)
    gap = shares.sum(0) - torch.bincount(labels)  # with a bias, the mean prediction is the mean of the labels
    assert gap.abs().max() < 0.5


def test_the_least_of_a_narrow_valley_is_found() -> None:
    """A quadratic a thousand times as steep one way as the other."""
    steepness, least = torch.tensor([[1000.0, 1.0, 30.0]]), torch.tensor([[1.0, -2.0, 3.0]])

    def valley(at: Tensor) -> tuple[float, Tensor]:
        away = at - least
        return float((steepness * away.square()).sum() / 2), steepness * away

    found = probe.minimized(valley, torch.zeros(1, 3), iterations=60)
    torch.testing.assert_close(found, least, atol=1e-3, rtol=1e-3)
    assert torch.equal(probe.minimized(valley, least, iterations=60), least)  # where there is no way down


def test_a_fit_is_as_good_as_torch_s_own() -> None:
    points, labels = clouds(300)
    head = probe.fit_head(points, labels, 3, penalty=1e-2)
    scale = (points.std(0) + 1e-3) * 5**0.5
    weight, bias = torch.zeros(3, 5, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        logits = (points - points.mean(0)) / scale @ weight.T + bias
        return torch.nn.functional.cross_entropy(logits, labels) + 1e-2 / 2 * weight.square().sum()

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(weight, bias)
        value.backward()
        return value.item()

    optimizer.step(closure)
    mine = loss(head.weight * scale, head.bias + head.weight @ points.mean(0))
    assert mine.item() == pytest.approx(loss(weight, bias).item(), abs=1e-5)


def test_a_strong_pull_toward_another_head_leaves_it_as_it_was() -> None:
    points, labels = clouds(90)
    before = Head(torch.randn(3, 5), torch.randn(3))
    after = probe.fit_head(points, labels, 3, penalty=1e9, toward=before)
    assert torch.allclose(after.weight, before.weight, rtol=1e-3, atol=1e-5)


def test_weights_count() -> None:
    points, labels = torch.tensor([[0.0], [0.0]]), torch.tensor([0, 1])
    head = probe.fit_head(points, labels, 2, penalty=1e-3, weights=torch.tensor([3.0, 1.0]))
    assert torch.allclose(head(points).softmax(1)[0], torch.tensor([0.75, 0.25]), atol=1e-3)


def test_rare_classes_are_weighed_up_to_a_limit() -> None:
    labels = torch.tensor([0] * 40 + [1] * 10 + [2])
    weights = probe.balancing_weights(labels, 4)
    assert [float(weights[labels == label][0]) for label in range(3)] == [1, 4, 10]


def test_about_equal_classes_are_not_weighed() -> None:
    labels = torch.tensor([0] * 30 + [1] * 10)
    assert torch.equal(probe.balancing_weights(labels, 2), torch.ones(40))


def test_the_nearest_mean_is_by_direction() -> None:
    features, labels = torch.tensor([[1.0, 0.0], [3.0, 0.2], [0.0, 1.0]]), torch.tensor([0, 0, 1])
    queries = torch.tensor([[10.0, 1.0], [0.1, 5.0], [-1.0, -1.0]])
    similar = probe.nearest_mean(features, labels, queries, 3)  # of the third class there are no pictures
    assert similar.argmax(1).tolist() == [0, 1, 1]
