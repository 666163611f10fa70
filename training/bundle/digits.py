"""The `digit` fit: any picture of one digit becomes what MNIST's makers would have made of it.

They cropped each digit, scaled it into a 20 x 20 box and centred it by mass in 28 x 28, white on black. A photograph
also needs its paper removed: shade, polarity, specks and thin ink. Knows only arrays.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Grey = NDArray[np.uint8]
Floats = NDArray[np.float64]

WORKING_SIDE = 320  # longest side, in pixels, at which paper and ink are told apart
NOISY_SIDE = 80  # shortest side from which specks are filtered out; in smaller pictures a stroke may be one pixel wide
BOX = 20 / 28  # MNIST's box, as a share of the frame
THIN = 2.0 / 28  # thinner strokes than MNIST's are thickened to this share of the frame
SPECK = 0.04  # a blot below this share of the ink is dirt, not part of the digit


def fit_digit(grey: Grey, size: tuple[int, int]) -> Grey:
    """Greyscale [h, w] to white ink on black [height, width]. An input that already is that passes unchanged, and its
    negative is inverted."""
    if (passed := as_mnist(grey, size)) is not None:
        return passed
    width, height = size
    ink = _ink(_shrink(grey))  # [h, w], 0 paper … 1 ink
    mask = _digit_mask(ink)
    if not mask.any():
        return np.zeros((height, width), np.uint8)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    scale = BOX * min(height, width) / max(mask[box].shape)
    digit = _thicken((ink * mask)[box], mask[box], THIN * min(height, width) / scale)
    return _centre(_resize(digit, scale), height, width)


def as_mnist(grey: Grey, size: tuple[int, int]) -> Grey | None:
    """An input that is white ink on black already, or the negative of its negative; None for any other."""
    width, height = size
    if grey.shape != (height, width):
        return None
    border = border_pixels(grey).mean()
    if 64 <= border <= 191:
        return None
    return grey if border < 64 else 255 - grey


def border_pixels(grey: Grey) -> Grey:
    return np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])


def _shrink(grey: Grey) -> Grey:
    factor = max(grey.shape) / WORKING_SIDE
    if factor <= 1:
        return grey
    height, width = (max(1, round(side / factor)) for side in grey.shape)
    return np.asarray(Image.fromarray(grey).resize((width, height), Image.Resampling.BOX))


def _ink(grey: Grey) -> Floats:
    """How much each pixel differs from the paper, in the ink's direction: 0 … 1."""
    from scipy import ndimage  # 0.1 s to import: only for pictures that need it, never at a server's start

    smooth = grey.astype(np.float64)
    if min(grey.shape) >= NOISY_SIDE:
        smooth = ndimage.median_filter(smooth, size=3, mode="nearest")
    difference = smooth - _paper(smooth)
    darker, lighter = -np.quantile(difference, 0.005), np.quantile(difference, 0.995)
    difference *= -1 if darker > lighter else 1
    return (difference / max(darker, lighter, 1.0)).clip(0, 1)


def _paper(grey: Floats) -> Floats:
    """The paper's brightness: a quadratic surface through the pixels that lie near it, starting from the border."""
    height, width = grey.shape
    y, x = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    terms = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=-1).reshape(-1, 6)
    values = grey.ravel()
    border = border_pixels(grey.astype(np.uint8))
    surface = np.full_like(values, np.median(border))
    tolerance = max(24.0, 2.0 * float(border.std()))
    for _ in range(4):
        near = np.abs(values - surface) < tolerance
        if near.sum() < 12:
            break
        coefficients, *_ = np.linalg.lstsq(terms[near], values[near], rcond=None)
        surface = terms @ coefficients
        tolerance = max(12.0, 3.0 * float(np.std((values - surface)[near])))
    return surface.reshape(height, width)


def _digit_mask(ink: Floats) -> NDArray[np.bool_]:
    """Where the digit is: above Otsu's threshold, without specks."""
    from scipy import ndimage

    mask = ink > max(_otsu(ink), 0.2)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count == 0:
        return mask
    mass = ndimage.sum_labels(ink, labels, index=np.arange(1, count + 1))
    keep = np.flatnonzero(mass >= SPECK * mass.sum()) + 1
    return np.isin(labels, keep)


def _otsu(ink: Floats) -> float:
    """The threshold that best separates two groups of values (Otsu, 1979)."""
    counts, edges = np.histogram(ink, bins=64, range=(0, 1))
    middles = (edges[:-1] + edges[1:]) / 2
    below = np.cumsum(counts)
    above = below[-1] - below
    sum_below = np.cumsum(counts * middles)
    with np.errstate(divide="ignore", invalid="ignore"):
        gap = sum_below / below - (sum_below[-1] - sum_below) / above
        between = np.nan_to_num(below * above * gap**2)
    return float(edges[int(np.argmax(between)) + 1])


def _thicken(digit: Floats, mask: NDArray[np.bool_], wanted: float) -> Floats:
    """Widen strokes to `wanted` pixels where they are thinner; they would fade when scaled down."""
    from scipy import ndimage

    # Across a stroke of width w the distance to its edge averages w / 4.
    stroke = 4.0 * float(ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1][mask].mean())
    grow = round((wanted - stroke) / 2)
    if grow < 1:
        return digit
    y, x = np.ogrid[-grow : grow + 1, -grow : grow + 1]
    disc = x * x + y * y <= grow * grow + 0.5
    return ndimage.grey_dilation(np.pad(digit, grow), footprint=disc)


def _resize(digit: Floats, scale: float) -> Floats:
    """Scale down smoothly, then bring the ink back to full strength."""
    height, width = (max(1, round(side * scale)) for side in digit.shape)
    small = np.asarray(
        Image.fromarray(digit.astype(np.float32)).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float64
    ).clip(0, None)
    return (small / max(float(np.quantile(small, 0.95)), 1e-6)).clip(0, 1)


def _centre(digit: Floats, height: int, width: int) -> Grey:
    """Put the digit's centre of mass at the frame's centre, as far as it fits."""
    digit = digit[:height, :width]
    rows, columns = digit.shape
    mass = digit.sum() or 1.0
    y = round((height - 1) / 2 - float((digit.sum(1) * np.arange(rows)).sum() / mass))
    x = round((width - 1) / 2 - float((digit.sum(0) * np.arange(columns)).sum() / mass))
    y, x = min(max(y, 0), height - rows), min(max(x, 0), width - columns)
    frame = np.zeros((height, width), np.uint8)
    frame[y : y + rows, x : x + columns] = (digit * 255).round().astype(np.uint8)
    return frame
