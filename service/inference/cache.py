"""What the model said of pictures that it has seen, so that it needn't say it again.

One answer is kept for each picture, before it is put into words: `top_k` and the protocols' outputs are cut from it as
from a fresh one. Kept are only answers, never errors, and each under the digest of the whole manifest and the way that
it was computed: another model, another version, the same weights with another calibration or in another precision,
never get it. Belongs to the event loop; no locks.
"""

import hashlib
from collections import OrderedDict

from training.bundle.answers import Row
from training.bundle.images import Pixels
from training.bundle.manifest import Manifest

OVERHEAD = 1200  # bytes of the objects around a row's arrays, as measured


class Cache:
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._rows: OrderedDict[bytes, Row] = OrderedDict()  # the one asked for last at the end
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, key: bytes) -> Row | None:
        row = self._rows.get(key)
        if row is not None:
            self._rows.move_to_end(key)
        return row

    def put(self, key: bytes, row: Row) -> None:
        """Keep a copy of one row, at the cost of those that were asked for longest ago."""
        ranking, place = row
        alone = ranking.only(place)
        self._drop(key)
        self._rows[key] = alone, 0
        self.bytes += _size((alone, 0))
        while self.bytes > self._max_bytes:
            self._drop(next(iter(self._rows)))

    def _drop(self, key: bytes) -> None:
        if row := self._rows.pop(key, None):
            self.bytes -= _size(row)


def key_of(digest: bytes, picture: bytes | Pixels) -> bytes:
    """A file and its pixels have keys of their own: only decoding could tell that they are the same."""
    kind, content = (b"file", picture) if isinstance(picture, bytes) else (b"pixels", picture.tobytes())
    return hashlib.blake2b(content, digest_size=16, key=digest, person=kind).digest()


def digest_of(manifest: Manifest, engine: str) -> bytes:
    """Of everything that an answer depends on: weights, calibration, classes, input, which version it is, and the
    engine, for the next load may choose another."""
    return hashlib.blake2b(f"{engine}\0{manifest.model_dump_json()}".encode(), digest_size=32).digest()


def _size(row: Row) -> int:
    ranking, _ = row
    arrays = (ranking.logits, ranking.order, ranking.chances, ranking.familiar)
    return OVERHEAD + sum(array.nbytes for array in arrays)
