"""Fine-tuning by the real service in real processes, from the request to the answer, whatever comes between."""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from subprocess import Popen
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from service.client import Client
from service.jobs.job import TERMINAL, Job
from service.jobs.store import open_store
from tests.databases import new_schema
from tests.tiny import Server, encode, launch, serving
from training.bundle import store

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ROWS = {"builtin": "mnist", "limit": 400}  # what `data` puts in the place of MNIST
QUICK = {"depth": "head"}  # only starting the process takes long
LONG = {"depth": "full", "epochs": 1000}

EFFECT_SECONDS = 2.0  # from the end of a step to the effect of what was asked in it


def row(digit: int, generator: np.random.Generator) -> np.ndarray:
    pixels = generator.integers(0, 90, (28, 28), dtype=np.uint8)
    pixels[3 + 2 * digit : 5 + 2 * digit] = 220
    return pixels


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """In the place of MNIST: a bright row each, whose height is the digit."""
    generator = np.random.default_rng(0)
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 600), ("t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = np.stack([row(digit, generator) for digit in labels])
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, *images.shape) + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return tmp_path / "data"


@pytest.fixture
def settings(data: Path) -> dict[str, str]:
    return {"data": str(data), "default_model": "tiny", "device": "cpu", "rescan_seconds": "0.2"}


def until(seen: Callable[[], Any], seconds: float = 60, pause: float = 0.02) -> Any:
    end = time.monotonic() + seconds
    while not (found := seen()):
        assert time.monotonic() < end
        time.sleep(pause)
    return found


def all_told(state: Path, job: str) -> list[dict[str, Any]]:
    """Events, as far as they have come."""
    path = state / "jobs" / job / "events.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def told(state: Path, job: str, event: str) -> list[dict[str, Any]]:
    """Those of one kind."""
    return [found for found in all_told(state, job) if found["event"] == event]


def at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()


def since_the_step(state: Path, job: str, asked: float) -> float:
    """Seconds by now since the end of the step in which something was asked; since then where there was no step."""
    ends = [end for end in map(at, told(state, job, "progress")) if end >= asked]
    return time.time() - min(ends, default=asked)


def child_of(state: Path, job: str) -> int | None:
    """The process that works at a job."""
    with suppress(OSError, ValueError):
        pid = json.loads((state / "jobs" / job / "child.json").read_bytes())["pid"]
        command = Path(f"/proc/{pid}/cmdline").read_text()
        return pid if str(state) in command else None
    return None


