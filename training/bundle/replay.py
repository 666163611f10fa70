"""What a bundle remembers of the data it was trained on: features, not pictures, and digests of its test set.

Fine-tuning replays the features so that old classes aren't forgotten where the data itself isn't at hand, guards with
those of the test set, and tells with the digests whether an uploaded picture is one that the model was measured on.
A bundle without this file can be served and fine-tuned all the same.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize

from training.bundle.images import Pixels
from training.bundle.manifest import BundleError

REPLAY = "replay.safetensors"
DIGEST_BYTES = 8

Features = NDArray[np.float16]  # [N, D], what the network's last layer sees
Labels = NDArray[np.int64]  # [N]


class ReplayMalformed(BundleError):
    """The file isn't what its name says."""


@dataclass(frozen=True)
class Replay:
    features: Features  # [N, D] of training pictures, equally many of each class; none where the classes are too many
    labels: Labels  # [N]
    guard_features: Features  # [M, D] of test pictures
    guard_labels: Labels  # [M]
    test_digests: NDArray[np.uint8]  # [T, DIGEST_BYTES] of the test pictures, sorted

    def is_test_picture(self, pixels: Pixels) -> bool:
        """Whether these very pixels [C, H, W] were measured on."""
        return bool((self.test_digests == pixel_digest(pixels)).all(axis=1).any())


def pixel_digest(pixels: Pixels) -> NDArray[np.uint8]:
    """The first bytes of the SHA-256 of a picture as the network sees it: uint8 [C, H, W] to [DIGEST_BYTES]."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data).digest()
    return np.frombuffer(digest[:DIGEST_BYTES], np.uint8)


def write_replay(path: Path, replay: Replay) -> None:
    path.write_bytes(serialize({name: np.ascontiguousarray(array) for name, array in vars(replay).items()}))


def read_replay(path: Path) -> Replay | None:
    """None where the bundle has no such file. Raises ReplayMalformed."""
    try:
        return Replay(**load_file(path))
    except FileNotFoundError:
        return None
    except (SafetensorError, TypeError, OSError) as error:
        raise ReplayMalformed(f"{REPLAY} can't be read: {error}") from error
