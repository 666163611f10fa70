"""The routes of fine-tuning, on a service that only queues: what jobs do is `tests/service/jobs` and `tests/e2e`."""

import asyncio
import io
import json
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from typing import Any, Self

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response
from PIL import Image

from service.api import orders, server_sent
from service.api.orders import Asked
from service.api.schemas import TrainRequest
from service.app import create_app
from service.jobs.history import Tail
from service.jobs.job import Order
from service.jobs.store import JobStore, open_store
from service.lifecycle import Lifecycle
from service.settings import Settings
from tests.service.api.leaving import leave
from tests.service.jobs.conftest import order
from tests.tiny import encode, make_bundle
from training.bundle.store import hold_back

SHADES = {"model": "greys", "dataset": {"builtin": "mnist", "limit": 100}, "name": "shades"}


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"concurrent_jobs": 0, "queued_jobs": 5, "data": tmp_path})


@pytest.fixture
def jobs(settings: Settings) -> Iterator[JobStore]:
    """The service's own jobs, to bring them into states."""
    store = open_store(settings.state)
    yield store
    store.close()


def started(client: TestClient, **changes: object) -> dict[str, Any]:
    reply = client.post("/train", json=SHADES | changes)
    assert reply.status_code == 202, reply.json()
    return reply.json()


def problem(body: dict[str, Any]) -> dict[str, Any]:
    del body["request_id"], body["type"]
    return body


# --- starting a job ---


def test_a_job_is_accepted_and_can_be_read(client: TestClient) -> None:
    reply = client.post("/train", json=SHADES)
    job = reply.json()
    assert (reply.status_code, reply.headers["retry-after"]) == (202, "1")
    assert reply.headers["location"] == f"/train/{job['id']}"
    assert re.fullmatch(r"job-[0-9a-f]{24}", job["id"])
    assert job == {
        "id": job["id"],
        "status": "queued",
        "wanted": None,
        "model": "greys",
        "version": "1",
        "name": "shades",
        "dataset": {"builtin": "mnist", "limit": 100},
        "seed": 0,
        "promote": "if_better",
        "recipe": {},
        "metadata": {},
        "progress": None,
        "result": None,
        "error": None,
        "created_at": job["created_at"],
        "started_at": None,
        "finished_at": None,
    }
    assert client.get(reply.headers["location"]).json() == job
    assert client.get("/train").json() == {"jobs": [job], "has_more": False}


def test_everything_can_be_said(client: TestClient, settings: Settings) -> None:
    make_bundle(settings.artifacts)
    asked = {
        "model": "greys",
        "version": "1",
        "name": "shades",
        "dataset": {"builtin": "cifar10", "limit": None},
        "recipe": {"epochs": 2, "depth": "full"},
        "seed": 7,
        "promote": "never",
    }
    job = started(client, **asked)
    assert {name: job[name] for name in asked} == asked


@pytest.mark.parametrize(
    ("change", "status", "code", "detail"),
    [
        ({"model": "none"}, 404, "model_not_found", "there is no model 'none'; there is greys"),
        ({"version": "9"}, 404, "version_not_found", "model greys has no version 9; it has 1"),
        (
            {"name": "../x"},
            422,
            "invalid_name",
            "'../x' can't be a model's name: a name is 1 to 63 of a-z, 0-9, '.', '_' and '-', "
            "and starts with a letter or digit",
        ),
        (
            {"dataset": "ds-none"},
            404,
            "dataset_not_found",
            "there is no data set 'ds-none'; GET /datasets lists those that there are",
        ),
    ],
)
def test_what_does_not_exist_is_refused(
    client: TestClient, change: dict[str, Any], status: int, code: str, detail: str
) -> None:
    reply = client.post("/train", json=SHADES | change)
    body = problem(reply.json())
    assert (reply.status_code, body["code"], body["detail"]) == (status, code, detail)
    assert client.get("/train").json()["jobs"] == []


def test_an_unknown_base_model(client: TestClient) -> None:
    for reply in (
        client.post("/train", json=SHADES | {"model": "none"}),
        sent(client, archive("dark", "light"), model="none", name="pets"),
    ):
        assert problem(reply.json()) == {
            "title": "No such model",
            "status": 404,
            "detail": "there is no model 'none'; there is greys",
            "code": "model_not_found",
        }
    assert client.get("/train").json() == {"jobs": [], "has_more": False}
    assert client.get("/datasets").json() == {"datasets": []}


