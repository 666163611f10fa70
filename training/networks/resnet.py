"""Residual networks for small pictures: ResNet-18 and ResNet-34 with a 3 x 3 stem (He et al., 2016)."""

from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from training.networks.network import Network


class ResNet(Network):
    """Stages of `blocks` blocks each; every stage but the first halves the picture and has twice the channels."""

    def __init__(self, *, channels: int, classes: int, blocks: list[int], width: int = 64) -> None:
        super().__init__(channels)
        self.stem = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            outputs = width * 2**stage
            for place in range(count):
                stages.append(Block(inputs, outputs, stride=2 if stage and place == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*stages)
        self.head = nn.Linear(inputs, classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.to(memory_format=torch.channels_last)

    def features(self, pixels: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(self.normalize(pixels))))
        return self.blocks(x).mean((2, 3))  # [N, D]

    def folded(self) -> Self:
        """Each norm is folded into the convolution before it."""
        copy = super().folded()
        copy.stem, copy.norm = _fused(copy.stem, copy.norm)
        for block in copy.blocks:
            assert isinstance(block, Block)
            block.fold()
        return copy


class Block(nn.Module):
    """Two convolutions with a way around them: [N, i, H, W] to [N, o, H / stride, W / stride]."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1: nn.Module = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2: nn.Module = nn.BatchNorm2d(outputs)
        self.way_around: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.way_around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.way_around(x))

    def fold(self) -> None:
        self.conv1, self.norm1 = _fused(self.conv1, self.norm1)
        self.conv2, self.norm2 = _fused(self.conv2, self.norm2)
        if isinstance(self.way_around, nn.Sequential):
            self.way_around = nn.Sequential(*_fused(*self.way_around))


def _fused(convolution: nn.Module, norm: nn.Module) -> tuple[nn.Conv2d, nn.Identity]:
    assert isinstance(convolution, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_eval(convolution, norm), nn.Identity()
