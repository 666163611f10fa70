"""The shipped `mnist` reads digits that we draw: fonts, strokes, sizes, places, both polarities, light noise."""

from collections.abc import Iterator
from pathlib import Path
from random import Random

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.ImageFont import FreeTypeFont

from tests.tiny import encode
from training import published
from training.bundle import store
from training.bundle.images import decode
from training.bundle.store import BundleRef
from training.drawings import pen_digit
from training.evaluate import infer

ROOT = Path(__file__).parents[3]
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "cmr10"]


def ink(digit: int, random: Random) -> np.ndarray:
    """One digit, white on black, somewhere on a frame of some size: by pen or in a font."""
    size = random.randint(60, 400)
    frame = Image.new("L", (size, size))
    height = size * random.uniform(0.35, 0.8)
    if random.random() < 0.5:
        drawn = Image.fromarray(pen_digit(digit, random, size=round(height), stroke=random.uniform(0.05, 0.16)))
    else:
        drawn = Image.new("L", (round(height), round(height)))
        ImageDraw.Draw(drawn).text((height / 2, height / 2), str(digit), 255, font(random, height * 0.8), anchor="mm")
    free = size - drawn.width
    frame.paste(drawn, (random.randint(0, free), random.randint(0, free)))
    return np.asarray(frame) / 255


def font(random: Random, height: float) -> FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"{random.choice(FONTS)}.ttf", round(height))


def photograph(strokes: np.ndarray, random: Random) -> Image.Image:
    """Dark on unevenly lit paper or light on a dark ground, with light noise."""
    noise = np.random.default_rng(random.getrandbits(32)).normal(0, random.uniform(0, 8), strokes.shape)
    y, x = np.mgrid[0 : strokes.shape[0], 0 : strokes.shape[1]] / strokes.shape[0]
    shade = random.uniform(-50, 50) * x + random.uniform(-30, 30) * y
    if random.random() < 0.5:
        picture = (200 + shade) * (1 - strokes * random.uniform(0.6, 0.95))
    else:
        picture = 30 + shade.clip(-20, 20) + strokes * random.uniform(120, 220)
    return Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8))


def drawings(count: int) -> Iterator[tuple[int, bytes]]:
    random = Random(7)
    for index in range(count):
        digit = index % 10
        form = random.choice(["PNG", "JPEG", "WEBP"])
        yield digit, encode(photograph(ink(digit, random), random), form)


def test_nine_of_ten_drawn_digits_are_read_right() -> None:
    artifacts = ROOT / "artifacts"
    manifest, module = published.load(BundleRef("mnist", store.active(artifacts, "mnist") or ""), artifacts)
    digits, pictures = zip(*drawings(200), strict=True)
    pixels = np.stack([decode(picture, manifest.input) for picture in pictures])
    answers = infer(module, torch.from_numpy(pixels), torch.device("cpu")).argmax(1)
    right = float((answers == torch.tensor(digits)).double().mean())
    assert right >= 0.9, f"{right:.1%} of {len(digits)} drawn digits were read right"