def test_a_recipe_override_that_does_not_exist(client: TestClient) -> None:
    reply = client.post("/train", json=SHADES | {"recipe": {"epoch": 3}})
    assert problem(reply.json()) == {
        "title": "Not a setting of fine-tuning, or out of its range",
        "status": 422,
        "detail": "fine-tuning has no setting 'epoch'; it has depth, epochs, batch_size, learning_rate, shift, flip, "
        "keep_classes, replay",
        "code": "recipe_invalid",
        "setting": "epoch",
    }


def test_a_recipe_override_out_of_its_range(client: TestClient) -> None:
    reply = client.post("/train", json=SHADES | {"recipe": {"batch_size": 0}})
    assert problem(reply.json()) == {
        "title": "Not a setting of fine-tuning, or out of its range",
        "status": 422,
        "detail": "batch_size=0: Input should be greater than or equal to 2",
        "code": "recipe_invalid",
        "setting": "batch_size",
    }


@pytest.mark.parametrize(
    ("content", "parameter"),
    [
        ("{", "body"),
        ("[]", "body"),
        ("{}", "body.model"),
        (json.dumps(SHADES | {"learning_rate": 1}), "body.learning_rate"),
        (json.dumps(SHADES | {"seed": -1}), "body.seed"),
        (json.dumps(SHADES | {"promote": "maybe"}), "body.promote"),
        (json.dumps(SHADES | {"dataset": {"builtin": "imagenet"}}), "body.dataset.Builtin.builtin"),
    ],
)
def test_a_body_that_makes_no_sense_is_named(client: TestClient, content: str, parameter: str) -> None:
    reply = client.post("/train", content=content, headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_parameter")
    assert parameter in {error["parameter"] for error in reply.json()["errors"]}


def test_more_json_than_an_order_takes_is_refused_while_it_comes_in(client: TestClient) -> None:
    for content in (json.dumps(SHADES | {"model": "x" * 70_000}), iter([b" " * 10_000] * 7)):
        reply = client.post("/train", content=content, headers={"Content-Type": "application/json"})
        assert (reply.status_code, reply.headers["connection"]) == (413, "close")
        assert problem(reply.json()) == {
            "title": "The request body is too large",
            "status": 413,
            "detail": "the JSON has more than 65536 bytes; the limit is 65536: "
            "pictures come as the file `dataset` of a form",
            "code": "body_too_large",
            "limit": 65_536,
        }
    assert client.get("/train").json() == {"jobs": [], "has_more": False}


def test_another_content_type_is_refused(client: TestClient) -> None:
    reply = client.post("/train", content=b"PK", headers={"Content-Type": "application/zip"})
    assert problem(reply.json()) == {
        "title": "The content type isn't read here",
        "status": 415,
        "detail": "content type application/zip isn't read here; "
        "send application/json, or multipart/form-data with the archive as its part `dataset`",
        "code": "unsupported_media_type",
    }


def test_a_builtin_set_needs_the_data(settings: Settings) -> None:
    with TestClient(create_app(settings.model_copy(update={"data": None}))) as client:
        assert problem(client.post("/train", json=SHADES).json()) == {
            "title": "No such data set",
            "status": 404,
            "detail": "mnist isn't on this machine; set SAFELIGHT_DATA to the folder that holds it",
            "code": "dataset_not_found",
        }


def test_models_that_can_not_be_written_are_said_so_at_once(
    client: TestClient, settings: Settings, read_only: Callable[[Path], Path]
) -> None:
    read_only(settings.artifacts)
    reply = client.post("/train", json=SHADES)
    assert problem(reply.json()) == {
        "title": "The artifacts folder can't be changed",
        "status": 503,
        "detail": f"{settings.artifacts} can't be written, so no version could be published there; see to the owner "
        "and rights of the artifacts folder (SAFELIGHT_ARTIFACTS)",
        "code": "artifacts_unwritable",
    }
    assert client.get("/train").json() == {"jobs": [], "has_more": False}
    assert client.get("/health/ready").status_code == 200


def test_a_full_queue_takes_no_more(client: TestClient) -> None:
    for _ in range(5):
        started(client)
    reply = client.post("/train", json=SHADES)
    assert reply.headers["retry-after"] == "5"
    assert problem(reply.json()) == {
        "title": "No more jobs may wait",
        "status": 429,
        "detail": "5 jobs are waiting; the limit is 5 (SAFELIGHT_QUEUED_JOBS): "
        "come back when one is done, or cancel one",
        "code": "jobs_full",
        "limit": 5,
    }


# --- on an upload ---


def archive(*labels: str, count: int = 12) -> bytes:
    """A zip of class folders."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        for place, label in enumerate(labels):
            for index in range(count):
                shade = 255 * (count * place + index) // (count * len(labels))
                file.writestr(f"{label}/{index}.png", encode(Image.new("L", (8, 8), shade)))
    return content.getvalue()


def sent(client: TestClient, content: bytes, key: str = "", **parts: str) -> Response:
    headers = {"Idempotency-Key": key} if key else {}
    return client.post("/train", files={"dataset": ("pets.zip", content)}, data=parts, headers=headers)


FORM = {"Content-Type": "multipart/form-data; boundary=xyz"}


def form(content: bytes, **fields: str) -> bytes:
    """The same as bytes."""
    parts = [b'name="%s"\r\n\r\n%s' % (name.encode(), value.encode()) for name, value in fields.items()]
    parts.append(b'name="dataset"; filename="pets.zip"\r\n\r\n' + content)
    return b"".join(b"--xyz\r\nContent-Disposition: form-data; " + part + b"\r\n" for part in parts) + b"--xyz--\r\n"


def test_the_archive_may_come_with_the_request(client: TestClient) -> None:
    recipe = json.dumps({"depth": "head"})
    reply = sent(client, archive("dark", "light"), model="greys", name="pets", seed="7", promote="never", recipe=recipe)
    job = reply.json()
    assert (reply.status_code, reply.headers["location"]) == (202, f"/train/{job['id']}")
    asked = {"model": "greys", "version": "1", "name": "pets", "seed": 7, "promote": "never"}
    assert {name: job[name] for name in asked} == asked
    assert job["recipe"] == {"depth": "head"}
    assert client.get(f"/datasets/{job['dataset']}").json()["id"] == job["dataset"]
    named = started(client, name="pets", dataset=job["dataset"])
    assert named["dataset"] == job["dataset"]


def test_labelled_pictures_may_come_with_the_request(client: TestClient) -> None:
    with zipfile.ZipFile(io.BytesIO(archive("dark", "light"))) as packed:
        files = [(name.split("/")[0], (name, packed.read(name))) for name in packed.namelist()]
    told = {"data": {"model": "greys", "name": "pets"}, "headers": {"Idempotency-Key": "k"}}
    reply = client.post("/train", files=files, **told)
    assert reply.status_code == 202
    assert reply.json()["dataset"] == sent(client, archive("dark", "light"), model="greys", name="p").json()["dataset"]
    assert client.post("/train", files=files, **told).json() == reply.json()
    assert client.post("/train", files=files[::-1], **told).json()["code"] == "idempotency_key_reused"


def test_an_archive_goes_to_the_state_folder_and_nowhere_else(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "no such folder"))
    content = io.BytesIO(archive("dark", "light"))
    with zipfile.ZipFile(content, "a") as file:
        file.writestr("dark/notes.bin", bytes(4_000_000))  # more than anybody would keep in memory
    reply = sent(client, content.getvalue(), model="greys", name="pets")
    assert reply.status_code == 202, reply.text


def test_the_same_archive_with_the_same_key_is_the_same_request(client: TestClient) -> None:
    content = archive("dark", "light")
    first = sent(client, content, "k", model="greys", name="pets")
    assert sent(client, content, "k", model="greys", name="pets").json() == first.json()
    assert sent(client, content, "k", model="greys", name="others").json()["code"] == "idempotency_key_reused"
    assert sent(client, archive("low", "high"), "k", model="greys", name="pets").json()["code"] == (
        "idempotency_key_reused"
    )
    assert len(client.get("/train").json()["jobs"]) == 1


def test_a_name_that_stands_for_other_classes_is_taken(client: TestClient) -> None:
    assert problem(sent(client, archive("dark", "light"), model="greys").json()) == {
        "title": "The name is that of a model with other classes",
        "status": 409,
        "detail": "model greys has the classes grey-0, grey-1, grey-2, grey-3, grey-4, grey-5, grey-6, grey-7, grey-8, "
        "grey-9 and 6 more; the new version would have dark, light: give it another `name`",
        "code": "name_taken",
    }
    assert client.get("/train").json()["jobs"] == []


def test_a_result_without_a_name_is_a_version_of_its_base_whose_classes_it_may_have_in_any_case(
    client: TestClient,
) -> None:
    reply = sent(client, archive("GREY-1", "grey-2"), model="greys")
    assert (reply.status_code, reply.json()["name"]) == (202, "greys")


def test_a_built_in_set_has_classes_too(client: TestClient) -> None:
    assert problem(client.post("/train", json=SHADES | {"name": "greys"}).json()) == {
        "title": "The name is that of a model with other classes",
        "status": 409,
        "detail": "model greys has the classes grey-0, grey-1, grey-2, grey-3, grey-4, grey-5, grey-6, grey-7, grey-8, "
        "grey-9 and 6 more; the new version would have 0, 1, 2, 3, 4, 5, 6, 7, 8, 9: give it another `name`",
        "code": "name_taken",
    }


def test_a_name_that_is_held_back_stands_for_its_classes_too(client: TestClient, settings: Settings) -> None:
    make_bundle(settings.artifacts, "pets", classes=("dark", "light"), activate=False)
    hold_back(settings.artifacts, "pets")
    assert problem(sent(client, archive("high", "low"), model="greys", name="pets").json()) == {
        "title": "The name is that of a model with other classes",
        "status": 409,
        "detail": "model pets has the classes dark, light; the new version would have high, low: "
        "give it another `name`",
        "code": "name_taken",
    }
    assert sent(client, archive("Light", "DARK"), model="greys", name="pets").status_code == 202


def test_what_is_wrong_with_the_rest_is_said_before_the_archive_is_looked_at(client: TestClient) -> None:
    assert sent(client, b"no archive", model="none").json()["code"] == "model_not_found"
    assert sent(client, b"no archive", model="greys", recipe="{}").json()["code"] == "dataset_refused"


@pytest.mark.parametrize(
    ("parts", "parameter"),
    [
        ({}, "body.model"),
        ({"model": "greys", "seed": "x"}, "body.seed"),
        ({"model": "greys", "recipe": "epochs=3"}, "body.recipe"),
        ({"model": "greys", "epochs": "3"}, "body.epochs"),
    ],
)
def test_a_form_that_makes_no_sense_is_named(client: TestClient, parts: dict[str, str], parameter: str) -> None:
    reply = sent(client, b"any", **parts)
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_parameter")
    assert [error["parameter"] for error in reply.json()["errors"]] == [parameter]


def test_a_form_with_two_files_is_refused(client: TestClient) -> None:
    files = [("dataset", ("a.zip", b"PK")), ("dataset", ("b.zip", b"PK"))]
    assert problem(client.post("/train", files=files, data={"model": "greys"}).json()) == {
        "title": "The body isn't what its content type says",
        "status": 400,
        "detail": "the multipart body can't be read: it has several archives, or pictures beside one; "
        "send them one by one",
        "code": "malformed_body",
    }


def test_a_data_set_that_is_deleted_just_before_its_job_is_made(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = client.post("/datasets", files={"dataset": ("pets.zip", archive("dark", "light"))}).json()["id"]
    settle = orders.settle

    async def settle_and_wait(*arguments: Any) -> Order:
        order = await settle(*arguments)
        await asyncio.to_thread(lambda: client.delete(f"/datasets/{dataset}").raise_for_status())
        return order

    monkeypatch.setattr(orders, "settle", settle_and_wait)
    asked = SHADES | {"dataset": dataset}
    for reply in (
        client.post("/train", json=asked, headers={"Idempotency-Key": "k"}),
        sent(client, archive("dark", "light"), "k", model="greys", name="pets"),
    ):
        assert problem(reply.json()) == {
            "title": "No such data set",
            "status": 404,
            "detail": f"data set {dataset} was deleted in this moment; send its pictures again if you need it",
            "code": "dataset_not_found",
        }
    monkeypatch.undo()
    assert client.get("/train").json() == {"jobs": [], "has_more": False}
    assert sent(client, archive("dark", "light"), "k", model="greys", name="pets").status_code == 202


def test_the_same_archive_comes_again_and_again_while_its_data_set_is_being_deleted(client: TestClient) -> None:
    content = archive("dark", "light")
    dataset = client.post("/datasets", files={"dataset": ("pets.zip", content)}).json()["id"]
    gone = f"data set {dataset} was deleted in this moment; send its pictures again if you need it"
    none = f"there is no data set '{dataset}'; GET /datasets lists those that there are"
    used = f"data set {dataset} is used by a job; wait for it, or cancel it first"
    missing = {"title": "No such data set", "status": 404, "code": "dataset_not_found"}
    in_use = {"title": "A job uses the data set", "status": 409, "code": "dataset_in_use"}

    def train(_: int) -> bool:
        """A job that was accepted has its data set for as long as it isn't over."""
        reply = sent(client, content, model="greys", name="pets")
        if reply.status_code != 202:
            assert problem(reply.json()) == missing | {"detail": gone}
            return False
        job = reply.json()
        fixed = {"model": "greys", "version": "1", "name": "pets", "dataset": dataset, "status": "queued"}
        assert {name: job[name] for name in fixed} == fixed
        assert client.get(f"/datasets/{dataset}").status_code == 200
        assert client.post(f"/train/{job['id']}/cancel").json()["status"] == "cancelled"
        return True

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(train, number) for number in range(8)]
        deletions = []
        while not all(one.done() for one in asked):
            deletions.append(client.delete(f"/datasets/{dataset}"))
    accepted = sum(one.result() for one in asked)
    assert len(client.get("/train?limit=100").json()["jobs"]) == accepted
    for reply in deletions:
        if reply.status_code != 204:
            assert problem(reply.json()) in (
                missing | {"detail": none},
                missing | {"detail": gone},
                in_use | {"detail": used},
            )
    assert 204 in {reply.status_code for reply in deletions}


