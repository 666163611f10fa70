"""Augmentation of whole batches: one call changes every image, each in its own way.

Randomness is drawn from a generator that the caller seeds by step, so a resumed run sees the same pictures. It is drawn
on the CPU, so that every device sees the same too; the pictures stay where they are.
"""

import math
from collections.abc import Callable

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


def scaled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """All of each image [N, C, H, W] in a smaller height and width; a pixel is a mean of those that it stands for."""
    return F.interpolate(images.float(), size=size, mode="bilinear", antialias=True)


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
    aspect = width / height  # places are given in halves of either side
    theta = torch.stack(
        [
            torch.stack([cos, (cos * slant - sin) / aspect, draw[3] * 2 * shift / width], dim=1),
            torch.stack([sin * aspect, sin * slant + cos, draw[4] * 2 * shift / height], dim=1),
        ],
        dim=1,
    )  # [N, 2, 3]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images.float(), grid, align_corners=False)


# --- TrivialAugment ---------------------------------------------------------------------------------------------------


def trivial(images: Tensor, share: float, generator: Generator) -> Tensor:
    """Change a share of the images [N, C, H, W], each in one of twelve ways and by an amount that chance says.

    After TrivialAugment (Müller and Hutter, 2021), without histograms, and less far: nothing is turned by more than a
    right angle or moved by more than a third of its side. Over the border comes the picture mirrored.
    """
    changed = images.to(torch.float32, copy=True)
    chosen = torch.rand(len(images), generator=generator) < share
    way = torch.randint(len(CHANGES), (len(images),), generator=generator)
    amount = (torch.rand(len(images), generator=generator) * 2 - 1).view(-1, 1, 1, 1).to(images.device)  # ± 1
    for number, change in enumerate(CHANGES):
        these = (chosen & (way == number)).nonzero()[:, 0].to(images.device)
        if len(these):
            changed[these] = change(changed[these], amount[these])
    return changed.clamp(0, 255)


def _turned(images: Tensor, amount: Tensor) -> Tensor:
    cos, sin = torch.cos(amount * math.pi / 2), torch.sin(amount * math.pi / 2)
    height, width = images.shape[2:]
    return _warped(images, cos, -sin * (height / width), 0, sin * (width / height), cos, 0)


def _sheared_along(images: Tensor, amount: Tensor) -> Tensor:
    return _warped(images, 1, 0.8 * amount, 0, 0, 1, 0)


def _sheared_down(images: Tensor, amount: Tensor) -> Tensor:
    return _warped(images, 1, 0, 0, 0.8 * amount, 1, 0)


def _moved_along(images: Tensor, amount: Tensor) -> Tensor:
    return _warped(images, 1, 0, 0.6 * amount, 0, 1, 0)


def _moved_down(images: Tensor, amount: Tensor) -> Tensor:
    return _warped(images, 1, 0, 0, 0, 1, 0.6 * amount)


def _warped(images: Tensor, *matrix: Tensor | float) -> Tensor:
    """The place (x, y) shows what was at (a x + b y + c, d x + e y + f), in halves of the picture's sides from its
    centre; `matrix` is a to f, numbers or [N, 1, 1, 1]."""
    zeros = torch.zeros(len(images), 1, 1, 1, device=images.device)
    theta = torch.cat([zeros + value for value in matrix], dim=3).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="reflection", align_corners=False)


def _brightness(images: Tensor, amount: Tensor) -> Tensor:
    return images * (1 + 0.9 * amount)


def _contrast(images: Tensor, amount: Tensor) -> Tensor:
    return _from(_grey(images).mean((1, 2, 3), keepdim=True), images, amount)


def _saturation(images: Tensor, amount: Tensor) -> Tensor:
    return _from(_grey(images), images, amount)


def _sharpness(images: Tensor, amount: Tensor) -> Tensor:
    return _from(F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="reflect"), 3, 1), images, amount)


def _from(middle: Tensor, images: Tensor, amount: Tensor) -> Tensor:
    """Nearer to `middle` where the amount is negative, further from it where it is positive."""
    return middle + (images - middle) * (1 + 0.9 * amount)


def _posterised(images: Tensor, amount: Tensor) -> Tensor:
    step = 2 ** (1 + (5 * amount.abs()).round())  # 7 to 2 bits are left
    return (images / step).floor() * step


def _solarised(images: Tensor, amount: Tensor) -> Tensor:
    return torch.where(images >= 255 * (1 - amount.abs()), 255 - images, images)


def _stretched(images: Tensor, _: Tensor) -> Tensor:
    """The darkest value of each channel to 0, the lightest to 255."""
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(high > low, (images - low) * 255 / (high - low).clamp(min=1), images)


def _grey(images: Tensor) -> Tensor:
    """[N, 1, H, W], as bright as what it is made from looks (ITU-R BT.601)."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue).unsqueeze(1)


CHANGES: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    _turned,
    _sheared_along,
    _sheared_down,
    _moved_along,
    _moved_down,
    _brightness,
    _contrast,
    _saturation,
    _sharpness,
    _posterised,
    _solarised,
    _stretched,
)
