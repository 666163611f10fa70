"""Muon for the convolutions, Nesterov SGD for the few parameters beside them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training.recipes import Recipe


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal before each step (Jordan et al., 2024), for convolution filters [o, i, k, k].

    A filter bank is a matrix [o, i * k * k]. Its momentum is replaced by the nearest matrix with singular values near
    1, and the bank itself is kept at norm sqrt(o), so the learning rate alone says how fast directions change.
    """

    def __init__(self, filters: Iterable[nn.Parameter], lr: float, momentum: float) -> None:
        super().__init__(filters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for filters in group["params"]:
                if filters.grad is None:
                    continue
                state = self.state[filters]
                if not state:
                    state["momentum"] = torch.zeros_like(filters)
                momentum = state["momentum"].mul_(group["momentum"]).add_(filters.grad)
                update = filters.grad.add(momentum, alpha=group["momentum"])  # Nesterov
                filters.mul_(len(filters) ** 0.5 / filters.norm())
                filters.add_(orthogonal(update.flatten(1)).view_as(filters), alpha=-group["lr"])


def orthogonal(matrix: Tensor, iterations: int = 3) -> Tensor:
    """Bring the singular values of a matrix near 1 by a quintic Newton-Schulz iteration.

    Three iterations leave them between about 0.3 and 1.2, which is near enough here and costs six matrix products each.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at zero that still converges into that band
    x = matrix / (matrix.norm() + 1e-7)
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    for _ in range(iterations):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def build_optimizers(network: nn.Module, recipe: Recipe, batch_size: int) -> list[torch.optim.Optimizer]:
    """Sort the trainable parameters by shape: filters to Muon, biases and the head to SGD."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    filters = [parameter for parameter in trainable if parameter.ndim == 4]
    biases = [parameter for parameter in trainable if parameter.ndim == 1]
    heads = [parameter for parameter in trainable if parameter.ndim == 2]
    # torch multiplies weight decay by the learning rate; dividing first makes it a share lost per step.
    decay = recipe.weight_decay * batch_size
    rest = [
        {"params": biases, "lr": recipe.bias_lr, "weight_decay": decay / recipe.bias_lr},
        {"params": heads, "lr": recipe.head_lr, "weight_decay": decay / recipe.head_lr},
    ]
    optimizers: list[torch.optim.Optimizer] = [
        Muon(filters, lr=recipe.filter_lr, momentum=recipe.filter_momentum),
        torch.optim.SGD(rest, lr=recipe.head_lr, momentum=recipe.momentum, nesterov=True),
    ]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def set_learning_rate(optimizers: list[torch.optim.Optimizer], progress: float) -> None:
    """From the peak straight down to zero; `progress` is the share of the run that is done. No warm-up: Muon's steps
    have a fixed size, so the first ones are no larger than the others."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 - progress)