def test_a_client_that_leaves_while_its_archive_is_checked_starts_no_job(
    client: TestClient, settings: Settings
) -> None:
    body = form(archive("dark", "light", count=1000), model="greys", name="pets")
    status = leave(client, "/train", FORM | {"Idempotency-Key": "k"}, body)
    assert status == 499
    assert client.get("/train").json() == {"jobs": [], "has_more": False}
    assert client.get("/datasets").json() == {"datasets": []}
    assert os.listdir(settings.state / "datasets") == [".lock"]
    assert sent(client, archive("dark", "light"), "k", model="greys", name="pets").status_code == 202


# --- the same request again ---


@pytest.mark.parametrize("again", ["k-1", '"k-1"'])
def test_the_same_request_with_the_same_key_gets_the_first_answer(
    client: TestClient, jobs: JobStore, again: str
) -> None:
    first = client.post("/train", json=SHADES, headers={"Idempotency-Key": "k-1"})
    jobs.cancel(first.json()["id"])
    second = client.post("/train", json=SHADES | {"seed": 0}, headers={"Idempotency-Key": again})
    assert (second.status_code, second.json()) == (202, first.json())
    assert second.headers["location"] == first.headers["location"]
    assert len(client.get("/train").json()["jobs"]) == 1


def test_another_request_with_the_same_key_is_refused(client: TestClient) -> None:
    client.post("/train", json=SHADES, headers={"Idempotency-Key": "k"})
    reply = client.post("/train", json=SHADES | {"seed": 1}, headers={"Idempotency-Key": "k"})
    assert problem(reply.json()) == {
        "title": "The Idempotency-Key came with another request before",
        "status": 422,
        "detail": "this Idempotency-Key came with another request before; take a new key for a new request",
        "code": "idempotency_key_reused",
    }


