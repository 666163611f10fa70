"""What every network is: pixels to logits, with the normalisation inside."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from copy import deepcopy
from itertools import pairwise
from typing import Literal, Self

import torch
from torch import Tensor, nn

Activation = Literal["sigmoid", "tanh", "relu", "relu6", "leaky relu", "gelu", "silu"]
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}
BOUNDED = (nn.Sigmoid, nn.Tanh, nn.ReLU6)  # however large what goes in
NEVER_FALLING = (*BOUNDED, nn.ReLU, nn.LeakyReLU)  # the largest of several stays the largest

Normalization = Literal["standard", "unit"]
Initialization = Literal["default", "normal", "scaled normal", "xavier", "he"]


class Network(nn.Module, ABC):
    """Pixels [N, C, H, W] of any dtype, 0 … 255, to logits [N, K]. Normalisation is the first layer."""

    head: nn.Linear

    def __init__(self, channels: int, normalization: Normalization = "standard") -> None:
        """`normalization` "standard" is to mean 0 and deviation 1 over the training set, "unit" to 0 … 1."""
        super().__init__()
        self.normalize = Normalize(channels)
        self.normalization = normalization

    def forward(self, pixels: Tensor) -> Tensor:
        return self.head(self.features(pixels))  # [N, K]

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """What the head reads: [N, D]."""

    @torch.no_grad()
    def initialize(self, images: Tensor) -> None:
        """Set what comes from the data, uint8 images [N, C, H, W]: the mean and deviation of each channel."""
        if self.normalization == "unit":
            self.normalize.std.fill_(255)
        else:
            self.normalize.fit(images)

    def folded(self) -> Self:
        """A copy for inference, with as few operations as will do."""
        return deepcopy(self).eval()


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


def hidden_layers(widths: Sequence[int], activation: Activation, dropout: float) -> nn.Sequential:
    """Fully connected layers from each width to the next: [N, …] of `widths[0]` values to [N, `widths[-1]`]."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), ACTIVATIONS[activation](), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


@torch.no_grad()
def initialize_weights(network: nn.Module, how: Initialization) -> None:
    """Draw the weights of linear layers and convolutions anew; "default" leaves them as torch has drawn them.

    normal: deviation 1, also of biases, as in Nielsen (2015), chapter 1. scaled normal: 1 / sqrt(inputs), of biases 1,
    as in his chapter 3. xavier: Glorot and Bengio (2010). he: He et al. (2015).
    """
    if how == "default":
        return
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            inputs = layer.weight[0].numel()
            if how == "xavier":
                nn.init.xavier_normal_(layer.weight)
            elif how == "he":
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            else:
                nn.init.normal_(layer.weight, std=1.0 if how == "normal" else inputs**-0.5)
            if layer.bias is not None:
                nn.init.normal_(layer.bias, std=0.0 if how in ("xavier", "he") else 1.0)
