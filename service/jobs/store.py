"""Jobs in a database. Each change is one transaction that holds only if the job is still as it was seen.

Two services may share a database: each takes the jobs of its own home only, and what one of them asks for, as a
cancellation, the other sees.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row, and_, delete, func, insert, or_, select, update
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, NoSuchModuleError

from service.errors import (
    DatabaseUnavailable,
    JobNotFound,
    JobsFull,
    JobStateConflict,
    KeyInUse,
    KeyReused,
)
from service.jobs import tables
from service.jobs.home import home
from service.jobs.job import AT_WORK, FOLLOWING, TERMINAL, Builtin, Job, Order, Pictures, Status, Wish, new_id
from service.telemetry import logger

KEYS_KEPT = timedelta(hours=24)

_jobs, _keys = tables.jobs.c, tables.idempotency_keys.c


class JobMoved(Exception):
    """The job is no longer as it was seen: in another state, or something else is wanted of it."""


@dataclass(frozen=True)
class Due:
    """A job that its home's runner has something to do with."""

    id: str
    status: Status
    wanted: Wish | None


class JobStore:
    """Every method is one transaction and may wait for the disk: call it in a thread. Raises DatabaseUnavailable."""

    def __init__(self, url: str, home: str) -> None:
        self.home = home
        with _reachable():
            self._engine = tables.open_database(url)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with _reachable(), self._engine.begin() as connection:
            yield connection

    # --- making and reading ---

    def create(self, order: Order, *, queue_size: int, key: str | None = None) -> Job:
        """Queue a job; with a claimed idempotency key, its answer is settled in the same moment. Raises JobsFull."""
        job = Job(
            **dict(order),
            id=new_id(),
            home=self.home,
            status="queued",
            wanted=None,
            progress=None,
            result=None,
            error=None,
            created_at=datetime.now(UTC),
            started_at=None,
            finished_at=None,
        )
        with self._transaction() as connection:
            tables.be_alone(connection)  # else two might both find the last place free
            waiting = connection.scalar(select(func.count()).where(_jobs.home == self.home, _jobs.status == "queued"))
            if (waiting or 0) >= queue_size:
                raise JobsFull(
                    f"{queue_size} jobs are waiting; the limit is {queue_size} (SAFELIGHT_QUEUED_JOBS): "
                    "come back when one is done, or cancel one",
                    limit=queue_size,
                )
            connection.execute(insert(tables.jobs).values(_as_row(job)))
            if key is not None:
                reply = job.model_dump(mode="json")
                connection.execute(update(tables.idempotency_keys).where(_keys.key == key).values(reply=reply))
        logger.info("job", extra={"job": job.id, "status": job.status, "model": job.model, "into": job.name})
        return job

    def get(self, job_id: str) -> Job:
        """Raises JobNotFound."""
        with self._transaction() as connection:
            row = connection.execute(select(tables.jobs).where(_jobs.id == job_id)).first()
        if row is None:
            raise _no_job(job_id)
        return _as_job(row)

    def page(self, *, limit: int, after: str | None = None, status: Status | None = None) -> tuple[list[Job], bool]:
        """The newest jobs, or those before `after`; and whether there are more."""
        query = select(tables.jobs).order_by(_jobs.id.desc()).limit(limit + 1)
        if after is not None:
            query = query.where(_jobs.id < after)
        if status is not None:
            query = query.where(_jobs.status == status)
        with self._transaction() as connection:
            found = [_as_job(row) for row in connection.execute(query)]
        return found[:limit], len(found) > limit

    def counts(self) -> dict[Status, int]:
        """How many of this home's jobs are in each state."""
        query = select(_jobs.status, func.count().label("jobs")).where(_jobs.home == self.home).group_by(_jobs.status)
        with self._transaction() as connection:
            found = {row.status: row.jobs for row in connection.execute(query)}
        return {status: found.get(status, 0) for status in FOLLOWING}

    def uses(self, dataset: str) -> bool:
        """Whether a job of this home that isn't over needs a data set: other homes have copies of their own."""
        needs_it = and_(_jobs.home == self.home, _jobs.dataset == dataset, _jobs.status.not_in(TERMINAL))
        query = select(_jobs.id).where(needs_it).limit(1)
        with self._transaction() as connection:
            return connection.execute(query).first() is not None

    # --- what a client asks of a job ---

    def cancel(self, job_id: str) -> Job:
        """At once where it waits; where it runs, as soon as its process has stopped. Raises JobStateConflict."""
        return self._ask(job_id, "cancel", "cancelled", ("queued", "paused"))

    def pause(self, job_id: str) -> Job:
        return self._ask(job_id, "pause", "paused", ("queued",))

    def resume(self, job_id: str) -> Job:
        job = self.get(job_id)
        try:
            if job.status == "paused":
                return self.move(job, "queued")
        except JobMoved:
            job = self.get(job_id)
        raise JobStateConflict(f"{job_id} is {job.status}; only a paused job can be resumed", job_status=job.status)

    def _ask(self, job_id: str, wish: Wish, status: Status, at_once: Sequence[Status]) -> Job:
        while True:
            job = self.get(job_id)
            if job.wanted == "cancel" and wish == "pause":
                raise _cannot(job, wish)
            try:
                if job.status in at_once:
                    return self.move(job, status)
                if job.status in AT_WORK:
                    return self._change(job, as_asked=True, wanted=wish)
            except JobMoved:
                continue  # it went on between the two; what is asked may be possible all the same
            raise _cannot(job, wish)

    # --- what the runner does ---

    def due(self, with_process: Sequence[str] = ()) -> list[Due]:
        """This home's jobs that wait or are at work, oldest first; and those that a process is kept for."""
        query = select(_jobs.id, _jobs.status, _jobs.wanted).order_by(_jobs.id)
        due = or_(_jobs.status.in_(["queued", *AT_WORK]), _jobs.id.in_(with_process))
        query = query.where(_jobs.home == self.home, due)
        with self._transaction() as connection:
            return [Due(*row) for row in connection.execute(query)]

    def move(self, job: Job, status: Status, **changes: Any) -> Job:
        """The one way into another state. Raises JobMoved where the job isn't as given any more.

        What was asked of it meanwhile is no hindrance, but for a pause: that would forget a cancellation.
        """
        if status not in FOLLOWING[job.status]:
            raise ValueError(f"a job never goes from {job.status} to {status}")
        if status == "paused" and job.wanted == "cancel":
            raise ValueError("a job that is being cancelled is never paused")
        now = datetime.now(UTC)
        if status == "validating" and job.started_at is None:
            changes["started_at"] = now
        if status in TERMINAL:
            changes["finished_at"] = now
        if status not in ("queued", *AT_WORK):
            changes["wanted"] = None
        moved = self._change(job, as_asked=status == "paused", status=status, **changes)
        logger.info("job", extra={"job": job.id, "status": status, "before": job.status} | _reason(moved))
        return moved

    def note(self, job: Job, **changes: Any) -> Job:
        """Write down how far it is; its state stays. Raises JobMoved."""
        return self._change(job, **changes)

    def _change(self, job: Job, *, as_asked: bool = False, **changes: Any) -> Job:
        """`as_asked`: only where nothing else is wanted of it than when it was seen."""
        as_seen = [_jobs.id == job.id, _jobs.status == job.status]
        if as_asked:
            as_seen.append(_jobs.wanted.is_not_distinct_from(job.wanted))
        with self._transaction() as connection:
            row = connection.execute(update(tables.jobs).where(*as_seen).values(changes).returning(*_jobs)).first()
        if row is None:
            raise JobMoved(job.id)
        return _as_job(row)

    # --- clearing away ---

    def to_clear(self, failed_before: datetime) -> list[str]:
        """Jobs of this home that are over and whose checkpoints nobody needs: of failed ones, only the old."""
        over = or_(
            _jobs.status.in_(["succeeded", "cancelled"]),
            and_(_jobs.status == "failed", _jobs.finished_at < failed_before),
        )
        query = select(_jobs.id).where(_jobs.home == self.home, _jobs.cleared.is_(False), over)
        with self._transaction() as connection:
            return list(connection.scalars(query))

    def cleared(self, job_id: str) -> None:
        with self._transaction() as connection:
            connection.execute(update(tables.jobs).where(_jobs.id == job_id).values(cleared=True))

    def expired(self, before: datetime) -> list[str]:
        """Jobs of this home that were over before then."""
        query = select(_jobs.id).where(_jobs.home == self.home, _jobs.finished_at < before)
        with self._transaction() as connection:
            return list(connection.scalars(query))

    def forget(self, job_id: str) -> None:
        with self._transaction() as connection:
            connection.execute(delete(tables.jobs).where(_jobs.id == job_id, _jobs.status.in_(TERMINAL)))

    # --- idempotency keys ---

    def claim(self, key: str, fingerprint: str, longest: timedelta) -> dict[str, Any] | None:
        """The answer that this very request got before, or None: then it's for the caller to answer.

        A claim that is older than the `longest` that an answer may take is of a service that died before it could.
        Raises KeyReused for another request with the same key, KeyInUse while the first is being answered.
        """
        now = datetime.now(UTC)
        stale = or_(
            _keys.claimed_at < now - KEYS_KEPT,
            and_(_keys.claimed_at < now - longest, _keys.reply.is_(None)),
        )
        try:
            with self._transaction() as connection:
                connection.execute(delete(tables.idempotency_keys).where(stale))
                row = {"key": key, "fingerprint": fingerprint, "claimed_at": now}
                connection.execute(insert(tables.idempotency_keys).values(row))
        except IntegrityError:
            return self._replay(key, fingerprint)
        return None

    def _replay(self, key: str, fingerprint: str) -> dict[str, Any] | None:
        query = select(_keys.fingerprint, _keys.reply).where(_keys.key == key)
        with self._transaction() as connection:
            row = connection.execute(query).first()
        if row is None or (row.fingerprint == fingerprint and row.reply is None):
            raise KeyInUse("the first request with this Idempotency-Key is still being answered; ask again in a moment")
        if row.fingerprint != fingerprint:
            raise KeyReused("this Idempotency-Key came with another request before; take a new key for a new request")
        return dict(row.reply)

    def release(self, key: str) -> None:
        """Give a claimed key back: its request was refused, and may come again."""
        with self._transaction() as connection:
            connection.execute(delete(tables.idempotency_keys).where(_keys.key == key, _keys.reply.is_(None)))


