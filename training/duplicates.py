"""Near-duplicates: one picture to the eye though not to the byte, as after a resize or another JPEG compression.

Two pictures are near-duplicates where their 8 x 8 difference hashes differ in at most 2 of 64 bits and their thumbnails
differ by less than 15 % of their contrast. The hash is the index that spares comparing every picture with every other;
alone it would call most upright strokes one picture (3 million pairs among MNIST's 60,000), or a red and a blue ball.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

DISTANCE = 2  # bits of the hash
STEP = 8.0  # of 255: a bit is set where brightness rises by more; a smaller step lets JPEG's noise set bits
THUMBNAIL = 16  # pixels a side
DIFFERENCE = 0.15  # of the contrast: the closest digits of two hands differ by as much, a picture saved anew by less
FLAT = 4.0  # of 255: a picture with less contrast (standard deviation) has no shape, and is nobody's near-duplicate
PARTS = 4  # of the hash, 16 bits each: a pair that differs in 2 bits agrees in at least 2 of them
AT_ONCE = 4096  # pictures as floating-point numbers
PAIRS_AT_ONCE = 2**20  # some tens of megabytes


@dataclass(frozen=True)
class Signatures:
    """What is compared of N pictures: less than a kilobyte each, whatever their size."""

    hashes: NDArray[np.uint64]  # [N]
    thumbnails: NDArray[np.uint8]  # [N, C * THUMBNAIL * THUMBNAIL]
    contrasts: Floats  # [N], standard deviation within the channels of the thumbnail

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> Self:
        """Of pictures [N, C, H, W]."""
        count, channels = pixels.shape[:2]
        light = np.tensordot(_scaled(pixels, 8, 9), _light(channels), (1, 0))  # [N, 8, 9]
        rises = light[..., 1:] > light[..., :-1] + STEP
        parts = rises.reshape(count, 64 // PARTS, PARTS).swapaxes(1, 2)  # each from all over: borders are often empty
        hashes = np.packbits(parts.reshape(count, 64), axis=1).view(np.uint64).ravel()
        thumbnails = _scaled(pixels, THUMBNAIL, THUMBNAIL)  # [N, C, 16, 16]
        contrasts = np.sqrt(thumbnails.var(axis=(2, 3)).mean(axis=1))  # in each channel: an even red has none
        return cls(hashes, thumbnails.round().astype(np.uint8).reshape(count, channels * THUMBNAIL**2), contrasts)

    @classmethod
    def joined(cls, parts: "Sequence[Signatures]") -> Self:
        return cls(*(np.concatenate(arrays) for arrays in zip(*(vars(part).values() for part in parts), strict=True)))


def group_ids(pixels: NDArray[np.uint8]) -> Ids:
    """A number for each picture [N, C, H, W]; near-duplicates, and near-duplicates of those, share it."""
    portions = (pixels[start : start + AT_ONCE] for start in range(0, max(1, len(pixels)), AT_ONCE))
    return groups(Signatures.joined([Signatures.of(portion) for portion in portions]))


def groups(signatures: Signatures) -> Ids:
    """The same of signatures: the least index of each picture's group."""
    ids = np.arange(len(signatures.hashes))
    for first, second in pairs(signatures, ids):  # those that have been joined aren't compared any more
        _join(ids, first, second)
    return ids


def pairs(signatures: Signatures, kinds: Ids) -> Iterator[tuple[Ids, Ids]]:
    """Every pair of near-duplicates of different kinds, in portions of two arrays of indices; some come twice.

    Kinds may become equal while this goes on.
    """
    shaped = np.flatnonzero(signatures.contrasts >= FLAT)
    for members in _buckets(signatures.hashes, shaped):
        hashes, contrasts = signatures.hashes[members], signatures.contrasts[members]
        outlines = signatures.thumbnails[members].astype(np.float32)
        outlines -= outlines.mean(axis=1, keepdims=True)  # that one is brighter all over is no difference
        energies = (outlines**2).sum(axis=1)
        anchor = _most_common(
            kinds[members]
        )  # what is of its kind need not be compared: what isn't is, with everything
        for block in np.array_split(np.arange(len(members)), max(1, len(members) ** 2 // PAIRS_AT_ONCE)):
            rows = block[kinds[members[block]] != kinds[members[anchor]]]
            near = np.bitwise_count(hashes[rows, None] ^ hashes) <= DISTANCE
            near &= kinds[members[rows], None] != kinds[members]
            if near.any():
                apart = energies[rows, None] + energies - 2 * outlines[rows] @ outlines.T  # squared, summed
                least = np.minimum(contrasts[rows, None], contrasts)
                first, second = np.nonzero(near & (apart < outlines.shape[1] * (DIFFERENCE * least) ** 2))
                yield members[rows[first]], members[second]


def _most_common(kinds: Ids) -> int:
    """The place of one that is."""
    _, places, counts = np.unique(kinds, return_index=True, return_counts=True)
    return int(places[counts.argmax()])


def _buckets(hashes: NDArray[np.uint64], members: Ids) -> Iterator[Ids]:
    """Members that agree in some parts of the hash: every pair that is near meets in at least one of these."""
    size = 64 // PARTS
    for turn, kept in enumerate(combinations(range(PARTS), PARTS - DISTANCE)):
        keys = hashes[members] & np.uint64(sum((2**size - 1) << (size * part) for part in kept))
        order = np.argsort(keys, kind="stable")
        edges = [0, *(np.flatnonzero(np.diff(keys[order])) + 1).tolist(), len(members)]
        for start, stop in pairwise(edges):
            bucket = members[order[start:stop]]
            if len(bucket) > 1 and (turn == 0 or np.ptp(hashes[bucket]) > 0):  # equal hashes have met in the first turn
                yield bucket


def _join(ids: Ids, first: Ids, second: Ids) -> None:
    """Give both of each pair, and all that already share an id with either, the least id among them."""
    while True:
        here, there = ids[first], ids[second]
        apart = here != there
        if not apart.any():
            return
        least, most = np.minimum(here, there)[apart], np.maximum(here, there)[apart]
        leader = np.arange(len(ids))
        np.minimum.at(leader, most, least)
        while not np.array_equal(leader, leader[leader]):
            leader = leader[leader]
        ids[:] = leader[ids]


def _light(channels: int) -> Floats:
    return np.array([0.299, 0.587, 0.114] if channels == 3 else [1.0], np.float32)


def _scaled(pixels: NDArray[np.uint8], height: int, width: int) -> Floats:
    return _averages(pixels.shape[2], height) @ pixels.astype(np.float32) @ _averages(pixels.shape[3], width).T


@lru_cache(maxsize=16)
def _averages(size: int, wanted: int) -> Floats:
    """The matrix [wanted, size] that averages so many values into `wanted` equal parts."""
    edges = np.arange(wanted + 1) * size / wanted
    inside = np.minimum(edges[1:, None], np.arange(1, size + 1)) - np.maximum(edges[:-1, None], np.arange(size))
    return (inside.clip(0) * wanted / size).astype(np.float32)
