"""POST /datasets and what follows, over HTTP: the whole answers, bad archives and worse forms."""

import os
import stat
import struct
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx2 import Response

from service.app import create_app
from service.settings import Settings
from tests.service.api.leaving import leave
from tests.tiny import pictures, tarred, zipped

ZIP = {"Content-Type": "application/zip"}
PETS = pictures("cat", "dog")
EMPTY = {"count": 0, "first": []}


@contextmanager
def application(settings: Settings, **changes: object) -> Iterator[TestClient]:
    """The application with some settings changed; whatever a test sent it, nothing of it is left half done."""
    with TestClient(create_app(settings.model_copy(update=changes)), raise_server_exceptions=False) as client:
        yield client
        assert client.get("/health/ready").json() == {"status": "ready"}
        left = [name for name in os.listdir(settings.state / "datasets") if not name.startswith("ds-")]
        assert left == [".lock"]


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    with application(settings) as client:
        yield client


def problem(response: Response) -> dict[str, Any]:
    """A whole problem reply, checked for what all of them share; the id is taken out of it."""
    assert response.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = response.json()
    assert body["status"] == response.status_code
    assert body["type"] == f"urn:safelight:problem:{body['code']}"
    assert body.pop("request_id") == response.headers["x-request-id"]
    del body["type"]
    return body


# --- what is received -------------------------------------------------------------------------------------------------


def test_the_whole_life_of_a_data_set(client: TestClient) -> None:
    files = PETS | {"cat/notes.txt": b"hello"}
    added = client.post("/datasets?model=greys&version=1&name=pets", content=zipped(files), headers=ZIP)
    body = added.json()
    assert (added.status_code, added.headers["location"]) == (201, f"/datasets/{body['id']}")
    detail = body["rejected"]["first"][0].pop("detail")
    assert detail.startswith("this is no image of a format that is read here; ")
    assert body == {
        "id": body["id"],
        "name": "pets",
        "created_at": body["created_at"],
        "images": 20,
        "bytes": sum(map(len, PETS.values())),
        "divided": False,
        "classes": [
            {"name": "cat", "images": 10, "train": None, "test": None},
            {"name": "dog", "images": 10, "train": None, "test": None},
        ],
        "rejected": {
            "count": 1,
            "by_code": {"not_an_image": 1},
            "first": [{"file": "cat/notes.txt", "code": "not_an_image"}],
        },
        "duplicates": EMPTY,
        "near_duplicates": EMPTY,
        "contradictions": EMPTY,
        "base": {"model": "greys", "version": "1", "known": {}, "new": ["cat", "dog"], "test_pictures": None},
        "sizes": {
            "smallest": {"width": 16, "height": 16},
            "median": {"width": 16, "height": 16},
            "largest": {"width": 16, "height": 16},
            "upscaled": 0,
        },
        "polarity": None,
        "notes": ["greys@1 doesn't remember its test set, so pictures of it can't be told"],
    }
    again = client.post("/datasets?model=greys&name=pets", content=tarred(files, "gz"), headers=ZIP)
    assert (again.status_code, again.json()["id"], again.json()["created_at"]) == (200, body["id"], body["created_at"])
    body["rejected"]["first"][0]["detail"] = detail
    assert client.get(f"/datasets/{body['id']}").json() == again.json() == body
    shown = {name: body[name] for name in ("id", "name", "created_at", "images", "bytes", "divided")}
    assert client.get("/datasets").json() == {"datasets": [shown | {"classes": ["cat", "dog"]}]}
    assert client.delete(f"/datasets/{body['id']}").status_code == 204
    assert client.get("/datasets").json() == {"datasets": []}
    for gone in (client.get(f"/datasets/{body['id']}"), client.delete(f"/datasets/{body['id']}")):
        assert problem(gone) == {
            "title": "No such data set",
            "status": 404,
            "detail": f"there is no data set '{body['id']}'; GET /datasets lists those that there are",
            "code": "dataset_not_found",
        }


def test_a_data_set_that_a_job_uses_stays(client: TestClient) -> None:
    dataset = client.post("/datasets", content=zipped(PETS), headers=ZIP).json()["id"]
    client.app_state["datasets"]._in_use = {dataset}.__contains__  # what a job says
    assert problem(client.delete(f"/datasets/{dataset}")) == {
        "title": "A job uses the data set",
        "status": 409,
        "detail": f"data set {dataset} is used by a job; wait for it, or cancel it first",
        "code": "dataset_in_use",
    }
    assert client.get(f"/datasets/{dataset}").status_code == 200


