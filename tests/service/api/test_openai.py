"""OpenAI's routes, asked by the unmodified `openai` SDK, in this process; what a run does is in `tests/e2e`."""

import io
import json
import re
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastapi.testclient import TestClient
from openai import OpenAI
from PIL import Image

from service.api import openai_objects
from service.jobs.history import parse
from service.jobs.job import FOLLOWING, Job
from service.jobs.store import JobStore, open_store
from service.settings import Settings
from tests.service.jobs.conftest import order
from tests.tiny import encode


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"concurrent_jobs": 0, "queued_jobs": 5})


@pytest.fixture
def jobs(settings: Settings) -> Iterator[JobStore]:
    """The service's own jobs, to bring them into states."""
    store = open_store(settings.state)
    yield store
    store.close()


@pytest.fixture
def sdk(client: TestClient) -> OpenAI:
    return OpenAI(base_url="http://testserver/v1", api_key="none is needed", http_client=client, max_retries=0)


def queued(jobs: JobStore, **changes: object) -> Job:
    return jobs.create(order(dataset="ds-0123456789abcdef", **changes), queue_size=100)


def theirs(job: Job) -> str:
    return f"ft{job.id}"


# --- files ---


def archive(path: Path, classes: str = "ant bee", each: int = 10) -> Path:
    """A zip of class folders: the first class is dark, the next lighter, and no picture is like another."""
    with zipfile.ZipFile(path, "w") as file:
        for shade, name in enumerate(classes.split()):
            for index in range(each):
                pixels = np.random.default_rng(100 * shade + index).integers(0, 60, (8, 8), dtype=np.uint8) + 80 * shade
                file.writestr(f"{name}/{index}.png", encode(Image.fromarray(pixels.astype(np.uint8))))
    return path


def test_an_archive_is_uploaded_listed_read_and_deleted(sdk: OpenAI, tmp_path: Path) -> None:
    path = archive(tmp_path / "pets.zip")
    before = int(time.time())
    file = sdk.files.create(file=path, purpose="fine-tune")
    assert file.model_dump(exclude_unset=True) == {
        "object": "file",
        "id": file.id,
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": "pets.zip",
        "purpose": "fine-tune",
        "status": "processed",
    }
    assert re.fullmatch(r"file-[0-9a-f]{16}", file.id)
    assert before <= file.created_at <= time.time()
    with zipfile.ZipFile(io.BytesIO(sdk.files.content(file.id).read())) as back:
        assert (len(back.namelist()), sum(info.file_size for info in back.infolist())) == (20, file.bytes)
    assert sdk.files.create(file=path, purpose="fine-tune") == sdk.files.retrieve(file.id) == file
    other = sdk.files.create(file=archive(tmp_path / "more.zip", "cat dog"), purpose="fine-tune")
    assert {found.id for found in sdk.files.list(limit=1)} == {file.id, other.id}
    assert len(sdk.files.list(limit=1).data) == 1
    assert list(sdk.files.list(purpose="batch")) == []
    assert sdk.files.delete(file.id).model_dump() == {"id": file.id, "deleted": True, "object": "file"}
    assert [found.id for found in sdk.files.list()] == [other.id]


def test_an_archive_that_can_not_be_trained_on_is_refused_with_the_reason(sdk: OpenAI, tmp_path: Path) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="class") as refused:
        sdk.files.create(file=archive(tmp_path / "one.zip", "ant", each=30), purpose="fine-tune")
    assert refused.value.code == "dataset_refused"
    assert list(sdk.files.list()) == []


@pytest.mark.parametrize(
    ("files", "data", "message", "param"),
    [
        ({"file": b"PK"}, {"purpose": "batch"}, "body.purpose: Input should be 'fine-tune'", "purpose"),
        ({"file": b"PK"}, {}, "body.purpose: Field required", "purpose"),
        ({"file": (None, "PK")}, {"purpose": "fine-tune"}, "body.file: a file is required", "file"),
        (
            {"file": b"PK"},
            {"purpose": "fine-tune", "expires_after[seconds]": "9"},
            "body.expires_after[seconds]: Extra inputs are not permitted",
            "expires_after[seconds]",
        ),
    ],
)
def test_a_form_that_makes_no_sense(
    client: TestClient, files: dict[str, Any], data: dict[str, str], message: str, param: str
) -> None:
    reply = client.post("/v1/files", files=files, data=data)
    assert (reply.status_code, reply.json()) == (422, error(message, "invalid_parameter", param))


