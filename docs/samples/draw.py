"""Draw the sample pictures of the README: a digit on paper and a simple scene. No picture of a data set is used.

python docs/samples/draw.py
"""

from pathlib import Path
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.drawings import pen_digit

HERE = Path(__file__).parent


def digit() -> Image.Image:
    """A 7 in dark ink on unevenly lit paper, as a phone would see it."""
    ink = pen_digit(7, Random(3), size=280, stroke=0.07)
    y, x = np.mgrid[0:280, 0:280] / 280
    paper = 225 - 45 * x - 25 * y  # [H, W]
    grain = np.random.default_rng(3).normal(0, 4, ink.shape)
    photo = paper * (1 - ink / 255 * 0.8) + grain
    return Image.fromarray(photo.clip(0, 255).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.8))


def ship() -> Image.Image:
    """A ship between sky and sea."""
    image = Image.new("RGB", (256, 256))
    draw = ImageDraw.Draw(image)
    for row in range(256):
        share = row / 256
        sky, sea = (150 + int(70 * share), 190 + int(40 * share), 225), (40, 80 + int(30 * share), 120)
        draw.line([(0, row), (256, row)], fill=sky if row < 150 else sea)
    draw.polygon([(30, 140), (226, 132), (204, 176), (58, 178)], fill=(60, 60, 70))  # hull
    draw.polygon([(30, 140), (226, 132), (224, 140), (32, 148)], fill=(170, 40, 40))
    draw.rectangle([92, 102, 176, 138], fill=(235, 235, 230))  # decks
    draw.rectangle([112, 78, 160, 104], fill=(220, 220, 215))
    draw.rectangle([130, 44, 148, 80], fill=(190, 60, 50))  # funnel
    for window in range(100, 172, 14):
        draw.rectangle([window, 112, window + 7, 120], fill=(60, 80, 100))
    for row in range(182, 250, 12):
        draw.line([(0, row), (256, row + 4)], fill=(70, 115, 150), width=2)
    return image.filter(ImageFilter.GaussianBlur(1.5))


if __name__ == "__main__":
    digit().save(HERE / "digit.png")
    ship().save(HERE / "ship.png")
