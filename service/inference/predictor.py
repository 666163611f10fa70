"""The sentence: admit → decode → submit → answer. One predictor serves one version of one model."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.errors import (
    DeadlineExceeded,
    InferenceFailed,
    InvalidBase64,
    QueueFull,
    TensorInvalid,
    TopKOutOfRange,
)
from service.inference.batcher import Batcher, Run
from service.inference.cache import Cache, digest_of, key_of
from service.inference.engine import Engine, Runner
from service.telemetry import CACHE_SECONDS, FAILED_SECONDS, IMAGES, STAGE_SECONDS
from training import SafelightError
from training.bundle.answers import Answer, Row, rank
from training.bundle.images import ImageRejected, Pixels, decode, decode_quickly
from training.bundle.manifest import Manifest

Picture = bytes | Pixels | SafelightError  # pixels are as the network takes them; a failure keeps its place

MOST_AT_ONCE = 16  # pictures of a request that may be decoded on the event loop: half a millisecond's work
HASHED_AT_ONCE = 100_000  # bytes of a request's pictures that may be hashed on the event loop: a tenth of a millisecond
STAGES = ("decode", "queue", "infer", "total")


@dataclass(frozen=True)
class Answered:
    """One outcome for each picture, in the request's order, and how long each stage took, in seconds."""

    outcomes: list[Answer | SafelightError]
    seconds: dict[str, float]


@dataclass(frozen=True)
class Computed:
    """The same before it is put into words: each picture's row, or its error."""

    outcomes: list[Row | SafelightError]
    seconds: dict[str, float]

    def rows(self) -> list[Row]:
        """Of a request that stands or falls as a whole. Raises its first picture's error."""
        found = []
        for place, outcome in enumerate(self.outcomes):
            if isinstance(outcome, ImageRejected | InvalidBase64) and len(self.outcomes) > 1:
                raise TensorInvalid(f"picture {place} of {len(self.outcomes)}: {outcome}") from outcome
            if isinstance(outcome, SafelightError):
                raise outcome
            found.append(outcome)
        return found


def ranked(runner: Runner, manifest: Manifest) -> Run[Row]:
    """An engine's run and what its logits say, for a batcher; logits that aren't finite fail their own picture."""

    def run(images: NDArray[np.uint8]) -> list[Row | InferenceFailed]:
        logits = runner(images)  # [N, K]
        finite = np.asarray(np.isfinite(logits).all(axis=1))  # [N]
        ranking = rank(logits if finite.all() else np.nan_to_num(logits), manifest)
        failed = InferenceFailed("the model answered this picture with NaN or infinity")
        return [(ranking, row) if good else failed for row, good in enumerate(finite.tolist())]

    return run