def test_a_file_of_another_name_is_refused(client: TestClient) -> None:
    reply = client.post("/v1/files", files={"picture": b"PK"}, data={"purpose": "fine-tune"})
    message = "the multipart body can't be read: its only file may be the archive, as a part named `file`"
    assert (reply.status_code, reply.json()) == (400, error(message, "malformed_body"))


@pytest.mark.parametrize("headers", [{}, {"Content-Type": "application/json"}])
def test_what_is_no_form_is_refused(client: TestClient, headers: dict[str, str]) -> None:
    reply = client.post("/v1/files", content=b"PK", headers=headers)
    message = "the multipart body can't be read: its content type names no boundary"
    assert (reply.status_code, reply.json()) == (400, error(message, "malformed_body"))


# --- starting a job ---


def test_a_job_is_started_with_what_was_asked(sdk: OpenAI, jobs: JobStore, tmp_path: Path) -> None:
    file = sdk.files.create(file=archive(tmp_path / "pets.zip"), purpose="fine-tune")
    chosen: Any = {"n_epochs": 3, "batch_size": "auto", "learning_rate_multiplier": 0.5}
    job = sdk.fine_tuning.jobs.create(
        model="greys@1",
        training_file=file.id,
        suffix="pets",
        seed=7,
        metadata={"for": "a test"},
        method={"type": "supervised", "supervised": {"hyperparameters": chosen}},
        extra_body={"promote": "never", "recipe": {"depth": "head"}},
    )
    assert (job.status, job.model, job.training_file, job.seed) == ("queued", "greys", file.id, 7)
    (made,), _ = jobs.page(limit=1)
    assert (made.name, made.version, made.promote, made.metadata) == ("pets", "1", "never", {"for": "a test"})
    assert made.recipe == {"depth": "head", "epochs": 3, "learning_rate": 0.5}
    with pytest.raises(openai.ConflictError, match=f"{file.id} is used by a job"):
        sdk.files.delete(file.id)


def test_a_job_is_started_with_what_must_be_said(sdk: OpenAI, jobs: JobStore, tmp_path: Path) -> None:
    file = sdk.files.create(file=archive(tmp_path / "pets.zip"), purpose="fine-tune")
    for hyperparameters in ({}, {"n_epochs": "auto"}):
        sdk.fine_tuning.jobs.create(model="greys", training_file=file.id, hyperparameters=hyperparameters)
    made, _ = jobs.page(limit=9)
    assert {(job.name, job.version, job.seed, job.promote) for job in made} == {("greys-ft", "1", 0, "if_better")}
    assert [job.recipe for job in made] == [{}, {}]


