"""Does the jobs: takes one at a time from the database, starts a process for it, and writes down what comes of it.

Of all the processes that share a state folder one is the runner: whoever holds the lock. When it dies another takes
over, and finds in the run folders how far each job has come.
"""

import asyncio
import fcntl
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Self

from service.errors import DatabaseUnavailable, JobFileNotFound, ServiceError
from service.jobs.child import LOG, end_leftover
from service.jobs.history import EVENTS, Tail
from service.jobs.job import AT_WORK, TERMINAL, Builtin, Job, Status, Wish
from service.jobs.sitting import Ending, Seen, Sitting, failure, told
from service.jobs.store import Due, JobMoved, JobStore
from service.telemetry import JOB_SECONDS, logger
from training import events

POLL_SECONDS = 0.5  # between looks at what other processes asked for
SWEEP_SECONDS = 3600.0  # between looks for jobs that are too old to keep
LOCK = "runner.lock"

RUN = "run.json"
CURVE = "learning-curve.png"
KEPT = frozenset({RUN, EVENTS, LOG, CURVE})  # of a job that is over

SETTLED: dict[Wish, Status] = {"pause": "paused", "cancel": "cancelled"}


@dataclass(frozen=True)
class Machine:
    """Where things are, and what a job may take; from the settings."""

    command: Sequence[str]  # python -m training
    artifacts: Path
    data: Path | None
    devices: Sequence[str]  # each job gets the one that the fewest others are on
    memory_bytes: int  # 0: no limit
    job_seconds: float
    grace_seconds: float  # from SIGTERM to SIGKILL
    hold_seconds: float  # that a paused job's process waits for the word to go on; 0: it ends at once


@dataclass(frozen=True)
class Keeping:
    """For how many days what is left of jobs is kept."""

    checkpoints: float  # of those that failed
    jobs: float