def test_a_key_whose_request_is_still_being_answered(client: TestClient, jobs: JobStore) -> None:
    headers = {"Idempotency-Key": "k"}
    asked = TrainRequest.model_validate(SHADES)
    jobs.claim("k", Asked(asked, asked.dataset).fingerprint(), timedelta(hours=1))
    reply = client.post("/train", json=SHADES, headers=headers)
    assert reply.headers["retry-after"] == "5"
    assert problem(reply.json()) == {
        "title": "The first request with this key is still being answered",
        "status": 409,
        "detail": "the first request with this Idempotency-Key is still being answered; ask again in a moment",
        "code": "idempotency_key_in_use",
    }


@pytest.mark.parametrize(("minutes", "status"), [(19, 409), (25, 202)])
def test_a_key_is_its_requests_own_for_as_long_as_archives_may_be_checked(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, minutes: int, status: int
) -> None:
    checks = {"dataset_uploads": 3, "dataset_checks": 2, "dataset_seconds": 600.0}  # two rounds of ten minutes
    asked = TrainRequest.model_validate(SHADES)
    fingerprint = Asked(asked, asked.dataset).fingerprint()

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return super().now(tz) + timedelta(minutes=minutes)

    with TestClient(create_app(settings.model_copy(update=checks))) as client:
        client.app_state["jobs"].claim("k", fingerprint, timedelta(hours=1))
        monkeypatch.setattr("service.jobs.store.datetime", Later)
        assert client.post("/train", json=SHADES, headers={"Idempotency-Key": "k"}).status_code == status


