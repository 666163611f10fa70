"""The linear model and the multi-layer perceptron: every pixel into every neuron."""

from typing import Literal

from torch import Tensor, nn

from training.networks.network import (
    Activation,
    Initialization,
    Network,
    Normalization,
    hidden_layers,
    initialize_weights,
)


class Perceptron(Network):
    """Hidden layers of the given widths, none for a linear model, then one output a class.

    With `output` "sigmoid" what it gives are values between 0 and 1, for a squared error to compare with 0 and 1.
    """

    def __init__(
        self,
        *,
        channels: int,
        classes: int,
        height: int,
        width: int,
        widths: list[int],
        activation: Activation = "relu",
        output: Literal["linear", "sigmoid"] = "linear",
        dropout: float = 0.0,
        initialization: Initialization = "default",
        normalization: Normalization = "standard",
    ) -> None:
        super().__init__(channels, normalization)
        widths = [channels * height * width, *widths]
        self.layers = hidden_layers(widths, activation, dropout)
        self.head = nn.Linear(widths[-1], classes)
        self.output = nn.Sigmoid() if output == "sigmoid" else nn.Identity()
        initialize_weights(self, initialization)

    def features(self, pixels: Tensor) -> Tensor:
        return self.layers(self.normalize(pixels))  # [N, D]

    def forward(self, pixels: Tensor) -> Tensor:
        return self.output(super().forward(pixels))  # [N, K]
