"""Jobs in the database: the same tests on SQLite and PostgreSQL."""

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, settings, strategies
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from service.errors import (
    DatabaseUnavailable,
    JobNotFound,
    JobsFull,
    JobStateConflict,
    KeyInUse,
    KeyReused,
    ServiceError,
)
from service.jobs.job import AT_WORK, FOLLOWING, TERMINAL, Builtin, Job, Status
from service.jobs.store import Due, JobMoved, JobStore
from tests.service.jobs.conftest import Hesitant, order

Open = Callable[..., JobStore]
MINUTE = timedelta(minutes=1)


def create(jobs: JobStore, **changes: object) -> Job:
    return jobs.create(order(**changes), queue_size=10_000)


def in_state(jobs: JobStore, status: Status) -> Job:
    """A job that came to a state by legal ways."""
    ways: dict[Status, list[Status]] = {
        "queued": [],
        "validating": ["validating"],
        "running": ["validating", "running"],
        "paused": ["paused"],
        "succeeded": ["validating", "running", "succeeded"],
        "failed": ["validating", "failed"],
        "cancelled": ["cancelled"],
    }
    job = create(jobs)
    for step in ways[status]:
        job = jobs.move(job, step)
    return job


def test_a_job_is_read_back_as_it_was_made(jobs: JobStore) -> None:
    before = datetime.now(UTC)
    job = create(
        jobs, dataset={"builtin": "cifar10", "limit": 2000}, recipe={"epochs": 2.5}, seed=2**53, metadata={"for": "Ä"}
    )
    assert before <= job.created_at <= datetime.now(UTC)
    assert jobs.get(job.id) == job
    assert job.model_dump() == {
        "id": job.id,
        "status": "queued",
        "wanted": None,
        "model": "greys",
        "version": "1",
        "name": "shades",
        "dataset": {"builtin": "cifar10", "limit": 2000},
        "seed": 2**53,
        "promote": "if_better",
        "recipe": {"epochs": 2.5},
        "metadata": {"for": "Ä"},
        "progress": None,
        "result": None,
        "error": None,
        "created_at": job.created_at,
        "started_at": None,
        "finished_at": None,
    }


def test_times_are_utc_and_written_once(jobs: JobStore) -> None:
    job = in_state(jobs, "running")
    assert job.started_at is not None
    assert job.started_at.utcoffset() == timedelta(0)
    again = jobs.move(jobs.move(job, "queued"), "validating")
    assert (again.started_at, again.finished_at) == (job.started_at, None)
    failed = jobs.move(again, "failed", error={"code": "diverged", "message": "so it did"})
    assert failed.finished_at is not None
    assert failed.created_at <= failed.started_at <= failed.finished_at  # type: ignore[operator]
    assert jobs.get(job.id) == failed


def test_a_job_that_does_not_exist(jobs: JobStore) -> None:
    with pytest.raises(JobNotFound, match="there is no job 'job-0'; GET /train lists those that there are"):
        jobs.get("job-0")


def test_what_is_no_number_is_kept_as_nothing(jobs: JobStore) -> None:
    job = jobs.note(in_state(jobs, "running"), progress={"phase": "training", "step": 1, "steps": 2, "loss": math.nan})
    assert job.progress is not None
    assert job.progress.loss is None


# --- states ---


@pytest.mark.parametrize("before", get_args(Status))
def test_only_legal_transitions_are_made(jobs: JobStore, before: Status) -> None:
    for after in get_args(Status):
        job = in_state(jobs, before)
        if after in FOLLOWING[before]:
            assert jobs.move(job, after).status == jobs.get(job.id).status == after
        else:
            with pytest.raises(ValueError, match=f"a job never goes from {before} to {after}"):
                jobs.move(job, after)
            assert jobs.get(job.id).status == before


