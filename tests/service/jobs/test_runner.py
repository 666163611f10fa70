"""The runner with real processes, of a program that keeps to the rules of `safelight finetune` and trains nothing."""

import asyncio
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, closing, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.errors import DatasetNotFound
from service.jobs.history import parse
from service.jobs.job import Error, Job
from service.jobs.runner import Keeping, Machine, Runner
from service.jobs.store import JobStore
from tests.service.jobs.conftest import Hesitant, order
from training.events import OUT_OF_MEMORY

PROGRAM = Path(__file__).parent / "training_program.py"
WEEK_AND_QUARTER = Keeping(checkpoints=7, jobs=90)
SUMMARY = "fixed 9 of 10, broke 1; promoted"


class Workshop:
    """A state folder with its database, and runners to work in it."""

    def __init__(self, root: Path, database: str = "") -> None:
        self.root = root
        self.jobs = JobStore(database or f"sqlite:///{root}/jobs.db", "here")
        self.published: list[tuple[str, str, str]] = []
        self.machine = Machine(
            command=[sys.executable, str(PROGRAM)],
            artifacts=root / "artifacts",
            data=None,
            devices=["cpu"],
            memory_bytes=0,
            job_seconds=60.0,
            grace_seconds=2.0,
            hold_seconds=30.0,
        )

    def runner(
        self, *, slots: int = 1, keeping: Keeping = WEEK_AND_QUARTER, jobs: JobStore | None = None, **machine: Any
    ) -> Runner:
        async def published(model: str, version: str) -> None:
            (job, *_), _ = self.jobs.page(limit=1)
            self.published.append((model, version, job.status))

        return Runner(
            jobs or self.jobs,
            self.root / "jobs",
            replace(self.machine, **machine),
            slots=slots,
            keeping=keeping,
            dataset_path=self.dataset_path,
            published=published,
        )

    def dataset_path(self, dataset: str) -> Path:
        if dataset == "ds-gone":
            raise DatasetNotFound("there is no data set ds-gone")
        return self.root / "datasets" / dataset

    def queue(self, **recipe: object) -> Job:
        return self.jobs.create(order(recipe=recipe), queue_size=100)

    def folder(self, job: Job) -> Path:
        return self.root / "jobs" / job.id

    def pids(self, job: Job) -> list[int]:
        """Of all processes that have worked at a job."""
        log = self.folder(job) / "log.txt"
        return [int(pid) for pid in re.findall(r"^pid (\d+)", log.read_text(), re.M)] if log.exists() else []

    def told_device(self, job: Job) -> str:
        """Where its process was told to train."""
        return (self.folder(job) / "log.txt").read_text().partition("--device ")[2].split()[0]

    def weights(self) -> str:
        return str(json.loads((self.root / "artifacts" / "shades" / "weights").read_text()))

    async def until(self, job: Job, *states: str, seconds: float = 15) -> Job:
        return await self.seen(job, lambda found: found.status in states, seconds)

    async def at_step(self, job: Job, step: int) -> Job:
        return await self.seen(job, lambda _: f'"checkpointed", "step": {step},' in self.events(job))

    async def begun(self, job: Job) -> Job:
        """The runner knows that its process listens: a pause holds it, where before that it would end it."""
        return await self.until(job, "running")

    async def paused(self, runner: Runner, job: Job, step: int = 3) -> Job:
        """Pause a job once it is at this step, and wait until it is."""
        await self.begun(job)
        await self.at_step(job, step)
        self.jobs.pause(job.id)
        runner.wake()
        return await self.until(job, "paused")

    def resume(self, runner: Runner, job: Job) -> None:
        self.jobs.resume(job.id)
        runner.wake()

    async def seen(self, job: Job, what: Callable[[Job], bool], seconds: float = 15) -> Job:
        end = time.monotonic() + seconds
        while not what(found := self.jobs.get(job.id)):
            assert time.monotonic() < end, (found, self.events(job))
            await asyncio.sleep(0.02)
        return found

    def events(self, job: Job) -> str:
        path = self.folder(job) / "events.jsonl"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def shop(tmp_path: Path) -> Any:
    workshop = Workshop(tmp_path)
    yield workshop
    workshop.jobs.close()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def in_loop(test: Callable[[Workshop], Coroutine[Any, Any, None]]) -> Callable[[Workshop], None]:
    def run(shop: Workshop) -> None:
        asyncio.run(test(shop))

    run.__name__ = test.__name__
    return run