def test_the_same_request_with_the_same_key_starts_one_job(sdk: OpenAI, tmp_path: Path) -> None:
    file = sdk.files.create(file=archive(tmp_path / "pets.zip"), purpose="fine-tune")
    headers = {"Idempotency-Key": "k"}
    first, second = (
        sdk.fine_tuning.jobs.create(model="greys", training_file=file.id, extra_headers=headers) for _ in range(2)
    )
    assert first == second
    with pytest.raises(openai.UnprocessableEntityError, match="another request before"):
        sdk.fine_tuning.jobs.create(model="greys", training_file=file.id, seed=1, extra_headers=headers)


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "none"}, 404, "model_not_found", None),
        ({"model": "greys@9"}, 404, "version_not_found", None),
        ({"training_file": "file-0"}, 404, "dataset_not_found", "training_file"),
        ({"training_file": "ds-0123456789abcdef"}, 404, "dataset_not_found", "training_file"),
        ({"suffix": "No Name"}, 422, "invalid_name", None),
        ({"hyperparameters": {"n_epochs": -1}}, 422, "recipe_invalid", "epochs"),
        ({"hyperparameters": {"n_epochs": "some"}}, 422, "invalid_parameter", "hyperparameters.n_epochs"),
        ({"method": {"type": "dpo"}}, 422, "invalid_parameter", "method.type"),
        ({"validation_file": "file-0"}, 422, "invalid_parameter", "validation_file"),
        ({"integrations": [{"type": "wandb"}]}, 422, "invalid_parameter", "integrations"),
        ({"metadata": {"key": "x" * 513}}, 422, "invalid_parameter", "metadata.key"),
        ({"temperature": 1}, 422, "invalid_parameter", "temperature"),
    ],
)
def test_a_job_that_can_not_be(
    client: TestClient, sdk: OpenAI, tmp_path: Path, change: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    asked = {"model": "greys", "training_file": "file-0123456789abcdef"}
    if param != "training_file":
        asked["training_file"] = sdk.files.create(file=archive(tmp_path / "pets.zip"), purpose="fine-tune").id
    reply = client.post("/v1/fine_tuning/jobs", json=asked | change)
    found = reply.json()["error"]
    assert (reply.status_code, found["code"], found["param"]) == (status, code, param)
    assert found["type"] == "invalid_request_error"
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


# --- jobs ---


def test_a_job_in_openais_words(sdk: OpenAI, jobs: JobStore) -> None:
    job = queued(jobs, recipe={"epochs": 3, "flip": True}, seed=7, metadata={"for": "Ä"})
    hyperparameters = {"n_epochs": 3.0, "batch_size": "auto", "learning_rate_multiplier": "auto"}
    assert sdk.fine_tuning.jobs.retrieve(theirs(job)).model_dump(exclude_unset=True) == {
        "object": "fine_tuning.job",
        "id": theirs(job),
        "model": "greys",
        "created_at": int(job.created_at.timestamp()),
        "finished_at": None,
        "estimated_finish": None,
        "fine_tuned_model": None,
        "status": "queued",
        "error": None,
        "training_file": "file-0123456789abcdef",
        "validation_file": None,
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "seed": 7,
        "metadata": {"for": "Ä"},
        "organization_id": "safelight",
        "result_files": [],
        "trained_tokens": None,
        "integrations": [],
        "version": "1",
        "result": None,
    }


def test_every_state_has_a_name_that_openai_knows_or_shows(jobs: JobStore) -> None:
    job = queued(jobs)
    names = {
        status: openai_objects.FineTuningJob.of(job.model_copy(update={"status": status})).status
        for status in FOLLOWING
    }
    assert names == {
        "queued": "queued",
        "validating": "validating_files",
        "running": "running",
        "paused": "paused",
        "succeeded": "succeeded",
        "failed": "failed",
        "cancelled": "cancelled",
    }


@pytest.mark.parametrize(("promoted", "model"), [(True, "shades"), (False, None)])
def test_a_job_that_succeeded_names_its_model_where_that_answers(
    sdk: OpenAI, jobs: JobStore, promoted: bool, model: str | None
) -> None:
    running = jobs.move(jobs.move(queued(jobs), "validating"), "running")
    result = {"model": "shades", "version": "1", "promoted": promoted, "summary": "fixed 5 of 50, broke 0"}
    over = jobs.move(running, "succeeded", result=result)
    job = sdk.fine_tuning.jobs.retrieve(theirs(over))
    assert over.finished_at is not None
    assert (job.status, job.fine_tuned_model, job.finished_at) == (
        "succeeded",
        model,
        int(over.finished_at.timestamp()),
    )
    assert job.model_extra == {"version": "1", "result": result}


def test_a_job_that_failed_says_why(sdk: OpenAI, jobs: JobStore) -> None:
    error = {"code": "diverged", "message": "the loss rose; try a smaller learning_rate"}
    job = jobs.move(jobs.move(queued(jobs), "validating"), "failed", error=error)
    found = sdk.fine_tuning.jobs.retrieve(theirs(job))
    assert found.error is not None
    assert (found.status, found.error.model_dump()) == ("failed", error | {"param": None})


def test_a_job_that_runs_says_when_it_will_be_done(sdk: OpenAI, jobs: JobStore) -> None:
    running = jobs.move(jobs.move(queued(jobs), "validating"), "running")
    jobs.note(running, progress={"phase": "training", "step": 1, "steps": 9, "seconds_left": 1000.0})
    found = sdk.fine_tuning.jobs.retrieve(theirs(running))
    assert found.estimated_finish is not None
    assert 990 <= found.estimated_finish - found.created_at <= 1100


def test_jobs_come_newest_first_page_by_page(sdk: OpenAI, jobs: JobStore) -> None:
    made = [theirs(queued(jobs)) for _ in range(5)]
    page = sdk.fine_tuning.jobs.list(limit=2)
    assert ([job.id for job in page.data], page.has_more) == (made[:-3:-1], True)
    assert [job.id for job in sdk.fine_tuning.jobs.list(limit=2)] == made[::-1]  # the SDK turns the pages


def test_jobs_are_found_by_their_metadata(sdk: OpenAI, jobs: JobStore) -> None:
    made = [theirs(queued(jobs, metadata={"n": str(index % 2), "all": "yes"})) for index in range(5)]
    assert [job.id for job in sdk.fine_tuning.jobs.list(limit=2, metadata={"n": "1"})] == [made[3], made[1]]
    assert len(list(sdk.fine_tuning.jobs.list(limit=2, metadata={"all": "yes"}))) == 5
    assert list(sdk.fine_tuning.jobs.list(metadata={"n": "1", "all": "no"})) == []


def test_a_job_is_paused_resumed_and_cancelled(sdk: OpenAI, jobs: JobStore) -> None:
    job = theirs(queued(jobs))
    assert sdk.fine_tuning.jobs.pause(job).status == "paused"
    assert sdk.fine_tuning.jobs.resume(job).status == "queued"
    assert sdk.fine_tuning.jobs.cancel(job).status == "cancelled"


# --- what a run has told ---

AT = {"at": "2026-01-01T00:00:07Z"}
STARTED = {"recipe": "r", "dataset": "d", "seed": 0, "device": "cpu", "precision": "float32", "steps": 9, "step": 0}
LINES = [
    AT | {"event": "validated", "report": {}},
    AT | {"event": "phase", "phase": "heads", "step": 3, "steps": 21},
    AT | {"event": "started"} | STARTED,
    AT
    | {"event": "progress", "step": 3, "steps": 9, "epoch": 0.5, "loss": 0.123, "accuracy": 0.9}
    | {"images_per_second": 9.0, "seconds_left": 1.0},
    AT | {"event": "of a newer version"},
    AT
    | {"event": "epoch", "epoch": 1, "step": 6, "train_loss": 0.1, "train_accuracy": 0.95}
    | {"holdout_loss": 0.2, "holdout_accuracy": 0.9, "seconds": 3.0},
    AT | {"event": "notice", "message": "one picture was left out"},
    AT | {"event": "checkpointed", "step": 6, "path": "/somewhere"},
    AT | {"event": "interrupted", "step": 6},
    AT | {"event": "held"},
    AT | {"event": "released"},
    AT | {"event": "phase", "phase": "judging", "step": 1, "steps": 2},
    AT | {"event": "published", "model": "shades", "version": "3", "accuracy": 0.9},
    AT | {"event": "decided", "result": {"summary": "fixed 9 of 50, broke 1; p = 0.011; promoted"}},
]


@pytest.fixture
def told(settings: Settings, jobs: JobStore) -> Job:
    """A job of which much was told, and half a line more."""
    job = queued(jobs)
    folder = settings.state / "jobs" / job.id
    folder.mkdir(parents=True)
    (folder / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"event": "fai')
    return job


def test_events_are_sentences_and_figures_newest_first(sdk: OpenAI, told: Job) -> None:
    found = [event.model_dump() for event in sdk.fine_tuning.jobs.list_events(theirs(told), limit=3)]

    def event(line: int, message: str, level: str = "info", **data: float) -> dict[str, Any]:
        kind = {"level": level, "type": "metrics" if data else "message", "data": data}
        name = f"ftevent-{told.id.removeprefix('job-')}-{line}"
        return {"id": name, "created_at": 1767225607, "message": message, "object": "fine_tuning.job.event"} | kind

    figures = {"step": 6, "train_loss": 0.1, "train_accuracy": 0.95, "valid_loss": 0.2, "valid_accuracy": 0.9}
    assert found == [
        event(14, "fixed 9 of 50, broke 1; p = 0.011; promoted"),
        event(13, "Version 3 of shades is there"),
        event(12, "Judging: 1/2"),
        event(11, "Going on"),
        event(10, "Paused"),
        event(9, "Stopped at step 6", "warn"),
        event(8, "Checkpoint at step 6"),
        event(7, "one picture was left out", "warn"),
        event(6, "Epoch 1: hold-out loss=0.20, accuracy=0.900", **figures),
        event(4, "Step 3/9: training loss=0.12", step=3, total_steps=9, train_loss=0.123, train_accuracy=0.9),
        event(3, "Training on cpu: 9 steps, from step 0"),
        event(2, "Fitting heads: 3/21"),
        event(1, "The pictures are checked"),
    ]


def test_events_come_page_by_page_and_what_is_not_understood_is_on_none(client: TestClient, told: Job) -> None:
    path, lines = f"/v1/fine_tuning/jobs/{theirs(told)}/events", []
    page = client.get(f"{path}?limit=4").json()
    while page["data"]:
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        lines.append([int(event["id"].rpartition("-")[2]) for event in page["data"]])
        assert page["has_more"] == (lines[-1][-1] > 1)
        page = client.get(f"{path}?limit=4&after={page['last_id']}").json()
    assert lines == [[14, 13, 12, 11], [10, 9, 8, 7], [6, 4, 3, 2], [1]]
    assert page == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize("line", ["0", "5", "15", "99999999999999999999", "x"])
def test_a_page_behind_no_event_of_the_list(client: TestClient, told: Job, line: str) -> None:
    after = f"ftevent-{told.id.removeprefix('job-')}-{line}"
    for wrong in (after, f"ftevent-{24 * '0'}-3"):
        reply = client.get(f"/v1/fine_tuning/jobs/{theirs(told)}/events?after={wrong}")
        message = "body.after: nothing in the list has this id"
        assert (reply.status_code, reply.json()) == (422, error(message, "invalid_parameter", "after"))


@pytest.mark.parametrize("what", ["events", "checkpoints"])
def test_a_long_history_keeps_no_other_request_waiting(
    client: TestClient, settings: Settings, told: Job, what: str
) -> None:
    """The event loop's thread does hardly any of the work, however fast or busy the machine is."""
    path = settings.state / "jobs" / told.id / "events.jsonl"
    content = "".join(json.dumps(LINES[3]) + "\n" for _ in range(40_000))
    path.write_text(content)
    begun = time.thread_time()
    parse(content.encode().splitlines())
    all_of_it = time.thread_time() - begun
    assert client.portal is not None
    begun = client.portal.call(time.thread_time)
    assert client.get(f"/v1/fine_tuning/jobs/{theirs(told)}/{what}").status_code == 200
    assert client.portal.call(time.thread_time) - begun < all_of_it / 4


def test_checkpoints_are_the_versions_that_can_be_asked(sdk: OpenAI, told: Job) -> None:
    (found,) = sdk.fine_tuning.jobs.checkpoints.list(theirs(told))
    assert found.model_dump(exclude_unset=True) == {
        "object": "fine_tuning.job.checkpoint",
        "id": f"ftckpt_{told.id.removeprefix('job-')}-3",
        "created_at": 1767225607,
        "fine_tuned_model_checkpoint": "shades@3",
        "fine_tuning_job_id": theirs(told),
        "metrics": {"step": 6, "train_loss": 0.1, "valid_loss": 0.2, "valid_accuracy": 0.9},
        "step_number": 6,
    }


def test_nothing_was_told_yet(sdk: OpenAI, jobs: JobStore) -> None:
    job = theirs(queued(jobs))
    assert list(sdk.fine_tuning.jobs.list_events(job)) == []
    page = sdk.fine_tuning.jobs.checkpoints.list(job)
    assert page.model_dump() == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


# --- errors ---


def error(message: str, code: str, param: str | None = None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def test_what_is_over_can_not_be_cancelled_and_no_client_should_try_again(client: TestClient, jobs: JobStore) -> None:
    job = theirs(queued(jobs))
    client.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    reply = client.post(f"/v1/fine_tuning/jobs/{job}/cancel", headers={"Content-Type": "application/json"})
    assert (reply.status_code, reply.headers["x-should-retry"]) == (409, "false")
    message = f"{job} is cancelled; only a job that isn't over can be cancelled"
    assert reply.json() == error(message, "job_state_conflict")


def test_the_sdk_raises_what_it_raises_for_openai(sdk: OpenAI, jobs: JobStore) -> None:
    patient = sdk.with_options(max_retries=5)
    with pytest.raises(openai.ConflictError, match="only a paused job can be resumed"):
        patient.fine_tuning.jobs.resume(theirs(queued(jobs)))
    with pytest.raises(openai.NotFoundError) as missing:
        patient.fine_tuning.jobs.retrieve("ftjob-0")
    assert (missing.value.code, missing.value.type) == ("job_not_found", "invalid_request_error")
    assert missing.value.request_id


@pytest.mark.parametrize(
    ("method", "path", "status", "body"),
    [
        ("GET", "/v1/nothing", 404, error("GET /v1/nothing: Not Found", "not_found")),
        (
            "PUT",
            "/v1/fine_tuning/jobs",
            405,
            error("PUT /v1/fine_tuning/jobs: Method Not Allowed", "method_not_allowed"),
        ),
        (
            "GET",
            "/v1/fine_tuning/jobs?limit=0",
            422,
            error("query.limit: Input should be greater than or equal to 1", "invalid_parameter", "limit"),
        ),
        (
            "POST",
            "/v1/fine_tuning/jobs",
            422,
            error("body: Field required", "invalid_parameter"),
        ),
        (
            "GET",
            "/v1/files/file-0",
            404,
            error(
                "there is no file 'file-0'; GET /v1/files lists those that there are", "dataset_not_found", "file_id"
            ),
        ),
    ],
)
def test_errors_have_openais_shape_everywhere(
    client: TestClient, method: str, path: str, status: int, body: dict[str, Any]
) -> None:
    reply = client.request(method, path)
    assert (reply.status_code, reply.json()) == (status, body)
    assert reply.headers["content-type"] == "application/json"


@pytest.mark.parametrize("job", ["job-0", f"ftjob-{24 * '0'}"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/{}"),
        ("GET", "/{}/events"),
        ("GET", "/{}/checkpoints"),
        ("POST", "/{}/cancel"),
        ("POST", "/{}/pause"),
        ("POST", "/{}/resume"),
    ],
)
def test_a_job_that_does_not_exist(client: TestClient, method: str, path: str, job: str) -> None:
    reply = client.request(method, "/v1/fine_tuning/jobs" + path.format(job))
    message = f"there is no job '{job}'; GET /v1/fine_tuning/jobs lists those that there are"
    assert (reply.status_code, reply.json()) == (404, error(message, "job_not_found"))


def test_jobs_behind_one_that_can_not_be(client: TestClient) -> None:
    reply = client.get("/v1/fine_tuning/jobs?after=job-0")
    message = "there is no job 'job-0'; GET /v1/fine_tuning/jobs lists those that there are"
    assert (reply.status_code, reply.json()) == (404, error(message, "job_not_found"))
