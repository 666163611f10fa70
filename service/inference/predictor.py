"""The sentence: admit → decode → submit → rank. One predictor serves one version of one model."""

import asyncio
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass

import numpy as np

from service.errors import DeadlineExceeded, TopKOutOfRange
from service.inference.batcher import Batcher, Outcome
from service.inference.engine import Engine
from service.telemetry import IMAGES, STAGE_SECONDS
from training import SafelightError
from training.bundle.answers import Answer, answers
from training.bundle.images import ImageRejected, Pixels, decode

Picture = bytes | SafelightError  # one that already failed keeps its place in the request


@dataclass(frozen=True)
class Answered:
    """One outcome for each picture, in the request's order, and how long each stage took, in seconds."""

    outcomes: list[Answer | SafelightError]
    seconds: dict[str, float]


class Predictor:
    def __init__(self, engine: Engine, batcher: Batcher, decoders: Executor, *, threads: int, max_pixels: int) -> None:
        self.engine = engine
        self.manifest = engine.manifest
        self._batcher = batcher
        self._decoders = decoders
        self._threads = threads
        self._max_pixels = max_pixels

    async def predict(self, pictures: Sequence[Picture], top_k: int, deadline: float) -> Answered:
        """Answer each picture before `deadline`, in the event loop's time.

        A bad picture's outcome is its error; the others are answered. Raises TopKOutOfRange, QueueFull and
        DeadlineExceeded for the request as a whole.
        """
        classes = len(self.manifest.classes)
        if not 1 <= top_k <= classes:
            raise TopKOutOfRange(
                f"top_k is {top_k}; {self.manifest.model} has {classes} classes, so it can be 1 to {classes}",
                limit=classes,
            )
        with self._batcher.admit(len(pictures)):
            begun = time.perf_counter()
            decoded = await self._decode(pictures, deadline)
            seconds = {"decode": time.perf_counter() - begun}
            good = {place: item for place, item in enumerate(decoded) if isinstance(item, np.ndarray)}
            outcomes: dict[int, Answer | SafelightError] = {
                place: item for place, item in enumerate(decoded) if isinstance(item, SafelightError)
            }
            if good:
                submission = await self._batcher.submit(list(good.values()), deadline)
                started = submission.started or submission.submitted
                seconds |= {"queue": started - submission.submitted, "infer": submission.finished - started}
                outcomes.update(zip(good, self._rank(submission.outcomes, top_k), strict=True))
        answered = sum(isinstance(outcome, Answer) for outcome in outcomes.values())
        self._observe(seconds | {"total": time.perf_counter() - begun}, answered)
        return Answered([outcomes[place] for place in range(len(pictures))], seconds)

    async def close(self) -> None:
        """Answer what was admitted, then stop."""
        await self._batcher.close()

    async def _decode(self, pictures: Sequence[Picture], deadline: float) -> list[Pixels | SafelightError]:
        """Decode off the event loop, a share of the pictures in each thread, for as long as the request waits."""
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

    def _decode_one(self, picture: Picture) -> Pixels | SafelightError:
        if isinstance(picture, SafelightError):
            return picture
        try:
            return decode(picture, self.manifest.input, self._max_pixels)
        except ImageRejected as error:
            return error

    def _rank(self, outcomes: list[Outcome], top_k: int) -> list[Answer | SafelightError]:
        rows = [outcome for outcome in outcomes if isinstance(outcome, np.ndarray)]
        ranked = iter(answers(np.stack(rows), self.manifest, top_k) if rows else ())
        return [next(ranked) if isinstance(outcome, np.ndarray) else outcome for outcome in outcomes]

    def _observe(self, seconds: dict[str, float], answered: int) -> None:
        names = self.manifest.model, self.manifest.version
        IMAGES.labels(*names).inc(answered)
        for stage, value in seconds.items():
            STAGE_SECONDS.labels(stage, *names).observe(value)
