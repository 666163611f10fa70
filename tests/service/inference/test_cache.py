"""Answers that are kept, and to whom they may be given again."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import REGISTRY

from service.app import create_app
from service.errors import InferenceFailed
from service.inference.cache import Cache, digest_of, key_of
from service.inference.predictor import Predictor
from service.inference.registry import Registry
from service.settings import Settings
from tests.registries import run
from tests.tiny import LEVELS, POISON, SPEC, Fragile, grey, make_bundle, reseal
from training.bundle import store
from training.bundle.answers import Row, rank
from training.bundle.images import NotAnImage, decode
from training.bundle.manifest import Calibration, Manifest
from training.bundle.store import BundleRef

PNG = {"Content-Type": "image/png"}
CACHE = 1_000_000  # bytes


async def rows(predictor: Predictor, *pictures: object) -> list[object]:
    deadline = asyncio.get_running_loop().time() + 30
    return list((await predictor.compute(pictures, deadline)).outcomes)  # type: ignore[arg-type]


def computed(ref: str = "greys@1") -> float:
    """How many pictures the engine has computed for a version."""
    model, version = ref.split("@")
    return REGISTRY.get_sample_value("safelight_batch_size_sum", {"model": model, "version": version}) or 0


def looked(outcome: str) -> float:
    labels = {"model": "greys", "version": "1", "outcome": outcome}
    return REGISTRY.get_sample_value("safelight_cache_seconds_count", labels) or 0


def test_a_picture_that_comes_again_is_not_computed_again(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        predictor = await registry.predictor(registry.entry(None, None))
        before, hits, misses = computed(), looked("hit"), looked("miss")
        first = await rows(predictor, grey(3), grey(5))
        again = await rows(predictor, grey(5), grey(7), grey(3))
        assert computed() - before == 3
        assert (looked("hit") - hits, looked("miss") - misses) == (2, 3)
        for old, new in ((first[0], again[2]), (first[1], again[0])):
            assert logits(old) == logits(new)
        assert [best(row) for row in again] == ["grey-5", "grey-7", "grey-3"]

    run(artifacts, test, cache_bytes=CACHE)


def logits(row: object) -> bytes:
    assert isinstance(row, tuple)
    return bytes(row[0].logits[row[1]].tobytes())


def best(row: object) -> str:
    assert isinstance(row, tuple)
    return str(row[0].answer(row[1], 1).best["label"])


def test_pixels_and_files_are_kept_apart(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        predictor = await registry.predictor(registry.entry(None, None))
        before = computed()
        for _ in range(2):
            assert [best(row) for row in await rows(predictor, grey(3), decode(grey(3), SPEC))] == ["grey-3"] * 2
        assert computed() - before == 2

    run(artifacts, test, cache_bytes=CACHE)


def test_an_error_is_never_kept(tmp_path: Path) -> None:
    make_bundle(tmp_path, module=Fragile())

    async def test(registry: Registry) -> None:
        predictor = await registry.predictor(registry.entry(None, None))
        before = looked("hit")
        for _ in range(2):
            good, unread, poisoned = await rows(predictor, grey(3), b"no picture", grey(2, first_pixel=POISON))
            assert best(good) == "grey-3"
            assert isinstance(unread, NotAnImage)
            assert isinstance(poisoned, InferenceFailed)
        assert looked("hit") - before == 1

    run(tmp_path, test, cache_bytes=CACHE)


def test_no_answer_of_another_version_is_given_even_with_the_same_weights(artifacts: Path) -> None:
    """A second version differs by nothing but its calibration, another model by nothing but its name."""
    make_bundle(artifacts, activate=False)
    make_bundle(artifacts, "other")
    reseal(BundleRef("greys", "2").path(artifacts), calibration=Calibration(temperature=3.0))

    async def test(registry: Registry) -> None:
        predictors = [
            await registry.predictor(registry.entry(model, version))
            for model, version in (("greys", "1"), ("greys", "2"), ("other", "1"))
        ]
        weights = {predictor.manifest.weights_sha256 for predictor in predictors}
        assert len(weights) == 1
        before = [computed(ref) for ref in ("greys@1", "greys@2", "other@1")]
        answers = [(await rows(predictor, grey(3)))[0] for predictor in predictors for _ in range(2)]
        assert [computed(ref) for ref in ("greys@1", "greys@2", "other@1")] == [count + 1 for count in before]
        chances = [float(row[0].chances[row[1]].max()) for row in answers[::2]]  # type: ignore[index]
        assert chances[0] == chances[2] != chances[1]

    run(artifacts, test, cache_bytes=CACHE)


def test_no_answer_of_another_engine_is_given(artifacts: Path) -> None:
    """As after an unload and a load, which times the engines anew and may choose another."""

    async def test(registry: Registry) -> None:
        first = await registry.predictor(registry.entry(None, None))
        in_int8 = [replace(timing, name="openvino int8") for timing in first.engine.timings]
        others = [
            replace(first.engine, chosen="openvino int8", timings=in_int8),
            replace(first.engine, device="cuda:1"),
            first.engine,
        ]
        predictors = [first, *(registry._new_predictor(BundleRef("greys", "1"), engine) for engine in others)]
        before = computed()
        found = [(await rows(predictor, grey(3)))[0] for predictor in predictors]
        assert computed() - before == 3  # the last one is the first one again
        assert {best(row) for row in found} == {"grey-3"}
        for predictor in predictors[1:]:
            await predictor.close()

    run(artifacts, test, cache_bytes=CACHE)


def test_much_is_not_hashed_on_the_event_loop(artifacts: Path) -> None:
    large = bytes(20_000_000)

    async def test(registry: Registry) -> None:
        predictor = await registry.predictor(registry.entry(None, None))
        begun = time.thread_time()
        key_of(b"digest", large)
        hashing = time.thread_time() - begun
        begun = time.thread_time()
        (outcome,) = await rows(predictor, large)
        assert time.thread_time() - begun < hashing / 3
        assert isinstance(outcome, NotAnImage)

    run(artifacts, test, cache_bytes=CACHE)


def test_without_a_size_nothing_is_kept(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        predictor = await registry.predictor(registry.entry(None, None))
        before, looks = computed(), looked("miss")
        for _ in range(3):
            await rows(predictor, grey(3))
        assert (computed() - before, looked("miss") - looks) == (3, 0)

    run(artifacts, test, cache_bytes=0)


def test_over_http_the_options_are_those_of_each_request(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"cache_mb": 1}))) as client:
        before = computed()
        few = client.post("/predict?top_k=2", content=grey(3), headers=PNG).json()["predictions"][0]
        many = client.post("/predict?top_k=5", content=grey(3), headers=PNG).json()["predictions"][0]
        assert (len(few["scores"]), len(many["scores"])) == (2, 5)
        assert many["scores"][:2] == few["scores"]
        reply = client.post("/v2/models/greys/infer", content=grey(3), headers={"Inference-Header-Content-Length": "0"})
        assert b"grey-3" in reply.content
        assert computed() - before == 1
        (stats,) = client.get("/v2/models/greys/stats").json()["model_stats"]
        assert stats["inference_stats"]["cache_hit"]["count"] >= 2
        assert stats["inference_stats"]["cache_hit"]["ns"] > 0
        assert client.get("/info").json()["limits"]["cache_mb"] == 1


@given(st.lists(st.tuples(st.integers(0, LEVELS - 1), st.booleans()), max_size=60), st.integers(1, 8))
@settings(max_examples=100, deadline=None)
def test_it_holds_the_last_ones_asked_for_and_never_more_than_it_may(asked: list[tuple[int, bool]], room: int) -> None:
    one = _row(0)
    probe = Cache(10**9)
    probe.put(b"one", one)
    cache = Cache(room * probe.bytes)
    expected: dict[bytes, int] = {}  # the one asked for last at the end
    for level, puts in asked:
        key = bytes([level])
        if puts:
            cache.put(key, _row(level))
            expected.pop(key, None)
            expected[key] = level
            while len(expected) > room:
                del expected[next(iter(expected))]
        else:
            found = cache.get(key)
            assert (found is not None) == (key in expected)
            if found is not None:
                assert found[0].order[found[1], 0] == level
                expected[key] = expected.pop(key)
        assert len(cache) == len(expected)
        assert cache.bytes == len(expected) * probe.bytes


def _row(level: int) -> Row:
    """One of a batch of many."""
    logits = np.zeros((64, LEVELS), np.float32)
    logits[7, level] = 9.0
    return rank(logits, MANIFEST), 7


def _manifest() -> Manifest:
    with TemporaryDirectory() as folder:
        return store.read_manifest(Path(folder), make_bundle(Path(folder)))


MANIFEST = _manifest()


def test_keys_differ_by_manifest_by_picture_and_by_form() -> None:
    digest = digest_of(MANIFEST, "torchscript float32")
    keys = {
        key_of(digest, grey(1)),
        key_of(digest, grey(2)),
        key_of(digest, decode(grey(1), SPEC)),
        key_of(b"another", grey(1)),
    }
    assert len(keys) == 4
