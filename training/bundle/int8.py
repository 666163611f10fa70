"""The int8 form of a bundle: what it takes to run the module's convolutions on bytes, and what that costs.

Weights aren't stored: `rounded_weights` makes the same of the same weights and means wherever they are. What can't be
derived is which values the activations take, and their channels' means; both were seen at export, on pictures. A bundle
without this file runs in float32, as it always did.

All processors give the same sums of bytes. Those without VNNI instructions add the products of input channels 0 and 1,
2 and 3, … at one place of the kernel in 16 bits, and cut off what doesn't fit; weights are rounded so that all does.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize

from training.bundle.answers import Logits
from training.bundle.golden import GoldenMismatch
from training.bundle.manifest import BundleError, Fraction

INT8 = "int8.safetensors"
MAX_WEIGHT = 127  # a weight's byte, plus and minus

# What int8 may cost on pictures of the test set, as shares of them; one picture in any case, for of fewer than a
# thousand no part is a tenth of a per cent.
MAX_LOST = 0.001  # right in float32 and, on balance, not in int8
MAX_DIFFERING = 0.01  # another best class, better or worse
MAX_ECE_RISE = 0.005

# Root mean square of the differences between golden logits here and at export, by their standard deviation. Equal
# ranges gave 0.0005 to 0.004 (a value between two steps may be rounded either way), ranges 1 % off 0.01 to 0.05.
MAX_DEVIATION = 0.007


class Int8Malformed(BundleError):
    """The file isn't what its name says."""


class Figures(BaseModel):
    """What the int8 form and float32 say of the same `n` pictures; neither was fitted to them, nor chosen by them."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    n: int = Field(ge=1)
    accuracy: Fraction
    float32_accuracy: Fraction
    ece: Fraction
    float32_ece: Fraction
    differing: Fraction = Field(description="share of pictures whose best class is another one")

    def objection(self) -> str | None:
        """Why the form isn't good enough to answer; None where it is."""
        one = 1 / self.n + 1e-9
        if (lost := self.float32_accuracy - self.accuracy) > max(MAX_LOST + 1e-9, one):
            return f"{lost:.2%} of {self.n} pictures are lost"
        if self.differing > max(MAX_DIFFERING, one):
            return f"{self.differing:.2%} of {self.n} best classes differ from float32"
        if (rise := self.ece - self.float32_ece) > max(MAX_ECE_RISE, one):
            return f"the ECE of {self.n} pictures rises by {rise:.2%}"
        return None


@dataclass(frozen=True)
class Ranges:
    """What goes into each of the last L convolutions, in the order of the graph. All else stays in float32.

    A byte b stands for (b - zero) * scale.
    """

    scales: NDArray[np.float32]  # [L]
    zeros: NDArray[np.uint8]  # [L], the byte that stands for 0
    means: tuple[NDArray[np.float32], ...]  # [L][I], of each input channel

    def __len__(self) -> int:
        return len(self.scales)


@dataclass(frozen=True)
class Int8:
    ranges: Ranges
    logits: Logits  # [N, K], of the first N golden images
    figures: Figures


def largest_weights(weights: NDArray[np.float32]) -> NDArray[np.float32]:
    """What MAX_WEIGHT stands for in each output channel of a convolution [O, I, H, W]: [O, 1, 1, 1].

    That is the largest weight, or the largest sum of the two that input channels 0 and 1, 2 and 3, … have in one place:
    such two come to 128 steps at most when they are rounded, and with two bytes of input to 255 * 128, which fits.
    """
    padded = np.pad(weights, ((0, 0), (0, weights.shape[1] % 2), (0, 0), (0, 0)))
    pairs = padded[:, 0::2] + padded[:, 1::2]  # [O, I / 2, H, W]
    largest = [np.abs(values).max((1, 2, 3), keepdims=True) for values in (weights, pairs)]
    return np.maximum(*largest).clip(1e-12)


