"""Convolution and pooling, once or twice, then fully connected layers: the networks of the textbooks (LeCun, 1998)."""

from itertools import pairwise

from torch import Tensor, nn

from training.networks.network import (
    ACTIVATIONS,
    Activation,
    Initialization,
    Network,
    Normalization,
    hidden_layers,
    initialize_weights,
)


class LeNet(Network):
    """Each convolution is unpadded and followed by an activation and a 2 x 2 maximum, each hidden layer by dropout."""

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        height: int,
        width: int,
        filters: list[int],
        hidden: list[int],
        kernel: int = 5,
        activation: Activation = "relu",
        dropout: float = 0.0,
        initialization: Initialization = "default",
        normalization: Normalization = "standard",
    ) -> None:
        super().__init__(channels, normalization)
        convolutions: list[nn.Module] = []
        for inputs, outputs in pairwise([channels, *filters]):
            convolutions += [nn.Conv2d(inputs, outputs, kernel), ACTIVATIONS[activation](), nn.MaxPool2d(2)]
            height, width = (height - kernel + 1) // 2, (width - kernel + 1) // 2
        self.convolutions = nn.Sequential(*convolutions)
        widths = [[channels, *filters][-1] * height * width, *hidden]
        self.layers = hidden_layers(widths, activation, dropout)
        self.head = nn.Linear(widths[-1], classes)
        initialize_weights(self, initialization)

    def features(self, pixels: Tensor) -> Tensor:
        return self.layers(self.convolutions(self.normalize(pixels)))  # [N, D]
