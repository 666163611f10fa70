"""Near-duplicates: what is one picture to the eye, and what only looks so to a hash."""

import io
import time

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from training import duplicates
from training.duplicates import group_ids

Pictures = NDArray[np.uint8]


def photographs(count: int, size: int = 64, seed: int = 0) -> Pictures:
    """Smooth coloured patches [N, 3, H, W], no two alike."""
    random = np.random.default_rng(seed)
    coarse = (Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8)) for _ in range(count))
    return np.stack(
        [np.asarray(one.resize((size, size), Image.Resampling.BICUBIC)).transpose(2, 0, 1) for one in coarse]
    )


def changed(pictures: Pictures, change: str) -> Pictures:
    return np.stack(
        [np.asarray(_change(Image.fromarray(one.transpose(1, 2, 0)), change)) for one in pictures]
    ).transpose(0, 3, 1, 2)


def _change(image: Image.Image, change: str) -> Image.Image:
    if change == "smaller":
        return image.resize((40, 40)).resize(image.size)
    if change == "brighter":
        return image.point(lambda value: min(255, value + 12))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=40)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("change", ["smaller", "brighter", "jpeg"])
def test_a_picture_saved_anew_is_found(change: str) -> None:
    originals = photographs(50)
    ids = group_ids(np.concatenate([originals, changed(originals, change)]))
    assert (ids[:50] == np.arange(50)).all()
    assert (ids[50:] == np.arange(50)).mean() >= 0.9


def test_pictures_that_differ_are_groups_of_their_own() -> None:
    assert np.array_equal(group_ids(photographs(2000, size=32)), np.arange(2000))


def test_flat_pictures_are_nobody_s_duplicates() -> None:
    greys = np.broadcast_to(np.arange(200, dtype=np.uint8)[:, None, None, None], (200, 3, 16, 16))
    reds = np.zeros((50, 3, 16, 16), np.uint8)
    reds[:, 0] = np.arange(200, 250)[:, None, None]
    for flat in (greys, reds):
        assert np.array_equal(group_ids(np.ascontiguousarray(flat)), np.arange(len(flat)))


def test_the_same_shape_in_another_colour_is_another_picture() -> None:
    balls = []
    for colour in ("red", "blue"):
        image = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(image).ellipse((6, 6, 26, 26), colour)
        balls.append(np.asarray(image).transpose(2, 0, 1))
    assert group_ids(np.stack(balls)).tolist() == [0, 1]


def test_strokes_that_differ_by_hand_are_different_pictures() -> None:
    strokes = []
    for lean in range(-6, 7, 2):
        image = Image.new("L", (28, 28))
        ImageDraw.Draw(image).line((14 + lean, 4, 14 - lean, 24), 255, 3)
        strokes.append(np.asarray(image)[None])
    assert group_ids(np.stack(strokes)).tolist() == list(range(7))


def test_a_group_is_held_together_by_its_middle() -> None:
    first = photographs(1)[0].astype(np.float64)
    other = photographs(1, seed=1)[0]
    steps = np.stack([(first + (other - first) * share).round().astype(np.uint8) for share in np.linspace(0, 0.2, 9)])
    assert (group_ids(steps[::8]).tolist(), group_ids(steps).tolist()) == ([0, 1], [0] * 9)


@pytest.mark.parametrize("shape", [(0, 3, 32, 32), (1, 1, 28, 28), (5, 3, 1, 1), (5, 1, 6, 40)])
def test_any_number_and_size_can_be_grouped(shape: tuple[int, ...]) -> None:
    pictures = np.zeros(shape, np.uint8)
    assert group_ids(pictures).tolist() == list(range(shape[0]))


def test_groups_do_not_depend_on_how_many_are_compared_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    originals = photographs(30)
    pictures = np.concatenate([originals, changed(originals, "smaller"), changed(originals, "brighter")])
    expected = group_ids(pictures)
    monkeypatch.setattr(duplicates, "PAIRS_AT_ONCE", 7)
    monkeypatch.setattr(duplicates, "AT_ONCE", 8)
    assert np.array_equal(group_ids(pictures), expected)


def test_ten_thousand_frames_of_one_camera_are_grouped_in_seconds() -> None:
    """The worst there is for the index: all hashes are the same."""
    scene = photographs(1, size=16)
    noise = np.random.default_rng(0).integers(-4, 5, (10_000, 3, 16, 16))
    frames = (scene + noise).clip(0, 255).astype(np.uint8)
    begun = time.monotonic()
    assert (group_ids(frames) == 0).mean() > 0.9
    assert time.monotonic() - begun < 40
