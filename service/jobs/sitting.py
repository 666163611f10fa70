"""One process's work at a job: followed through the events that it writes to its end, and what that end means."""

import asyncio
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.errors import DatabaseUnavailable
from service.jobs import history
from service.jobs.child import LOG, Child, out_of_memory_kills
from service.jobs.job import Error, Job, Progress, Status
from service.jobs.store import Due, JobMoved, JobStore
from service.telemetry import logger
from training import events
from training.events import Event

POLL_SECONDS = 0.1  # between looks at the events
NOTE_SECONDS = 0.5  # between notes of progress in the database
MOST_DEATHS = 5  # in a row, without a new checkpoint
INTERRUPTED = 130  # the exit code after SIGTERM
OWN_DEATHS = (-signal.SIGABRT, -signal.SIGSEGV)  # that nobody else brings about

TOO_LONG = "the job took longer than it may (SAFELIGHT_JOB_SECONDS); start it again with fewer pictures or epochs"

NOT_YET_TRAINING = events.Notice | events.Held | events.Released | events.Failed | events.Interrupted

Ending = tuple[Status, dict[str, Any]]  # the job's next state, and what changes with it


@dataclass
class Seen:
    """What a run's events have told so far."""

    begun: bool = False  # it listens to signals
    training: bool = False  # its data is checked
    held: bool = False
    interrupted: bool = False  # it has heard that it is to end, and all that it keeps is on the disk
    checkpoint: int = -1  # the step of the last one
    progress: Progress | None = None
    end: events.Decided | events.Failed | None = None

    @classmethod
    def read(cls, tail: history.Tail) -> "Seen":
        """What the events say that have come since."""
        seen = cls()
        seen.take_in(history.parse(tail.read()))
        return seen

    def take_in(self, found: list[Event]) -> None:
        for event in found:
            match event:
                case events.Progress() | events.Phase():
                    self.progress = _progress(event)
                case events.Checkpointed():
                    self.checkpoint = event.step
                case events.Held():
                    self.held = True
                case events.Interrupted():
                    self.interrupted = True
                case events.Decided() | events.Failed():
                    self.end = event
            self.begun = True
            self.training |= not isinstance(event, NOT_YET_TRAINING)