def processes(folder: Path) -> list[str]:
    """The commands of all processes that have to do with a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_text().replace("\0", " "))
    return [command for command in found if str(folder) in command]


def test_one_request_makes_a_version_that_answers_once_its_job_has_succeeded(
    tiny: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    with serving(tiny, tmp_path, **settings) as server:
        asked = {"model": "tiny", "dataset": ROWS, "name": "rows", "recipe": QUICK, "promote": "always"}
        job = httpx.post(f"{server.url}/train", json=asked).json()["id"]
        told_last = events(server, job)[-1]
        assert told_last.startswith("event: end\n")
        done = Job.model_validate_json(told_last.split("data: ")[1])
        picture = encode(Image.fromarray(row(7, np.random.default_rng(1))))
        answer = httpx.post(f"{server.url}/predict?model=rows", files={"file": picture}).json()
        assert done.status == "succeeded", (done, server.log.read_text())
        assert done.result is not None
        assert {name: done.result[name] for name in ("model", "version", "promoted")} == {
            "model": "rows",
            "version": "1",
            "promoted": True,
        }
        assert (answer["model"], answer["version"], answer["predictions"][0]["label"]) == ("rows", "1", "7")
        assert httpx.get(f"{server.url}/train/{job}").json() == done.model_dump(mode="json")
        assert "rows@1" in httpx.get(f"{server.url}/train/{job}/log").text
        assert 'safelight_job_seconds_count{status="succeeded"} 1.0' in httpx.get(f"{server.url}/metrics").text
    assert processes(tmp_path) == []


def events(server: Server, job: str) -> list[str]:
    return httpx.get(f"{server.url}/train/{job}/events", headers=STREAM, timeout=120).text.strip().split("\n\n")


STREAM = {"Accept": "text/event-stream"}


def test_a_job_is_paused_resumed_and_cancelled_while_it_trains(
    tiny: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with serving(tiny, tmp_path, **settings) as server, Client(server.url) as safelight:
        job = safelight.train(ROWS, model="tiny", name="rows", recipe=LONG).id
        until(lambda: told(state, job, "progress"))
        assert safelight.job(job).status == "running"
        curve = httpx.get(f"{server.url}/train/{job}/curve.png")
        assert (curve.headers["content-type"], curve.content[:4]) == ("image/png", b"\x89PNG")

        asked = time.time()
        assert safelight.pause(job).wanted == "pause"
        until(lambda: safelight.job(job).status == "paused")
        assert since_the_step(state, job, asked) < EFFECT_SECONDS
        step = told(state, job, "progress")[-1]["step"]
        assert len(told(state, job, "held")) == 1

        asked = time.time()
        assert safelight.resume(job).status == "queued"
        until(lambda: safelight.job(job).status in ("validating", "running"))
        (released,) = until(lambda: told(state, job, "released"))
        assert at(released) - asked < EFFECT_SECONDS
        until(lambda: told(state, job, "progress")[-1]["step"] > step)
        assert step + 1 in [event["step"] for event in told(state, job, "progress")]

        asked = time.time()
        assert safelight.cancel(job).wanted == "cancel"
        until(lambda: safelight.job(job).status == "cancelled")
        assert since_the_step(state, job, asked) < EFFECT_SECONDS
        until(lambda: not (state / "jobs" / job / "checkpoint.pt").exists())
    assert processes(tmp_path) == []
    assert not (tiny / "rows").exists()


def test_when_the_service_is_stopped_its_jobs_wait_and_go_on_with_the_next_one(
    tiny: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with serving(tiny, tmp_path, **settings) as server, Client(server.url) as safelight:
        job = safelight.train(ROWS, model="tiny", name="rows", recipe=LONG).id
        until(lambda: told(state, job, "progress"))
        with httpx.stream("GET", f"{server.url}/train/{job}/events", headers=STREAM, timeout=60) as watching:
            lines = watching.iter_lines()
            assert next(lines) == "event: validated"
            assert server.stop() == 0
            assert "event: end" not in list(lines)
        assert processes(tmp_path) == []
        assert "Traceback" not in server.log.read_text()
    with closing(open_store(state)) as jobs:
        assert jobs.get(job).status == "queued"
    (interrupted,) = told(state, job, "interrupted")
    with serving(tiny, tmp_path, **settings) as server, Client(server.url) as safelight:
        until(lambda: told(state, job, "progress")[-1]["step"] > interrupted["step"])
        assert safelight.cancel(job).status == "running"
        assert safelight.wait(job, timeout=60).status == "cancelled"


def test_of_several_workers_one_does_the_jobs_and_another_takes_over_when_it_dies(
    tiny: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    state = tmp_path / "state"
    with serving(tiny, tmp_path, "--workers", "2", **settings) as server, Client(server.url) as safelight:
        job = safelight.train(ROWS, model="tiny", name="rows", recipe=LONG).id
        until(lambda: told(state, job, "progress"))
        first = child_of(state, job)
        assert first is not None
        runner = int(Path(f"/proc/{first}/stat").read_text().rpartition(")")[2].split()[1])
        assert runner != server.process.pid
        os.kill(runner, signal.SIGKILL)
        until(lambda: child_of(state, job) not in (None, first))
        until(lambda: safelight.job(job).status == "running")
        for _ in range(4):  # whichever worker is asked
            with Client(server.url) as another:
                assert another.job(job).id == job
        safelight.cancel(job)
        assert safelight.wait(job, timeout=60).status == "cancelled"
        assert server.stop() == 0
    assert processes(tmp_path) == []


def test_of_several_workers_each_answers_with_a_new_model_as_soon_as_its_job_has_succeeded(
    tiny: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    seldom = settings | {"rescan_seconds": "1000"}
    picture = encode(Image.fromarray(row(7, np.random.default_rng(1))))
    with serving(tiny, tmp_path, "--workers", "2", **seldom) as server, Client(server.url) as safelight:
        job = safelight.train(ROWS, model="tiny", name="rows", recipe=QUICK, promote="always").id
        assert safelight.wait(job, timeout=120).status == "succeeded"
        for _ in range(16):  # connections, of which either worker gets some
            answer = httpx.post(f"{server.url}/predict?model=rows", files={"file": picture}, timeout=60).json()
            assert (answer["model"], answer["predictions"][0]["label"]) == ("rows", "7")


def test_two_services_on_one_database_do_their_own_jobs_and_know_of_the_others(
    tiny: Path, settings: dict[str, str], tmp_path: Path, postgres: str
) -> None:
    shared = settings | {"database_url": new_schema(postgres)}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    with (
        serving(tiny, tmp_path / "one", **shared) as one,
        serving(tiny, tmp_path / "two", **shared) as two,
        Client(one.url) as first,
        Client(two.url) as second,
    ):
        ours = first.train(ROWS, model="tiny", name="ones", recipe=QUICK).id
        theirs = second.train(ROWS, model="tiny", name="twos", recipe=QUICK).id
        assert second.wait(ours, timeout=60).status == first.wait(theirs, timeout=60).status == "succeeded"
        assert [job.id for job in first.jobs()] == [job.id for job in second.jobs()] == [theirs, ours]
        assert first.events(ours)
        elsewhere = httpx.get(f"{two.url}/train/{ours}/events")
        assert (elsewhere.status_code, elsewhere.json()["code"]) == (404, "job_file_not_found")
    assert os.listdir(tmp_path / "one" / "state" / "jobs") == [ours]
    assert os.listdir(tmp_path / "two" / "state" / "jobs") == [theirs]


@pytest.mark.parametrize("beside_libraries", [None, 2**28 + 2**24], ids=["to begin with", "on the way"])
def test_a_job_that_needs_more_memory_than_it_may_take_fails_and_says_what_to_do(
    settings: dict[str, str], tmp_path: Path, beside_libraries: int | None
) -> None:
    limit = 100_000_000 if beside_libraries is None else allocated_by_libraries() + beside_libraries
    shutil.copytree(ROOT / "artifacts", tmp_path / "artifacts")
    limited = settings | {"default_model": "cifar10", "job_memory_bytes": str(limit)}
    with serving(tmp_path / "artifacts", tmp_path, **limited) as server, Client(server.url) as safelight:
        job = safelight.wait(safelight.train(ROWS, model="cifar10", name="rows", recipe=QUICK).id, timeout=90)
        assert (job.status, job.result) == ("failed", None)
        assert job.error is not None
        assert job.error.model_dump() == {
            "code": "out_of_memory",
            "message": "the job needs more memory than it may take; allow more (SAFELIGHT_JOB_MEMORY_BYTES, or "
            "--memory-bytes), or start it again with a smaller batch_size or fewer pictures",
        }
        assert httpx.get(f"{server.url}/health/ready").status_code == 200
    assert not (tmp_path / "artifacts" / "rows").exists()
    assert processes(tmp_path) == []


def allocated_by_libraries() -> int:
    """By what a job imports, before it does anything."""
    program = "from training import finetune, guest; guest.limit_memory(2**40); print(2**40 - guest.memory_left())"
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


# --- killed at any moment ---


PHASES = ("start", "heads", "training", "judging", "published", "decided")  # of a process, in its order
PHASE_OF = {
    "started": "training",
    "progress": "training",
    "checkpointed": "training",
    "epoch": "training",
    "published": "published",
    "decided": "decided",
}

# So many strikes in each, in this order, for what a run has behind it doesn't come again; and two at its end.
PLAN = [
    *["start", "heads"] * 2,
    *["start", "start", "training"] * 3,
    *["start", "start", "judging"] * 2,
    *["start"] * 3,
]


# Run by Python as it starts: a training process stops itself, as under a debugger, at the place that a file names:
# "published", its version there and not yet active, or "active", and the decision not yet told. Nothing else could hit
# those last milliseconds.
STOPPING = """
import os, signal, sys
from pathlib import Path

