"""What a bundle takes along of its data, a megabyte at most: see `bundle.replay`."""

import numpy as np
import torch
from torch import Tensor

from training.bundle.replay import Features, Labels, Replay, pixel_digest
from training.datasets import Split
from training.networks import ConvNet

MOST_PER_CLASS = 100
MOST_BYTES = 450_000  # of training features, and as much of test features; the rest of the megabyte is digests


def remember(network: ConvNet, train: Split, test: Split, classes: int) -> Replay:
    """Features of equally many pictures of each class, and digests of the whole test set."""
    width = network.head.in_features
    count = max(1, min(MOST_PER_CLASS, MOST_BYTES // (2 * width * classes)))
    features, labels = _sample(network, train, count)
    guard_features, guard_labels = _sample(network, test, count)
    digests = np.stack([pixel_digest(image) for image in test.images.numpy()])
    return Replay(features, labels, guard_features, guard_labels, digests[np.lexsort(digests.T[::-1])])


@torch.inference_mode()
def _sample(network: ConvNet, split: Split, count: int) -> tuple[Features, Labels]:
    """Features [n, D] of the first pictures of each class, in the split's order, and their labels [n]."""
    chosen = torch.cat([(split.labels == label).nonzero().squeeze(1)[:count] for label in split.labels.unique()])
    device = next(network.parameters()).device
    network.eval()
    features: list[Tensor] = [
        network.features(images.to(device)).float().cpu() for images in split.images[chosen].split(250)
    ]
    return torch.cat(features).half().numpy(), split.labels[chosen].numpy()