def test_a_job_is_moved_only_from_the_state_that_it_was_seen_in(jobs: JobStore) -> None:
    seen = create(jobs)
    jobs.move(seen, "validating")
    with pytest.raises(JobMoved):
        jobs.move(seen, "cancelled")
    assert jobs.get(seen.id).status == "validating"


def test_two_services_can_not_both_take_a_job(open_store: Open) -> None:
    stores = [open_store() for _ in range(4)]
    seen = [create(stores[0]) for _ in range(10)]
    together = threading.Barrier(4)

    def take_all(jobs: JobStore) -> int:
        together.wait()
        taken = 0
        for job in seen:
            try:
                jobs.move(job, "validating")
                taken += 1
            except JobMoved:
                pass
        return taken

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(take_all, stores)) == 10


def test_a_service_is_due_to_do_the_jobs_of_its_own_home_only(open_store: Open) -> None:
    here, there = open_store("here"), open_store("there")
    first, second = create(here), in_state(here, "running")
    create(there)
    for over in ("paused", "succeeded", "failed", "cancelled"):
        in_state(here, over)
    assert here.due() == [Due(first.id, "queued", None), Due(second.id, "running", None)]
    assert there.cancel(first.id).status == "cancelled"
    assert there.cancel(second.id).status == "running"
    assert here.due() == [Due(second.id, "running", "cancel")]


CANCEL = "only a job that isn't over can be cancelled"
PAUSE = "only a job that waits or runs can be paused"
RESUME = "only a paused job can be resumed"


@pytest.mark.parametrize(
    ("ask", "at_once", "soon", "rule"),
    [
        ("cancel", {"queued": "cancelled", "paused": "cancelled"}, AT_WORK, CANCEL),
        ("pause", {"queued": "paused"}, AT_WORK, PAUSE),
        ("resume", {"paused": "queued"}, set(), RESUME),
    ],
)
def test_what_a_client_may_ask(
    jobs: JobStore, ask: str, at_once: dict[Status, Status], soon: set[Status], rule: str
) -> None:
    for status in get_args(Status):
        job = in_state(jobs, status)
        if status in at_once or status in soon:
            asked = getattr(jobs, ask)(job.id)
            assert (asked.status, asked.wanted) == (at_once.get(status, status), ask if status in soon else None)
            assert jobs.get(job.id) == asked
        else:
            with pytest.raises(JobStateConflict, match=f"{job.id} is {status}; {rule}") as conflict:
                getattr(jobs, ask)(job.id)
            assert conflict.value.facts == {"job_status": status}
            assert jobs.get(job.id) == job


def test_a_pause_may_become_a_cancellation_but_not_the_other_way_round(jobs: JobStore) -> None:
    job = in_state(jobs, "running")
    assert jobs.pause(job.id).wanted == "pause"
    assert jobs.pause(job.id).wanted == "pause"
    assert jobs.cancel(job.id).wanted == "cancel"
    with pytest.raises(JobStateConflict, match=f"{job.id} is being cancelled; {PAUSE}"):
        jobs.pause(job.id)


@pytest.mark.parametrize("status", sorted(AT_WORK))
def test_a_cancellation_is_not_lost_to_a_pause_that_was_about_to_be_noted(jobs: JobStore, status: Status) -> None:
    job = in_state(jobs, status)
    seen = jobs.pause(job.id)
    jobs.cancel(job.id)
    with pytest.raises(JobMoved):
        jobs.move(seen, "paused")
    cancelling = jobs.get(job.id)
    with pytest.raises(ValueError, match="a job that is being cancelled is never paused"):
        jobs.move(cancelling, "paused")
    assert jobs.get(job.id) == cancelling
    assert (cancelling.status, cancelling.wanted) == (status, "cancel")
    assert jobs.move(seen, "cancelled").status == "cancelled"


def test_a_lost_job_that_is_being_cancelled_can_not_be_paused(jobs: JobStore) -> None:
    jobs.cancel((job := in_state(jobs, "running")).id)
    lost = jobs.move(job, "queued")
    with pytest.raises(JobStateConflict, match=f"{job.id} is being cancelled; {PAUSE}"):
        jobs.pause(job.id)
    assert jobs.get(job.id) == lost
    assert jobs.cancel(job.id).status == "cancelled"