@in_loop
async def test_a_job_runs_to_its_end(shop: Workshop) -> None:
    job = shop.queue(steps=30)
    async with shop.runner().working():
        await shop.until(job, "running")
        running = await shop.seen(job, lambda found: found.progress is not None)
        done = await shop.until(job, "succeeded")
    assert running.progress is not None
    assert 0 < running.progress.step <= running.progress.steps == 30
    assert done.started_at is not None
    assert done.finished_at is not None
    assert done.model_dump() == job.model_dump() | {
        "status": "succeeded",
        "started_at": done.started_at,
        "finished_at": done.finished_at,
        "progress": {
            "phase": "training",
            "step": 30,
            "steps": 30,
            "epoch": 1.0,
            "loss": 1 / 30,
            "accuracy": 29 / 30,
            "seconds_left": 0.0,
        },
        "result": {
            "model": "shades",
            "version": "1",
            "promoted": True,
            "decision": "promoted",
            "summary": SUMMARY,
            "metrics": {"accuracy": 0.9},
            "gate": {},
            "comparisons": {},
            "seconds": 1.0,
        },
    }
    assert shop.published == [("shades", "1", "running")]  # it answers before the job reads succeeded
    assert len(shop.pids(job)) == 1


def test_a_job_is_done_whatever_the_database(tmp_path: Path, database: str) -> None:
    async def main(shop: Workshop) -> None:
        first, second = shop.queue(steps=100), shop.queue(steps=10_000)
        async with shop.runner().working() as runner:
            await shop.paused(runner, first)
            await shop.at_step(second, 1)
            shop.jobs.resume(first.id)
            shop.jobs.cancel(second.id)
            await shop.until(second, "cancelled")
            done = await shop.until(first, "succeeded")
        assert done.result is not None
        assert done.progress is not None
        assert (done.result["summary"], done.progress.step) == (SUMMARY, 100)

    with closing((shop := Workshop(tmp_path, database)).jobs):
        asyncio.run(main(shop))


@in_loop
async def test_the_command_is_the_one_that_a_person_types(shop: Workshop) -> None:
    wanted = order(dataset={"builtin": "cifar10", "limit": 2000}, recipe={"steps": 1, "pause": 0}, seed=7)
    job = shop.jobs.create(wanted, queue_size=1)
    async with shop.runner(data=Path("/data"), memory_bytes=4_000_000_000, job_seconds=100.0).working():
        await shop.until(job, "succeeded")
    folder, artifacts = shop.folder(job), shop.root / "artifacts"
    assert (folder / "log.txt").read_text().split()[2:] == (
        f"finetune greys@1 --name shades --run {folder} --seed 7 --promote if_better --dataset cifar10 --limit 2000 "
        f"--set steps=1 --set pause=0 --artifacts {artifacts} --device cpu --data /data --memory-bytes 4000000000 "
        "--deadline-seconds 100.0 --guest --stop-at-eof --holdable"
    ).split()


@in_loop
async def test_jobs_are_done_one_at_a_time_in_their_order(shop: Workshop) -> None:
    made = [shop.queue(steps=5) for _ in range(3)]
    async with shop.runner().working():
        await shop.until(made[-1], "succeeded")
    done = [shop.jobs.get(job.id) for job in made]
    for first, second in zip(done, done[1:], strict=False):
        assert first.finished_at is not None
        assert second.started_at is not None
        assert first.finished_at <= second.started_at


@in_loop
async def test_jobs_are_spread_over_the_devices(shop: Workshop) -> None:
    jobs = [shop.queue(steps=40) for _ in range(3)]
    async with shop.runner(slots=2, devices=["cuda:0", "cuda:1"]).working():
        for job in jobs[:2]:
            await shop.seen(job, lambda found: found.status == "running")
        first = [shop.told_device(job) for job in jobs[:2]]
        shop.jobs.cancel(jobs[0].id)
        await shop.seen(jobs[2], lambda found: found.status == "running")
        assert sorted(first) == ["cuda:0", "cuda:1"]  # two that begin at once may do so in either order
        assert shop.told_device(jobs[2]) == first[0]


