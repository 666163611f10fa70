import asyncio
import io
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from prometheus_client import REGISTRY

from service.errors import DeadlineExceeded, InferenceFailed, QueueFull
from service.inference.predictor import MOST_AT_ONCE, Predictor, ranked
from tests.registries import LIMITS, run_predictor
from tests.tiny import POISON, SPEC, Fragile, encode, grey, make_bundle, reseal
from training.bundle.images import NotAnImage, decode


def in_seconds(seconds: float) -> float:
    return asyncio.get_running_loop().time() + seconds


def heavy() -> bytes:
    """A picture that takes long to decode."""
    return encode(Image.effect_noise((2000, 2000), 90), "PNG")


@pytest.mark.parametrize("why", ["the deadline passed", "the client left"])
def test_decoding_stops_when_nobody_waits_for_it(artifacts: Path, why: str) -> None:
    picture = heavy()
    begun = time.perf_counter()
    decode(picture, SPEC)
    one = time.perf_counter() - begun

    async def test(predictor: Predictor) -> None:
        asking = asyncio.create_task(predictor.predict([picture] * 200, 1, in_seconds(one)))
        if why == "the client left":
            await asyncio.sleep(one / 2)
            asking.cancel()
        with pytest.raises((DeadlineExceeded, asyncio.CancelledError)):
            await asking
        begun = time.perf_counter()
        answered = await predictor.predict([grey(3)], 1, in_seconds(60))
        assert answered.outcomes[0].best["label"] == "grey-3"  # type: ignore[union-attr]
        assert time.perf_counter() - begun < 20 * one  # of 100 in each thread

    run_predictor(artifacts, test)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_fail_their_picture_alone(artifacts: Path, value: float) -> None:
    async def test(predictor: Predictor) -> None:
        def broken(images: NDArray[np.uint8]) -> NDArray[np.float32]:
            logits = predictor.engine.run(images).copy()
            logits[1, 3] = value
            return logits

        images = np.stack([decode(grey(level), SPEC) for level in (1, 2, 3)])
        first, failed, last = ranked(broken, predictor.manifest)(images)
        assert str(failed) == "the model answered this picture with NaN or infinity"
        assert isinstance(failed, InferenceFailed)
        labels = [row[0].answer(row[1], 1).best["label"] for row in (first, last)]  # type: ignore[index, union-attr]
        assert labels == ["grey-1", "grey-3"]

    run_predictor(artifacts, test)


@pytest.mark.parametrize("count", [1, MOST_AT_ONCE, MOST_AT_ONCE + 1, 100])
def test_pictures_decoded_at_once_and_in_threads_get_the_same_answers(artifacts: Path, count: int) -> None:
    """Those of the input's own size may be decoded on the event loop, larger ones never are."""
    larger = encode(Image.open(io.BytesIO(grey(5))).resize((40, 40)))

    async def test(predictor: Predictor) -> None:
        for pictures in ([grey(5)] * count, [larger] * count, [grey(5), larger] * count):
            answered = await predictor.predict(pictures, 1, in_seconds(60))
            assert {outcome.best["label"] for outcome in answered.outcomes} == {"grey-5"}  # type: ignore[union-attr]
            assert len(answered.outcomes) == len(pictures)

    run_predictor(artifacts, test)


def test_digits_that_must_be_fitted_are_not_decoded_on_the_event_loop(artifacts: Path) -> None:
    """They are as small as MNIST's own, but take fifty times as long."""
    spec = SPEC.model_copy(update={"fit": "digit"})
    reseal(artifacts / "greys" / "1", input=spec)
    on_grey = np.full((8, 8), 128, np.uint8)
    on_grey[2:6, 3:5] = 10
    pictures = [encode(Image.fromarray(on_grey))] * MOST_AT_ONCE
    decode(pictures[0], spec)  # it imports SciPy

    async def test(predictor: Predictor) -> None:
        begun = time.thread_time()
        for picture in pictures:
            decode(picture, spec)
        decoding = time.thread_time() - begun
        begun = time.thread_time()
        outcomes = (await predictor.compute(pictures, in_seconds(60))).outcomes
        assert time.thread_time() - begun < decoding / 3
        assert all(isinstance(outcome, tuple) for outcome in outcomes)

    run_predictor(artifacts, test)


def failures() -> float:
    names = {"model": "greys", "version": "1"}
    return REGISTRY.get_sample_value("safelight_failed_seconds_count", names) or 0


def test_a_client_that_leaves_is_a_failure_and_a_full_queue_is_none(artifacts: Path) -> None:
    async def test(predictor: Predictor) -> None:
        before = failures()
        with predictor._batcher.admit(LIMITS["queue_size"], in_seconds(10)), pytest.raises(QueueFull):
            await predictor.compute([grey(1)], in_seconds(10))
        assert failures() == before
        leaving = asyncio.create_task(predictor.compute([heavy()], in_seconds(60)))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert failures() == before + 1

    run_predictor(artifacts, test)


def test_only_pictures_with_an_answer_are_counted_as_answered(tmp_path: Path) -> None:
    make_bundle(tmp_path, module=Fragile())
    names = {"model": "greys", "version": "1"}

    async def test(predictor: Predictor) -> None:
        before = REGISTRY.get_sample_value("safelight_images_total", names) or 0
        pictures = [grey(1), grey(2, first_pixel=POISON), b"no picture", grey(3)]
        first, poisoned, unread, last = (await predictor.predict(pictures, 1, in_seconds(10))).outcomes
        assert (isinstance(poisoned, InferenceFailed), isinstance(unread, NotAnImage)) == (True, True)
        assert (first.best["label"], last.best["label"]) == ("grey-1", "grey-3")  # type: ignore[union-attr]
        assert REGISTRY.get_sample_value("safelight_images_total", names) == before + 2

    run_predictor(tmp_path, test)
