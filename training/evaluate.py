"""Evaluation: a classifier's logits over a split, and the figures that are made of them."""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.bundle.manifest import Metrics
from training.calibrate import expected_calibration_error, negative_log_likelihood

Classifier = Callable[[Tensor], Tensor]  # pixels [N, C, H, W] → logits [N, K]

# The centre counts as much as both shifts together: with mirrored ones airbench's six views (Jordan, 2024).
SHIFTS = ((0, 0, 0.5), (-1, -1, 0.25), (1, 1, 0.25))  # (down, right, weight)


@torch.inference_mode()
def infer(
    classifier: Classifier, images: Tensor, device: torch.device, views: str = "none", batch: int = 100
) -> Tensor:
    """Logits [N, K] of uint8 images [N, C, H, W], in float32 on the CPU.

    `views` averages over pictures moved by a pixel ("shifts"), mirrored as well ("mirrored shifts"), or takes each as
    it is ("none"): the single view, which is what a server computes.
    """
    if isinstance(classifier, nn.Module):
        classifier.eval()
    logits = []
    for chunk in images.split(batch):
        pixels = chunk.to(device)
        weighted = [weight * classifier(view).float() for view, weight in _views(pixels, views)]
        logits.append(torch.stack(weighted).sum(0).cpu())
    return torch.cat(logits)


def _views(pixels: Tensor, views: str) -> Iterator[tuple[Tensor, float]]:
    if views == "none":
        yield pixels, 1.0
        return
    mirrored = views == "mirrored shifts"
    height, width = pixels.shape[2:]
    padded = F.pad(pixels.float(), (1, 1, 1, 1), mode="reflect")
    for down, right, weight in SHIFTS:
        view = padded[:, :, 1 + down : 1 + down + height, 1 + right : 1 + right + width]
        yield view, weight / (1 + mirrored)
        if mirrored:
            yield view.flip(3), weight / 2


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).double().mean())


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts [K, K]: row is the true class, column the predicted one."""
    classes = logits.shape[1]
    return torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)


def metrics(
    logits: Tensor, labels: Tensor, classes: Sequence[str], temperature: float, logits_tta: Tensor | None = None
) -> Metrics:
    """Every figure of the report, from single-view logits [N, K] and, apart, those with test-time augmentation."""
    counts = confusion(logits, labels).double()
    right, true, predicted = counts.diag(), counts.sum(1), counts.sum(0)
    recall = right / true.clamp(min=1)
    f1 = 2 * right / (true + predicted).clamp(min=1)
    return Metrics(
        n=len(labels),
        accuracy=accuracy(logits, labels),
        accuracy_tta=None if logits_tta is None else accuracy(logits_tta, labels),
        macro_f1=float(f1.mean()),
        per_class_recall=dict(zip(classes, recall.tolist(), strict=True)),
        nll=negative_log_likelihood(logits, labels, temperature),
        nll_uncalibrated=negative_log_likelihood(logits, labels, 1.0),
        ece=expected_calibration_error(logits, labels, temperature),
        ece_uncalibrated=expected_calibration_error(logits, labels, 1.0),
    )
