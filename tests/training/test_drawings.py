"""Pictures that we draw ourselves: always alike for a seed, and each unlike the others."""

from random import Random

import numpy as np
import pytest

from training.bundle.golden import SAMPLES
from training.bundle.manifest import InputSpec
from training.drawings import STROKES, arc, golden_images, pen_digit

SPECS = [
    InputSpec(channels=1, height=28, width=28, fit="digit"),
    InputSpec(channels=3, height=32, width=32, fit="cover"),
    InputSpec(channels=3, height=7, width=90, fit="contain"),
    InputSpec(channels=1, height=1, width=1, fit="stretch"),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "x".join(map(str, spec.shape)))
def test_golden_images_are_of_the_input_and_always_alike(spec: InputSpec) -> None:
    images = golden_images(spec)
    assert (images.shape, images.dtype) == ((SAMPLES, *spec.shape), np.uint8)
    assert np.array_equal(images, golden_images(spec))
    assert not np.array_equal(images, golden_images(spec, seed=1))


@pytest.mark.parametrize("spec", SPECS[:2], ids=["grey", "colour"])
def test_golden_images_exercise_a_network(spec: InputSpec) -> None:
    images = golden_images(spec)
    assert len({image.tobytes() for image in images}) == SAMPLES
    assert (images.min(), images.max()) == (0, 255)
    assert np.median(images.reshape(SAMPLES, -1).std(axis=1)) > 20


def test_golden_images_do_not_depend_on_how_pictures_are_fitted() -> None:
    stretched, covered = (InputSpec(channels=3, height=16, width=24, fit=fit) for fit in ("stretch", "cover"))
    assert np.array_equal(golden_images(stretched), golden_images(covered))


@pytest.mark.parametrize("digit", STROKES)
def test_a_digit_is_white_ink_amid_black_and_no_two_are_alike(digit: int) -> None:
    random = Random(digit)
    digits = np.stack([pen_digit(digit, random) for _ in range(10)])
    assert (digits.shape, digits.dtype) == ((10, 28, 28), np.uint8)
    assert len({one.tobytes() for one in digits}) == 10
    assert all(one.max() == 255 for one in digits)
    for edge in (digits[:, 0], digits[:, -1], digits[:, :, 0], digits[:, :, -1]):
        assert edge.max() == 0
    assert 0.04 < (digits > 127).mean() < 0.3


def test_every_digit_can_be_written() -> None:
    assert sorted(STROKES) == list(range(10))


@pytest.mark.parametrize("size", [8, 64, 200])
def test_a_digit_is_of_any_size(size: int) -> None:
    assert pen_digit(4, Random(0), size=size).shape == (size, size)


def test_a_broader_pen_leaves_more_ink() -> None:
    thin, broad = (pen_digit(8, Random(0), stroke=stroke).sum() for stroke in (0.05, 0.16))
    assert broad > 1.5 * thin


def test_an_arc_goes_clockwise_from_start_to_end() -> None:
    points = arc(0, 0, 2, 1, 0, 90)
    assert points[0] == pytest.approx((2, 0))
    assert points[-1] == pytest.approx((0, 1))
    assert all((x / 2) ** 2 + y**2 == pytest.approx(1) for x, y in points)