class Predictor:
    def __init__(
        self,
        engine: Engine,
        batcher: Batcher[Row],
        decoders: Executor,
        cache: Cache | None,
        *,
        threads: int,
        max_pixels: int,
    ) -> None:
        self.engine = engine
        self.manifest = engine.manifest
        self._batcher = batcher
        self._decoders = decoders
        self._cache = cache
        self._digest = digest_of(self.manifest, f"{engine.chosen} on {engine.device}")
        self._threads = threads
        self._max_pixels = max_pixels
        names = self.manifest.model, self.manifest.version
        self._images = IMAGES.labels(*names)
        self._cache_seconds = [CACHE_SECONDS.labels(outcome, *names) for outcome in ("miss", "hit")]
        self._failed_seconds = FAILED_SECONDS.labels(*names)
        self._stage_seconds = {stage: STAGE_SECONDS.labels(stage, *names) for stage in STAGES}

    def check_room(self, deadline: float) -> None:
        """Raise QueueFull where not even one picture would be let in: what is refused before its body is read costs
        little, and there is much of it when it matters. What the cache knows needs no room."""
        if self._cache is None:
            self._batcher.check_room(1, deadline)

    def knock(self, deadline: float) -> None:
        """The same for a request that is about to come in."""
        if self._cache is None:
            self._batcher.knock(deadline)

    async def predict(self, pictures: Sequence[Picture], top_k: int, deadline: float) -> Answered:
        """The `top_k` best classes of each picture. Raises TopKOutOfRange, and what `compute` raises."""
        classes = len(self.manifest.classes)
        if not 1 <= top_k <= classes:
            raise TopKOutOfRange(
                f"top_k is {top_k}; {self.manifest.model} has {classes} classes, so it can be 1 to {classes}",
                limit=classes,
            )
        computed = await self.compute(pictures, deadline)
        outcomes = [
            item if isinstance(item, SafelightError) else item[0].answer(item[1], top_k) for item in computed.outcomes
        ]
        return Answered(outcomes, computed.seconds)

    async def compute(self, pictures: Sequence[Picture], deadline: float, *, whole: bool = False) -> Computed:
        """Run the model on each picture before `deadline`, in the event loop's time.

        A bad picture's outcome is its error; the others are answered, unless the request is to be answered as a
        `whole`. Raises QueueFull and DeadlineExceeded, and in a whole the first picture's error.
        """
        begun = time.perf_counter()
        try:
            if self._cache is None:
                computed = await self._compute(pictures, deadline)
            else:
                computed = await self._compute_unknown(self._cache, pictures, deadline)
            if whole:
                computed.rows()
        except QueueFull:
            raise  # it never began
        except (SafelightError, asyncio.CancelledError):
            self._failed_seconds.observe(time.perf_counter() - begun)
            raise
        self._observe(computed, time.perf_counter() - begun)
        return computed

    async def _compute_unknown(self, cache: Cache, pictures: Sequence[Picture], deadline: float) -> Computed:
        """Run the model on those pictures only that the cache knows nothing of."""
        outcomes: dict[int, Row | SafelightError] = {}
        unknown: dict[int, bytes] = {}  # their keys, by their places
        begun = time.perf_counter()
        keys = await self._keys(pictures)
        hashing = (time.perf_counter() - begun) / max(1, len(pictures))
        for place, (picture, key) in enumerate(zip(pictures, keys, strict=True)):
            if isinstance(picture, SafelightError):
                outcomes[place] = picture
                continue
            begun = time.perf_counter()
            row = cache.get(key)
            if row is None:
                unknown[place] = key
            else:
                outcomes[place] = row
            self._cache_seconds[row is not None].observe(hashing + time.perf_counter() - begun)
        if not unknown:
            return Computed([outcomes[place] for place in range(len(pictures))], {})
        computed = await self._compute([pictures[place] for place in unknown], deadline)
        for (place, key), outcome in zip(unknown.items(), computed.outcomes, strict=True):
            outcomes[place] = outcome
            if not isinstance(outcome, SafelightError):
                cache.put(key, outcome)
        return Computed([outcomes[place] for place in range(len(pictures))], computed.seconds)

    async def _keys(self, pictures: Sequence[Picture]) -> list[bytes]:
        """One for each picture, by its content; an error's is empty. Much content is looked at in a thread."""

        def keys() -> list[bytes]:
            return [b"" if isinstance(one, SafelightError) else key_of(self._digest, one) for one in pictures]

        contents = [one for one in pictures if not isinstance(one, SafelightError)]
        size = sum(len(one) if isinstance(one, bytes) else one.nbytes for one in contents)
        return keys() if size <= HASHED_AT_ONCE else await asyncio.to_thread(keys)

    async def _compute(self, pictures: Sequence[Picture], deadline: float) -> Computed:
        with self._batcher.admit(len(pictures), deadline):
            begun = time.perf_counter()
            decoded = await self._decode(pictures, deadline)
            seconds = {"decode": time.perf_counter() - begun}
            images = [item for item in decoded if isinstance(item, np.ndarray)]
            rows: list[Row | InferenceFailed] = []
            if images:
                submission = await self._batcher.submit(images, deadline)
                rows = submission.outcomes
                started = submission.started or submission.submitted
                seconds |= {"queue": started - submission.submitted, "infer": submission.finished - started}
        found = iter(rows)
        return Computed([item if isinstance(item, SafelightError) else next(found) for item in decoded], seconds)

    async def close(self) -> None:
        """Answer what was admitted, then stop."""
        await self._batcher.close()

    async def _decode(self, pictures: Sequence[Picture], deadline: float) -> list[Pixels | SafelightError]:
        """Decode off the event loop, but for what takes less time than to hand it over."""
        if sum(isinstance(picture, bytes) for picture in pictures) > MOST_AT_ONCE:
            return await self._decode_in_threads(pictures, deadline)
        known = [self._decode_quickly(picture) for picture in pictures]
        left = [picture for picture, decoded in zip(pictures, known, strict=True) if decoded is None]
        rest = iter(await self._decode_in_threads(left, deadline) if left else ())
        return [next(rest) if decoded is None else decoded for decoded in known]

    async def _decode_in_threads(self, pictures: Sequence[Picture], deadline: float) -> list[Pixels | SafelightError]:
        """A share of the pictures in each thread, for as long as the request waits."""
        loop = asyncio.get_running_loop()
        unwanted = threading.Event()
        share = -(-len(pictures) // self._threads)
        chunks = [pictures[start : start + share] for start in range(0, len(pictures), share)]
        try:
            async with asyncio.timeout_at(deadline):
                done = await asyncio.gather(
                    *(loop.run_in_executor(self._decoders, self._decode_chunk, chunk, unwanted) for chunk in chunks)
                )
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed in the decode stage", stage="decode") from None
        finally:
            unwanted.set()  # too late, or the client has gone: other requests need the threads
        return [item for chunk in done for item in chunk]

    def _decode_chunk(self, pictures: Sequence[Picture], unwanted: threading.Event) -> list[Pixels | SafelightError]:
        return [self._decode_one(picture) for picture in pictures if not unwanted.is_set()]

    def _decode_quickly(self, picture: Picture) -> Pixels | SafelightError | None:
        return decode_quickly(picture, self.manifest.input) if isinstance(picture, bytes) else picture

    def _decode_one(self, picture: Picture) -> Pixels | SafelightError:
        if not isinstance(picture, bytes):
            return picture
        try:
            return decode(picture, self.manifest.input, self._max_pixels)
        except ImageRejected as error:
            return error

    def _observe(self, computed: Computed, total: float) -> None:
        answered = sum(isinstance(outcome, tuple) for outcome in computed.outcomes)
        if not answered:
            self._failed_seconds.observe(total)
            return
        self._images.inc(answered)
        for stage, value in computed.seconds.items():
            self._stage_seconds[stage].observe(value)
        self._stage_seconds["total"].observe(total)
