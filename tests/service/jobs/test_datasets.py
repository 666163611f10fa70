"""Data sets on disk: real checks by real child processes."""

import asyncio
import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest

from service.errors import (
    CheckFailed,
    DatasetInUse,
    DatasetNotFound,
    DatasetRefused,
    DeadlineExceeded,
    DiskFull,
    QueueFull,
    StateUnwritable,
)
from service.jobs import datasets
from service.jobs.datasets import DATA, REPORT, DatasetStore, Limits, _failure
from tests.service.jobs.uploading import receive
from tests.tiny import pictures, zipped

T = TypeVar("T")

LIMITS = Limits(uploads=4, checks=2, seconds=60, memory_bytes=2**31)
PETS = zipped(pictures("cat", "dog"))
MANY = zipped(pictures("cat", "dog", count=1500))


async def chunks(content: bytes, size: int = 2**16) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@pytest.fixture
def new_store(tmp_path: Path, artifacts: Path) -> Callable[..., DatasetStore]:
    def new_store(in_use: Callable[[str], bool] = lambda _: False, **limits: float) -> DatasetStore:
        return DatasetStore(tmp_path / "state" / "datasets", artifacts, replace(LIMITS, **limits), in_use)

    return new_store


@pytest.fixture
def store(new_store: Callable[..., DatasetStore]) -> DatasetStore:
    return new_store()


def run(store: DatasetStore, work: Callable[[], Awaitable[T]]) -> T:
    """Within an open store."""

    async def main() -> T:
        async with store.open():
            return await work()

    return asyncio.run(main())


def left(store: DatasetStore) -> list[str]:
    """What lies in the folder beside the data sets and the lock."""
    return sorted(name for name in os.listdir(store.folder) if not name.startswith("ds-") and name != ".lock")


