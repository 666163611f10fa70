"""Augmentation of whole batches: one call changes every image, each in its own way.

Randomness is drawn from a generator that the caller seeds by step, so a resumed run sees the same pictures. It is drawn
on the CPU, so that every device sees the same too; the pictures stay where they are.
"""

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def random_shifts(count: int, shift: int, step: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """How far down and to the right each image is moved: [N] and [N], multiples of `step` between ± `shift`."""
    places = 2 * (shift // step) + 1
    down, right = (torch.randint(0, places, (2, count), generator=generator) - shift // step) * step
    return down, right


def move(images: Tensor, down: Tensor, right: Tensor, shift: int) -> Tensor:
    """Move each image [N, C, H, W] by so many pixels [N], at most `shift`, with the border reflected."""
    height, width = images.shape[2:]
    padded = F.pad(images.float(), (shift,) * 4, mode="reflect")
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [N, C, 2 * shift + 1, 2 * shift + 1, H, W], a view
    which, down, right = torch.arange(len(images)), shift + down, shift + right
    return windows[which.to(images.device), :, down.to(images.device), right.to(images.device)]


def mirror(images: Tensor, mirrored: Tensor) -> Tensor:
    """Mirror those images [N, C, H, W] that are marked [N]."""
    return torch.where(mirrored.to(images.device).view(-1, 1, 1, 1), images.flip(3), images)


def cutout(images: Tensor, size: int, generator: Generator) -> Tensor:
    """Cover a square of `size` pixels of each image [N, C, H, W] with the mean of all; it lies wholly inside (DeVries
    and Taylor, 2017)."""
    height, width = images.shape[2:]
    top = torch.randint(0, height - size + 1, (len(images), 1), generator=generator)
    left = torch.randint(0, width - size + 1, (len(images), 1), generator=generator)
    rows, columns = torch.arange(height), torch.arange(width)
    covered_rows = (rows >= top) & (rows < top + size)  # [N, H]
    covered_columns = (columns >= left) & (columns < left + size)  # [N, W]
    covered = (covered_rows[:, :, None] & covered_columns[:, None, :]).unsqueeze(1)  # [N, 1, H, W]
    mean = images.float().mean((0, 2, 3), keepdim=True)  # [1, C, 1, 1]
    return torch.where(covered.to(images.device), mean, images)


def random_affine(
    images: Tensor, *, degrees: float, scale: float, shear: float, shift: float, generator: Generator
) -> Tensor:
    """Turn, scale, shear and move each image [N, C, H, W] about its centre; the border fills with 0.

    Each amount is drawn evenly from ± `degrees`, 1 ± `scale`, ± `shear` degrees and ± `shift` pixels.
    """
    count, _, height, width = images.shape
    draw = (torch.rand(5, count, generator=generator) * 2 - 1).to(images.device)  # [5, N]
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
