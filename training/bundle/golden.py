"""Golden samples: inputs, and the logits that the exporter saw for them; proof that a loaded model is that model."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file
from safetensors.numpy import save as serialize

from training.bundle.answers import Logits, probabilities
from training.bundle.manifest import BundleError, Manifest

SAMPLES = 256


class GoldenMismatch(BundleError):
    """The model's answers to the golden inputs aren't those that its exporter saw."""


@dataclass(frozen=True)
class Golden:
    images: NDArray[np.uint8]  # [N, C, H, W]
    logits: Logits  # [N, K]


@dataclass(frozen=True)
class Agreement:
    """How far one run of the golden inputs is from another."""

    logit_difference: float  # the largest, over all samples and classes; where logits pass 100, by their size
    probability_difference: float  # likewise, after calibration
    argmax_differences: int  # samples whose best class differs


def write_golden(path: Path, golden: Golden) -> None:
    # Not save_file, which lets nobody else read the file.
    path.write_bytes(serialize({"images": golden.images, "logits": golden.logits}))


def read_golden(path: Path, manifest: Manifest) -> Golden:
    """Read golden samples; raises GoldenMismatch where they can't belong to this manifest."""
    try:
        tensors = load_file(path)
        golden = Golden(tensors["images"], tensors["logits"])
    except (SafetensorError, KeyError, OSError) as error:
        raise GoldenMismatch(f"{path.name} can't be read: {error}") from error
    images, logits = golden.images, golden.logits
    if images.dtype != np.uint8 or images.shape[1:] != manifest.input.shape or len(images) == 0:
        raise GoldenMismatch(
            f"golden images are {images.dtype} {images.shape}; the input is uint8 {manifest.input.shape}"
        )
    if logits.dtype != np.float32 or logits.shape != (len(images), len(manifest.classes)):
        wanted = (len(images), len(manifest.classes))
        raise GoldenMismatch(f"golden logits are {logits.dtype} {logits.shape}; the manifest says float32 {wanted}")
    if not np.isfinite(logits).all():
        raise GoldenMismatch("golden logits are not all finite: any answer would agree with them")
    return golden


def compare(reference: Logits, candidate: Logits, temperature: float) -> Agreement:
    """Compare two runs of the same inputs, each [N, K]. Raises GoldenMismatch on a wrong shape, NaN or infinity."""
    if candidate.shape != reference.shape:
        raise GoldenMismatch(f"the model answers the golden inputs with {candidate.shape}, not {reference.shape}")
    if not np.isfinite(candidate).all():
        raise GoldenMismatch("the model answers the golden inputs with NaN or infinity")
    chances = probabilities(reference, temperature), probabilities(candidate, temperature)
    size = max(1.0, float(np.abs(reference).max()) / 100)  # float32 has seven digits, wherever the point is
    return Agreement(
        logit_difference=float(np.abs(reference - candidate).max()) / size,
        probability_difference=float(np.abs(chances[0] - chances[1]).max()),
        argmax_differences=int((reference.argmax(1) != candidate.argmax(1)).sum()),
    )