def children_of(store: DatasetStore) -> list[int]:
    """Processes that check something in this folder."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and str(store.folder).encode() in (process / "cmdline").read_bytes():
                found.append(int(process.name))
    return found


def test_what_is_received_is_checked_and_kept(store: DatasetStore) -> None:
    async def main() -> None:
        record = await receive(store, chunks(PETS), model="greys@1", filename="pets")
        assert (record.is_new, record.id, record.report.name, record.report.images) == (
            True,
            record.report.id,
            "pets",
            20,
        )
        assert record.report.base is not None
        assert store.path(record.id) == store.folder / record.id / DATA
        assert sorted(os.listdir(store.folder / record.id)) == [DATA, REPORT]
        assert await store.get(record.id) == replace(record, is_new=False)
        assert await store.list() == [replace(record, is_new=False)]
        assert left(store) == []

    run(store, main)


def test_the_same_pictures_are_one_data_set_with_the_newest_report(store: DatasetStore) -> None:
    async def main() -> None:
        first = await receive(store, chunks(PETS), filename="first")
        again = await receive(store, chunks(PETS), filename="again", model="greys@1")
        assert (first.is_new, again.is_new, first.id, first.created_at) == (True, False, again.id, again.created_at)
        assert (await store.get(first.id)).report == again.report
        assert [record.report.name for record in await store.list()] == ["again"]

    run(store, main)


def test_two_uploads_of_the_same_at_once_are_one(store: DatasetStore) -> None:
    async def main() -> None:
        records = await asyncio.gather(*(receive(store, chunks(PETS), filename="pets") for _ in range(3)))
        assert sorted(record.is_new for record in records) == [False, False, True]
        assert {record.id for record in records} == {(await store.list())[0].id}
        assert left(store) == []

    run(store, main)


def test_an_upload_while_the_same_is_being_deleted_ends_well(store: DatasetStore) -> None:
    async def main() -> None:
        record = await receive(store, chunks(PETS))
        kept = store.folder / record.id

        async def delete_all_the_time() -> int:
            count = 0
            while True:
                with suppress(DatasetNotFound):
                    await store.delete(record.id)
                    count += 1
                await asyncio.sleep(0)

        deleting = asyncio.create_task(delete_all_the_time())
        for _ in range(2):
            assert (await receive(store, chunks(PETS))).id == record.id
        deleting.cancel()
        with suppress(asyncio.CancelledError):
            await deleting
        last = await receive(store, chunks(PETS))
        assert sorted(os.listdir(kept)) == [DATA, REPORT]
        assert (await store.get(last.id)).report == last.report
        assert left(store) == []

    run(store, main)


def test_where_it_was_deleted_in_the_middle_it_takes_its_place(store: DatasetStore, tmp_path: Path) -> None:
    """The moment between finding the place taken and renewing the report, held still."""

    async def main() -> None:
        record = await receive(store, chunks(PETS))
        async with store.uploading() as upload:
            await upload.begin_archive()
            await upload.write(PETS)
            upload.close()
            await store._run_check(upload, ["--name=again"])
            rename = os.rename

            def rename_and_delete(source: Path, place: Path) -> None:
                try:
                    rename(source, place)
                except OSError:
                    rename(place, tmp_path / "gone")
                    raise

            os.rename = rename_and_delete
            try:
                kept = store._keep(upload.folder)
            finally:
                os.rename = rename
        assert (kept.is_new, kept.id, kept.report.name) == (True, record.id, "again")
        assert sorted(os.listdir(store.folder / record.id)) == [DATA, REPORT]

    run(store, main)


def test_a_data_set_that_a_job_uses_is_not_deleted(new_store: Callable[..., DatasetStore]) -> None:
    used: set[str] = set()
    store = new_store(in_use=used.__contains__)

    async def main() -> None:
        record = await receive(store, chunks(PETS))
        used.add(record.id)
        with pytest.raises(
            DatasetInUse, match=f"^data set {record.id} is used by a job; wait for it, or cancel it first$"
        ):
            await store.delete(record.id)
        used.clear()
        await store.delete(record.id)
        for ask in (store.get, store.delete):
            with pytest.raises(DatasetNotFound):
                await ask(record.id)
        assert (await store.list(), left(store)) == ([], [])

    run(store, main)


@pytest.mark.parametrize("name", ["ds-0123456789abcdef", "../datasets", "ds-", ".lock", "ds-0123456789abcdeg", ""])
def test_a_data_set_that_is_not_there_is_not_found(store: DatasetStore, name: str) -> None:
    with pytest.raises(DatasetNotFound, match=r"^there is no data set .*; GET /datasets lists those that there are$"):
        store.path(name)


# --- refusals and failures --------------------------------------------------------------------------------------------


def refused(store: DatasetStore, content: bytes) -> Exception:
    """The error of an upload that leaves nothing behind."""

    async def main() -> Exception:
        with pytest.raises(Exception) as found:  # noqa: PT011
            await receive(store, chunks(content))
        return found.value

    error = run(store, main)
    assert (left(store), list(store.folder.glob("ds-*")), children_of(store)) == ([], [], [])
    return error


def test_a_refusal_of_the_check_is_passed_on_with_its_facts(store: DatasetStore) -> None:
    error = refused(store, zipped(pictures("cat", count=30)))
    assert (type(error), str(error), error.facts) == (
        DatasetRefused,
        "only one class, 'cat'; a classifier needs at least 2, a folder each",
        {"reason": "too_few_classes", "classes": 1, "limit": 2},
    )


def test_a_check_that_takes_too_long_is_stopped(new_store: Callable[..., DatasetStore]) -> None:
    error = refused(new_store(seconds=0.3), MANY)
    assert (type(error), str(error), error.facts) == (
        DeadlineExceeded,
        "checking the data set takes more than 0.3 s (SAFELIGHT_DATASET_SECONDS); send fewer or smaller pictures",
        {"stage": "check"},
    )


def test_a_data_set_that_a_job_is_about_to_be_made_for_is_deleted_before_or_not_at_all(
    new_store: Callable[..., DatasetStore],
) -> None:
    used: set[str] = set()
    first, second = new_store(in_use=used.__contains__), new_store(in_use=used.__contains__)

    async def main() -> None:
        record = await receive(first, chunks(PETS))
        async with second.open():
            with first.holding(record.id):
                deleting = asyncio.create_task(second.delete(record.id))
                while not waits_for(first.folder / record.id):
                    await asyncio.sleep(0.01)
                used.add(record.id)
            with pytest.raises(DatasetInUse):
                await deleting
            used.clear()
            await second.delete(record.id)
        with pytest.raises(DatasetNotFound, match=rf"^data set {record.id} was deleted in this moment; send its "):
            held(first, record.id)

    run(first, main)


def test_who_waited_for_a_deletion_gets_the_data_set_that_came_again(store: DatasetStore) -> None:
    async def main() -> None:
        record = await receive(store, chunks(PETS))
        place = store.folder / record.id
        with store._locked(record.id, fcntl.LOCK_EX):
            holding = asyncio.create_task(asyncio.to_thread(held, store, record.id))
            while not waits_for(place):
                await asyncio.sleep(0.01)
            place.rename(store.folder / ".deleted-by-hand")
            again = await receive(store, chunks(PETS))
        assert await holding == place.stat().st_ino
        assert again.is_new

    run(store, main)


def held(store: DatasetStore, dataset: str) -> int:
    with store.holding(dataset):
        return (store.folder / dataset).stat().st_ino


def waits_for(place: Path) -> bool:
    """Whether somebody waits for a lock on it."""
    waiting = [line for line in Path("/proc/locks").read_text().splitlines() if "-> FLOCK" in line]
    return any(line.split()[6].endswith(f":{place.stat().st_ino}") for line in waiting)


def test_a_check_that_is_killed_is_our_failure_and_not_the_data_s(store: DatasetStore) -> None:
    async def main() -> None:
        upload = asyncio.create_task(receive(store, chunks(MANY)))
        while not (children := children_of(store)):
            await asyncio.sleep(0.01)
        os.kill(children[0], signal.SIGKILL)
        with pytest.raises(
            CheckFailed, match=r"^the check of the data set was killed by signal 9; the log has more\. Noth"
        ):
            await upload

    run(store, main)
    assert left(store) == []


def test_whoever_leaves_takes_the_check_along(store: DatasetStore) -> None:
    async def main() -> None:
        upload = asyncio.create_task(receive(store, chunks(MANY)))
        while not children_of(store):
            await asyncio.sleep(0.01)
        upload.cancel()
        with pytest.raises(asyncio.CancelledError):
            await upload
        assert (children_of(store), left(store)) == ([], [])

    run(store, main)


def test_a_killed_service_leaves_no_check_and_the_next_clears_up(
    tmp_path: Path, new_store: Callable[..., DatasetStore]
) -> None:
    (tmp_path / "many.zip").write_bytes(MANY)
    program = f"""