@in_loop
async def test_as_many_at_once_as_there_are_slots(shop: Workshop) -> None:
    made = [shop.queue(steps=10_000) for _ in range(3)]
    async with shop.runner(slots=2).working():
        for job in made[:2]:
            await shop.until(job, "running")
        await asyncio.sleep(0.7)
        assert shop.jobs.get(made[2].id).status == "queued"
        shop.jobs.cancel(made[0].id)
        await shop.until(made[2], "running")
        assert (shop.jobs.counts()["running"], shop.jobs.counts()["cancelled"]) == (2, 1)


# --- pause, resume, cancel ---


@in_loop
async def test_a_paused_job_goes_on_to_the_weights_that_it_would_have_had(shop: Workshop) -> None:
    plain, paused = shop.queue(steps=100, pause=0), shop.queue(steps=100)
    async with shop.runner().working() as runner:
        await shop.until(plain, "succeeded")
        expected = shop.weights()
        await shop.begun(paused)
        shop.jobs.pause(paused.id)
        runner.wake()
        asked = time.monotonic()
        held = await shop.until(paused, "paused")
        assert time.monotonic() - asked < 2
        assert (held.wanted, held.finished_at, held.result) == (None, None, None)
        lines = shop.events(paused).splitlines()
        await asyncio.sleep(0.5)
        assert shop.events(paused).splitlines() == lines
        assert json.loads(lines[-1])["event"] == "held"
        resumed = time.monotonic()
        shop.resume(runner, paused)
        await shop.until(paused, "running")
        assert time.monotonic() - resumed < 2
        await shop.until(paused, "succeeded")
    assert shop.weights() == expected
    assert len(shop.pids(paused)) == 1


@in_loop
async def test_a_job_may_be_paused_again_and_again_and_its_pauses_do_not_count(shop: Workshop) -> None:
    job = shop.queue(steps=100)
    begun = time.monotonic()
    async with shop.runner(job_seconds=8.0).working() as runner:
        for step in (3, 6, 9):
            await shop.paused(runner, job, step)
            await asyncio.sleep(2.7)
            shop.resume(runner, job)
        done = await shop.until(job, "succeeded")
    assert len(shop.pids(job)) == 1
    assert 100 * 0.02 < done.seconds < time.monotonic() - begun - 3 * 2.7


@pytest.mark.parametrize("ending", ["after its time", "another job", "at once", "killed"])
def test_a_paused_job_whose_process_has_ended_goes_on_from_its_checkpoint(shop: Workshop, ending: str) -> None:
    async def main() -> None:
        plain, paused = shop.queue(steps=100, pause=0), shop.queue(steps=100)
        seconds = {"after its time": 0.3, "at once": 0.0}.get(ending, 30.0)
        async with shop.runner(hold_seconds=seconds).working() as runner:
            await shop.until(plain, "succeeded")
            expected = shop.weights()
            await shop.paused(runner, paused)
            (pid,) = shop.pids(paused)
            assert alive(pid) == (ending != "at once")
            other = shop.queue(steps=10) if ending == "another job" else None
            if ending == "killed":
                os.kill(pid, signal.SIGKILL)
            await shop.seen(paused, lambda _: not alive(pid))
            if other:
                await shop.until(other, "succeeded")
            assert shop.jobs.get(paused.id).status == "paused"
            shop.resume(runner, paused)
            await shop.until(paused, "succeeded")
        assert shop.weights() == expected
        assert len(shop.pids(paused)) == 2
        assert "--resume" in (shop.folder(paused) / "log.txt").read_text()

    asyncio.run(main())


@in_loop
async def test_a_paused_job_may_be_cancelled(shop: Workshop) -> None:
    job = shop.queue(steps=10_000)
    async with shop.runner().working() as runner:
        await shop.paused(runner, job)
        assert shop.jobs.cancel(job.id).status == "cancelled"
        runner.wake()
        left = {"run.json", "events.jsonl", "log.txt"}
        await shop.seen(job, lambda _: set(os.listdir(shop.folder(job))) == left)
        assert not any(map(alive, shop.pids(job)))


