"""Linear probes: how far a network's features, at each of its depths, tell the classes of new pictures apart.

The features are computed once, with the network as it is; what is fitted is one linear layer. A network that was
trained on other classes has often thrown away in its last layers what would tell the new ones apart, so the depth to
read from is a choice like any other, made by validation.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.networks import ConvNet
from training.networks.convnet import Pool, pooled

PENALTIES = (1e-4, 1e-3, 1e-2)  # L2, on features scaled to length about 1; beyond them no data set was better off


@dataclass(frozen=True)
class Place:
    """Where features are read: after this many groups, pooled this way."""

    depth: int
    pool: Pool


@dataclass(frozen=True)
class Head:
    """A linear layer on the features as the network gives them."""

    weight: Tensor  # [K, D]
    bias: Tensor  # [K]

    def __call__(self, features: Tensor) -> Tensor:
        return features @ self.weight.T + self.bias  # [N, K]


def places(network: ConvNet) -> list[Place]:
    return [Place(depth, "mean and max") for depth in range(1, len(network.groups) + 1)]


@torch.inference_mode()
def features(
    network: ConvNet, images: Tensor, where: list[Place], device: torch.device, batch: int = 250
) -> dict[Place, Tensor]:
    """Features [N, D] of pixels [N, C, H, W] at each place, in one pass through the network, on the CPU."""
    network.eval()
    found: dict[Place, list[Tensor]] = {place: [] for place in where}
    for chunk in images.split(batch):
        x = network.activation(network.stem(network.normalize(chunk.to(device))))
        for depth, group in enumerate(network.groups, start=1):
            x = group(x)
            for place in (place for place in where if place.depth == depth):
                found[place].append(pooled(x, place.pool).float().cpu())
    return {place: torch.cat(chunks) for place, chunks in found.items()}


def fit_head(
    features: Tensor,
    labels: Tensor,
    classes: int,
    *,
    penalty: float,
    weights: Tensor | None = None,
    toward: Head | None = None,
    iterations: int = 60,
) -> Head:
    """Multinomial logistic regression on features [N, D], by L-BFGS on all of them at once.

    `weights` [N] say how much each picture counts. The penalty pulls toward zero, or toward another head.
    """
    mean, deviation = features.mean(0), features.std(0) + 1e-3
    scale = deviation * features.shape[1] ** 0.5  # so that a standardised picture has length about 1
    inputs = (features - mean) / scale
    start_weight = torch.zeros(classes, features.shape[1]) if toward is None else toward.weight * scale
    start_bias = torch.zeros(classes) if toward is None else toward.bias + toward.weight @ mean
    weight, bias = start_weight.clone().requires_grad_(), start_bias.clone().requires_grad_()
    share = torch.full((len(labels),), 1 / len(labels)) if weights is None else weights / weights.sum()
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe", tolerance_change=1e-7
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (F.cross_entropy(inputs @ weight.T + bias, labels, reduction="none") * share).sum()
        loss = loss + penalty / 2 * (weight - start_weight).square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    fitted = weight.detach() / scale
    return Head(fitted, bias.detach() - fitted @ mean)


def balancing_weights(labels: Tensor, classes: int, limit: float = 10.0) -> Tensor:
    """A weight for each picture [N] that lets rare classes count as much as others, but no picture over `limit` times
    as much as one of the commonest class; ones where no class has over three times the pictures of another."""
    counts = torch.bincount(labels, minlength=classes).double()
    present = counts[counts > 0]
    if present.max() <= 3 * present.min():
        return torch.ones(len(labels))
    return (present.max() / counts.clamp(min=1)).clamp(max=limit)[labels].float()


def nearest_mean(features: Tensor, labels: Tensor, queries: Tensor, classes: int) -> Tensor:
    """Cosine similarity [M, K] of queries [M, D] to the mean of each class's features: the simplest classifier that
    learns at all, and the baseline that a fine-tuned one must beat."""
    counts = torch.bincount(labels, minlength=classes)
    sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels, features)
    similar = F.normalize(queries, dim=1) @ F.normalize(sums, dim=1).T
    return similar.masked_fill(counts == 0, -torch.inf)  # a class without pictures is nobody's nearest


def arguments_at(arguments: dict[str, Any], place: Place, classes: int) -> dict[str, Any]:
    """The arguments of a network that ends at a place, with a head of its own."""
    changed = {"widths": arguments["widths"][: place.depth], "pool": place.pool, "head_bias": True, "classes": classes}
    return arguments | changed


@torch.no_grad()
def cut(network: ConvNet, arguments: dict[str, Any], head: Head) -> ConvNet:
    """The network up to a place, as `arguments_at` has it, with a fitted head: a whole network again."""
    short = ConvNet(**arguments)
    wanted = short.state_dict().keys() - {"head.weight", "head.bias"}
    state = {name: tensor for name, tensor in network.state_dict().items() if name in wanted}
    short.load_state_dict(state | {"head.weight": head.weight, "head.bias": head.bias})
    return short.eval()
