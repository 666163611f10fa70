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
        with pytest.raises(ProblemError, match="^dataset_refused: MNIST needs a data folder: set SAFELIGHT_DATA"):
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
