"""What a network is shown and what it has learnt, as pictures: inputs, first-layer filters, feature maps, gradients."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor, nn

from training.networks import Network

INPUTS, FILTERS, FEATURE_MAPS, GRADIENTS = "inputs.png", "filters.png", "feature-maps.png", "gradients.png"
MOST_TILES = 64  # on a sheet
MOST_MAPS = 12  # of a layer
COLUMNS = 12
SIDE = 72  # of a tile, in pixels
LINE = 12  # of text

Tile = NDArray[np.uint8]  # [SIDE, SIDE, 3]


def inputs(path: Path, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
    """Pictures [N, C, H, W] as the network gets them, augmented, each with its class; what has none is a stranger."""
    known = [classes[label] for label in labels.tolist()]
    names = known + ["-"] * (len(images) - len(known))
    tiles = [_tile(image / 255) for image in images[:MOST_TILES].float().cpu()]
    rows = [slice(start, start + COLUMNS) for start in range(0, len(tiles), COLUMNS)]
    _sheet(path, [tiles[row] for row in rows], [names[:MOST_TILES][row] for row in rows])


def filters(path: Path, network: Network) -> None:
    """The weights of the first layer, as the pictures that they look for: each from its least to its greatest."""
    layer = next(module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear))
    weights = layer.weight.detach().cpu().float()
    if isinstance(layer, nn.Linear):  # every pixel into every neuron
        side = round((weights.shape[1] / network.normalize.mean.numel()) ** 0.5)
        weights = weights.view(len(weights), -1, side, side)
    tiles = [_tile(_stretched(one)) for one in weights[:MOST_TILES]]
    _sheet(path, [tiles[start : start + COLUMNS] for start in range(0, len(tiles), COLUMNS)])


@torch.no_grad()
def feature_maps(path: Path, network: Network, image: Tensor) -> None:
    """What each convolution makes of one picture [C, H, W]: its strongest maps, a row a layer."""
    found: list[Tensor] = []
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    hooks = [
        layer.register_forward_hook(lambda _, __, output: found.append(output[0].float().cpu())) for layer in layers
    ]
    network.eval()(image[None].to(next(network.parameters()).device))
    for hook in hooks:
        hook.remove()
    if found:
        strongest = [maps[maps.abs().mean((1, 2)).topk(min(MOST_MAPS, len(maps))).indices] for maps in found]
        _sheet(path, [[_tile(_stretched(one[None])) for one in maps] for maps in strongest])


def gradients(path: Path, norms: Sequence[dict[str, float]]) -> None:
    """The length of each layer's gradient at the end of each epoch: where it vanishes on its way back, it shows."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    names = list(norms[0])
    for place, name in enumerate(names):
        shade = place / max(1, len(names) - 1)  # from the first layer, blue, to the last, red
        lengths = [row[name] for row in norms]
        axes.plot(range(1, len(norms) + 1), lengths, marker=".", color=(shade, 0.3, 1 - shade), label=name)
    axes.set(title="gradient norms by layer", xlabel="epoch", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, dpi=100, format="png")
    os.replace(temporary, path)


def _stretched(values: Tensor) -> Tensor:
    return (values - values.min()) / (values.max() - values.min()).clamp(min=1e-12)


def _tile(values: Tensor) -> Tile:
    """Values [C, H, W], 0 … 1: in colour where there are three channels, else their mean in grey."""
    pixels = (values if len(values) == 3 else values.mean(0).expand(3, -1, -1)).clamp(0, 1) * 255
    picture = Image.fromarray(pixels.permute(1, 2, 0).to(torch.uint8).numpy())
    return np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST))


def _sheet(path: Path, rows: Sequence[Sequence[Tile]], names: Sequence[Sequence[str]] = ()) -> None:
    """Tiles in rows, each with its name below it where there are names."""
    height = SIDE + 2 + (LINE if names else 0)
    sheet = Image.new("RGB", ((SIDE + 2) * max(map(len, rows)), height * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for down, row in enumerate(rows):
        for right, tile in enumerate(row):
            sheet.paste(Image.fromarray(tile), (right * (SIDE + 2), down * height))
            if names:
                draw.text((right * (SIDE + 2), down * height + SIDE), names[down][right][:12], fill="black")
    temporary = path.with_name(f".{path.name}")
    sheet.save(temporary, "PNG")
    os.replace(temporary, path)  # it may be looked at while the run goes on
