"""A plain, fast convolutional network: a stem, groups of two 3 x 3 convolutions, a maximum over space, a linear layer.

The shape is that of the CIFAR-10 speed records (hlb-CIFAR10, airbench94): no residuals, pooling before the norm, norms
with a bias but no scale. Widths and stem come from the recipe; nothing here depends on the picture's size.
"""

from copy import deepcopy
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Activation = Literal["relu", "gelu", "silu"]
Pool = Literal["max", "mean and max"]
_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class ConvNet(nn.Module):
    """Pixels [N, C, H, W] of any dtype, 0 … 255, to logits [N, K]. Normalisation is the first layer."""

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        widths: list[int],
        stem_width: int,
        stem_kernel: int,
        stem_stride: int = 1,
        whiten: bool = False,
        activation: Activation = "gelu",
        pool: Pool = "max",
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        if whiten and stem_width > (directions := 2 * channels * stem_kernel**2):
            raise ValueError(f"stem_width is {stem_width}; patches have only {directions} directions to whiten along")
        self.normalize = Normalize(channels)
        self.stem = nn.Conv2d(channels, stem_width, stem_kernel, stem_stride)
        self.stem.weight.requires_grad_(not whiten)
        self.whiten = whiten
        self.activation = _ACTIVATIONS[activation]()
        inputs = [stem_width, *widths[:-1]]
        self.groups = nn.Sequential(*(Group(i, o, activation) for i, o in zip(inputs, widths, strict=True)))
        self.pool = pool
        width = widths[-1] * (1 if pool == "max" else 2)
        self.head = nn.Linear(width, classes, bias=head_bias)
        nn.init.normal_(self.head.weight, std=1 / width)
        # Weights with channels last bring activations into that order: convolutions and pooling take half the time.
        self.to(memory_format=torch.channels_last)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))  # [N, K]

    def features(self, pixels: Tensor) -> Tensor:
        x = self.normalize(pixels)  # [N, C, H, W]
        x = self.activation(self.stem(x))
        x = self.groups(x)  # [N, widths[-1], h, w]
        return pooled(x, self.pool)  # [N, D]

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Set what comes from the data: the mean and deviation of each channel, and the whitening filters."""
        self.normalize.fit(images)
        if self.whiten:
            some = images[:: max(1, len(images) // 5000)]  # from all over: data sets may be sorted by class
            filters = whitening_filters(self.normalize(some), self.stem.kernel_size[0])
            self.stem.weight.copy_(torch.cat([filters, -filters])[: self.stem.out_channels])
            nn.init.zeros_(self.stem.get_parameter("bias"))

    def folded(self) -> "ConvNet":
        """A copy for inference with each norm folded into the convolution before it.

        The norm stands after the pooling, but its scale (1 / deviation) is positive, so it commutes with the maximum.
        """
        copy = deepcopy(self).eval()
        for group in copy.groups:
            assert isinstance(group, Group)
            group.fold()
        return copy


def pooled(x: Tensor, pool: Pool) -> Tensor:
    """Feature maps [N, C, h, w] to features: [N, C], or [N, 2 * C] where the mean goes with the maximum."""
    largest = x.amax((2, 3))
    return largest if pool == "max" else torch.cat([x.mean((2, 3)), largest], dim=1)


class Group(nn.Module):
    """Convolve, halve, convolve: [N, i, H, W] to [N, o, H // 2, W // 2]."""

    norm1: nn.BatchNorm2d | nn.Identity
    norm2: nn.BatchNorm2d | nn.Identity

    def __init__(self, inputs: int, outputs: int, activation: Activation) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs)
        self.norm1 = _norm(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = _norm(outputs)
        self.activation = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x), 2)  # pooling first: norm and activation then touch a quarter of the values
        x = self.activation(self.norm1(x))
        return self.activation(self.norm2(self.conv2(x)))

    def fold(self) -> None:
        assert isinstance(self.norm1, nn.BatchNorm2d)
        assert isinstance(self.norm2, nn.BatchNorm2d)
        self.conv1, self.norm1 = fuse_conv_bn_eval(self.conv1, self.norm1), nn.Identity()
        self.conv2, self.norm2 = fuse_conv_bn_eval(self.conv2, self.norm2), nn.Identity()


class Normalize(nn.Module):
    """Subtract the training set's mean and divide by its deviation, channel by channel. Part of every export."""

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return (pixels.type_as(self.mean) - self.mean) / self.std

    @torch.no_grad()
    def fit(self, images: Tensor) -> None:
        """Take mean and deviation of uint8 images [N, C, H, W]."""
        values = torch.arange(256, dtype=torch.float64)
        for channel in range(images.shape[1]):  # by histogram: the whole set as floats would take gigabytes
            shares = torch.bincount(images[:, channel].flatten(), minlength=256).double() / images[:, channel].numel()
            mean = (shares * values).sum()
            self.mean[channel] = mean
            self.std[channel] = (shares * (values - mean) ** 2).sum().sqrt().clamp(min=1)  # it may be 0


def whitening_filters(images: Tensor, kernel: int) -> Tensor:
    """Filters that turn patches of normalised images [N, C, H, W] into uncorrelated values of variance 1.

    Returns [C * kernel², C, kernel, kernel], largest variance first (Page, 2018; Jordan, 2024).
    """
    channels = images.shape[1]
    patches = images.unfold(2, kernel, 1).unfold(3, kernel, 1)  # [N, C, h, w, k, k]
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * kernel * kernel)
    covariance = patches.T @ patches / len(patches)
    variances, vectors = torch.linalg.eigh(covariance.double())  # ascending
    # A floor under the variances: the last directions are noise, and would be blown up.
    filters = (vectors / (variances + 5e-4).sqrt()).T.flip(0)
    return filters.float().reshape(-1, channels, kernel, kernel)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    """A 3 x 3 convolution that starts by passing its inputs through: depth costs nothing at first."""
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[: min(inputs, outputs)])
    return conv


def _norm(width: int) -> nn.BatchNorm2d:
    """Statistics follow the last few batches (momentum 0.4): the weights move fast. The scale stays 1."""
    norm = nn.BatchNorm2d(width, momentum=0.4)
    norm.weight.requires_grad_(False)
    return norm
