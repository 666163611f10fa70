import asyncio
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.client import AsyncClient, Client, ProblemError
from tests.tiny import Server, Slow, grey, make_bundle, pictures, serving, tarred, zipped


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server whose queue four pictures fill, and `greys` with a second version."""
    folder = tmp_path_factory.mktemp("client")
    for _ in range(2):
        make_bundle(folder / "artifacts", activate=False)
    make_bundle(folder / "artifacts", "slow", module=Slow())
    settings = {"default_model": "greys", "max_images": "4", "queue_size": "4", "max_batch": "1"}
    settings |= {"concurrent_jobs": "0", "data": str(folder)}
    with serving(folder / "artifacts", folder, **settings) as server:
        yield server


def test_every_call_of_the_client(server: Server, tmp_path: Path) -> None:
    (tmp_path / "nine.png").write_bytes(grey(9))
    with Client(server.url) as safelight:
        answer = safelight.predict(grey(3), tmp_path / "nine.png", model="greys", version="1", top_k=1)
        assert [entry.label for entry in answer.predictions] == ["grey-3", "grey-9"]
        assert [model.name for model in safelight.models()] == ["greys", "slow"]
        assert safelight.model("greys").default
        assert safelight.version("greys", "1").manifest.version == "1"
        assert safelight.activate("greys", "2").active == "2"
        assert safelight.activate("greys", "1").active == "1"
        assert safelight.info().limits["max_images"] == 4
        assert safelight.ready().status == "ready"
        (tmp_path / "pets.tar.gz").write_bytes(tarred(pictures("cat", "grey-3"), "gz"))
        added = safelight.add_dataset(tmp_path / "pets.tar.gz", model="greys", version="1")
        assert (added.name, added.images, added.base.known) == ("pets", 20, {"grey-3": "grey-3"})
        assert safelight.dataset(added.id).rejected.count == 0
        assert [dataset.id for dataset in safelight.datasets()] == [added.id]
        assert safelight.delete_dataset(added.id) is None
        with pytest.raises(ProblemError, match="^dataset_refused: no MNIST: looked for "):
            safelight.add_built_in_dataset("mnist", limit=20)


def test_every_call_of_the_async_client(server: Server, tmp_path: Path) -> None:
    (tmp_path / "nine.png").write_bytes(grey(9))

    async def main() -> None:
        async with AsyncClient(server.url) as safelight:
            answer = await safelight.predict(grey(3), tmp_path / "nine.png", model="greys", version="1", top_k=1)
            assert [entry.label for entry in answer.predictions] == ["grey-3", "grey-9"]
            assert [model.name for model in await safelight.models()] == ["greys", "slow"]
            assert (await safelight.model("greys")).default
            assert (await safelight.version("greys", "1")).manifest.version == "1"
            assert (await safelight.activate("greys", "2")).active == "2"
            assert (await safelight.activate("greys", "1")).active == "1"
            assert (await safelight.info()).limits["max_images"] == 4
            assert (await safelight.ready()).status == "ready"
            (tmp_path / "pets.zip").write_bytes(zipped(pictures("cat", "dog")))
            added = await safelight.add_dataset(tmp_path / "pets.zip")
            assert (added.name, added.images, added.base) == ("pets", 20, None)
            assert (await safelight.dataset(added.id)).rejected.count == 0
            assert [dataset.id for dataset in await safelight.datasets()] == [added.id]
            assert await safelight.delete_dataset(added.id) is None
            with pytest.raises(ProblemError, match="^model_not_found: "):
                await safelight.add_built_in_dataset("mnist", limit=20, model="nope")

    asyncio.run(main())


MNIST = {"builtin": "mnist", "limit": 100}


def test_every_call_about_jobs(server: Server) -> None:
    with Client(server.url) as safelight:
        job = safelight.train(MNIST, model="greys", name="shades", recipe={"epochs": 2}, seed=1, promote="always")
        assert (job.status, job.name, job.recipe, job.seed, job.promote) == (
            "queued",
            "shades",
            {"epochs": 2},
            1,
            "always",
        )
        assert safelight.train(MNIST, model="greys", name="digits", idempotency_key="k") == (
            second := safelight.train(MNIST, model="greys", name="digits", idempotency_key="k")
        )
        assert safelight.jobs(limit=2) == [second, job]
        assert safelight.jobs(after=second.id, status="queued", limit=1) == [job]
        assert safelight.job(job.id) == job
        assert safelight.events(job.id, after=0, limit=5) == []
        assert safelight.pause(job.id).status == "paused"
        assert safelight.resume(job.id).status == "queued"
        with pytest.raises(TimeoutError, match=f"{job.id} is still queued"):
            safelight.wait(job.id, timeout=0)
        assert safelight.cancel(job.id) == safelight.wait(job.id)


def test_every_asynchronous_call_about_jobs(server: Server) -> None:
    async def main() -> None:
        async with AsyncClient(server.url) as safelight:
            job = await safelight.train(MNIST, model="greys", version="2", name="shades")
            assert (job.status, job.version, job.name) == ("queued", "2", "shades")
            assert (await safelight.jobs(limit=1)) == [job]
            assert await safelight.job(job.id) == job
            assert await safelight.events(job.id) == []
            assert (await safelight.pause(job.id)).status == "paused"
            assert (await safelight.resume(job.id)).status == "queued"
            with pytest.raises(TimeoutError):
                await safelight.wait(job.id, timeout=0)
            assert await safelight.cancel(job.id) == await safelight.wait(job.id)

    asyncio.run(main())


def test_what_the_service_refuses_is_raised_with_the_whole_problem(server: Server) -> None:
    with Client(server.url) as safelight, pytest.raises(ProblemError) as refusal:
        safelight.predict(grey(1), top_k=99)
    problem = refusal.value.problem
    assert str(refusal.value) == f"{problem.code}: {problem.detail}"
    assert problem.model_dump() == {
        "type": "urn:safelight:problem:top_k_out_of_range",
        "title": "top_k is out of range",
        "status": 422,
        "detail": "top_k is 99; greys has 16 classes, so it can be 1 to 16",
        "code": "top_k_out_of_range",
        "request_id": problem.request_id,
        "limit": 16,
    }
    assert refusal.value.retry_after is None


def test_a_full_queue_tells_the_async_client_when_to_come_back(server: Server) -> None:
    async def main() -> list[object]:
        async with AsyncClient(server.url) as safelight:
            asking = (safelight.predict(*[grey(1)] * 4, model="slow") for _ in range(6))
            return await asyncio.gather(*asking, return_exceptions=True)

    outcomes = asyncio.run(main())
    refused = [outcome for outcome in outcomes if isinstance(outcome, ProblemError)]
    assert {(error.problem.code, error.problem.status) for error in refused} == {("queue_full", 429)}
    assert all(error.retry_after is not None and error.retry_after >= 1 for error in refused)
    assert len(refused) < 6


def test_a_server_that_is_not_there_is_an_error_of_httpx() -> None:
    with Client("http://127.0.0.1:9") as safelight, pytest.raises(httpx.ConnectError):
        safelight.models()
