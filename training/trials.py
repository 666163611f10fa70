"""What the test set alone doesn't say: how a model bears worse pictures, and whether it tells strangers.

Both are reported, and nothing is chosen by them.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor

from training import augment, datasets
from training.bundle.answers import familiarity
from training.bundle.manifest import InputSpec, OutOfDistribution
from training.datasets import Split
from training.evaluate import Classifier, accuracy, infer
from training.layout import DatasetError

STRANGERS = 2000  # pictures of each kind, at most
OTHER_CLASSES = "finetune-sample"  # a data set of class folders with none of the built-in sets' classes

Spoil = Callable[[Tensor, Generator], Tensor]  # uint8 [N, C, H, W] to the same


@dataclass(frozen=True)
class Trials:
    robustness: dict[str, float]  # accuracy on the test set, by what was done to its pictures
    strangers: dict[str, float]  # area under the ROC curve, by what they are


def trials(
    classify: Classifier,
    test: Split,
    spec: InputSpec,
    ood: OutOfDistribution,
    temperature: float,
    device: torch.device,
    data: Path | None,
    own: str,
) -> Trials:
    """Try a classifier on spoilt pictures of its test set, and on pictures of other data sets, where those are at hand;
    `own` is the name of the data set that it knows."""

    def familiar(images: Tensor) -> NDArray[np.float64]:
        return familiarity(infer(classify, images, device).numpy(), ood.score, temperature)

    random = torch.Generator().manual_seed(0)
    spoilt = {name: infer(classify, spoil(test.images, random), device) for name, spoil in SPOILERS.items()}
    inside = familiar(test.images)
    outside = {name: familiar(images) for name, images in _strangers(spec, data, own, random).items()}
    return Trials(
        {name: accuracy(logits, test.labels) for name, logits in spoilt.items()},
        {name: area_under_roc(inside, scores) for name, scores in outside.items()},
    )


def area_under_roc(inside: NDArray[np.float64], outside: NDArray[np.float64]) -> float:
    """How often one from inside scores higher than one from outside; a tie counts half."""
    order = np.sort(outside)
    below = np.searchsorted(order, inside, "left") + np.searchsorted(order, inside, "right")
    return float(below.mean() / 2 / len(outside))


# --- worse pictures ---------------------------------------------------------------------------------------------------


def _jpeg(images: Tensor, _: Generator) -> Tensor:
    return torch.stack([torch.from_numpy(_resaved(image)) for image in images.numpy()])


def _resaved(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=20)
    pixels = np.asarray(Image.open(file)).reshape(*image.shape[1:], len(image))
    return pixels.transpose(2, 0, 1).copy()


def _blurred(images: Tensor, _: Generator) -> Tensor:
    """Each pixel the weighted mean of 5 x 5, as a lens out of focus would have it: a Gaussian of deviation 1."""
    line = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / 2)
    kernel = (line / line.sum()).outer(line / line.sum()).expand(images.shape[1], 1, 5, 5)
    padded = F.pad(images.float(), (2, 2, 2, 2), mode="reflect")
    return _as_pixels(F.conv2d(padded, kernel, groups=images.shape[1]))


def _noisy(images: Tensor, random: Generator) -> Tensor:
    return _as_pixels(images + 20 * torch.randn(images.shape, generator=random))


def _brighter(images: Tensor, _: Generator) -> Tensor:
    return _as_pixels(1.5 * images.float())


def _shifted(images: Tensor, random: Generator) -> Tensor:
    down, right = 4 * torch.randint(0, 2, (2, len(images)), generator=random) - 2
    return augment.move(images, down, right, 2).to(torch.uint8)


def _as_pixels(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255).to(torch.uint8)


SPOILERS: dict[str, Spoil] = {
    "JPEG of quality 20": _jpeg,
    "blur, deviation 1 pixel": _blurred,
    "noise, deviation 20 of 255": _noisy,
    "half as bright again": _brighter,
    "moved by 2 pixels, both ways": _shifted,
}


# --- strangers --------------------------------------------------------------------------------------------------------


def _strangers(spec: InputSpec, data: Path | None, own: str, random: Generator) -> dict[str, Tensor]:
    """Test pictures [N, C, H, W] of the data sets that are in the data folder and aren't the model's own."""
    if data is None:
        return {}
    in_colour = spec.channels == 3
    sources = {
        "MNIST in colour" if in_colour else "MNIST": "mnist",
        "CIFAR-10" if in_colour else "CIFAR-10 in grey": "cifar10",
        "photographs of other classes": str(data / f"{OTHER_CLASSES}.zip"),
    }
    found = {}
    for name, source in sources.items():
        try:
            images = datasets.load(source, spec, data).test.images
        except DatasetError:  # it isn't there
            continue
        if source != own:
            images = images[:: max(1, len(images) // STRANGERS)][:STRANGERS]
            found[name] = _coloured(images, random) if name == "MNIST in colour" else images
    return found


def _coloured(images: Tensor, random: Generator) -> Tensor:
    """Ink of one colour on paper of another."""
    ink, paper = torch.rand(2, len(images), 3, 1, 1, generator=random) * 255
    share = images / 255
    return _as_pixels(share * ink + (1 - share) * paper)
