"""Pictures that we draw ourselves: digits as pen strokes, shapes, textures, noise, and simple scenes.

They are the golden inputs of every bundle, the samples of the README, and the digits of the tests. No picture of a data
set is passed on.
"""

import math
from collections.abc import Callable
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from training.bundle.golden import SAMPLES
from training.bundle.images import Pixels, fit
from training.bundle.manifest import InputSpec

Point = tuple[float, float]


def arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> list[Point]:
    """Points along an ellipse, clockwise from `start` to `end` degrees; 0 is to the right, 90 down."""
    steps = max(6, int(abs(end - start) / 12))
    angles = [math.radians(start + (end - start) * i / steps) for i in range(steps + 1)]
    return [(x + rx * math.cos(angle), y + ry * math.sin(angle)) for angle in angles]


# Each digit as a pen writes it, in a box of width 0.6 and height 1.
STROKES: dict[int, list[list[Point]]] = {
    0: [arc(0.3, 0.5, 0.28, 0.48, -90, 270)],
    1: [[(0.12, 0.24), (0.32, 0.04), (0.32, 0.98)]],
    2: [arc(0.3, 0.28, 0.26, 0.26, -170, 40) + [(0.06, 0.96), (0.58, 0.96)]],
    3: [arc(0.27, 0.26, 0.25, 0.24, -150, 90) + arc(0.27, 0.73, 0.28, 0.25, -90, 150)],
    4: [[(0.42, 0.02), (0.04, 0.66), (0.58, 0.66)], [(0.42, 0.3), (0.42, 0.99)]],
    5: [[(0.54, 0.04), (0.12, 0.04), (0.09, 0.44)] + arc(0.27, 0.68, 0.28, 0.29, -125, 140)],
    6: [[(0.46, 0.02), (0.2, 0.34)] + arc(0.3, 0.7, 0.25, 0.27, 200, -160)],
    7: [[(0.04, 0.05), (0.56, 0.05), (0.22, 0.98)]],
    8: [arc(0.3, 0.26, 0.22, 0.23, 90, -270) + arc(0.3, 0.74, 0.26, 0.25, -90, 270)],
    9: [arc(0.3, 0.28, 0.24, 0.25, 0, -360) + [(0.53, 0.4), (0.44, 0.98)]],
}


def pen_digit(
    digit: int, random: Random, size: int = 28, stroke: float = 0.1, wobble: float = 0.03
) -> NDArray[np.uint8]:
    """One digit in strokes, white on black, [size, size]: leaning, turned and stretched a little, as hands do.

    `stroke` is the pen's width and `wobble` how far points stray, both as shares of the digit's height.
    """
    big = 4 * size
    image = Image.new("L", (big, big))
    draw = ImageDraw.Draw(image)
    lean, turn = random.uniform(-0.2, 0.2), random.uniform(-0.12, 0.12)
    height = big * random.uniform(0.62, 0.74)
    width = height * random.uniform(0.85, 1.1)
    pen = max(2, round(height * stroke))
    for line in STROKES[digit]:
        stray = (random.gauss(0, wobble), random.gauss(0, wobble))
        points = []
        for x, y in line:
            x, y = x - 0.3 + stray[0] * math.sin(3 * y), y - 0.5 + stray[1] * math.sin(4 * x)
            x -= lean * y
            x, y = x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)
            points.append((big / 2 + x * width, big / 2 + y * height))
        draw.line(points, fill=255, width=pen, joint="curve")
        for x, y in (points[0], points[-1]):
            draw.ellipse([x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2], fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def golden_images(spec: InputSpec, seed: int = 0) -> NDArray[np.uint8]:
    """The 256 golden inputs of an input, uint8 [256, C, H, W]."""
    return drawn_images(spec, SAMPLES, str(seed))


def drawn_images(spec: InputSpec, count: int, seed: str) -> NDArray[np.uint8]:
    """Digits, shapes, textures and noise in turn, uint8 [count, C, H, W]; the same for the same seed."""
    random = Random(f"{seed} {spec.shape}")
    kinds: list[Callable[[Random], Image.Image]] = [_digit, _shapes, _texture, _noise]
    return np.stack([_fitted(kinds[i % len(kinds)](random), spec) for i in range(count)])


def _fitted(image: Image.Image, spec: InputSpec) -> Pixels:
    # Stretched, whatever the bundle's own fit is: golden inputs exercise the network, not the fit.
    stretched = InputSpec(channels=spec.channels, height=spec.height, width=spec.width, fit="stretch")
    return fit(image.convert("L" if spec.channels == 1 else "RGB"), stretched)


def _digit(random: Random) -> Image.Image:
    ink = Image.fromarray(pen_digit(random.randrange(10), random, size=64, stroke=random.uniform(0.07, 0.16)))
    if random.random() < 0.5:
        return ink
    return Image.composite(_flat(random, 64), _flat(random, 64), ink)


def _shapes(random: Random) -> Image.Image:
    image = _flat(random, 64)
    draw = ImageDraw.Draw(image)
    for _ in range(random.randint(1, 5)):
        x, y, w, h = random.randint(-8, 56), random.randint(-8, 56), random.randint(6, 48), random.randint(6, 48)
        form = random.choice((draw.ellipse, draw.rectangle))
        form([x, y, x + w, y + h], fill=_colour(random))
    return image


def _texture(random: Random) -> Image.Image:
    y, x = np.mgrid[0:64, 0:64] / 64
    channels = []
    for _ in range(3):
        wave = random.uniform(1, 12) * x + random.uniform(1, 12) * y + random.uniform(0, 1)
        channels.append(127.5 + random.uniform(30, 127) * np.sin(2 * np.pi * wave))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def _noise(random: Random) -> Image.Image:
    pixels = np.frombuffer(random.randbytes(64 * 64 * 3), np.uint8).reshape(64, 64, 3)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(random.uniform(0, 4)))


def _flat(random: Random, size: int) -> Image.Image:
    return Image.new("RGB", (size, size), _colour(random))


def _colour(random: Random) -> tuple[int, int, int]:
    return random.randrange(256), random.randrange(256), random.randrange(256)