@in_loop
async def test_no_held_process_outlives_its_service(shop: Workshop) -> None:
    job = shop.queue(steps=100)
    async with shop.runner().working() as runner:
        await shop.paused(runner, job)
    assert not any(map(alive, shop.pids(job)))
    assert shop.jobs.get(job.id).status == "paused"
    async with shop.runner().working():
        shop.jobs.resume(job.id)
        await shop.until(job, "succeeded")
    assert len(shop.pids(job)) == 2


@in_loop
async def test_a_cancelled_job_leaves_what_people_read_and_nothing_else(shop: Workshop) -> None:
    job = shop.queue(steps=10_000)
    async with shop.runner().working() as runner:
        await shop.at_step(job, 2)
        (shop.folder(job) / "learning-curve.png").write_bytes(b"png")
        (shop.folder(job) / "cache").mkdir()
        (shop.folder(job) / "cache" / "features").write_bytes(b"many")
        shop.jobs.cancel(job.id)
        runner.wake()
        asked = time.monotonic()
        over = await shop.until(job, "cancelled")
        assert time.monotonic() - asked < 2
        left = {"run.json", "events.jsonl", "log.txt", "learning-curve.png"}
        while set(os.listdir(shop.folder(job))) != left:
            assert time.monotonic() - asked < 15
            await asyncio.sleep(0.02)
    assert (over.wanted, over.result, over.error) == (None, None, None)
    assert over.finished_at is not None
    assert not any(map(alive, shop.pids(job)))
    assert shop.published == []


@pytest.mark.parametrize("hold_seconds", [30.0, 0.0])
def test_a_job_that_is_cancelled_at_the_moment_of_its_pause_is_cancelled(shop: Workshop, hold_seconds: float) -> None:
    answers = []

    def cancel(seen: Job) -> None:
        if seen.wanted == "pause":
            answers.append(shop.jobs.cancel(seen.id).wanted)

    async def main(slow: Hesitant) -> None:
        slow.meanwhile = cancel
        job = shop.queue(steps=10_000)
        async with shop.runner(jobs=slow, hold_seconds=hold_seconds).working() as runner:
            await shop.begun(job)
            shop.jobs.pause(job.id)
            runner.wake()
            over = await shop.until(job, "paused", "cancelled")
        assert (answers, over.status, over.wanted) == (["cancel"], "cancelled", None)
        assert not any(map(alive, shop.pids(job)))

    with closing(Hesitant(f"sqlite:///{shop.root}/jobs.db", "here")) as slow:
        asyncio.run(main(slow))


@pytest.mark.parametrize("ask", ["pause", "cancel"])
def test_a_process_that_does_not_listen_is_ended(shop: Workshop, ask: str) -> None:
    async def main() -> None:
        job = shop.queue(steps=10_000, deaf=True)
        async with shop.runner(grace_seconds=0.3).working() as runner:
            await shop.at_step(job, 1)
            getattr(shop.jobs, ask)(job.id)
            runner.wake()
            await shop.until(job, {"pause": "paused", "cancel": "cancelled"}[ask])
        assert not any(map(alive, shop.pids(job)))

    asyncio.run(main())


@pytest.mark.parametrize("ask", ["pause", "cancel"])
def test_a_process_that_has_stopped_is_not_waited_for_until_it_is_gone_by_itself(shop: Workshop, ask: str) -> None:
    async def main() -> None:
        plain, job = shop.queue(steps=100, pause=0), shop.queue(steps=100, linger=60)
        async with shop.runner(grace_seconds=60.0, hold_seconds=0.0).working() as runner:
            await shop.until(plain, "succeeded")
            expected = shop.weights()
            await shop.at_step(job, 3)
            getattr(shop.jobs, ask)(job.id)
            runner.wake()
            await shop.until(job, {"pause": "paused", "cancel": "cancelled"}[ask])
            assert not any(map(alive, shop.pids(job)))
            assert json.loads(shop.events(job).splitlines()[-1])["event"] == "interrupted"
            if ask == "pause":
                shop.resume(runner, job)
                await shop.until(job, "succeeded")
                assert shop.weights() == expected

    asyncio.run(main())


