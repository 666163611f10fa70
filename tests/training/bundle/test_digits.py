"""The `digit` fit: photographs of digits come out as MNIST's makers would have made them."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from training.bundle.digits import Grey, fit_digit
from training.drawings import pen_digit

SIZE = (28, 28)


def mnist_like(digit: int = 3) -> Grey:
    """White ink on black, 28 x 28."""
    return np.asarray(pen_digit(digit, Random(digit)))


def photograph(
    digit: int = 3,
    *,
    side: int = 200,
    pen: float = 0.1,
    paper: int = 190,
    ink: int = 60,
    shade: int = 50,
    noise: float = 6,
    seed: int = 0,
) -> Grey:
    """Dark ink on light paper that is lit from one corner."""
    random = np.random.default_rng(seed)
    strokes = pen_digit(digit, Random(seed), size=side, stroke=pen) / 255.0
    y, x = np.mgrid[0:side, 0:side] / side
    light = paper + shade * (x + y) / 2
    grey = light + strokes * (ink - paper) + random.normal(0, noise, (side, side))
    return grey.clip(0, 255).astype(np.uint8)


def box(frame: Grey, threshold: int = 32) -> tuple[int, int]:
    """Height and width of the ink."""
    rows, columns = np.nonzero(frame > threshold)
    return int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1


def centre_of_mass(frame: Grey) -> tuple[float, float]:
    y, x = np.indices(frame.shape)
    mass = frame.sum(dtype=float)
    return float((y * frame).sum() / mass), float((x * frame).sum() / mass)


def likeness(a: Grey, b: Grey) -> float:
    """Correlation of two frames, 1 for the same."""
    return float(np.corrcoef(a.ravel(), b.ravel())[0, 1])


@pytest.mark.parametrize("digit", range(10))
def test_mnist_itself_passes_unchanged(digit: int) -> None:
    assert np.array_equal(fit_digit(mnist_like(digit), SIZE), mnist_like(digit))


@pytest.mark.parametrize("digit", range(10))
def test_its_negative_is_inverted(digit: int) -> None:
    assert np.array_equal(fit_digit(255 - mnist_like(digit), SIZE), mnist_like(digit))


@pytest.mark.parametrize("digit", range(10))
def test_a_photograph_becomes_light_ink_in_mnist_s_box(digit: int) -> None:
    frame = fit_digit(photograph(digit), SIZE)
    assert frame[0].max() == frame[-1].max() == frame[:, 0].max() == frame[:, -1].max() == 0
    assert frame.max() > 200
    assert max(box(frame)) in (19, 20)
    assert centre_of_mass(frame) == pytest.approx((13.5, 13.5), abs=1)


@pytest.mark.parametrize("digit", range(10))
def test_shade_noise_and_polarity_make_little_difference(digit: int) -> None:
    clean = fit_digit(photograph(digit, shade=0, noise=0), SIZE)
    photos = [photograph(digit), photograph(digit, paper=50, ink=200), photograph(digit, paper=120, shade=110, ink=20)]
    # Where a centre of mass or a stroke's width lies on the edge of rounding, one pixel more or less gives 0.85.
    assert min(likeness(fit_digit(photo, SIZE), clean) for photo in photos) > 0.8


def test_a_28_x_28_picture_in_the_other_polarity_is_turned_around() -> None:
    frame = fit_digit(255 - mnist_like(), SIZE)
    assert frame[0, 0] == 0
    assert likeness(frame, mnist_like()) > 0.8


def test_the_place_on_the_paper_makes_no_difference() -> None:
    digit = photograph(5, side=100, shade=0, noise=0)
    frames = []
    for top, left in ((0, 0), (150, 20), (200, 200)):
        paper = np.full((300, 300), 190, np.uint8)
        paper[top : top + 100, left : left + 100] = digit
        frames.append(fit_digit(paper, SIZE))
    assert min(likeness(frame, frames[0]) for frame in frames) > 0.98


def stroke_width(frame: Grey) -> float:
    """Of a vertical line: ink of a middle row, in pixels of full strength."""
    return float(frame[14].sum() / 255)


@pytest.mark.parametrize("pen", [3, 5, 8])
def test_thin_strokes_are_thickened(pen: int) -> None:
    paper = np.full((300, 300), 230, np.uint8)
    paper[40:260, 150 : 150 + pen] = 30
    assert 1.5 <= stroke_width(fit_digit(paper, SIZE)) <= 3


def test_thick_strokes_are_not_thickened() -> None:
    paper = np.full((300, 300), 230, np.uint8)
    paper[40:260, 130:174] = 30  # a fifth of the digit's height: 4 of 20 pixels
    assert stroke_width(fit_digit(paper, SIZE)) == pytest.approx(4, abs=0.6)


@pytest.mark.parametrize("shade", [0, 128, 255])
@pytest.mark.parametrize("size", [(28, 28), (1, 1), (200, 100)])
def test_a_blank_page_is_an_empty_frame(shade: int, size: tuple[int, int]) -> None:
    frame = fit_digit(np.full(size, shade, np.uint8), SIZE)
    assert np.array_equal(frame, np.full(SIZE, shade if shade == 0 and size == SIZE else 0, np.uint8))


def test_shaded_paper_without_ink_is_an_empty_frame() -> None:
    y, x = np.mgrid[0:200, 0:200]
    assert not fit_digit((120 + 0.3 * x + 0.2 * y).astype(np.uint8), SIZE).any()


def test_specks_are_left_out() -> None:
    clean = photograph(5, shade=0, noise=0)
    dirty = clean.copy()
    for y, x in ((5, 5), (190, 8), (12, 185)):
        dirty[y : y + 5, x : x + 5] = 60
    assert likeness(fit_digit(dirty, SIZE), fit_digit(clean, SIZE)) > 0.99


def test_a_digit_in_two_pieces_is_kept_whole() -> None:
    broken = photograph(5, shade=0, noise=0)
    whole = fit_digit(broken, SIZE)
    broken[95:101] = 190
    assert likeness(fit_digit(broken, SIZE), whole) > 0.85


@pytest.mark.parametrize(
    ("height", "width"), [(5, 5), (9, 30), (28, 28), (61, 17), (320, 320), (1000, 40), (2000, 3000), (3000, 2000)]
)
def test_every_size_is_taken(height: int, width: int) -> None:
    digit = Image.fromarray(photograph(2, shade=0, noise=0)).resize((width, height))
    frame = fit_digit(np.asarray(digit), SIZE)
    assert frame.shape == SIZE
    assert frame.max() > 150
    assert frame[0, 0] == 0


@pytest.mark.parametrize("size", [(28, 28), (32, 20), (56, 56), (8, 8)])
def test_the_box_follows_the_frame(size: tuple[int, int]) -> None:
    width, height = size
    frame = fit_digit(photograph(8), size)
    assert frame.shape == (height, width)
    assert max(box(frame, 80)) == pytest.approx(min(size) * 20 / 28, abs=1.5)


@settings(max_examples=100, deadline=None)
@given(
    grey=arrays.arrays(np.uint8, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)),
    size=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_any_array_gives_a_frame(grey: Grey, size: tuple[int, int]) -> None:
    frame = fit_digit(grey, size)
    assert frame.shape == (size[1], size[0])
    assert frame.dtype == np.uint8


@settings(max_examples=40, deadline=None)
@given(blots=st.lists(st.tuples(*[st.integers(0, 30)] * 4, st.integers(0, 255)), max_size=5), paper=st.integers(0, 255))
def test_any_drawing_gives_a_frame(blots: list[tuple[int, int, int, int, int]], paper: int) -> None:
    page = np.full((33, 47), paper, np.uint8)
    for y, x, height, width, ink in blots:
        page[y : y + height, x : x + width] = ink
    assert fit_digit(page, SIZE).shape == SIZE
