"""Augmentation of whole batches: one call changes every image, each in its own way.

Randomness is drawn from a generator that the caller seeds by step, so a resumed run sees the same pictures.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def random_shift(images: Tensor, shift: int, generator: Generator) -> Tensor:
    """Move each image [N, C, H, W] by up to `shift` pixels in each direction, with the border reflected."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (shift,) * 4, mode="reflect")
    down, right = torch.randint(0, 2 * shift + 1, (2, len(images)), generator=generator)
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 2 * shift + 1, 2 * shift + 1, H, W], a view
    return windows[torch.arange(len(images)), :, down, right]


def flip_alternating(images: Tensor, first: Tensor, epoch: int) -> Tensor:
    """Mirror images [N, C, H, W]: those marked in `first` [N] on even epochs, the others on odd ones.

    Each image is then seen both ways in any two epochs, which random flips don't grant (Jordan, 2024).
    """
    flip = first ^ (epoch % 2 == 1)
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(3), images)


def random_affine(
    images: Tensor, *, degrees: float, scale: float, shear: float, shift: float, generator: Generator
) -> Tensor:
    """Turn, scale, shear and move each image [N, C, H, W] about its centre; the border fills with 0.

    Each amount is drawn evenly from ± `degrees`, 1 ± `scale`, ± `shear` degrees and ± `shift` pixels.
    """
    count, _, height, width = images.shape
    draw = torch.rand(5, count, generator=generator) * 2 - 1  # [5, N]
    angle, slant = draw[0] * math.radians(degrees), torch.tan(draw[1] * math.radians(shear))
    zoom = 1 / (1 + draw[2] * scale)
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack(
        [
            torch.stack([cos, cos * slant - sin, draw[3] * 2 * shift / width], dim=1),
            torch.stack([sin, sin * slant + cos, draw[4] * 2 * shift / height], dim=1),
        ],
        dim=1,
    )  # [N, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)