@in_loop
async def test_what_is_asked_in_another_process_takes_effect_too(shop: Workshop) -> None:
    job = shop.queue(steps=10_000)
    async with shop.runner().working():
        await shop.at_step(job, 1)
        elsewhere = JobStore(f"sqlite:///{shop.root}/jobs.db", "elsewhere")
        elsewhere.cancel(job.id)
        elsewhere.close()
        await shop.until(job, "cancelled")


@in_loop
async def test_a_job_may_be_cancelled_while_its_data_is_checked(shop: Workshop) -> None:
    job = shop.queue(checking=1.0)
    async with shop.runner().working() as runner:
        await shop.until(job, "validating")
        shop.jobs.cancel(job.id)
        runner.wake()
        await shop.until(job, "cancelled")


# --- failures ---


@in_loop
async def test_a_run_that_fails_says_why(shop: Workshop) -> None:
    job = shop.queue(fail_at=2)
    async with shop.runner().working():
        failed = await shop.until(job, "failed")
    assert failed.error == Error(code="diverged", message="the loss rose and rose")
    assert failed.result is None
    assert (shop.folder(job) / "checkpoint.pt").exists()  # for seven days


@in_loop
async def test_a_run_that_ends_without_a_word_is_quoted_from_its_log(shop: Workshop) -> None:
    job = shop.queue(exit_at=1)
    async with shop.runner().working():
        failed = await shop.until(job, "failed")
    message = "the training process ended with exit code 1 and didn't say why: no idea; its log may say more"
    assert failed.error == Error(code="unexpected_exit", message=message)


@in_loop
async def test_a_process_that_keeps_dying_is_given_up_after_five_times(shop: Workshop) -> None:
    job = shop.queue(die_at=2)
    async with shop.runner().working():
        failed = await shop.until(job, "failed")
    message = (
        "the training process was ended by SIGKILL, 5 times in a row, before it could get on; its log may say why; "
        "start the job again once the cause is gone"
    )
    assert failed.error == Error(code="crashed", message=message)
    assert len(shop.pids(job)) == 5


@in_loop
async def test_deaths_with_progress_between_them_are_no_reason_to_give_up(shop: Workshop) -> None:
    job = shop.queue(steps=400)
    expected = shop.queue(steps=400, pause=0)
    async with shop.runner().working():
        for step in range(1, 9):
            await shop.at_step(job, 2 * step)
            os.kill(shop.pids(job)[-1], signal.SIGKILL)
            await shop.seen(job, lambda _, count=step: len(shop.pids(job)) > count)
        shop.jobs.cancel(job.id)
        await shop.until(expected, "succeeded")
    assert shop.jobs.get(job.id).status == "cancelled"
    assert len(shop.pids(job)) == 9


@in_loop
async def test_want_of_memory_has_its_own_code(shop: Workshop) -> None:
    job = shop.queue(die_at=0)
    async with shop.runner().working():
        await shop.seen(job, lambda _: len(shop.pids(job)) > 0)
        with (shop.folder(job) / "log.txt").open("a") as log:
            log.write("terminate called after throwing an instance of 'std::bad_alloc'\n")
        failed = await shop.until(job, "failed")
    assert failed.error == Error(code="out_of_memory", message=OUT_OF_MEMORY)
    assert len(shop.pids(job)) == 5


@pytest.mark.parametrize(
    "words",
    [
        "OpenBLAS error: Memory allocation still failed after 10 retries, giving up.",
        "memory allocation of 49152 bytes failed\nskipping backtrace printing to avoid potential recursion",
        "ImportError: libx.so: cannot allocate memory in static TLS block",
    ],
)
@pytest.mark.parametrize("how", [{"exit_at": 1}, {"abort_at": 1}])
def test_a_process_that_ends_itself_for_want_of_memory_is_not_started_again(
    shop: Workshop, words: str, how: dict[str, int]
) -> None:
    async def main() -> None:
        job = shop.queue(words=words, **how)
        async with shop.runner().working():
            failed = await shop.until(job, "failed")
        assert failed.error == Error(code="out_of_memory", message=OUT_OF_MEMORY)
        assert len(shop.pids(job)) == 1

    asyncio.run(main())