@pytest.mark.parametrize(("first", "second"), [("cancel", "pause"), ("pause", "cancel")])
def test_of_two_that_ask_at_once_the_one_who_cancels_is_heard(database: str, first: str, second: str) -> None:
    with closing(JobStore(database, "here")) as jobs, closing(Hesitant(database, "here")) as slow:
        job = in_state(jobs, "running")
        slow.meanwhile = lambda seen: seen.wanted or getattr(jobs, first)(seen.id)
        with suppress(JobStateConflict):
            getattr(slow, second)(job.id)
        assert jobs.get(job.id).wanted == "cancel"


def test_what_was_asked_is_remembered_by_a_job_whose_process_was_lost_and_forgotten_once_done(jobs: JobStore) -> None:
    jobs.pause((job := in_state(jobs, "running")).id)
    lost = jobs.move(jobs.get(job.id), "queued")
    assert (lost.status, lost.wanted) == ("queued", "pause")
    paused = jobs.move(lost, "paused")
    assert (paused.status, paused.wanted) == ("paused", None)


class Life(RuleBasedStateMachine):
    """Any sequence of calls, by the runner and by clients of two services on one database."""

    jobs: JobStore
    other: JobStore
    pictures = Bundle("pictures")  # of jobs, as they were once seen

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[str, Status] = {}
        self.cancelled: set[str] = set()  # a client was told so

    @initialize(target=pictures)
    def one_waits(self) -> Job:
        job = create(self.jobs)
        self.states[job.id] = job.status
        return job

    @initialize(target=pictures)
    def one_is_at_work(self) -> Job:
        return self.jobs.move(self.one_waits(), "validating")

    @rule(seen=pictures, ask=strategies.sampled_from(["cancel", "pause", "resume"]))
    def ask(self, seen: Job, ask: str) -> None:
        with suppress(ServiceError):
            getattr(self.other, ask)(seen.id)
            if ask == "cancel":
                self.cancelled.add(seen.id)

    @rule(seen=pictures, to=strategies.sampled_from(get_args(Status)))
    def move(self, seen: Job, to: Status) -> None:
        """By one whose picture of the job may be an old one."""
        with suppress(JobMoved, ValueError):
            self.jobs.move(seen, to)

    @rule(target=pictures, seen=pictures)
    def look_again(self, seen: Job) -> Job:
        return self.jobs.get(seen.id)

    @invariant()
    def no_transition_was_illegal(self) -> None:
        for job, before in self.states.items():
            after = self.jobs.get(job).status
            assert after == before or after in FOLLOWING[before]
            self.states[job] = after

    @invariant()
    def what_is_to_be_cancelled_is_never_paused(self) -> None:
        for job in self.cancelled:
            assert self.jobs.get(job).status != "paused"