def test_a_refused_request_does_not_use_up_its_key(client: TestClient) -> None:
    headers = {"Idempotency-Key": "k"}
    assert client.post("/train", json=SHADES | {"model": "none"}, headers=headers).status_code == 404
    assert client.post("/train", json=SHADES, headers=headers).status_code == 202


@pytest.mark.parametrize("key", ["", '""', "a b", "x" * 256])
def test_what_can_not_be_a_key(client: TestClient, key: str) -> None:
    assert problem(client.post("/train", json=SHADES, headers={"Idempotency-Key": key}).json()) == {
        "title": "Not a possible Idempotency-Key",
        "status": 422,
        "detail": "an Idempotency-Key is 1 to 255 visible ASCII characters, in double quotes or not",
        "code": "idempotency_key_invalid",
    }


# --- reading ---


def test_jobs_come_newest_first_page_by_page(client: TestClient) -> None:
    ids = [started(client)["id"] for _ in range(3)][::-1]
    first = client.get("/train?limit=2").json()
    assert ([job["id"] for job in first["jobs"]], first["has_more"]) == (ids[:2], True)
    second = client.get(f"/train?limit=2&after={ids[1]}").json()
    assert ([job["id"] for job in second["jobs"]], second["has_more"]) == (ids[2:], False)