@in_loop
async def test_a_job_that_takes_too_long_says_so_itself(shop: Workshop) -> None:
    job = shop.queue(steps=10_000)
    async with shop.runner(job_seconds=0.4, grace_seconds=15.0).working():
        failed = await shop.until(job, "failed")
    assert failed.error == Error(code="deadline_passed", message="it took too long")


@in_loop
async def test_a_job_that_takes_too_long_and_does_not_stop_is_ended(shop: Workshop) -> None:
    job = shop.queue(steps=10_000, deaf=True)
    async with shop.runner(job_seconds=0.4, grace_seconds=0.3).working():
        failed = await shop.until(job, "failed")
    message = "the job took longer than it may (SAFELIGHT_JOB_SECONDS); start it again with fewer pictures or epochs"
    assert failed.error == Error(code="deadline_passed", message=message)
    assert not any(map(alive, shop.pids(job)))


@in_loop
async def test_time_counts_over_all_the_sittings_of_a_job(shop: Workshop) -> None:
    job = shop.queue(steps=10_000)
    async with shop.runner(job_seconds=100.0, hold_seconds=0.0).working() as runner:
        await shop.until(job, "running")
        await asyncio.sleep(0.5)
        shop.jobs.pause(job.id)
        runner.wake()
        worked = (await shop.until(job, "paused")).seconds
        shop.jobs.resume(job.id)
        await shop.seen(job, lambda _: len(shop.pids(job)) == 2)
    log = (shop.folder(job) / "log.txt").read_text()
    assert worked > 0.5
    assert re.findall(r"--deadline-seconds ([\d.]+)", log) == ["100.0", f"{100 - worked:.1f}"]


@in_loop
async def test_a_data_set_that_has_gone_fails_the_job(shop: Workshop) -> None:
    job = shop.jobs.create(order(dataset="ds-gone"), queue_size=1)
    async with shop.runner().working():
        failed = await shop.until(job, "failed")
    assert failed.error == Error(code="dataset_not_found", message="there is no data set ds-gone")


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """A small disk of its own in the place of a folder, with no room left."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a disk can't be mounted here: {mounted.stderr.decode().strip()}")
    try:
        with suppress(OSError):
            (folder / "filler").write_bytes(bytes(100_000))
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_fails_the_job_and_leaves_no_process(shop: Workshop) -> None:
    async def main() -> None:
        job = shop.queue(steps=10_000)
        async with shop.runner().working():
            failed = await shop.until(job, "failed")
        assert failed.error == Error(code="disk_full", message="the disk is full; make room, then start the job again")
        assert not any(str(shop.root) in words for words in commands())

    with full_disk(shop.root / "jobs"):
        asyncio.run(main())


def commands() -> list[str]:
    """Of all processes."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_text().replace("\0", " "))
    return found


@in_loop
async def test_a_command_that_can_not_be_started_is_given_up_after_five_times(shop: Workshop) -> None:
    job = shop.queue()
    async with shop.runner(command=["/nowhere/python"]).working():
        failed = await shop.until(job, "failed")
    assert failed.error is not None
    assert failed.error.code == "crashed"


@in_loop
async def test_a_version_that_can_not_be_taken_in_is_published_all_the_same(shop: Workshop) -> None:
    job = shop.queue()
    shop.published = None  # type: ignore[assignment]  # what is told of it fails
    runner = shop.runner()
    async with runner.working():
        await shop.until(job, "succeeded")


# --- the service comes and goes ---


@in_loop
async def test_when_the_service_stops_jobs_go_back_to_the_queue_and_no_process_is_left(shop: Workshop) -> None:
    made = [shop.queue(steps=10_000), shop.queue(steps=10_000, deaf=True)]
    async with shop.runner(slots=2, grace_seconds=0.5).working():
        for job in made:
            await shop.at_step(job, 1)
    for job in made:
        assert shop.jobs.get(job.id).status == "queued"
        assert shop.jobs.get(job.id).deaths == 0
        assert shop.pids(job)
        assert not any(map(alive, shop.pids(job)))
    async with shop.runner(slots=2).working():
        for job in made:
            await shop.seen(job, lambda _, job=job: len(shop.pids(job)) == 2)


