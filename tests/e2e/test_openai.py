"""The unmodified `openai` SDK against the real server: the program of docs/openai.md, from an archive to an answer."""

import io
import re
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from openai import OpenAI
from PIL import Image, ImageDraw

from tests.tiny import Server, serving
from training.bundle import store

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # a job has the lowest priority, and others may be busy


def shape(kind: str, random: np.random.Generator) -> bytes:
    """A disc or a cross, somewhere, in some colour on grey."""
    image = Image.fromarray(random.integers(90, 120, (32, 32, 3), dtype=np.uint8))
    draw, (x, y) = ImageDraw.Draw(image), random.integers(3, 14, 2).tolist()
    colour = tuple(random.integers(150, 255, 3).tolist())
    if kind == "disc":
        draw.ellipse((x, y, x + 14, y + 14), fill=colour)
    else:
        draw.line((x, y, x + 14, y + 14), fill=colour, width=3)
        draw.line((x, y + 14, x + 14, y), fill=colour, width=3)
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive with 40 pictures of each of two new classes."""
    random = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("archive") / "pets.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for kind in ("cross", "disc"):
            for index in range(40):
                archive.writestr(f"{kind}/{index}.png", shape(kind, random))
    return path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(ROOT / "artifacts", folder / "artifacts")
    with serving(folder / "artifacts", folder, state=str(folder / "state")) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none is needed") as client:
        yield client


@pytest.fixture(scope="module")
def printed(server: Server, pets: Path) -> list[str]:
    """What the program of the page prints."""
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "openai.md").read_text(), re.S)
    program = program.replace("http://127.0.0.1:8000", server.url)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=pets.parent, capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr + server.log.read_text()
    return done.stdout.splitlines()


def test_the_program_of_the_page_makes_a_model(printed: list[str]) -> None:
    summary, *_, last = printed
    assert re.fullmatch(r"\d+ of \d+ right, .*; promoted", summary)
    assert last == "succeeded pets"


@pytest.mark.usefixtures("printed")
def test_the_new_model_answers_by_its_name(server: Server) -> None:
    picture = shape("disc", np.random.default_rng(9))
    reply = httpx.post(f"{server.url}/predict?model=pets", content=picture, headers={"Content-Type": "image/png"})
    assert (reply.status_code, reply.json()["predictions"][0]["label"]) == (200, "disc")


@pytest.mark.usefixtures("printed")
def test_files_jobs_events_and_checkpoints_can_be_read(client: OpenAI) -> None:
    (job,) = client.fine_tuning.jobs.list()
    (file,) = client.files.list()
    assert (job.training_file, job.model, job.status, job.fine_tuned_model) == (file.id, "cifar10", "succeeded", "pets")
    assert job.model_extra is not None
    assert job.model_extra["result"]["promoted"] is True
    told = list(client.fine_tuning.jobs.list_events(job.id, limit=2))
    assert told[0].message == job.model_extra["result"]["summary"]
    assert told[-1].message == "The pictures are checked"
    (checkpoint,) = client.fine_tuning.jobs.checkpoints.list(job.id)
    assert checkpoint.fine_tuned_model_checkpoint == "pets@1"


def test_the_same_archive_is_the_same_file_and_can_be_read_back(client: OpenAI, pets: Path) -> None:
    first, second = (client.files.create(file=pets, purpose="fine-tune") for _ in range(2))
    assert first == second == client.files.retrieve(first.id)
    with zipfile.ZipFile(io.BytesIO(client.files.content(first.id).read())) as archive:
        names = archive.namelist()
    assert (len(names), {name.split("/")[0] for name in names}) == (80, {"cross", "disc"})


def test_a_job_is_paused_resumed_and_cancelled_and_its_file_deleted(client: OpenAI, pets: Path) -> None:
    file = client.files.create(file=pets, purpose="fine-tune")
    job = client.fine_tuning.jobs.create(
        model=f"cifar10@{store.active(ROOT / 'artifacts', 'cifar10')}",
        training_file=file.id,
        suffix="shapes",
        seed=3,
        metadata={"for": "a test"},
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1000, "batch_size": "auto"}}},
        extra_body={"recipe": {"depth": "full"}, "promote": "never"},
    )
    assert (job.model, job.seed, job.metadata, job.hyperparameters.n_epochs) == ("cifar10", 3, {"for": "a test"}, 1000)
    with pytest.raises(openai.ConflictError):
        client.files.delete(file.id)
    client.fine_tuning.jobs.pause(job.id)
    assert until(client, job.id, "paused") == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status == "queued"
    client.fine_tuning.jobs.cancel(job.id)
    assert until(client, job.id, "cancelled") == "cancelled"


def until(client: OpenAI, job: str, status: str, seconds: float = 30) -> str:
    """The job's state once it is this, or when the time is over."""
    end = time.monotonic() + seconds
    while (found := client.fine_tuning.jobs.retrieve(job).status) != status and time.monotonic() < end:
        time.sleep(0.1)
    return found