active = Path(os.environ["STOPPING_ACTIVE"])
written = False

def hook(event, arguments):
    global written
    writes = event == "os.rename" and Path(os.fsdecode(arguments[1])) == active and any(active.parent.glob("[1-9]*"))
    place = "published" if writes else "active" if written else None
    written = False  # also for what the hook itself does
    if place and Path(os.environ["STOPPING_AT"]).read_text() == place:
        os.kill(os.getpid(), signal.SIGSTOP)
    written = writes

if "finetune" in sys.orig_argv:
    sys.addaudithook(hook)
"""


@dataclass(frozen=True)
class Strike:
    """What was killed, and in which phase of the training process; `start` too where there was none."""

    phase: str
    what: str


class Storm:
    """A service that is killed, or its training process, or both, at a random moment of a phase, and started again."""

    def __init__(self, start: Callable[[], Popen[str]], place: Path, job: Job, seconds: dict[str, float]) -> None:
        self.start = start
        self.state, self.stop_at = place / "state", place / "stop-at"
        self.job = job.id
        self.seconds = seconds  # that each phase takes
        self.service = start()
        self.random = random.Random(7)
        self.strikes: list[Strike] = []
        self.deaths = 0  # of the training process, since it last wrote a checkpoint; at five it is given up
        self.checkpoints = 0

    def __enter__(self) -> "Storm":
        return self

    def __exit__(self, *_: object) -> None:
        self.service.terminate()
        self.service.communicate()

    def strike(self, phase: str) -> None:
        """Kill something at a random moment of a phase, or of a later one where the run has that behind it."""
        if phase == "start":
            time.sleep(self.random.uniform(0, 1.5))
        else:
            until(lambda: PHASES.index(self.phase()) >= PHASES.index(phase), 180, 0.002)
            time.sleep(self.random.uniform(0, self.seconds[phase] / 4))
        self._kill(self.random.choice(["child", "service", "both"]))

    def strike_at(self, place: str, then: str = "") -> None:
        """Kill the process once it has stopped itself at a place of `STOPPING`; the next one stops at another."""
        until(lambda: is_stopped(child_of(self.state, self.job)), 180)
        self.stop_at.write_text(then)
        self._kill(self.random.choice(["child", "both"]))

    def phase(self) -> str:
        """That the present process is in, by what it has told."""
        if child_of(self.state, self.job) is None:
            return "start"
        begun = (self.state / "jobs" / self.job / "child.json").stat().st_mtime
        phases = [phase_of(event) for event in all_told(self.state, self.job) if at(event) > begun]
        return next((phase for phase in reversed(phases) if phase), "start")

    def _kill(self, what: str) -> None:
        child, phase = child_of(self.state, self.job), self.phase()
        if child is None or (what != "service" and phase != "published" and not self._may_die()):
            what = "service"
        if what != "service":
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        if what != "child":
            self.service.kill()
            self.service.communicate()
            self.service = self.start()
        self.strikes.append(Strike(phase, what))

    def _may_die(self) -> bool:
        checkpoints = len(told(self.state, self.job, "checkpointed"))
        self.deaths = 1 if checkpoints > self.checkpoints else self.deaths + 1
        self.checkpoints = checkpoints
        return self.deaths < 3  # two come at the end


def is_stopped(pid: int | None) -> bool:
    with suppress(OSError):  # no such process
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def phase_of(event: dict[str, Any]) -> str | None:
    return event["phase"] if event["event"] == "phase" else PHASE_OF.get(event["event"])


def seconds_of_phases(state: Path, job: str) -> dict[str, float]:
    """How long each took in a run that nothing came between."""
    begun: dict[str, float] = {}
    for event in all_told(state, job):
        if phase := phase_of(event):
            begun.setdefault(phase, at(event))
    return {phase: end - begin for (phase, begin), end in zip(begun.items(), list(begun.values())[1:], strict=False)}


def train_undisturbed(safelight: Client, recipe: dict[str, Any]) -> Job:
    """What others must end with, whatever happens to them."""
    done = safelight.wait(safelight.train(ROWS, model="tiny", name="calm", recipe=recipe).id, timeout=120)
    assert done.status == "succeeded"
    return done


def weights(artifacts: Path, model: str) -> str:
    (ref,) = store.versions(artifacts, model)
    return store.read_manifest(artifacts, ref).weights_sha256


@pytest.mark.timeout(300)
def test_a_job_whose_service_is_killed_while_it_is_held_is_still_paused_and_goes_on(
    tiny: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    state, recipe = tmp_path / "state", {"depth": "full", "epochs": 12}
    with serving(tiny, tmp_path, **settings) as server, Client(server.url) as safelight:
        train_undisturbed(safelight, recipe)
        held = safelight.train(ROWS, model="tiny", name="held", recipe=recipe).id
        until(lambda: told(state, held, "progress"))
        safelight.pause(held)
        until(lambda: safelight.job(held).status == "paused")
        assert child_of(state, held) is not None
        server.process.kill()
        until(lambda: child_of(state, held) is None)
    assert processes(tmp_path) == []
    with serving(tiny, tmp_path, **settings) as server, Client(server.url) as safelight:
        assert safelight.job(held).status == "paused"
        safelight.resume(held)
        assert safelight.wait(held, timeout=120).status == "succeeded"
    assert weights(tiny, "held") == weights(tiny, "calm")
    assert processes(tmp_path) == []


@pytest.mark.timeout(900)  # on a busy machine; on one of its own, about a minute and a half
def test_a_job_that_is_killed_twenty_times_ends_with_the_weights_and_result_of_one_that_never_was(
    tiny: Path, settings: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(STOPPING)
    (tmp_path / "stop-at").write_text("published")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("STOPPING_AT", str(tmp_path / "stop-at"))
    monkeypatch.setenv("STOPPING_ACTIVE", str(tiny / "stormy" / "active"))
    state, recipe = tmp_path / "state", {"depth": "full", "epochs": 10}
    with serving(tiny, tmp_path, **settings) as server, Client(server.url) as safelight:
        calm = train_undisturbed(safelight, recipe)
        stormy = safelight.train(ROWS, model="tiny", name="stormy", recipe=recipe)
    seconds = seconds_of_phases(state, calm.id)
    with (
        Storm(lambda: launch(tiny, tmp_path, **settings), tmp_path, stormy, seconds) as storm,
        closing(open_store(state)) as jobs,
    ):
        for phase in PLAN:
            storm.strike(phase)
        assert store.active(tiny, "stormy") is None
        storm.strike_at("published", then="active")
        storm.strike_at("active")
        assert store.active(tiny, "stormy") is not None
        until(lambda: jobs.get(stormy.id).status in TERMINAL, 300)
        done = jobs.get(stormy.id)
    assert done.status == "succeeded", (done, storm.strikes)
    assert len(storm.strikes) >= 20
    assert {"heads", "training", "judging"} <= {strike.phase for strike in storm.strikes[:-2]}
    assert [strike.phase for strike in storm.strikes[-2:]] == ["published", "published"], storm.strikes
    assert {"child", "service", "both"} == {strike.what for strike in storm.strikes}
    assert weights(tiny, "stormy") == weights(tiny, "calm")
    assert calm.result is not None
    assert done.result is not None
    own = {name: done.result[name] for name in ("model", "version", "seconds")}
    assert done.result == calm.result | own, storm.strikes
    assert processes(tmp_path) == []
    assert not list(tiny.glob("*/.staging-*"))
