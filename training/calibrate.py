"""Calibration: one temperature, and one threshold below which an input isn't of the kind the model knows.

Both are fitted on the hold-out, never on the test set. Works on logits alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from training.bundle.answers import familiarity, probabilities
from training.bundle.manifest import Calibration, OutOfDistribution, Score

TEMPERATURES = (0.05, 20.0)


def fit_temperature(logits: Tensor, labels: Tensor) -> Calibration:
    """The temperature that minimises NLL (Guo et al., 2017); logits [N, K], labels [N].

    NLL has one minimum in log T, found by golden-section search between 0.05 and 20; 1 where that is no better.
    """
    logits = logits.double()

    def nll(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_temperature), labels))

    low, high = (float(np.log(bound)) for bound in TEMPERATURES)
    golden = (5**0.5 - 1) / 2
    while high - low > 1e-5:
        left, right = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, right) if nll(left) < nll(right) else (left, high)
    best = (low + high) / 2
    return Calibration(temperature=float(np.exp(best)) if nll(best) < nll(0.0) else 1.0)


def fit_ood(logits: Tensor, score: Score, temperature: float, true_positive_rate: float = 0.95) -> OutOfDistribution:
    """The score that this share of hold-out images [N, K] reaches."""
    scores = familiarity(logits.numpy(), score, temperature)
    threshold = float(np.quantile(scores, 1 - true_positive_rate))
    return OutOfDistribution(score=score, threshold=threshold, true_positive_rate=float((scores >= threshold).mean()))


def expected_calibration_error(logits: Tensor, labels: Tensor, temperature: float, bins: int = 15) -> float:
    """How far confidence is from accuracy, over equal bins of confidence, weighted by their share of images."""
    chances = torch.from_numpy(probabilities(logits.numpy(), temperature))
    confidence, predicted = chances.max(1)
    right = (predicted == labels).double()
    index = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right - confidence)
    return float(gaps.abs().sum() / len(labels))


def negative_log_likelihood(logits: Tensor, labels: Tensor, temperature: float) -> float:
    """Mean, in nats."""
    return float(F.cross_entropy(logits.double() / temperature, labels))