def rounded_weights(weights: NDArray[np.float32], means: NDArray[np.float32]) -> NDArray[np.float32]:
    """A convolution's weights [O, I, H, W] as bytes can hold them: 255 steps between plus and minus `largest_weights`.

    Each becomes one of the two steps beside it, so that an output's mean is kept, for inputs whose channels have
    `means` [I]. What a kernel looks at is mostly smooth: what counts is the sum of its errors, times that mean. Kernel
    by kernel, from the largest mean on, a sum is rounded to the side that makes up for those before. So a weight whose
    last bit is another one may be rounded otherwise, and many after it: the weights must be those of the module itself.

    Raises ValueError where there aren't as many means as input channels.
    """
    if len(means) != weights.shape[1]:
        raise ValueError(f"there are {weights.shape[1]} input channels and {len(means)} means")
    scales = largest_weights(weights).astype(np.float64) / MAX_WEIGHT
    # `largest_weights` adds in float32, which may leave a sum of two a trifle above 127. A trifle is no reason to round
    # a weight up: both of them, and the sum would be 129.
    steps = np.round(weights / scales, 4).reshape(*weights.shape[:2], -1)  # [O, I, H * W]
    below = np.floor(steps)
    remainders = steps - below
    sums = remainders.sum(2)  # [O, I]
    up = np.empty_like(sums)  # so many of a kernel's, those with the largest remainders
    owed = np.zeros(len(weights))  # [O], of the output's mean
    for channel in np.argsort(-np.abs(means), kind="stable"):
        exact, mean = sums[:, channel], float(means[channel])
        wanted = exact + owed / mean if mean else exact
        up[:, channel] = np.clip(np.round(wanted), np.floor(exact), np.ceil(exact))
        owed += mean * (exact - up[:, channel])
    largest_first = np.argsort(-remainders, axis=2, kind="stable")
    raised = np.empty_like(remainders)
    np.put_along_axis(raised, largest_first, np.arange(steps.shape[2]) < up[:, :, None], axis=2)
    return ((below + raised).reshape(weights.shape) * scales).astype(np.float32)


def write_int8(path: Path, int8: Int8) -> None:
    ranges = int8.ranges
    tensors: dict[str, NDArray[Any]] = {"scales": ranges.scales, "zeros": ranges.zeros, "logits": int8.logits}
    tensors |= {_means(layer): means for layer, means in enumerate(ranges.means)}
    path.write_bytes(serialize(tensors, {"figures": int8.figures.model_dump_json()}))


def read_int8(path: Path) -> Int8 | None:
    """None where the bundle has no such file, or one from before weights were rounded by `means`. Raises
    Int8Malformed."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            scales, zeros, logits = (file.get_tensor(name) for name in ("scales", "zeros", "logits"))
            names = [_means(layer) for layer in range(scales.size)]
            means = tuple(file.get_tensor(name) for name in names if name in file.keys())  # noqa: SIM118 - no dictionary
            figures = Figures.model_validate_json((file.metadata() or {}).get("figures", ""))
    except (SafetensorError, ValidationError, OSError, TypeError, AttributeError) as error:  # numpy lacks some types
        raise Int8Malformed(f"{INT8} can't be read: {error}") from error
    if scales.dtype != np.float32 or zeros.dtype != np.uint8 or scales.shape != zeros.shape or scales.ndim != 1:
        raise Int8Malformed(f"{INT8}: scales are {scales.dtype} {scales.shape}, zeros {zeros.dtype} {zeros.shape}")
    if logits.dtype != np.float32 or logits.ndim != 2 or not logits.size:
        raise Int8Malformed(f"{INT8}: logits are {logits.dtype} {logits.shape}")
    if len(scales) and not means:
        return None
    if len(means) != len(scales) or any(one.dtype != np.float32 or one.ndim != 1 for one in means):
        found = [f"{one.dtype} {one.shape}" for one in means]
        raise Int8Malformed(f"{INT8}: there are {len(scales)} scales, and means are {found}")
    if not (scales > 0).all() or not all(np.isfinite(numbers).all() for numbers in (scales, logits, *means)):
        raise Int8Malformed(f"{INT8}: scales must be above 0, and all numbers finite")
    return Int8(Ranges(scales, zeros, means), logits, figures)


def _means(layer: int) -> str:
    return f"means.{layer}"


def deviation(reference: Logits, candidate: Logits) -> float:
    """How far golden logits are from those that the exporter kept, [N, K]; see MAX_DEVIATION. Raises GoldenMismatch."""
    candidate = candidate[: len(reference)]
    if candidate.shape != reference.shape or not np.isfinite(candidate).all():
        raise GoldenMismatch(f"the int8 form answers with {candidate.shape}, not {reference.shape}, or with NaN")
    spread = max(float(reference.std()), 1e-6)
    return float(np.sqrt(np.square(candidate - reference, dtype=np.float64).mean())) / spread