def test_jobs_are_listed_by_state(client: TestClient) -> None:
    queued, cancelled = started(client), started(client)
    client.post(f"/train/{cancelled['id']}/cancel")
    assert [job["id"] for job in client.get("/train?status=cancelled").json()["jobs"]] == [cancelled["id"]]
    assert [job["id"] for job in client.get("/train?status=queued").json()["jobs"]] == [queued["id"]]


@pytest.mark.parametrize("query", ["status=done", "limit=0", "limit=101", "after=x"])
def test_a_page_that_can_not_be(client: TestClient, query: str) -> None:
    reply = client.get(f"/train?{query}")
    assert (reply.status_code, reply.json()["code"]) == (422, "invalid_parameter")


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "/events"),
        ("GET", "/log"),
        ("GET", "/curve.png"),
        ("POST", "/cancel"),
        ("POST", "/pause"),
        ("POST", "/resume"),
    ],
)
def test_a_job_that_does_not_exist(client: TestClient, method: str, path: str) -> None:
    assert problem(client.request(method, f"/train/job-0{path}").json()) == {
        "title": "No such job",
        "status": 404,
        "detail": "there is no job 'job-0'; GET /train lists those that there are",
        "code": "job_not_found",
    }


# --- asking something of a job ---


def test_a_waiting_job_is_paused_resumed_and_cancelled_at_once(client: TestClient) -> None:
    job = started(client)
    for ask, status in (("pause", "paused"), ("resume", "queued"), ("cancel", "cancelled")):
        reply = client.post(f"/train/{job['id']}/{ask}", headers={"Content-Type": "application/json"})
        assert (reply.status_code, reply.json()["status"]) == (200, status)
    cancelled = client.get(f"/train/{job['id']}").json()
    assert cancelled == job | {"status": "cancelled", "finished_at": cancelled["finished_at"]}