class Runner:
    def __init__(
        self,
        jobs: JobStore,
        folder: Path,
        machine: Machine,
        *,
        slots: int,
        keeping: Keeping,
        dataset_path: Callable[[str], Path],
        published: Callable[[str, str], Awaitable[None]],
    ) -> None:
        """`published` is told of each new version, and has done what is needed for it to answer when it returns."""
        self._jobs = jobs
        self._folder = folder
        self._machine = machine
        self._slots = slots
        self._keeping = keeping
        self._dataset_path = dataset_path
        self._published = published
        self._sittings: dict[str, Sitting] = {}
        self._placed: dict[str, str] = {}  # jobs on devices
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._awake = asyncio.Event()
        self._stopping = False
        self._stands_still = False
        self._swept = -SWEEP_SECONDS

    @asynccontextmanager
    async def working(self) -> AsyncIterator[Self]:
        """Work in the background, as soon as no other process does; at the end jobs go back to the queue."""
        work = asyncio.create_task(self._work(), name="runner")
        try:
            yield self
        finally:
            self._stopping = True
            self.wake()
            await work

    def wake(self) -> None:
        """There is something new to do."""
        self._awake.set()

    def folder(self, job_id: str) -> Path:
        return self._folder / job_id

    def folder_of(self, job: Job) -> Path:
        """Raises JobFileNotFound where another service has it."""
        if job.home != self._jobs.home:
            raise JobFileNotFound(f"the files of {job.id} are with another service on this database; ask that one")
        return self.folder(job.id)

    # --- the loop ---

    async def _work(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self._folder.parent / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            logger.error("no jobs can be done here", extra={"reason": str(error)})
            return
        try:
            while not self._stopping and not _lock(descriptor):
                await self._sleep()
            while not self._stopping:
                await self._look()
                await self._sleep()
            for sitting in self._sittings.values():
                sitting.stop()
            await asyncio.gather(*list(self._tasks.values()))
        finally:
            os.close(descriptor)  # and the lock is free

    async def _sleep(self) -> None:
        try:
            async with asyncio.timeout(POLL_SECONDS):
                await self._awake.wait()
        except TimeoutError:
            return
        self._awake.clear()

    async def _look(self) -> None:
        try:
            for due in await asyncio.to_thread(self._jobs.due, list(self._sittings)):
                self._attend_to(due)
            await self._clear_away()
            self._stands_still = False
        except DatabaseUnavailable as error:
            if not self._stands_still:  # once, not twice a second
                logger.warning("jobs stand still", extra={"reason": str(error)})
            self._stands_still = True
        except Exception:  # whatever it was, the next look is due
            logger.exception("looking for jobs failed")

    def _attend_to(self, due: Due) -> None:
        if sitting := self._sittings.get(due.id):
            sitting.attend(due)
        elif due.id in self._tasks:
            pass  # its process is about to start, or has just ended
        elif due.status in AT_WORK:  # for a process that is no more, or of a service that is no more
            self._start(due.id, self._recover(due.id))
        elif due.wanted:  # asked for just before its process was lost
            self._start(due.id, self._fulfil(due.id))
        elif len(self._tasks) < self._slots:
            self._start(due.id, self._do(due.id))
        else:
            self._make_room()

    def _make_room(self) -> None:
        """End the process of a paused job, one at a time; it goes on from its checkpoint."""
        held = [sitting for sitting in self._sittings.values() if sitting.held_at is not None]
        idle = [sitting for sitting in held if sitting.is_idle]
        if idle and len(idle) == len(held):
            idle[0].stop()

    def _start(self, job_id: str, work: Coroutine[None, None, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except DatabaseUnavailable as error:
                logger.warning("job left as it is", extra={"job": job_id, "reason": str(error)})
            except JobMoved:
                pass  # a client was faster; the next look finds it as it is now
            except Exception:
                logger.exception("job left as it is", extra={"job": job_id})
            finally:
                del self._tasks[job_id]
                self.wake()

        self._tasks[job_id] = asyncio.create_task(guarded(), name=job_id)

    # --- one job ---

    async def _do(self, job_id: str) -> None:
        """Start a process for a job that waits, or for what is left of it, and see it to its end."""
        job = await asyncio.to_thread(self._jobs.get, job_id)
        if job.status != "queued":
            return  # since the look that found it
        job = await asyncio.to_thread(self._jobs.move, job, "validating")
        left = self._machine.job_seconds - job.seconds
        folder, device = self.folder(job_id), self._least_busy()
        try:
            command = self._command(job, folder, device, left)
        except ServiceError as error:
            await self._settle(job, failure(events.code_of(error), str(error)))
            return
        sitting = await asyncio.to_thread(
            Sitting,
            self._jobs,
            job,
            folder,
            allowed_seconds=left,
            grace_seconds=self._machine.grace_seconds,
            hold_seconds=self._machine.hold_seconds,
        )
        self._sittings[job_id], self._placed[job_id] = sitting, device
        if self._stopping:
            sitting.stop()
        try:
            folder.mkdir(exist_ok=True)
            await end_leftover(folder, self._machine.grace_seconds)
            code = await sitting.run(command)
            if sitting.held_at is not None:
                return  # its job is paused, or waits for another process, or is over
            ending: Callable[[Job], Ending] = partial(sitting.ending, code=code)
        except OSError as error:
            logger.warning("no training process", extra={"job": job_id, "reason": str(error)})
            ending = _no_room if events.is_disk_full(error) else partial(sitting.ending, code=None)
        finally:
            del self._sittings[job_id], self._placed[job_id]
        await self._conclude(job_id, ending)

    async def _conclude(self, job_id: str, ending: Callable[[Job], Ending]) -> None:
        """Bring a job to the state that follows from the end of its process, and from what was asked meanwhile."""
        while True:
            job = await asyncio.to_thread(self._jobs.get, job_id)
            try:
                await self._settle(job, ending(job))
            except JobMoved:  # something was asked between the two
                continue
            return

    def _least_busy(self) -> str:
        on = list(self._placed.values())
        return min(self._machine.devices, key=on.count)

    def _command(self, job: Job, folder: Path, device: str, seconds: float) -> list[str]:
        """The very command that a person would type."""
        if (folder / RUN).exists():
            words = ["--resume", str(folder)]
        else:
            words = [f"{job.model}@{job.version}", "--name", job.name, "--run", str(folder)]
            words += ["--seed", str(job.seed), "--promote", job.promote, *self._dataset(job)]
            words += [word for key, value in job.recipe.items() for word in ("--set", f"{key}={json.dumps(value)}")]
        machine = self._machine
        words += ["--artifacts", str(machine.artifacts), "--device", device]
        words += ["--data", str(machine.data)] if machine.data else []
        words += ["--memory-bytes", str(machine.memory_bytes)] if machine.memory_bytes else []
        words += ["--deadline-seconds", f"{max(0.0, seconds):.1f}", "--guest", "--stop-at-eof", "--holdable"]
        return [*machine.command, "finetune", *words]

    def _dataset(self, job: Job) -> list[str]:
        """Raises DatasetNotFound."""
        if not isinstance(job.dataset, Builtin):
            return ["--dataset", str(self._dataset_path(job.dataset))]
        limit = ["--limit", str(job.dataset.limit)] if job.dataset.limit else []
        return ["--dataset", job.dataset.builtin, *limit]

    async def _recover(self, job_id: str) -> None:
        """Find how far a job has come whose process, or whose service, is no more."""
        job = await asyncio.to_thread(self._jobs.get, job_id)
        if job.status not in AT_WORK:
            return
        await end_leftover(self.folder(job_id), self._machine.grace_seconds)
        seen = await asyncio.to_thread(Seen.read, Tail(self.folder(job_id) / EVENTS))
        await self._conclude(job_id, lambda job: told(job, seen.end) or ("queued", {}))

    async def _fulfil(self, job_id: str) -> None:
        """What was asked for just before a job's process was lost."""
        job = await asyncio.to_thread(self._jobs.get, job_id)
        if job.status == "queued" and job.wanted:
            await self._settle(job, (SETTLED[job.wanted], {}))

    async def _settle(self, job: Job, ending: Ending) -> None:
        status, changes = ending
        if status == "succeeded":
            if job.status == "validating":  # it was too short to be seen at work
                job = await asyncio.to_thread(self._jobs.move, job, "running")
            await self._publish(changes["result"])
        job = await asyncio.to_thread(self._jobs.move, job, status, **changes)
        if status in TERMINAL:
            JOB_SECONDS.labels(status).observe(job.seconds)

    async def _publish(self, result: dict[str, Any]) -> None:
        try:
            await self._published(str(result["model"]), str(result["version"]))
        except Exception:  # the version is published; who serves it finds it later
            logger.exception("a new version wasn't taken in", extra={"result": result.get("summary")})

    # --- clearing away ---

    async def _clear_away(self) -> None:
        """Remove the checkpoints that nobody needs, and all of jobs that are too old."""
        now = datetime.now(UTC)
        old = now - timedelta(days=self._keeping.checkpoints)
        for job_id in await asyncio.to_thread(self._jobs.to_clear, old):
            if job_id in self._tasks:
                continue  # its process is on its way out
            try:
                await asyncio.to_thread(_clear, self.folder(job_id))
            except OSError as error:  # what is left goes with the job
                logger.warning("not all files removed", extra={"job": job_id, "reason": str(error)})
            await asyncio.to_thread(self._jobs.cleared, job_id)
        if time.monotonic() < self._swept + SWEEP_SECONDS:
            return
        self._swept = time.monotonic()
        for job_id in await asyncio.to_thread(self._jobs.expired, now - timedelta(days=self._keeping.jobs)):
            await asyncio.to_thread(shutil.rmtree, self.folder(job_id), ignore_errors=True)
            await asyncio.to_thread(self._jobs.forget, job_id)


def _no_room(_: Job) -> Ending:
    return failure("disk_full", events.DISK_FULL)


def _clear(folder: Path) -> None:
    """Leave what people read: events, log and curve."""
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in [entry for entry in entries if entry.name not in KEPT]:
            if entry.is_dir(follow_symlinks=False):
                shutil.rmtree(entry, ignore_errors=True)
            else:
                os.unlink(entry)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