def test_every_form_of_the_same_pictures_is_the_same_data_set(client: TestClient) -> None:
    labelled = [(name.partition("/")[0], (name, content)) for name, content in PETS.items()]
    archive = {"dataset": ("My pets.tar.gz", tarred(PETS, "gz"))}
    replies = [
        client.post("/datasets", files=archive, data={"model": "greys"}),
        client.post("/datasets", files=labelled, data={"name": "labelled"}),
        client.post("/datasets?name=raw", content=zipped(PETS), headers={"Content-Type": "application/octet-stream"}),
    ]
    assert [reply.status_code for reply in replies] == [201, 200, 200]
    assert [reply.json()["name"] for reply in replies] == ["My pets", "labelled", "raw"]
    assert len({reply.json()["id"] for reply in replies}) == 1
    assert [reply.json()["base"] is None for reply in replies] == [False, True, True]


def test_a_form_s_fields_may_come_after_its_file_in_any_portions(client: TestClient) -> None:
    body = b"".join(
        b'--xyz\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % part
        for part in (
            (b"dataset", b'; filename="p\xc3\xa4ts.zip"', zipped(PETS)),
            (b"model", b"", b"greys"),
        )
    )

    def portions() -> Iterator[bytes]:
        whole = body + b"--xyz--\r\n"
        for start in range(0, len(whole), 1009):
            yield whole[start : start + 1009]

    reply = client.post(
        "/datasets", content=portions(), headers={"Content-Type": "multipart/form-data; boundary=xyz"}
    ).json()
    assert (reply["name"], reply["base"]["model"]) == ("päts", "greys")


def test_unicode_names_and_pictures_survive(client: TestClient, settings: Settings) -> None:
    files = pictures("猫", "ёж 🦔")
    added = client.post("/datasets?name=Tiere äöü&model=greys", content=zipped(files), headers=ZIP)
    body = added.json()
    assert (added.status_code, body) == (
        201,
        {
            "id": body["id"],
            "name": "Tiere äöü",
            "created_at": body["created_at"],
            "images": 20,
            "bytes": sum(map(len, files.values())),
            "divided": False,
            "classes": [
                {"name": "ёж 🦔", "images": 10, "train": None, "test": None},
                {"name": "猫", "images": 10, "train": None, "test": None},
            ],
            "rejected": {"count": 0, "by_code": {}, "first": []},
            "duplicates": EMPTY,
            "near_duplicates": EMPTY,
            "contradictions": EMPTY,
            "base": {"model": "greys", "version": "1", "known": {}, "new": ["ёж 🦔", "猫"], "test_pictures": None},
            "sizes": {
                "smallest": {"width": 16, "height": 16},
                "median": {"width": 16, "height": 16},
                "largest": {"width": 16, "height": 16},
                "upscaled": 0,
            },
            "polarity": None,
            "notes": ["greys@1 doesn't remember its test set, so pictures of it can't be told"],
        },
    )
    with zipfile.ZipFile(settings.state / "datasets" / body["id"] / "data.zip") as archive:
        assert sorted(archive.read(name) for name in archive.namelist()) == sorted(files.values())


def test_the_same_upload_while_it_is_being_deleted(client: TestClient) -> None:
    """Each request is answered as if it had come before or after each of the others."""
    content = zipped(PETS)
    expected = client.post("/datasets?name=pets", content=content, headers=ZIP).json()
    dataset = expected["id"]
    with ThreadPoolExecutor(2) as pool:
        uploads = [
            pool.submit(client.post, "/datasets?name=pets", content=content, headers=ZIP) for _ in range(UPLOADS)
        ]
        deletions = []
        while not all(upload.done() for upload in uploads):
            deletions.append(client.delete(f"/datasets/{dataset}"))
    gone = 0
    for reply in deletions:
        if reply.status_code == 204:
            gone += 1
            assert reply.content == b""
            continue
        assert problem(reply) in (
            missing(f"there is no data set '{dataset}'; GET /datasets lists those that there are"),
            missing(f"data set {dataset} was deleted in this moment; send its pictures again if you need it"),
        )
    new = 0
    for upload in uploads:
        body = upload.result().json()
        new += upload.result().status_code == 201
        assert (upload.result().status_code in (200, 201), body) == (
            True,
            expected | {"created_at": body["created_at"]},
        )
    there = client.get("/datasets").json()["datasets"]
    assert 1 + new - gone == len(there)
    assert gone > 1


UPLOADS = 8


def missing(detail: str) -> dict[str, Any]:
    return {"title": "No such data set", "status": 404, "detail": detail, "code": "dataset_not_found"}


# --- a bad disk -------------------------------------------------------------------------------------------------------