@in_loop
async def test_what_a_dead_service_left_running_goes_back_to_the_queue(shop: Workshop) -> None:
    job = shop.jobs.move(shop.jobs.move(shop.queue(), "validating"), "running")
    async with shop.runner().working():
        await shop.until(job, "succeeded")


@in_loop
async def test_a_job_goes_on_while_the_database_is_away(shop: Workshop) -> None:
    job = shop.queue(steps=60)

    def rename(before: str, after: str) -> None:
        with closing(sqlite3.connect(shop.root / "jobs.db", timeout=10)) as connection, connection:
            connection.execute(f"ALTER TABLE {before} RENAME TO {after}")

    async with shop.runner().working():
        await shop.at_step(job, 3)
        rename("jobs", "away")
        while '"decided"' not in shop.events(job):
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        rename("away", "jobs")
        done = await shop.until(job, "succeeded")
    assert done.result is not None
    assert len(shop.pids(job)) == 1


def left_behind(shop: Workshop, *lines: dict[str, object]) -> Job:
    """A running job whose service died, and whose process came to its end after that."""
    job = shop.jobs.move(shop.queue(), "validating")
    shop.folder(job).mkdir(parents=True)
    (shop.folder(job) / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return job


@in_loop
async def test_a_run_that_had_decided_when_its_service_died_has_succeeded(shop: Workshop) -> None:
    result = {"model": "shades", "version": "4", "summary": "promoted"}
    job = left_behind(shop, {"event": "decided", "result": result})
    async with shop.runner().working():
        done = await shop.until(job, "succeeded")
    assert done.result == result
    assert shop.published == [("shades", "4", "running")]
    assert shop.pids(job) == []


@in_loop
async def test_a_job_that_ended_before_its_cancellation_was_heard_has_succeeded(shop: Workshop) -> None:
    job = left_behind(shop, {"event": "decided", "result": {"model": "shades", "version": "4"}})
    assert shop.jobs.cancel(job.id).wanted == "cancel"
    async with shop.runner().working():
        assert (await shop.until(job, "succeeded")).wanted is None


@in_loop
async def test_a_run_that_had_failed_when_its_service_died_has_failed(shop: Workshop) -> None:
    job = left_behind(shop, {"event": "failed", "code": "diverged", "message": "it did"})
    async with shop.runner().working():
        failed = await shop.until(job, "failed")
    assert failed.error == Error(code="diverged", message="it did")


@in_loop
async def test_a_job_with_a_long_history_is_gone_on_with_while_the_event_loop_serves(shop: Workshop) -> None:
    told = {"event": "checkpointed", "at": "2026-01-01T00:00:00Z", "step": 3, "path": "/somewhere"}
    job = left_behind(shop, *[told] * 50_000)
    shop.jobs.move(shop.jobs.get(job.id), "queued")
    begun = time.thread_time()
    parse(shop.events(job).encode().splitlines())
    all_of_it = time.thread_time() - begun
    async with shop.runner().working():
        begun = time.thread_time()
        await asyncio.wait_for(process_of(shop, job), 30)
        assert time.thread_time() - begun < all_of_it / 2


async def process_of(shop: Workshop, job: Job) -> None:
    while not (shop.folder(job) / "child.json").exists():
        await asyncio.sleep(0.02)


@in_loop
async def test_one_that_was_to_be_cancelled_when_its_service_died_is_cancelled(shop: Workshop) -> None:
    job = left_behind(shop, {"event": "started"})
    shop.jobs.cancel(job.id)
    async with shop.runner().working():
        await shop.until(job, "cancelled")
    assert shop.pids(job) == []


@in_loop
async def test_one_that_was_to_be_paused_when_its_service_died_is_paused(shop: Workshop) -> None:
    job = left_behind(shop, {"event": "started"})
    shop.jobs.pause(job.id)
    async with shop.runner().working():
        await shop.until(job, "paused")
    assert shop.pids(job) == []


async def stray(shop: Workshop, job: Job, *, deaf: bool) -> asyncio.subprocess.Process:
    """A process that a dead service has left in the job's folder."""
    folder = shop.folder(job)
    folder.mkdir(parents=True)
    words = ["finetune", "greys@1", "--name", "shades", "--run", str(folder), "--seed", "0", "--stop-at-eof"]
    words += ["--set", "steps=10000", "--set", f"deaf={json.dumps(deaf)}", "--deadline-seconds", "60"]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(PROGRAM), *words, stdin=asyncio.subprocess.PIPE, start_new_session=True
    )
    await shop.at_step(job, 1)
    ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    (folder / "child.json").write_text(json.dumps({"pid": process.pid, "started": f"{boot} {ticks}"}))
    return process


