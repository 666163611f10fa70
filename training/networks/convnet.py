"""A plain, fast convolutional network: a stem, groups of 3 x 3 convolutions, a maximum over space, a linear layer.

The shape is that of the CIFAR-10 speed records (hlb-CIFAR10, airbench94 and 96): pooling before the norm, norms with a
bias but no scale, and past two convolutions a group the last two are added to what goes into them. Widths and stem come
from the recipe; nothing here depends on the picture's size.
"""

from copy import deepcopy
from typing import Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.networks.network import ACTIVATIONS, NEVER_FALLING, Activation, Network

Pool = Literal["max", "mean and max"]


class ConvNet(Network):
    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        widths: list[int],
        stem_width: int,
        stem_kernel: int,
        stem_stride: int = 1,
        convolutions: Literal[2, 3] = 2,
        whiten: bool = False,
        activation: Activation = "gelu",
        pool: Pool = "max",
        head_bias: bool = False,
    ) -> None:
        super().__init__(channels)
        if whiten and stem_width > (directions := 2 * channels * stem_kernel**2):
            raise ValueError(f"stem_width is {stem_width}; patches have only {directions} directions to whiten along")
        self.stem = nn.Conv2d(channels, stem_width, stem_kernel, stem_stride)
        self.stem.weight.requires_grad_(not whiten)
        self.whiten = whiten
        self.activation = ACTIVATIONS[activation]()
        inputs = [stem_width, *widths[:-1]]
        self.groups = nn.Sequential(
            *(Group(i, o, activation, convolutions) for i, o in zip(inputs, widths, strict=True))
        )
        self.pool = pool
        width = widths[-1] * (1 if pool == "max" else 2)
        self.head = nn.Linear(width, classes, bias=head_bias)
        nn.init.normal_(self.head.weight, std=1 / width)
        # Weights with channels last bring activations into that order: convolutions and pooling take half the time.
        self.to(memory_format=torch.channels_last)

    def features(self, pixels: Tensor) -> Tensor:
        x = self.normalize(pixels)  # [N, C, H, W]
        x = self.activation(self.stem(x))
        x = self.groups(x)  # [N, widths[-1], h, w]
        return pooled(x, self.pool)  # [N, D]

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Beside the normalisation, set the whitening filters."""
        super().initialize(images)
        if self.whiten:
            some = images[:: max(1, len(images) // 5000)]  # from all over: data sets may be sorted by class
            filters = whitening_filters(self.normalize(some), self.stem.kernel_size[0])
            self.stem.weight.copy_(torch.cat([filters, -filters])[: self.stem.out_channels])
            nn.init.zeros_(self.stem.get_parameter("bias"))

    def folded(self) -> Self:
        """Each norm is folded into the convolution before it.

        The first of a group stands after the pooling, but its scale (1 / deviation) is positive, so it commutes with
        the maximum. So does an activation that never falls; before the pooling it is one with the convolution, and what
        is pooled, and written in between, can be bytes where the network runs in int8.
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
    """Convolve, halve, convolve once or twice more: [N, i, H, W] to [N, o, H // 2, W // 2]."""

    norm1: nn.BatchNorm2d | nn.Identity
    norm2: nn.BatchNorm2d | nn.Identity
    norm3: nn.BatchNorm2d | nn.Identity

    def __init__(self, inputs: int, outputs: int, activation: Activation, convolutions: Literal[2, 3]) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs)
        self.norm1 = _norm(outputs)
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = _norm(outputs)
        self.has_third = convolutions == 3
        if self.has_third:
            self.conv3 = _conv(outputs, outputs)
            self.norm3 = _norm(outputs)
        self.activation = ACTIVATIONS[activation]()
        self.pools_last = False

    def forward(self, x: Tensor) -> Tensor:
        x = self._halved(self.conv1(x))
        y = self.norm2(self.conv2(x))
        if self.has_third:
            y = self.norm3(self.conv3(self.activation(y))) + x
        return self.activation(y)

    def _halved(self, x: Tensor) -> Tensor:
        if self.pools_last:
            return F.max_pool2d(self.activation(x), 2)
        return self.activation(self.norm1(F.max_pool2d(x, 2)))  # norm and activation touch a quarter of the values

    def fold(self) -> None:
        assert isinstance(self.norm1, nn.BatchNorm2d)
        assert isinstance(self.norm2, nn.BatchNorm2d)
        self.conv1, self.norm1 = fuse_conv_bn_eval(self.conv1, self.norm1), nn.Identity()
        self.conv2, self.norm2 = fuse_conv_bn_eval(self.conv2, self.norm2), nn.Identity()
        if self.has_third:
            assert isinstance(self.norm3, nn.BatchNorm2d)
            self.conv3, self.norm3 = fuse_conv_bn_eval(self.conv3, self.norm3), nn.Identity()
        self.pools_last = isinstance(self.activation, NEVER_FALLING)


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