FULL = {
    "title": "The disk is full",
    "status": 507,
    "detail": "there is no room for this data set in the state folder; delete data sets that nobody needs, or let "
    "SAFELIGHT_STATE be on a larger disk",
    "code": "disk_full",
}
UNWRITABLE = {
    "title": "The state folder can't be written",
    "status": 503,
    "detail": "the state folder can't be written: Read-only file system; see to SAFELIGHT_STATE's owner and rights",
    "code": "state_unwritable",
}


@pytest.mark.parametrize("size", [3_000_000, 1_200_000], ids=["while-receiving", "while-checking"])
def test_a_full_disk(settings: Settings, small_disk: Callable[[Path, str], Path], size: int) -> None:
    small_disk(settings.state / "datasets", "2m")
    content = zipped({name: content + bytes(size // 20) for name, content in PETS.items()})
    with application(settings) as client:
        assert problem(client.post("/datasets", content=content, headers=ZIP)) == FULL
        form = {"files": {"dataset": ("pets.zip", content)}, "data": {"model": "greys", "name": "pets"}}
        assert problem(client.post("/train", **form)) == FULL
        assert client.get("/train").json() == {"jobs": [], "has_more": False}
        assert client.post("/datasets", content=zipped(PETS), headers=ZIP).status_code == 201  # there is room for it


def test_a_state_folder_that_can_not_be_written(
    client: TestClient, settings: Settings, read_only: Callable[[Path], Path]
) -> None:
    dataset = client.post("/datasets", content=zipped(PETS), headers=ZIP).json()
    read_only(settings.state / "datasets")
    assert problem(client.post("/datasets", content=zipped(PETS), headers=ZIP)) == UNWRITABLE
    form = {"files": {"dataset": ("pets.zip", zipped(PETS))}, "data": {"model": "greys", "name": "pets"}}
    assert problem(client.post("/train", **form)) == UNWRITABLE
    assert problem(client.delete(f"/datasets/{dataset['id']}")) == UNWRITABLE
    assert client.get(f"/datasets/{dataset['id']}").json() == dataset
    assert client.get("/train").json() == {"jobs": [], "has_more": False}


# --- bad archives -----------------------------------------------------------------------------------------------------


def with_link() -> bytes:
    packed = BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        info = zipfile.ZipInfo("cat/passwords.png")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    return packed.getvalue()


def many_classes() -> bytes:
    return zipped({f"{number}/1.png": b"" for number in range(20_001)})


@pytest.mark.parametrize(
    ("make", "detail", "facts"),
    [
        (
            lambda: zipped(PETS | {"../../evil.png": b""}),
            "the entry '../../evil.png' leads outside of the archive; pack the class folders themselves, by "
            "relative paths",
            {"reason": "archive_unsafe", "entry": "../../evil.png"},
        ),
        (
            with_link,
            "the entry 'cat/passwords.png' is a link; pack plain files and folders only",
            {"reason": "archive_unsafe", "entry": "cat/passwords.png", "kind": "link"},
        ),
        (
            lambda: tarred({"cat/1.png": bytes(68_000_000)}, "gz"),
            "the archive has {size} bytes and unpacks to more than 67108864; the limit is 100 times its size: "
            "pack pictures as they are",
            {"reason": "archive_too_large", "limit": 67_108_864},
        ),
        (
            lambda: zipped(PETS)[:-40],
            "the zip is truncated or damaged; send the whole file again",
            {"reason": "archive_unreadable"},
        ),
        (
            lambda: zipped({}),
            "the zip holds no file; pack the class folders with the pictures in them",
            {"reason": "archive_empty"},
        ),
        (
            lambda: b"",
            "the archive is empty (0 bytes); send a zip or a tar of class folders",
            {"reason": "archive_empty"},
        ),
        (
            lambda: zipped(pictures("cat", count=30)),
            "only one class, 'cat'; a classifier needs at least 2, a folder each",
            {"reason": "too_few_classes", "classes": 1, "limit": 2},
        ),
        (
            lambda: zipped(pictures("cat", "x" * 300)),
            f"the class name '{'x' * 120}…{'x' * 60}' has 300 characters; the limit is 100: rename its folder",
            {"reason": "class_name_invalid", "label": f"{'x' * 120}…{'x' * 60}", "limit": 100},
        ),
        (
            lambda: zipped(pictures("Cat", "cat", "dog")),
            "the classes 'Cat' and 'cat' differ only in case; put them into one folder",
            {"reason": "class_names_collide", "classes": ["Cat", "cat"]},
        ),
        (
            many_classes,
            "the data set has 20001 classes; the limit is 1000: a folder is one class",
            {"reason": "too_many_classes", "classes": 20_001, "limit": 1000},
        ),
        (
            lambda: zipped(dict.fromkeys(PETS, b"hello")),
            "class 'cat' has 0 pictures (20 not_an_image left out); each needs at least 5",
            {"reason": "too_few_images", "label": "cat", "images": 0, "limit": 5, "left_out": {"not_an_image": 20}},
        ),
    ],
    ids=[
        "zip-slip",
        "symlink",
        "bomb",
        "truncated",
        "empty-zip",
        "nothing",
        "one-class",
        "long-name",
        "case",
        "20001-classes",
        "no-images",
    ],
)
def test_a_bad_archive_is_refused_with_the_reason(
    client: TestClient, make: Callable[[], bytes], detail: str, facts: dict[str, object]
) -> None:
    content = make()
    assert problem(client.post("/datasets", content=content, headers=ZIP)) == {
        "title": "The data set can't be used",
        "status": 422,
        "detail": detail.replace("{size}", str(len(content))),
        "code": "dataset_refused",
        **facts,
    }
    assert client.get("/datasets").json() == {"datasets": []}


def test_an_upload_that_is_too_large_is_refused_while_it_comes_in(settings: Settings) -> None:
    with application(settings, max_dataset_bytes=5_000) as client:
        for content in (zipped(PETS), iter([zipped(PETS)])):
            refusal = problem(client.post("/datasets", content=content, headers=ZIP))
            size = refusal["detail"].split(" bytes")[0].removeprefix("the body has ")
            assert size in (str(len(zipped(PETS))), "more than 5000")
            assert refusal == {
                "title": "The request body is too large",
                "status": 413,
                "detail": f"the body has {size} bytes; the limit is 5000 (SAFELIGHT_MAX_DATASET_BYTES): send a part "
                "of them, or smaller pictures",
                "code": "body_too_large",
                "limit": 5000,
            }
        big = client.post("/predict", content=bytes(6_000), headers={"Content-Type": "image/png"})
        assert big.json()["code"] == "not_an_image"


def test_a_data_set_may_be_larger_than_a_request_for_predictions(settings: Settings) -> None:
    with application(settings, max_body_bytes=2_000) as client:
        assert client.post("/datasets", content=zipped(PETS), headers=ZIP).status_code == 201
        assert client.post("/predict", content=bytes(3_000)).json()["code"] == "body_too_large"


def test_a_client_that_leaves_takes_its_upload_along(client: TestClient, settings: Settings) -> None:
    assert leave(client, "/datasets", ZIP, b"PK", whole=False) == 499
    assert leave(client, "/datasets", ZIP, zipped(pictures("cat", "dog", count=500))) == 499
    assert client.get("/datasets").json() == {"datasets": []}
    assert os.listdir(settings.state / "datasets") == [".lock"]


# --- bad requests -----------------------------------------------------------------------------------------------------

FORM = {"Content-Type": "multipart/form-data; boundary=xyz"}


def part(headers: bytes, content: bytes = b"x", end: bytes = b"--xyz--\r\n") -> bytes:
    return b"--xyz\r\n" + headers + b"\r\n\r\n" + content + b"\r\n" + end


@pytest.mark.parametrize(
    ("headers", "content", "detail"),
    [
        (FORM, part(b'Content-Disposition: form-data; name="model"'), "no part of it is a file; with curl: "),
        (
            FORM,
            part(b'Content-Disposition: form-data; name="dataset"; filename="a"', end=b""),
            "its closing boundary is ",
        ),
        (FORM, part(b"Content-Type: text/plain"), "a part of it has no name"),
        (
            FORM,
            part(b'Content-Disposition: form-data; name="model"', b"x" * 70_000),
            "its text has more than 65536 bytes",
        ),
        (
            FORM,
            part(b'Content-Disposition: form-data; name="a/b"; filename="1"'),
            "a picture's part is named by its class",
        ),
        (FORM, b"nonsense", "Expected boundary character"),
        ({"Content-Type": "multipart/form-data"}, b"x", "its content type names no boundary"),
    ],
)
def test_a_form_that_cannot_be_read_says_why(
    client: TestClient, headers: dict[str, str], content: bytes, detail: str
) -> None:
    found = problem(client.post("/datasets", content=content, headers=headers))
    assert found.pop("detail").startswith(f"the multipart body can't be read: {detail}")
    assert found == {"title": "The body isn't what its content type says", "status": 400, "code": "malformed_body"}


def test_a_form_with_two_minds_is_refused(client: TestClient) -> None:
    for more in ("dataset", "cat"):
        response = client.post("/datasets", files=[("dataset", ("a.zip", b"x")), (more, ("b.zip", b"x"))])
        assert problem(response)["detail"] == (
            "the multipart body can't be read: it has several archives, or pictures beside one; send them one by one"
        )


def test_too_many_pictures_in_a_form_are_sent_as_an_archive(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.datasets.MAX_LABELLED", 2)
    assert problem(client.post("/datasets", files=[("cat", ("1.png", b"x"))] * 3)) == {
        "title": "Too many pictures in one request",
        "status": 413,
        "detail": "more than 2 pictures in one form; send them as a zip or tar of class folders",
        "code": "too_many_images",
        "limit": 2,
    }


def test_a_field_that_is_none_is_named(client: TestClient) -> None:
    response = client.post("/datasets", files={"dataset": ("a.zip", b"x")}, data={"modle": "greys"})
    assert problem(response)["detail"] == (
        "modle: Extra inputs are not permitted; beside its files a form has the fields model, version and name"
    )


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"{", "the body: Invalid JSON: EOF while parsing an object at line 1 column 1; "),
        (b'{"builtin": "imagenet"}', "builtin: Input should be 'mnist' or 'cifar10'; "),
        (b'{"builtin": "mnist", "limit": 5}', "limit: Input should be greater than or equal to 20; "),
    ],
)
def test_json_that_names_no_data_set_is_refused(client: TestClient, content: bytes, detail: str) -> None:
    found = problem(client.post("/datasets", content=content, headers={"Content-Type": "application/json"}))
    assert (found["code"], found["detail"].startswith(detail)) == ("malformed_body", True)


def test_more_json_than_it_takes_to_name_a_data_set_is_refused(client: TestClient) -> None:
    response = client.post("/datasets", content=b" " * 70_000, headers={"Content-Type": "application/json"})
    assert response.headers["connection"] == "close"
    assert problem(response) == {
        "title": "The request body is too large",
        "status": 413,
        "detail": "the JSON has more than 65536 bytes; the limit is 65536: it only names a built-in data set",
        "code": "body_too_large",
        "limit": 65_536,
    }


def test_what_is_no_data_set_at_all_is_told_what_is(client: TestClient) -> None:
    response = client.post("/datasets", content=b"x", headers={"Content-Type": "application/x-www-form-urlencoded"})
    assert problem(response) == {
        "title": "The content type isn't read here",
        "status": 415,
        "detail": "content type application/x-www-form-urlencoded isn't read here (with curl --data-binary, add -H "
        "'Content-Type: application/zip'); send a zip or tar as it is (application/zip, application/x-tar, "
        "application/octet-stream), multipart/form-data with a file `dataset` or with pictures named by their class, "
        "or application/json",
        "code": "unsupported_media_type",
    }


@pytest.mark.parametrize("where", ["query", "form"])
def test_an_unknown_model_is_not_found(client: TestClient, where: str) -> None:
    query, fields = ("?model=nope", {}) if where == "query" else ("", {"model": "nope"})
    response = client.post(f"/datasets{query}", files={"dataset": ("a.zip", zipped(PETS))}, data=fields)
    assert problem(response) == {
        "title": "No such model",
        "status": 404,
        "detail": "there is no model 'nope'; there is greys",
        "code": "model_not_found",
    }


def test_a_check_that_takes_too_long_is_a_504(settings: Settings) -> None:
    with application(settings, dataset_seconds=0.1) as client:
        assert problem(client.post("/datasets", content=zipped(PETS), headers=ZIP)) == {
            "title": "Not answered in time",
            "status": 504,
            "detail": "checking the data set takes more than 0.1 s (SAFELIGHT_DATASET_SECONDS); send fewer or smaller "
            "pictures",
            "code": "deadline_exceeded",
            "stage": "check",
        }


def test_a_check_that_would_take_the_machine_s_memory_is_refused(settings: Settings) -> None:
    """A bitmap of 49 megapixels and a check that may have 256 MiB; packed it is small."""
    header = struct.pack("<2sLHHL", b"BM", 0, 0, 0, 54) + struct.pack(
        "<LLLHHLLLLLL", 40, 7000, 7000, 1, 24, 0, 0, 0, 0, 0, 0
    )
    picture = header + os.urandom(7000) * 3 * 7000
    with application(settings, dataset_memory_bytes=2**28) as client:
        response = client.post("/datasets", content=zipped(PETS | {"cat/big.bmp": picture}), headers=ZIP)
    found = problem(response)
    assert (found["code"], found["reason"]) == ("dataset_refused", "out_of_memory")
