"""Linear probes: how far a network's features, at each of its depths, tell the classes of new pictures apart.

The features are computed once, with the network as it is; what is fitted is one linear layer. A network that was
trained on other classes has often thrown away in its last layers what would tell the new ones apart, so the depth to
read from is a choice like any other, made by validation.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.networks import ConvNet
from training.networks.convnet import Pool, pooled

SUFFICIENT = 1e-4  # of the fall that the slope promises, for a step to be taken
ENOUGH = 1e-7  # a loss that falls by less is at its least

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
    network: ConvNet, images: Tensor, where: list[Place], device: torch.device, batch: int = 100
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


@torch.no_grad()
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
    inputs = torch.cat([(features - mean) / scale, torch.ones(len(features), 1)], dim=1)  # [N, D + 1]
    start = torch.zeros(classes, features.shape[1] + 1)  # weights, and in the last column the biases
    if toward is not None:
        start[:, :-1], start[:, -1] = toward.weight * scale, toward.bias + toward.weight @ mean
    share = torch.full((len(labels),), 1 / len(labels)) if weights is None else weights / weights.sum()
    truth = F.one_hot(labels, classes).float()

    def loss_and_gradient(at: Tensor) -> tuple[float, Tensor]:
        log_probabilities = F.log_softmax(inputs @ at.T, dim=1)  # [N, K]
        pulled = at - start
        pulled[:, -1] = 0  # biases are free
        loss = -(log_probabilities * truth).sum(1) @ share + penalty / 2 * pulled.square().sum()
        return float(loss), ((log_probabilities.exp() - truth) * share[:, None]).T @ inputs + penalty * pulled

    fitted = minimized(loss_and_gradient, start, iterations)
    weight = fitted[:, :-1] / scale
    return Head(weight, fitted[:, -1] - weight @ mean)


Step = tuple[Tensor, Tensor, float]  # moved by this, changed the gradient by that, 1 / their product


def minimized(
    loss_and_gradient: Callable[[Tensor], tuple[float, Tensor]], start: Tensor, iterations: int, memory: int = 10
) -> Tensor:
    """Where a convex function is least, by L-BFGS (Nocedal and Wright, 2006, algorithm 7.5), each step halved until it
    lowers the loss enough. Not torch's own: with its first optimizer torch imports its compiler, which takes 2 s.
    """
    at, (loss, gradient) = start, loss_and_gradient(start)
    steps: deque[Step] = deque(maxlen=memory)
    for _ in range(iterations):
        direction = _newton_direction(gradient, steps)
        slope = float((gradient * direction).sum())
        length = 1.0 if steps else min(1.0, 1 / max(1e-12, float(gradient.abs().sum())))
        after, after_gradient = loss_and_gradient(at + length * direction)
        while after > loss + SUFFICIENT * length * slope and -length * slope > ENOUGH:  # no step gains more than that
            length /= 2
            after, after_gradient = loss_and_gradient(at + length * direction)
        if not loss - after >= ENOUGH:  # NaN isn't, either
            break
        moved, changed = length * direction, after_gradient - gradient
        if (curvature := float((moved * changed).sum())) > 0:  # as it is but for roundings
            steps.append((moved, changed, 1 / curvature))
        at, loss, gradient = at + moved, after, after_gradient
    return at


def _newton_direction(gradient: Tensor, steps: Sequence[Step]) -> Tensor:
    """Downhill, and bent as the last steps say that the function curves: the two loops of L-BFGS."""
    direction, kept = -gradient, []
    for moved, changed, inverse in reversed(steps):
        kept.append(inverse * float((moved * direction).sum()))
        direction = direction - kept[-1] * changed
    if steps:
        moved, changed, inverse = steps[-1]
        direction = direction / (inverse * float(changed.square().sum()))
    for (moved, changed, inverse), back in zip(steps, reversed(kept), strict=True):
        direction = direction + (back - inverse * float((changed * direction).sum())) * moved
    return direction


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
