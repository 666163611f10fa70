"""What a bundle takes along of its data, a megabyte at most: see `bundle.replay`."""

import numpy as np
import torch
from torch import Tensor

from training.bundle.replay import DIGEST_BYTES, Features, Labels, Replay, pixel_digest
from training.datasets import Split
from training.networks import Network

MOST_BYTES = (
    990_000  # of digests, and features of as many training as test pictures; the rest of the megabyte is header
)
MOST_DIGESTS = 100_000
MOST_PER_CLASS = 100
LABEL_BYTES = 8


def remember(network: Network, train: Split, test: Split, classes: int) -> Replay:
    """Digests of the test set, and features of equally many pictures of each class: none where not one would fit."""
    digests = np.stack([pixel_digest(image) for image in test.images[:MOST_DIGESTS].numpy()])
    room = (MOST_BYTES - len(digests) * DIGEST_BYTES) // 2
    count = min(MOST_PER_CLASS, room // (classes * (2 * network.head.in_features + LABEL_BYTES)))
    features, labels = _sample(network, train, count)
    guard_features, guard_labels = _sample(network, test, count)
    return Replay(features, labels, guard_features, guard_labels, digests[np.lexsort(digests.T[::-1])])


@torch.inference_mode()
def _sample(network: Network, split: Split, count: int) -> tuple[Features, Labels]:
    """Features [n, D] of the first pictures of each class, in the split's order, and their labels [n]."""
    chosen = torch.cat([(split.labels == label).nonzero().squeeze(1)[:count] for label in split.labels.unique()])
    device = next(network.parameters()).device
    network.eval()
    features: list[Tensor] = [
        network.features(images.to(device)).float().cpu() for images in split.images[chosen].split(250)
    ]
    return torch.cat(features).half().numpy(), split.labels[chosen].numpy()