class Sitting:
    def __init__(
        self,
        jobs: JobStore,
        job: Job,
        folder: Path,
        *,
        allowed_seconds: float,
        grace_seconds: float,
        hold_seconds: float,
    ) -> None:
        """Reads what the sittings before have told, which takes a while: call it in a thread.

        The process itself keeps to `allowed_seconds`, what is left of the job's time; it is ended a while later.

        Paused, it is held for `hold_seconds`, then it ends.
        """
        self._tail = history.Tail(folder / history.EVENTS)
        self.job = job
        self.seen = Seen(checkpoint=Seen.read(self._tail).checkpoint)  # of the sittings before
        self.asked_at: float | None = None  # to stop or to wait
        self.held_at: float | None = None  # the job is paused, and the process waits
        self.overdue = False
        self._jobs = jobs
        self._folder = folder
        self._grace_seconds = grace_seconds
        self._hold_seconds = hold_seconds
        self._stopping = False
        self._awaited = False  # the job is to go on
        self._seconds_before = job.seconds
        self._begun = self._noted = time.monotonic()
        self._deadline = self._begun + allowed_seconds + grace_seconds
        self._child: Child | None = None
        self._memory_kills = out_of_memory_kills()

    @property
    def is_idle(self) -> bool:
        """Whether its process waits, and nobody has asked it to go on or to end."""
        return self.held_at is not None and not (self._awaited or self._stopping)

    @property
    def seconds(self) -> float:
        """That processes have worked at the job, this one included."""
        return self._seconds_before + (self.held_at or time.monotonic()) - self._begun

    def attend(self, due: Due) -> None:
        """Do what is asked of the job now."""
        if self.held_at is not None:
            self._awaited = due.status == "queued"
            if due.status == "cancelled":
                self.stop()
        elif due.wanted == "pause" and self.seen.begun and self._hold_seconds:
            self.hold()
        elif due.wanted:
            self.stop()

    def stop(self) -> None:
        """Ask the process to end; what it has done so far is kept."""
        if not self._stopping:
            self._stopping = True
            self.asked_at = time.monotonic()
            if self._child:
                self._child.terminate()

    def hold(self) -> None:
        """Ask the process to wait where it is."""
        if self.asked_at is None and self._child:
            self.asked_at = time.monotonic()
            self._child.hold()

    async def run(self, command: Sequence[str]) -> int:
        """Start the process and follow it to its end: its exit code. Raises OSError where it can't be started."""
        child = self._child = await Child.start(command, self._folder)
        if self._stopping:
            child.terminate()
        try:
            while (code := await child.exited(POLL_SECONDS)) is None:
                if self.held_at is None:
                    await self._follow()
                elif self._awaited and not self._stopping:
                    await self._go_on(child, self.held_at)
                self._enforce(child, time.monotonic())
        finally:
            child.kill()
        if self.held_at is None:
            await self._follow()
        return code

    def _enforce(self, child: Child, now: float) -> None:
        if self.held_at is not None and now > self.held_at + self._hold_seconds:
            self.stop()
        self.overdue = self.overdue or (self.held_at is None and now > self._deadline)
        ended = self._stopping and self.seen.interrupted  # torch would need a second to take itself down
        if ended or self.overdue or (self.asked_at is not None and now > self.asked_at + self._grace_seconds):
            child.kill()

    async def _follow(self) -> None:
        """Take in what the process has told since; note it in the database, progress not at every step."""
        found = history.parse(self._tail.read())
        self.seen.take_in(found)
        try:
            if self.seen.training and self.job.status == "validating":
                self.job = await asyncio.to_thread(self._jobs.move, self.job, "running")
            if self.seen.held and not self._stopping:
                await self._note_held()
            elif self.seen.progress and time.monotonic() > self._noted + NOTE_SECONDS:
                self._noted = time.monotonic()
                self.job = await asyncio.to_thread(self._jobs.note, self.job, **self._notes())
        except DatabaseUnavailable as error:  # the process goes on; the database hears of it later
            logger.warning("progress not noted", extra={"job": self.job.id, "reason": str(error)})

    async def _note_held(self) -> None:
        """The process waits; its job is paused from now on, unless something else is wanted meanwhile."""
        job = await asyncio.to_thread(self._jobs.get, self.job.id)
        if job.wanted != "pause":
            self.stop()
            return
        held_at = time.monotonic()
        try:
            self.job = await asyncio.to_thread(self._jobs.move, job, "paused", **self._notes())
        except JobMoved:  # it was cancelled between the two, which the next look finds
            return
        self.held_at, self.asked_at = held_at, None

    async def _go_on(self, child: Child, held_at: float) -> None:
        """The pause is over, and its time doesn't count."""
        self._awaited = False
        try:
            job = await asyncio.to_thread(self._jobs.get, self.job.id)
            if job.status != "queued":
                return
            self.job = await asyncio.to_thread(self._jobs.move, job, "validating")
        except (DatabaseUnavailable, JobMoved):  # the next look at the jobs brings it here again
            return
        pause = time.monotonic() - held_at
        self._begun, self._deadline = self._begun + pause, self._deadline + pause
        self.held_at, self.seen.held = None, False
        child.release()

    def _notes(self) -> dict[str, Any]:
        progress = {"progress": self.seen.progress.model_dump()} if self.seen.progress else {}
        return {"seconds": self.seconds} | progress

    def ending(self, job: Job, code: int | None) -> Ending:
        """What follows from the end of the process; `job` as it is now, with what was asked meanwhile.

        `code` is None where there was no process: it couldn't be started.
        """
        status, changes = self._ending(job, code)
        return status, self._notes() | changes

    def _ending(self, job: Job, code: int | None) -> Ending:
        if ending := told(job, self.seen.end):
            return ending
        if self.overdue:
            return failure("deadline_passed", TOO_LONG)
        if self.asked_at is not None:  # whatever its exit code: the signal may have met it anywhere
            return ("paused" if job.wanted == "pause" else "queued"), {}
        if code in OWN_DEATHS and self._memory_ran_out():  # as it would again
            return failure("out_of_memory", events.OUT_OF_MEMORY)
        if code is None or code < 0 or code == INTERRUPTED:
            return self._death(job, code)
        return self._unexplained(code)

    def _death(self, job: Job, code: int | None) -> Ending:
        """Nobody here ended it: it goes on from its checkpoint, unless that has come to nothing too often."""
        deaths = 1 if self.seen.checkpoint > job.died_at_step else job.deaths + 1
        facts: dict[str, Any] = {"deaths": deaths, "died_at_step": self.seen.checkpoint}
        logger.warning("training process died", extra=facts | {"job": job.id, "exit_code": code})
        if deaths < MOST_DEATHS:
            return "queued", facts
        status, changes = self._given_up(code)
        return status, facts | changes

    def _given_up(self, code: int | None) -> Ending:
        killed = code == -signal.SIGKILL and out_of_memory_kills() > self._memory_kills
        if killed or self._memory_ran_out():
            return failure("out_of_memory", events.OUT_OF_MEMORY)
        how = f"by {signal.Signals(-code).name}" if code and code < 0 else "from outside"
        reason = f"the training process was ended {how}, {MOST_DEATHS} times in a row, before it could get on; "
        return failure("crashed", reason + "its log may say why; start the job again once the cause is gone")

    def _unexplained(self, code: int) -> Ending:
        if self._memory_ran_out():
            return failure("out_of_memory", events.OUT_OF_MEMORY)
        lines = log_end(self._folder).strip().splitlines()
        words = f": {lines[-1][:300]}" if lines else ""
        reason = f"the training process ended with exit code {code} and didn't say why{words}; its log may say more"
        return failure("unexpected_exit", reason)

    def _memory_ran_out(self) -> bool:
        return events.WANT_OF_MEMORY.search(log_end(self._folder)) is not None


def told(job: Job, end: events.Decided | events.Failed | None) -> Ending | None:
    """What follows from how a run says that it ended; None where it doesn't say, and a process may go on with it."""
    match end:
        case events.Decided(result=result):
            return "succeeded", {"result": result}
        case _ if job.wanted == "cancel":
            return "cancelled", {}
        case events.Failed(code=name, message=message):
            return failure(name, message)
    return None


def failure(code: str, message: str) -> Ending:
    return "failed", {"error": Error(code=code, message=message).model_dump()}


def log_end(folder: Path, size: int = 4096) -> str:
    try:
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - size))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""


def _progress(event: events.Progress | events.Phase) -> Progress:
    facts = event.model_dump(include=set(Progress.model_fields))
    return Progress.model_validate({"phase": "training"} | facts)