@pytest.mark.parametrize("deaf", [False, True])
def test_a_process_that_a_dead_service_left_is_gone_before_its_folder_is_used_again(shop: Workshop, deaf: bool) -> None:
    async def main() -> None:
        job = shop.jobs.move(shop.queue(), "validating")
        process = await stray(shop, job, deaf=deaf)
        assert process.stdin is not None
        process.stdin.close()  # its service has died
        async with shop.runner(grace_seconds=0.5 if deaf else 15.0).working():
            await shop.seen(job, lambda found: found.status == "running" and shop.pids(job) != [])
            assert process.returncode == (-signal.SIGKILL if deaf else 130)

    asyncio.run(main())


@in_loop
async def test_a_process_that_only_has_the_same_id_is_let_alone(shop: Workshop) -> None:
    job = shop.jobs.move(shop.queue(), "validating")
    process = await stray(shop, job, deaf=False)
    innocent = await asyncio.create_subprocess_exec("sleep", "60", start_new_session=True)
    identity = json.loads((shop.folder(job) / "child.json").read_text())
    (shop.folder(job) / "child.json").write_text(json.dumps(identity | {"pid": innocent.pid}))
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()
    async with shop.runner(grace_seconds=0.1).working():
        await shop.until(job, "running")
        assert innocent.returncode is None
    innocent.kill()
    await innocent.wait()


@in_loop
async def test_one_runner_works_in_a_state_folder_and_another_takes_over(shop: Workshop) -> None:
    job, next_one = shop.queue(steps=10_000), shop.queue(steps=10_000)
    first = AsyncExitStack()
    await first.enter_async_context(shop.runner().working())
    await shop.until(job, "running")
    async with shop.runner().working():
        await asyncio.sleep(0.7)
        assert shop.jobs.get(next_one.id).status == "queued"
        await first.aclose()
        await shop.seen(job, lambda _: len(shop.pids(job)) == 2)


@in_loop
async def test_two_services_on_one_database_do_their_own_jobs(shop: Workshop) -> None:
    other = Workshop.__new__(Workshop)
    other.__dict__ |= shop.__dict__ | {"root": shop.root / "other", "published": []}
    other.root.mkdir()
    other.jobs = JobStore(f"sqlite:///{shop.root}/jobs.db", "there")
    ours, theirs = [shop.queue() for _ in range(3)], [other.queue() for _ in range(3)]
    async with shop.runner().working(), other.runner().working():
        for job in ours + theirs:
            await shop.until(job, "succeeded")
    assert all(len(shop.pids(job)) == 1 and not other.folder(job).exists() for job in ours)
    assert all(len(other.pids(job)) == 1 and not shop.folder(job).exists() for job in theirs)
    other.jobs.close()


# --- clearing away ---


@in_loop
async def test_old_checkpoints_of_failed_jobs_go_and_old_jobs_altogether(shop: Workshop) -> None:
    job = shop.queue(fail_at=2)
    async with shop.runner(keeping=Keeping(checkpoints=0, jobs=90)).working():
        await shop.until(job, "failed")
        await shop.seen(job, lambda _: not (shop.folder(job) / "checkpoint.pt").exists())
    assert (shop.folder(job) / "events.jsonl").exists()
    async with shop.runner(keeping=Keeping(checkpoints=0, jobs=0)).working():
        end = time.monotonic() + 15
        while shop.jobs.page(limit=1) != ([], False):
            assert time.monotonic() < end
            await asyncio.sleep(0.02)
    assert not shop.folder(job).exists()
