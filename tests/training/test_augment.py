"""Augmentation: what each transformation may do, and that the same generator does the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Generator, Tensor

from training import augment
from training.augment import cutout, mirror, move, random_affine, random_shifts, scaled, trivial


def seeded(seed: int = 0) -> Generator:
    return torch.Generator().manual_seed(seed)


def coordinates(count: int, height: int, width: int) -> Tensor:
    """Pictures whose first channel is each pixel's row and whose second is its column, [N, 2, H, W] uint8."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([rows, columns]).to(torch.uint8).expand(count, -1, -1, -1)


def disc(count: int, side: int = 28, radius: float = 6) -> Tensor:
    """A white disc in the middle of black, [N, 1, side, side] uint8."""
    at = torch.arange(side) - (side - 1) / 2
    return (255 * (at[:, None] ** 2 + at**2 <= radius**2)).to(torch.uint8).expand(count, 1, -1, -1)


def centres(images: Tensor) -> Tensor:
    """Centre of mass, [N, 2]: rows and columns."""
    mass = images.sum((1, 2, 3))
    rows = (images.sum((1, 3)) * torch.arange(images.shape[2])).sum(1) / mass
    columns = (images.sum((1, 2)) * torch.arange(images.shape[3])).sum(1) / mass
    return torch.stack([rows, columns], dim=1)


@pytest.mark.parametrize("shift", [1, 2])
@pytest.mark.parametrize(("height", "width"), [(12, 12), (9, 14)])
def test_pictures_shift_to_every_place_that_is_allowed_with_their_border_reflected(
    shift: int, height: int, width: int
) -> None:
    moved = shifted(coordinates(300, height, width), shift, seeded())
    assert moved.shape == (300, 2, height, width)
    for lines, size in ((moved[:, 0, :, 0], height), (moved[:, 1, 0, :], width)):
        padded = [*range(shift, 0, -1), *range(size), *range(size - 2, size - 2 - shift, -1)]
        windows = {tuple(padded[start : start + size]) for start in range(2 * shift + 1)}
        assert {tuple(line) for line in lines.int().tolist()} == windows


def test_a_shifted_picture_moves_as_a_whole() -> None:
    moved = shifted(coordinates(20, 9, 14), 2, seeded())
    assert torch.equal(moved[:, 0], moved[:, 0, :, :1].expand(-1, -1, 14))
    assert torch.equal(moved[:, 1], moved[:, 1, :1].expand(-1, 9, -1))


def test_smaller_pictures_show_all_of_the_picture_and_no_pattern_that_is_not_in_it() -> None:
    images = coordinates(2, 9, 14)
    smaller = scaled(images, (4, 7))
    assert smaller.shape == (2, 2, 4, 7)
    assert torch.allclose(smaller.mean((2, 3)), images.float().mean((2, 3)), atol=0.01)
    lattice = 255 * ((torch.arange(24)[:, None] + torch.arange(24)) % 2).expand(1, 1, -1, -1)
    grey = torch.full((1, 1, 12, 12), 127.5)
    assert torch.allclose(scaled(lattice, (12, 12)), grey, atol=3)  # not black, as every other pixel is


def test_pictures_move_by_as_much_as_is_said_down_and_to_the_right() -> None:
    down, right = torch.tensor([0, 2, -1]), torch.tensor([0, -1, 2])
    moved = move(coordinates(3, 9, 14), down, right, 2)
    assert moved[:, 0, 4, 4].tolist() == [4, 6, 3]
    assert moved[:, 1, 4, 4].tolist() == [4, 3, 6]


@pytest.mark.parametrize(
    ("shift", "step", "places"), [(4, 2, {-4, -2, 0, 2, 4}), (3, 3, {-3, 0, 3}), (3, 2, {-2, 0, 2})]
)
def test_moves_are_multiples_of_a_step(shift: int, step: int, places: set[int]) -> None:
    for moves in random_shifts(300, shift, step, seeded()):
        assert set(moves.tolist()) == places


def test_marked_pictures_are_mirrored() -> None:
    images = coordinates(4, 3, 3)
    mirrored = mirror(images, torch.tensor([True, False, True, False]))
    assert torch.equal(mirrored[[0, 2]], images[[0, 2]].flip(3))
    assert torch.equal(mirrored[[1, 3]], images[[1, 3]])


def test_a_square_of_the_mean_covers_a_part_of_each_picture_and_lies_inside() -> None:
    images = torch.zeros(400, 1, 9, 14, dtype=torch.uint8)
    images[:, :, 0, 0] = 126  # so that the mean is 1
    covered = cutout(images, 4, seeded()) == 1
    assert (covered.sum((1, 2, 3)) == 16).all()
    tops, lefts = covered.any(3).int().argmax(2), covered.any(2).int().argmax(2)
    assert set(tops.flatten().tolist()) == set(range(6))
    assert set(lefts.flatten().tolist()) == set(range(11))
    assert (covered.any(3).sum(2) == 4).all()


