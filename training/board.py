"""What a training run shows while it goes on: curves and pictures for TensorBoard, the pictures as PNG too."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from training import insight
from training.networks import Network

PICTURES = (insight.INPUTS, insight.FILTERS, insight.FEATURE_MAPS, insight.GRADIENTS)


class Board:
    """Writes into a run's folder; `step` is where the run begins or goes on."""

    def __init__(self, run: Path, step: int) -> None:
        self._run = run
        self._writer = SummaryWriter(run / "tensorboard", purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def begun(self, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        """With the first batch: pictures [N, C, H, W] of classes [N]."""
        insight.inputs(self._run / insight.INPUTS, images, labels, classes)
        self._picture(insight.INPUTS, 0)

    def epoch(self, row: dict[str, Any], norms: dict[str, float]) -> None:
        """With each epoch: its row of the history, and the lengths of its last gradients."""
        for name in ("loss", "accuracy"):
            for part in ("train", "holdout"):
                self._writer.add_scalar(f"{name}/{part}", row[f"{part}_{name}"], row["step"])
        for name, norm in norms.items():
            self._writer.add_scalar(f"gradient/{name}", norm, row["step"])

    def ended(self, network: Network, image: Tensor, norms: Sequence[dict[str, float]], step: int) -> None:
        """With the trained network: what it looks for, and what it makes of a picture [C, H, W]."""
        insight.filters(self._run / insight.FILTERS, network)
        insight.feature_maps(self._run / insight.FEATURE_MAPS, network, image)
        insight.gradients(self._run / insight.GRADIENTS, norms)
        for name in PICTURES[1:]:
            if (self._run / name).exists():  # without convolutions there are no maps
                self._picture(name, step)

    def _picture(self, name: str, step: int) -> None:
        picture = np.asarray(Image.open(self._run / name).convert("RGB"))
        self._writer.add_image(name.removesuffix(".png"), picture, step, dataformats="HWC")