def test_cancelling_a_job_that_is_over(client: TestClient) -> None:
    job = started(client)["id"]
    client.post(f"/train/{job}/cancel")
    assert problem(client.post(f"/train/{job}/cancel").json()) == {
        "title": "Not possible in the state that the job is in",
        "status": 409,
        "detail": f"{job} is cancelled; only a job that isn't over can be cancelled",
        "code": "job_state_conflict",
        "job_status": "cancelled",
    }


def test_resuming_a_job_that_is_not_paused(client: TestClient) -> None:
    job = started(client)["id"]
    assert problem(client.post(f"/train/{job}/resume").json()) == {
        "title": "Not possible in the state that the job is in",
        "status": 409,
        "detail": f"{job} is queued; only a paused job can be resumed",
        "code": "job_state_conflict",
        "job_status": "queued",
    }


def test_resuming_a_job_that_runs(client: TestClient, jobs: JobStore) -> None:
    job = jobs.move(jobs.move(jobs.get(started(client)["id"]), "validating"), "running")
    assert problem(client.post(f"/train/{job.id}/resume").json()) == {
        "title": "Not possible in the state that the job is in",
        "status": 409,
        "detail": f"{job.id} is running; only a paused job can be resumed",
        "code": "job_state_conflict",
        "job_status": "running",
    }
    assert client.get(f"/train/{job.id}").json() == job.model_dump(mode="json")


# --- what its run has told ---


EVENTS = [
    {"at": "2026-01-01T00:00:00Z", "event": "validated", "report": {}},
    {"at": "2026-01-01T00:00:01Z", "event": "notice", "message": "grüße\nan alle"},
    {"at": "2026-01-01T00:00:02Z", "event": "decided", "result": {"model": "shades", "version": "1"}},
]


@pytest.fixture
def told(client: TestClient, settings: Settings, jobs: JobStore) -> str:
    """A job that is over, with three events, a log and a curve."""
    job = jobs.move(jobs.get(started(client)["id"]), "cancelled")
    folder = settings.state / "jobs" / job.id
    folder.mkdir(parents=True)
    lines = [json.dumps(event, ensure_ascii=False) for event in EVENTS]
    (folder / "events.jsonl").write_text("\n".join(lines) + '\n{"event": "half a li')
    (folder / "log.txt").write_bytes("epoch 1 \N{CHECK MARK}\n".encode() + b"\xff\n")
    (folder / "learning-curve.png").write_bytes(b"\x89PNG")
    return job.id


def numbered(first: int, last: int) -> list[dict[str, Any]]:
    return [{"id": index, **EVENTS[index - 1]} for index in range(first, last + 1)]


@pytest.mark.parametrize(
    ("query", "first", "last", "more"),
    [("", 1, 3, False), ("?limit=2", 1, 2, True), ("?after=2", 3, 3, False), ("?after=1&limit=1", 2, 2, True)],
)
def test_events_are_paged_by_their_lines(
    client: TestClient, told: str, query: str, first: int, last: int, more: bool
) -> None:
    reply = client.get(f"/train/{told}/events{query}")
    assert reply.json() == {"events": numbered(first, last), "has_more": more}


def test_events_that_have_not_come_yet(client: TestClient) -> None:
    job = started(client)["id"]
    assert client.get(f"/train/{job}/events").json() == {"events": [], "has_more": False}
    assert client.get(f"/train/{job}/log").text == ""
    assert problem(client.get(f"/train/{job}/curve.png").json()) == {
        "title": "The job has no such file here",
        "status": 404,
        "detail": f"{job} is queued and has no learning curve yet",
        "code": "job_file_not_found",
    }


