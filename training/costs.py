"""What a step lowers: how far a network's outputs are from the labels, or from a teacher's."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.recipes import Recipe

MARGIN = 5.0  # between the energies of strangers and of what is known, in logits
MARGIN_WEIGHT = 0.1  # of that, beside the labels' cost


def cost(recipe: Recipe, outputs: Tensor, labels: Tensor, taught: Tensor | None) -> Tensor:
    """The recipe's cost of outputs [N + S, K] for N pictures with labels [N] and S strangers after them, with a
    teacher's logits [N, K] where there is one; the mean of the N, a scalar."""
    known, strange = outputs[: len(labels)], outputs[len(labels) :]
    if recipe.cost == "squared error":
        return squared_error(known, labels)
    loss = F.cross_entropy(known, labels, label_smoothing=recipe.label_smoothing)
    if recipe.teacher is not None and taught is not None:
        share = recipe.teacher.share
        loss = (1 - share) * loss + share * distance_from_teacher(known, taught, recipe.teacher.temperature)
    return loss + energy_margin(known, strange) if len(strange) else loss


def energy_margin(known: Tensor, strange: Tensor) -> Tensor:
    """How far energies (log-sum-exp) of logits [N, K] and of strangers' [S, K] are on the wrong side: a tenth of the
    squares' sum, over N. Strangers' are to be below that of logits of 0, the others' above it by MARGIN (Liu et al.,
    2020).

    Which class a stranger is most like is free, and so are the differences of its logits. Told to give all classes the
    same chance, a network gives a drawing the same logits whatever it shows, and what it makes of drawings says nothing
    of it any more (docs/experiments.md).
    """
    of_zeros = math.log(known.shape[1])
    excess = F.relu(strange.logsumexp(1) - of_zeros).square().sum()
    shortfall = F.relu(of_zeros + MARGIN - known.logsumexp(1)).square().sum()
    return MARGIN_WEIGHT * (excess + shortfall) / len(known)


def held_out_cost(recipe: Recipe, outputs: Tensor, labels: Tensor) -> float:
    """The same for pictures that nothing is learned from: no label is smoothed, no teacher asked."""
    return float(squared_error(outputs, labels) if recipe.cost == "squared error" else F.cross_entropy(outputs, labels))


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Half the squared distance to 1 for the true class and 0 for the others; the mean of all."""
    truth = F.one_hot(labels, outputs.shape[1]).to(outputs.dtype)
    return 0.5 * (outputs - truth).square().sum(1).mean()


def distance_from_teacher(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """Kullback-Leibler divergence of both softened distributions; times T², so that its gradient is as large as the
    labels' whatever T is (Hinton et al., 2015)."""
    ours, theirs = F.log_softmax(logits / temperature, dim=1), F.log_softmax(taught / temperature, dim=1)
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")


def penalty(recipe: Recipe, network: nn.Module) -> Tensor | float:
    """L1 regularisation: what the sizes of all weights cost; biases cost nothing."""
    if not recipe.l1:
        return 0.0
    weights = [parameter for parameter in network.parameters() if parameter.ndim > 1 and parameter.requires_grad]
    return recipe.l1 * torch.stack([weight.abs().sum() for weight in weights]).sum()