import asyncio
from pathlib import Path
from service.jobs.datasets import DatasetStore, Limits
from tests.service.jobs.uploading import receive
async def chunks():
    yield Path({str(tmp_path / "many.zip")!r}).read_bytes()
async def main():
    store = DatasetStore(Path({str(tmp_path / "state" / "datasets")!r}), Path("artifacts"), {LIMITS!r}, lambda _: False)
    async with store.open():
        await receive(store, chunks())
asyncio.run(main())
"""
    store = new_store()
    with subprocess.Popen([sys.executable, "-c", program]) as service:
        while not [child for child in children_of(store) if child != service.pid]:
            assert service.poll() is None
        service.kill()
    assert left(store) != []

    while children_of(store):
        time.sleep(0.01)

    async def main() -> None:
        assert left(store) == []

    run(store, main)


def test_a_second_process_leaves_the_first_one_s_uploads_alone(new_store: Callable[..., DatasetStore]) -> None:
    first, second = new_store(), new_store()

    async def main() -> None:
        async with first.uploading() as upload, second.open():
            assert upload.folder.is_dir()

    run(first, main)


def test_beyond_the_limit_uploads_are_sent_away(new_store: Callable[..., DatasetStore]) -> None:
    store = new_store(uploads=1)

    async def main() -> None:
        async with store.uploading():
            with pytest.raises(QueueFull) as found:
                await receive(store, chunks(PETS))
        assert (str(found.value), found.value.facts, found.value.retry_after) == (
            "as many data sets as may be, 1 (SAFELIGHT_DATASET_UPLOADS), are being received or checked; try again in a "
            "while",
            {"limit": 1},
            10.0,
        )
        assert (await receive(store, chunks(PETS))).is_new

    run(store, main)


@pytest.mark.parametrize("size", [3_000_000, 1_200_000], ids=["while-receiving", "while-checking"])
def test_a_full_disk_is_said_so_and_nothing_is_left(
    small_disk: Callable[[Path, str], Path], store: DatasetStore, size: int
) -> None:
    disk = small_disk(store.folder.parent, "2m")
    files = {name: content + bytes(size // 20) for name, content in pictures("cat", "dog").items()}
    error = refused(store, zipped(files))
    assert (type(error), str(error)) == (
        DiskFull,
        "there is no room for this data set in the state folder; delete data sets that nobody needs, or let "
        "SAFELIGHT_STATE be on a larger disk",
    )
    assert sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) == 0


def test_a_folder_that_cannot_be_written_is_said_so(read_only: Callable[[Path], Path], store: DatasetStore) -> None:
    read_only(store.folder.parent)
    with pytest.raises(StateUnwritable, match="^the state folder can't be written: Read-only file system; see to "):
        run(store, lambda: receive(store, chunks(PETS)))


def test_a_file_in_the_folder_s_place_matters_once_it_is_used(store: DatasetStore) -> None:
    store.folder.parent.mkdir()
    store.folder.write_text("not a folder")

    async def main() -> None:
        assert await store.list() == []
        with pytest.raises(StateUnwritable, match="^the state folder can't be written: File exists; see to "):
            await receive(store, chunks(PETS))

    run(store, main)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"code": "disk_full", "message": "x"}, DiskFull),
        ({"code": "os_error", "message": "x"}, CheckFailed),
        ({"code": "archive_unsafe", "message": "x", "entry": "y"}, DatasetRefused),
    ],
)
def test_the_last_line_of_a_check_says_what_went_wrong(said: dict[str, str], expected: type[Exception]) -> None:
    assert type(_failure(1, b"noise\n" + json.dumps(said).encode() + b"\n", b"")) is expected
    assert type(_failure(-9, b"", b"")) is CheckFailed
    assert type(_failure(2, b"no json", b"usage")) is CheckFailed


def test_other_errors_of_the_disk_are_not_a_full_one() -> None:
    with pytest.raises(StateUnwritable), datasets._disk_errors():
        raise OSError(errno.EROFS, "Read-only file system")