def shifted(images: Tensor, shift: int, random: Generator) -> Tensor:
    return move(images, *random_shifts(len(images), shift, 1, random), shift)


def affine(images: Tensor, seed: int = 0, **amounts: float) -> Tensor:
    return random_affine(images, **{"degrees": 0, "scale": 0, "shear": 0, "shift": 0} | amounts, generator=seeded(seed))


def test_an_affine_map_of_no_amount_changes_nothing() -> None:
    images = coordinates(3, 9, 14)
    assert torch.allclose(affine(images), images.float(), atol=1e-3)


def test_pictures_move_as_far_as_is_allowed() -> None:
    moved = centres(affine(disc(400), shift=3)) - centres(disc(1).float())
    assert moved.abs().max() <= 3.01
    assert moved.amax(0).min() > 2.8
    assert moved.amin(0).max() < -2.8


def test_pictures_grow_and_shrink_as_far_as_is_allowed() -> None:
    growth = (affine(disc(400), scale=0.2).sum((1, 2, 3)) / disc(1).sum()).sqrt()
    assert (growth.min().item(), growth.max().item()) == pytest.approx((0.8, 1.2), abs=0.02)


@pytest.mark.parametrize(("height", "width"), [(41, 41), (41, 61), (61, 41)])
def test_pictures_turn_as_far_as_is_allowed(height: int, width: int) -> None:
    images = torch.zeros(400, 1, height, width)
    images[:, :, height // 2, width // 2 + 16] = 255  # 16 pixels to the right of the middle
    places = centres(affine(images, degrees=90)) - torch.tensor([height // 2, width // 2])
    angles = torch.rad2deg(torch.atan2(places[:, 0], places[:, 1]))
    assert (angles.min().item(), angles.max().item()) == pytest.approx((-90, 90), abs=3)
    assert places.norm(dim=1).numpy() == pytest.approx(16, abs=0.6)


def test_pictures_shear_as_far_as_is_allowed() -> None:
    images = torch.zeros(400, 1, 41, 41)
    images[:, :, 8:12, 18:23] = 255  # ten pixels above the middle
    moved = (centres(affine(images, shear=20)) - centres(images))[:, 1]
    expected = 10.5 * torch.tan(torch.deg2rad(torch.tensor(20.0))).item()
    assert (moved.min().item(), moved.max().item()) == pytest.approx((-expected, expected), abs=0.3)


def test_what_moves_in_is_black() -> None:
    white = torch.full((50, 1, 10, 10), 255, dtype=torch.uint8)
    assert affine(white, shift=4)[:, 0, [0, 0, 9, 9], [0, 9, 0, 9]].min(1).values.max() < 255


@pytest.mark.parametrize(
    "change",
    [
        lambda images, random: shifted(images, 2, random),
        lambda images, random: cutout(images, 4, random),
        lambda images, random: random_affine(images, degrees=20, scale=0.2, shear=9, shift=2, generator=random),
    ],
    ids=["shift", "cutout", "affine"],
)
def test_the_same_generator_does_the_same_and_each_picture_has_its_own(
    change: Callable[[Tensor, Generator], Tensor],
) -> None:
    images = coordinates(30, 12, 12)
    once, again, other = (change(images, seeded(seed)) for seed in (0, 0, 1))
    assert torch.equal(once, again)
    assert not torch.equal(once, other)
    assert len({picture.numpy().tobytes() for picture in once}) > 10


# --- TrivialAugment ---------------------------------------------------------------------------------------------------


def coloured(count: int, side: int = 10) -> Tensor:
    """Noise, [N, 3, side, side], pixels 0 … 255."""
    return torch.randint(0, 256, (count, 3, side, side), generator=seeded(1)).float()


def by(amount: float, count: int = 3) -> Tensor:
    return torch.full((count, 1, 1, 1), amount)


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0, 0), (0.5, 0.4, 0.55), (1.0, 0.8, 1)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_share_of_the_pictures_is_changed_and_no_pixel_leaves_its_range(
    share: float, least: float, most: float, channels: int
) -> None:
    images = coloured(1000)[:, :channels].to(torch.uint8)
    before = images.clone()
    changed = trivial(images, share, seeded())
    assert torch.equal(images, before)
    assert (changed.shape, changed.dtype) == (images.shape, torch.float32)
    assert (changed.min(), changed.max()) == (0, 255)
    assert least <= float((changed != images).flatten(1).any(1).double().mean()) <= most


def test_pictures_are_changed_in_every_way_about_as_often_and_the_same_by_the_same_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images = coloured(1).expand(2400, -1, -1, -1)
    assert torch.equal(trivial(images, 1.0, seeded(3)), trivial(images, 1.0, seeded(3)))
    amounts: list[list[float]] = [[] for _ in augment.CHANGES]

    def noted(way: int) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda images, amount: amounts[way].extend(amount.flatten().tolist()) or images + way

    monkeypatch.setattr(augment, "CHANGES", tuple(noted(way) for way in range(len(amounts))))
    changed = trivial(images.clamp(0, 200), 1.0, seeded(3))
    ways = (changed - images.clamp(0, 200)).mean((1, 2, 3)).round().long()
    assert torch.bincount(ways).tolist() == [len(found) for found in amounts]
    assert all(150 <= len(found) <= 250 and min(found) < -0.9 and max(found) > 0.9 for found in amounts)


@pytest.mark.parametrize("change", augment.CHANGES, ids=lambda change: change.__name__)
def test_a_change_by_nothing_changes_nothing_and_one_by_much_does(change: Callable[[Tensor, Tensor], Tensor]) -> None:
    images = 20 + coloured(3) * 0.8
    if change not in (
        augment._posterised,
        augment._stretched,
    ):  # no amount of it is nothing
        assert torch.allclose(change(images, by(0)), images, atol=0.05)
    for amount in (-0.9, 0.9):
        assert float((change(images, by(amount)) - images).abs().mean()) > 5


def test_a_picture_is_turned_by_a_right_angle_at_most() -> None:
    images = coloured(3)
    assert torch.allclose(augment._turned(images, by(1)), torch.rot90(images, 1, (2, 3)), atol=0.05)
    assert torch.allclose(augment._turned(images, by(-1)), torch.rot90(images, -1, (2, 3)), atol=0.05)


def test_a_picture_that_is_no_square_is_turned_and_not_squeezed() -> None:
    lengths = torch.hypot(*(coordinates(1, 9, 15).float()[0] - torch.tensor([4.0, 7.0])[:, None, None]))
    hill = torch.exp(-((lengths / 3) ** 2)).expand(3, 1, -1, -1) * 255  # the same however it is turned
    inside = lengths < 4
    assert torch.allclose(augment._turned(hill, by(0.7))[..., inside], hill[..., inside], atol=10)


def test_a_picture_is_moved_by_three_tenths_of_its_side_at_most_and_mirrored_at_its_border() -> None:
    images = coloured(3)
    reflected = [3, 4, 5, 6, 7, 8, 9, 9, 8, 7]
    assert torch.allclose(augment._moved_along(images, by(1)), images[..., reflected], atol=0.05)
    assert torch.allclose(augment._moved_down(images, by(1)), images[:, :, reflected], atol=0.05)


def test_a_sheared_picture_keeps_its_middle_and_moves_its_edges_apart() -> None:
    rows = augment._sheared_along(coordinates(3, 9, 9).float(), by(0.5))
    assert torch.allclose(rows[:, 1, :, 4], 4 + 0.4 * (torch.arange(9.0) - 4), atol=0.05)
    columns = augment._sheared_down(coordinates(3, 9, 9).float(), by(0.5))
    assert torch.allclose(columns[:, 0, 4], 4 + 0.4 * (torch.arange(9.0) - 4), atol=0.05)


def test_brightness_contrast_and_saturation_change_what_they_are_named_for() -> None:
    images = 100 + coloured(3) / 10
    grey = augment._grey(images)
    assert torch.allclose(augment._brightness(images, by(0.5)), images * 1.45)
    flatter = augment._contrast(images, by(-1))
    assert torch.allclose(flatter.std((1, 2, 3)), 0.1 * images.std((1, 2, 3)), rtol=0.01)
    assert torch.allclose(augment._grey(flatter).mean((1, 2, 3)), grey.mean((1, 2, 3)), rtol=1e-4)
    paler = augment._saturation(images, by(-1))
    assert torch.allclose(augment._grey(paler), grey, rtol=1e-4)
    assert torch.allclose(paler - grey, 0.1 * (images - grey), atol=0.01)
    assert torch.allclose(augment._saturation(grey.expand(-1, 3, -1, -1), by(1)), grey.expand(-1, 3, -1, -1))


def test_a_sharper_picture_is_further_from_its_neighbours() -> None:
    images = coloured(3)
    blurred, sharper = augment._sharpness(images, by(-1)), augment._sharpness(images, by(1))
    assert 2 * float(blurred.std()) < float(images.std()) < 0.7 * float(sharper.std())


def test_bits_are_dropped_light_is_turned_to_dark_and_channels_fill_their_range() -> None:
    images = coloured(3)
    assert sorted(set(augment._posterised(images, by(1)).flatten().tolist())) == [0, 64, 128, 192]
    assert torch.equal(augment._solarised(images, by(1)), 255 - images)
    dark = images < 255 * 0.5
    assert torch.equal(augment._solarised(images, by(-0.5)), torch.where(dark, images, 255 - images))
    full = augment._stretched(50 + images / 5, by(0))
    assert torch.allclose(full.amin((2, 3)), torch.zeros(3, 3), atol=1e-3)
    assert torch.allclose(full.amax((2, 3)), torch.full((3, 3), 255.0), atol=1e-3)
    assert torch.equal(augment._stretched(torch.full((1, 3, 4, 4), 7.0), by(0, 1)), torch.full((1, 3, 4, 4), 7.0))