def open_store(state: Path, url: str | None = None) -> JobStore:
    """The jobs of a state folder: in a file there, or in the database of the url. Raises StateUnwritable too."""
    name = home(state)
    return JobStore(url or f"sqlite:///{state.resolve() / 'jobs.db'}", name)


@contextmanager
def _reachable() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except DBAPIError as error:
        reason = str(error.orig).strip().partition("\n")[0]
        raise DatabaseUnavailable(f"the database of jobs can't be used: {reason}; try again in a moment") from error
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        raise DatabaseUnavailable(f"SAFELIGHT_DATABASE_URL can't be used: {error}") from error


def _as_row(job: Job) -> dict[str, Any]:
    """A job as its columns."""
    columns = dict(job)
    if isinstance(job.dataset, Builtin):
        columns |= {"dataset": job.dataset.builtin, "dataset_limit": job.dataset.limit}
    return columns


def _as_job(row: Row[Any]) -> Job:
    columns = dict(row._mapping)
    del columns["cleared"]
    name, limit = columns.pop("dataset"), columns.pop("dataset_limit")
    dataset: Pictures = name if name.startswith("ds-") else Builtin(builtin=name, limit=limit)
    return Job(**columns, dataset=dataset)


def _reason(job: Job) -> dict[str, str]:
    return {"code": job.error.code, "reason": job.error.message} if job.error else {}


def _no_job(job_id: str) -> JobNotFound:
    return JobNotFound(f"there is no job {job_id[:80]!r}; GET /train lists those that there are")


def _cannot(job: Job, wish: Wish) -> JobStateConflict:
    state = "being cancelled" if job.wanted == "cancel" else job.status
    rule = {
        "cancel": "only a job that isn't over can be cancelled",
        "pause": "only a job that waits or runs can be paused",
    }
    return JobStateConflict(f"{job.id} is {state}; {rule[wish]}", job_status=job.status)
