"""Optimizers: torch's, and Muon; which parameter goes to which; and the learning rate's way."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from training import recipes
from training.recipes import Recipe


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal before each step (Jordan et al., 2024), for convolution filters [o, i, k, k].

    A filter bank is a matrix [o, i * k * k]. Its momentum is replaced by the nearest matrix with singular values near
    1, and the bank itself is kept at norm sqrt(o), so the learning rate alone says how fast directions change.
    """

    def __init__(self, filters: Iterable[nn.Parameter], lr: float | Tensor, momentum: float) -> None:
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
                _step_back(filters, orthogonal(update.flatten(1)).view_as(filters), group["lr"])


def _step_back(weights: Tensor, update: Tensor, rate: float | Tensor) -> None:
    if isinstance(rate, Tensor):
        weights.addcmul_(update, rate, value=-1)
    else:
        weights.add_(update, alpha=-rate)


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
    """The recipe's optimizers of everything that is trained, each group with its peak learning rate.

    On CUDA their steps can be recorded as a graph.
    """
    fused = True if next(network.parameters()).device.type == "cuda" else None  # else torch's choice
    match recipe.optimizer:
        case recipes.Muon() as settings:
            optimizers = _muon_beside_sgd(network, settings, batch_size, fused)
        case recipes.SGD() as settings:
            groups = _decayed(network, settings.weight_decay)
            momentum, nesterov = settings.momentum, settings.nesterov
            optimizers = [torch.optim.SGD(groups, lr=settings.lr, momentum=momentum, nesterov=nesterov, fused=fused)]
        case recipes.Adam() as settings:
            adam = torch.optim.Adam if settings.kind == "adam" else torch.optim.AdamW
            groups = _decayed(network, settings.weight_decay)
            optimizers = [adam(groups, lr=settings.lr, betas=settings.betas, fused=fused, capturable=fused is not None)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def _muon_beside_sgd(
    network: nn.Module, settings: recipes.Muon, batch_size: int, fused: bool | None
) -> list[torch.optim.Optimizer]:
    """Sort the trainable parameters by shape: filters to Muon, biases and the head to SGD."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    filters = [parameter for parameter in trainable if parameter.ndim == 4]
    biases = [parameter for parameter in trainable if parameter.ndim == 1]
    heads = [parameter for parameter in trainable if parameter.ndim == 2]
    # torch multiplies weight decay by the learning rate; dividing first makes it a share lost per step.
    decay = settings.weight_decay * batch_size
    rest = [
        {"params": biases, "lr": settings.bias_lr, "weight_decay": decay / settings.bias_lr},
        {"params": heads, "lr": settings.head_lr, "weight_decay": decay / settings.head_lr},
    ]
    sgd = torch.optim.SGD(rest, lr=settings.head_lr, momentum=settings.momentum, nesterov=True, fused=fused)
    return [Muon(filters, lr=settings.filter_lr, momentum=settings.filter_momentum), sgd] if filters else [sgd]


def _decayed(network: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Weights decay; biases and the scales of norms, which have one dimension, don't."""
    trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in trainable if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trainable if parameter.ndim == 1], "weight_decay": 0.0},
    ]


def step_all(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()


def clip_gradient(network: nn.Module, longest: float | None) -> None:
    """Shorten the gradient, of all parameters together, where it is longer than that."""
    if longest is not None:
        nn.utils.clip_grad_norm_(network.parameters(), longest)


def gradient_norms(network: nn.Module) -> dict[str, float]:
    """Of each layer's weights, in order, by name."""
    weights = {name: one for name, one in network.named_parameters() if one.ndim > 1 and one.grad is not None}
    return {
        name.removesuffix(".weight"): float(one.grad.norm()) for name, one in weights.items() if one.grad is not None
    }


def place_learning_rates(optimizers: list[torch.optim.Optimizer], device: torch.device) -> None:
    """On CUDA they stand in its memory, where a recorded step reads them anew; elsewhere they are numbers."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = float(group["lr"])
            group["lr"] = torch.tensor(rate, device=device) if device.type == "cuda" else rate


def set_learning_rate(optimizers: list[torch.optim.Optimizer], recipe: Recipe, step: int, steps: int) -> None:
    """Before a step, of `steps` in all: up to the peak, where the recipe has a warm-up, and along its schedule to zero.

    Muon needs no warm-up: its steps have a fixed size, so the first ones are no larger than the others.
    """
    left = 1 - step / steps
    share = {"linear": left, "cosine": 0.5 * (1 - math.cos(math.pi * left)), "constant": 1.0}[recipe.schedule]
    if recipe.warm_up:
        share = min(share, (step + 1) / (recipe.warm_up * steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["peak"] * share
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