def test_a_job_that_is_over_without_a_learning_curve_will_get_none(client: TestClient, jobs: JobStore) -> None:
    running = jobs.move(jobs.move(jobs.get(started(client)["id"]), "validating"), "running")
    job = jobs.move(running, "succeeded", result={"model": "shades", "version": "1"}).id
    assert problem(client.get(f"/train/{job}/curve.png").json()) == {
        "title": "The job has no such file here",
        "status": 404,
        "detail": f"{job} is succeeded and has no learning curve: only training beyond a head draws one",
        "code": "job_file_not_found",
    }


STREAM = {"Accept": "text/event-stream"}


def test_events_come_as_a_stream_that_ends_with_the_job(client: TestClient, told: str) -> None:
    reply = client.get(f"/train/{told}/events", headers=STREAM | {"Last-Event-ID": "1"})
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-cache"
    notice, decided, end, rest = reply.text.split("\n\n")
    assert notice == f"event: notice\ndata: {json.dumps(EVENTS[1], ensure_ascii=False)}\nid: 2"
    assert decided == f"event: decided\ndata: {json.dumps(EVENTS[2])}\nid: 3"
    name, data = end.split("\n")
    assert (name, rest) == ("event: end", "")
    assert json.loads(data.removeprefix("data: ")) == client.get(f"/train/{told}").json()


def test_a_long_stream_lets_others_have_their_turn(jobs: JobStore, tmp_path: Path) -> None:
    path, turns = tmp_path / "events.jsonl", [0]
    path.write_text((json.dumps(EVENTS[1]) + "\n") * 1000)
    job = jobs.move(jobs.create(order(), queue_size=1), "cancelled")

    async def others() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    async def main() -> list[int]:
        beside = asyncio.create_task(others())
        had = [turns[0] async for _ in server_sent.stream(jobs, job.id, Tail(path), Lifecycle())]
        beside.cancel()
        return had

    had = asyncio.run(main())
    assert len(had) == 1000 + len(["end"])
    assert max(map(had.count, had)) <= server_sent.PORTION


def test_a_stream_that_was_read_to_its_end_is_not_begun_again(client: TestClient, told: str) -> None:
    reply = client.get(f"/train/{told}/events", headers=STREAM | {"Last-Event-ID": "3"})
    assert (reply.status_code, reply.content) == (204, b"")
    assert client.get(f"/train/{told}/events?after=3", headers=STREAM).text.startswith("event: end\n")


def test_log_and_curve_are_read_as_they_are(client: TestClient, told: str) -> None:
    log = client.get(f"/train/{told}/log")
    assert log.headers["content-type"] == "text/plain; charset=utf-8"
    assert log.content == "epoch 1 \N{CHECK MARK}\n".encode() + b"\xff\n"
    curve = client.get(f"/train/{told}/curve.png")
    assert (curve.headers["content-type"], curve.content) == ("image/png", b"\x89PNG")


def test_the_files_of_another_services_job(client: TestClient, settings: Settings) -> None:
    with closing(JobStore(f"sqlite:///{settings.state}/jobs.db", "elsewhere")) as elsewhere:
        job = elsewhere.create(order(), queue_size=1).id
    assert client.get(f"/train/{job}").json()["status"] == "queued"
    for name in ("events", "log", "curve.png"):
        assert problem(client.get(f"/train/{job}/{name}").json()) == {
            "title": "The job has no such file here",
            "status": 404,
            "detail": f"the files of {job} are with another service on this database; ask that one",
            "code": "job_file_not_found",
        }


# --- the service as a whole ---


def test_jobs_are_there_after_a_restart(settings: Settings) -> None:
    with TestClient(create_app(settings)) as client:
        job = started(client)
        client.post(f"/train/{job['id']}/cancel")
        over = client.get(f"/train/{job['id']}").json()
    with TestClient(create_app(settings)) as client:
        assert client.get(f"/train/{job['id']}").json() == over


def test_jobs_are_counted_in_the_metrics(client: TestClient) -> None:
    started(client)
    client.post(f"/train/{started(client)['id']}/pause")
    text = client.get("/metrics").text
    assert 'safelight_jobs{status="queued"} 1.0' in text
    assert 'safelight_jobs{status="paused"} 1.0' in text
    assert 'safelight_jobs{status="running"} 0.0' in text