def test_no_sequence_of_calls_makes_an_illegal_transition_or_forgets_a_cancellation(open_store: Open) -> None:
    class OnThisDatabase(Life):
        jobs, other = open_store("here"), open_store("there")

    quick = settings(
        max_examples=40, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    run_state_machine_as_test(OnThisDatabase, settings=quick)


def test_terminal_states_are_those_that_nothing_follows() -> None:
    assert {"succeeded", "failed", "cancelled"} == TERMINAL
    assert not AT_WORK & TERMINAL


# --- lists ---


def test_jobs_are_listed_newest_first_page_by_page(jobs: JobStore) -> None:
    made = [create(jobs) for _ in range(5)][::-1]
    first, more = jobs.page(limit=2)
    assert (first, more) == (made[:2], True)
    second, more = jobs.page(limit=2, after=first[-1].id)
    assert (second, more) == (made[2:4], True)
    last, more = jobs.page(limit=2, after=second[-1].id)
    assert (last, more) == (made[4:], False)


def test_jobs_are_listed_by_state(jobs: JobStore) -> None:
    waiting, running = create(jobs), in_state(jobs, "running")
    assert jobs.page(limit=9, status="running") == ([running], False)
    assert jobs.page(limit=9, status="queued") == ([waiting], False)
    assert jobs.page(limit=9, status="paused") == ([], False)


def test_jobs_are_counted_by_state(jobs: JobStore) -> None:
    for status in ("queued", "queued", "running", "failed"):
        in_state(jobs, status)
    nothing = dict.fromkeys(get_args(Status), 0)
    assert jobs.counts() == nothing | {"queued": 2, "running": 1, "failed": 1}


def test_a_full_queue_takes_no_more(open_store: Open) -> None:
    here, there = open_store("here"), open_store("there")
    for _ in range(2):
        here.create(order(), queue_size=2)
    with pytest.raises(JobsFull, match="2 jobs are waiting; the limit is 2"):
        here.create(order(), queue_size=2)
    assert here.counts()["queued"] == 2
    there.create(order(), queue_size=2)


def test_a_queue_is_never_overfull_however_many_come_at_once(jobs: JobStore) -> None:
    def post(_: int) -> bool:
        try:
            jobs.create(order(), queue_size=3)
        except JobsFull:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(post, range(24))) == 3
    assert jobs.counts()["queued"] == 3


@pytest.mark.parametrize("status", get_args(Status))
def test_a_data_set_is_in_use_until_its_jobs_are_over(jobs: JobStore, status: Status) -> None:
    in_state(jobs, status)
    assert jobs.uses("ds-1") == (status not in TERMINAL)
    assert not jobs.uses("ds-2")


def test_a_data_set_of_another_home_is_a_copy_of_its_own(open_store: Open) -> None:
    in_state(open_store("there"), "running")
    assert open_store("there").uses("ds-1")
    assert not open_store("here").uses("ds-1")


def test_a_builtin_set_is_read_back_with_its_limit(jobs: JobStore) -> None:
    assert jobs.get(create(jobs, dataset={"builtin": "mnist"}).id).dataset == Builtin(builtin="mnist")


# --- clearing away ---


def test_checkpoints_go_at_once_or_once_a_failure_is_old(open_store: Open) -> None:
    jobs = open_store()
    done, cancelled, failed = (in_state(jobs, status) for status in ("succeeded", "cancelled", "failed"))
    in_state(jobs, "paused"), in_state(jobs, "running")
    in_state(open_store("there"), "succeeded")
    assert set(jobs.to_clear(datetime.now(UTC) - timedelta(days=7))) == {done.id, cancelled.id}
    jobs.cleared(done.id)
    assert set(jobs.to_clear(datetime.now(UTC))) == {cancelled.id, failed.id}


def test_old_jobs_are_forgotten_once_they_are_over(jobs: JobStore) -> None:
    over, running = in_state(jobs, "succeeded"), in_state(jobs, "running")
    assert jobs.expired(datetime.now(UTC) - timedelta(days=1)) == []
    assert jobs.expired(datetime.now(UTC)) == [over.id]
    for job in (over, running):
        jobs.forget(job.id)
    assert jobs.page(limit=9) == ([running], False)


# --- idempotency keys ---


def test_a_key_is_claimed_then_answered_and_answers_again(jobs: JobStore) -> None:
    assert jobs.claim("k", "print", MINUTE) is None
    with pytest.raises(KeyInUse):
        jobs.claim("k", "print", MINUTE)
    with pytest.raises(KeyReused):
        jobs.claim("k", "another", MINUTE)
    job = jobs.create(order(), queue_size=9, key="k")
    jobs.move(job, "validating")
    assert jobs.claim("k", "print", MINUTE) == job.model_dump(mode="json")
    with pytest.raises(KeyReused):
        jobs.claim("k", "another", MINUTE)


def test_a_key_whose_request_was_refused_is_free_again(jobs: JobStore) -> None:
    jobs.claim("k", "print", MINUTE)
    jobs.release("k")
    assert jobs.claim("k", "another", MINUTE) is None
    jobs.create(order(), queue_size=9, key="k")
    jobs.release("k")
    with pytest.raises(KeyReused):
        jobs.claim("k", "print", MINUTE)


def test_a_job_that_finds_no_place_settles_no_key(jobs: JobStore) -> None:
    jobs.claim("k", "print", MINUTE)
    with pytest.raises(JobsFull):
        jobs.create(order(), queue_size=0, key="k")
    with pytest.raises(KeyInUse):
        jobs.claim("k", "print", MINUTE)


@pytest.mark.parametrize(("answered", "kept", "forgotten"), [(True, 23 * 60, 25 * 60), (False, 49, 51)])
def test_keys_are_kept_for_a_day_and_claims_for_as_long_as_an_answer_may_take(
    jobs: JobStore, monkeypatch: pytest.MonkeyPatch, answered: bool, kept: int, forgotten: int
) -> None:
    jobs.claim("k", "print", 50 * MINUTE)
    if answered:
        jobs.create(order(), queue_size=9, key="k")
    now = datetime.now(UTC)

    class Later(datetime):
        minutes = kept

        @classmethod
        def now(cls, tz: object = None) -> datetime:
            return now + timedelta(minutes=cls.minutes)

    monkeypatch.setattr("service.jobs.store.datetime", Later)
    with pytest.raises(KeyReused):
        jobs.claim("k", "another", 50 * MINUTE)
    Later.minutes = forgotten
    assert jobs.claim("k", "another", 50 * MINUTE) is None


def test_of_many_that_claim_a_key_one_gets_it(open_store: Open) -> None:
    stores = [open_store() for _ in range(4)]
    together = threading.Barrier(4)

    def claim(jobs: JobStore) -> bool:
        together.wait()
        try:
            return jobs.claim("k", "print", MINUTE) is None
        except KeyInUse:
            return False

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(claim, stores)) == 1


# --- the database itself ---


def test_several_services_may_open_an_empty_database_at_once(open_store: Open) -> None:
    with ThreadPoolExecutor(4) as pool:
        stores = list(pool.map(open_store, ["here"] * 4))
    create(stores[0])
    assert all(jobs.counts()["queued"] == 1 for jobs in stores)


def test_jobs_survive_the_service(open_store: Open) -> None:
    job = in_state(open_store(), "failed")
    assert open_store("there").get(job.id).model_dump() == job.model_dump()


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("sqlite:////nowhere/at/all/jobs.db", "the database of jobs can't be used: unable to open database file"),
        ("postgresql+psycopg://nobody@/none?host=/nowhere", "the database of jobs can't be used: "),
        ("mysql://x", "SAFELIGHT_DATABASE_URL can't be used: "),
        ("mango://x", "SAFELIGHT_DATABASE_URL can't be used: "),
        ("no url", "SAFELIGHT_DATABASE_URL can't be used: "),
    ],
)
def test_a_database_that_can_not_be_opened_is_one_sentence(url: str, sentence: str) -> None:
    with pytest.raises(DatabaseUnavailable, match=sentence) as error:
        JobStore(url, "here")
    assert "\n" not in str(error.value)


def test_a_database_that_goes_away_is_reported_and_found_again(tmp_path: Path) -> None:
    jobs = JobStore(f"sqlite:///{tmp_path}/jobs.db", "here")
    path = tmp_path / "jobs.db"
    jobs.close()
    content = path.read_bytes()
    path.write_bytes(b"no database at all, but long enough to be taken for one" * 100)
    with pytest.raises(DatabaseUnavailable, match="the database of jobs can't be used: file is not a database"):
        jobs.counts()
    path.write_bytes(content)
    assert jobs.counts()["queued"] == 0
    jobs.close()
