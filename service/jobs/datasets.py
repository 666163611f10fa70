"""Data sets on disk: received, checked in a child process, kept under the digest of their pictures.

`<state>/datasets/<id>/` holds what `training.intake` wrote, and appears and vanishes by rename. An upload has a folder
of its own beside them, which is gone when the request is over, however it ends.
"""

import asyncio
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeVar

from pydantic import ValidationError

from service.errors import (
    CheckFailed,
    DatasetInUse,
    DatasetNotFound,
    DatasetRefused,
    DeadlineExceeded,
    DiskFull,
    QueueFull,
    StateUnwritable,
    TooManyImages,
)
from service.telemetry import logger
from training.dataset_report import Report
from training.events import is_disk_full

DATA = "data.zip"
REPORT = "dataset.json"
UPLOAD = "upload"  # within an incoming folder: what was sent
CHECKED = "checked"  # and what the check made of it

A = TypeVar("A")
R = TypeVar("R")

SUFFIXES = re.compile(r"(\.(zip|tar|tgz|gz|bz2|xz))+$", re.I)
ID = re.compile(r"ds-[0-9a-f]{16}")
MAX_LABELLED = 50_000  # pictures in one form; an archive may have more
RETRY_SECONDS = 10.0  # nobody knows how long the uploads before this one take


@dataclass(frozen=True)
class Limits:
    """What receiving data sets may take; from the settings."""

    uploads: int  # at once
    checks: int  # at once
    seconds: float  # of one check
    memory_bytes: int  # of one check


@dataclass(frozen=True)
class DatasetRecord:
    report: Report
    created_at: datetime
    is_new: bool = False  # this upload brought it

    @property
    def id(self) -> str:
        return self.report.id

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(row.name for row in self.report.classes)


class Upload:
    """What a request sends: one archive, or labelled pictures, which become one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = UPLOAD  # until it is known better
        self.source = str(folder / UPLOAD)
        self.options: tuple[str, ...] = ()
        self._sink: IO[bytes] | None = None
        self._labelled: zipfile.ZipFile | None = None
        self._count = 0
        self._digest = hashlib.sha256()
        self.begun = False

    @property
    def sha256(self) -> str:
        """Of what was sent so far: the archive, or the pictures and their labels."""
        return self._digest.hexdigest()

    async def begin_archive(self, filename: str = "") -> None:
        self.begun = True
        self.name = SUFFIXES.sub("", filename) or self.name
        await asyncio.to_thread(self._open_archive)

    async def begin_picture(self, label: str, filename: str) -> None:
        self.begun = True
        await asyncio.to_thread(self._open_picture, label, filename)

    async def write(self, data: bytes) -> None:
        await asyncio.to_thread(self._write, data)

    async def end(self) -> None:
        """Of one archive or picture."""
        await asyncio.to_thread(self._close_sink)

    def name_built_in(self, name: str, limit: int | None, data: Path | None) -> None:
        """Instead of sending anything."""
        self.name = self.source = name
        self.options = (*([f"--limit={limit}"] if limit else []), *([f"--data={data}"] if data else []))

    def close(self) -> None:
        with _disk_errors():
            self._close_sink()
            if self._labelled is not None:
                self._labelled.close()
                self._labelled = None

    def _open_archive(self) -> None:
        with _disk_errors():
            self._sink = (self.folder / UPLOAD).open("wb")

    def _open_picture(self, label: str, filename: str) -> None:
        self._count += 1
        if self._count > MAX_LABELLED:
            raise TooManyImages(
                f"more than {MAX_LABELLED} pictures in one form; send them as a zip or tar of class folders",
                limit=MAX_LABELLED,
            )
        with _disk_errors():
            self._labelled = self._labelled or zipfile.ZipFile(self.folder / UPLOAD, "w")
            self._digest.update(f"{label}\n".encode())
            plain = re.sub(r"[^\w.-]", "_", filename)[-80:]
            info = zipfile.ZipInfo(f"{label}/{self._count:06}-{plain}")
            self._sink = self._labelled.open(info, "w", force_zip64=True)

    def _write(self, data: bytes) -> None:
        assert self._sink is not None
        self._digest.update(data)
        with _disk_errors():
            self._sink.write(data)

    def _close_sink(self) -> None:
        if self._sink is not None:
            with _disk_errors():
                self._sink.close()
            self._sink = None


class DatasetStore:
    def __init__(self, folder: Path, artifacts: Path, limits: Limits, in_use: Callable[[str], bool]) -> None:
        self.folder = folder
        self._artifacts = artifacts
        self._limits = limits
        self._in_use = in_use
        self._uploads = 0
        self._checks = asyncio.Semaphore(limits.checks)
        self._claim: IO[bytes] | None = None  # an open file, locked as long as this process lives

    @asynccontextmanager
    async def open(self) -> AsyncIterator["DatasetStore"]:
        """Clear away what an earlier process left half done. A folder that can't be written matters once it is used."""
        try:
            await asyncio.to_thread(self._claim_folder)
        except StateUnwritable as error:
            logger.warning("no data sets can be received", extra={"reason": str(error)})
        try:
            yield self
        finally:
            if self._claim is not None:
                self._claim.close()

    # --- receiving ---

    @asynccontextmanager
    async def uploading(self) -> AsyncIterator[Upload]:
        """A place for one upload. Raises QueueFull, StateUnwritable."""
        if self._uploads >= self._limits.uploads:
            raise QueueFull(
                f"as many data sets as may be, {self._limits.uploads} (SAFELIGHT_DATASET_UPLOADS), are being received "
                "or checked; try again in a while",
                retry_after=RETRY_SECONDS,
                limit=self._limits.uploads,
            )
        self._uploads += 1
        folder = None
        try:
            folder = await _to_its_end(self._new_folder, ".incoming-")
            upload = Upload(folder)
            try:
                yield upload
            finally:
                with suppress(DiskFull):  # it goes anyway
                    upload.close()
        finally:
            self._uploads -= 1
            if folder is not None:
                await _to_its_end(partial(shutil.rmtree, ignore_errors=True), folder)

    async def check(self, upload: Upload, *, model: str | None = None, name: str | None = None) -> DatasetRecord:
        """Check what was received against `model`, as `model@version`, and keep it.

        Raises DatasetRefused, DeadlineExceeded, DiskFull, CheckFailed.
        """
        await asyncio.to_thread(upload.close)
        options = [
            *upload.options,
            f"--name={_printable(name or upload.name)}",
            *([f"--model={model}"] if model else []),
        ]
        async with self._checks:
            await self._run_check(upload, options)
        with _disk_errors():
            record = await _to_its_end(self._keep, upload.folder)
        logger.info("dataset", extra={"dataset": record.id, "images": record.report.images, "is_new": record.is_new})
        return record

    async def _run_check(self, upload: Upload, options: list[str]) -> None:
        command = [sys.executable, "-m", "training", "dataset", "check", upload.source, *options]
        command += [f"--into={upload.folder / CHECKED}", f"--artifacts={self._artifacts}"]
        command += ["--guest", "--stop-at-eof", f"--memory-bytes={self._limits.memory_bytes}", "--json"]
        with _log(upload.folder) as log:
            try:
                async with asyncio.timeout(self._limits.seconds):
                    code, said = await _run(command, log)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"checking the data set takes more than {self._limits.seconds:g} s (SAFELIGHT_DATASET_SECONDS); "
                    "send fewer or smaller pictures",
                    stage="check",
                ) from None
            if code != 0:
                log.seek(0)
                raise _failure(code, said, log.read()[-2000:])

    def _keep(self, incoming: Path) -> DatasetRecord:
        """Give what was checked its place. Where the same pictures are already, only the report is renewed."""
        report = Report.model_validate_json((incoming / CHECKED / REPORT).read_bytes())
        created_at = _created_at(incoming / CHECKED)
        place = self.folder / report.id
        while True:
            try:
                os.rename(incoming / CHECKED, place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                _flush_folder(self.folder)
                return DatasetRecord(report, created_at, is_new=True)
            with suppress(FileNotFoundError):  # it was deleted this moment: there is room now
                shutil.copyfile(incoming / CHECKED / REPORT, incoming / REPORT)
                os.replace(incoming / REPORT, place / REPORT)
                return DatasetRecord(report, _created_at(place))

    # --- asking and deleting ---

    async def list(self) -> Sequence[DatasetRecord]:
        """Newest first."""
        return await asyncio.to_thread(self._list)

    async def get(self, dataset: str) -> DatasetRecord:
        """Raises DatasetNotFound."""
        return await asyncio.to_thread(self._get, dataset)

    def path(self, dataset: str) -> Path:
        """Of the zip to train on. Raises DatasetNotFound."""
        return self._place(dataset) / DATA

    @contextmanager
    def holding(self, dataset: str) -> Iterator[None]:
        """As long as this lasts, no process deletes the data set. May wait: call it in a thread.

        Raises DatasetNotFound.
        """
        with self._locked(dataset, fcntl.LOCK_SH):
            yield

    async def delete(self, dataset: str) -> None:
        """Raises DatasetNotFound, DatasetInUse."""
        await asyncio.to_thread(self._delete, dataset)
        logger.info("dataset deleted", extra={"dataset": dataset})

    def _list(self) -> Sequence[DatasetRecord]:
        found = []
        for name in os.listdir(self.folder) if self.folder.is_dir() else []:
            if ID.fullmatch(name):
                with suppress(DatasetNotFound):  # deleted since
                    found.append(self._get(name))
        return sorted(found, key=lambda record: (record.created_at, record.id), reverse=True)

    def _get(self, dataset: str) -> DatasetRecord:
        place = self._place(dataset)
        try:
            return DatasetRecord(Report.model_validate_json((place / REPORT).read_bytes()), _created_at(place))
        except (FileNotFoundError, ValidationError) as error:
            raise _not_found(dataset) from error

    def _delete(self, dataset: str) -> None:
        place = self._place(dataset)
        with self._locked(dataset, fcntl.LOCK_EX):
            if self._in_use(dataset):
                raise DatasetInUse(f"data set {dataset} is used by a job; wait for it, or cancel it first")
            doomed = self._new_folder(".deleted-")
            try:
                os.rename(place, doomed / dataset)
            finally:
                shutil.rmtree(doomed, ignore_errors=True)

    @contextmanager
    def _locked(self, dataset: str, how: int) -> Iterator[None]:
        place = self.folder / dataset
        while True:
            try:
                folder = os.open(place, os.O_RDONLY)
            except FileNotFoundError as error:
                again = "send its pictures again if you need it"
                raise DatasetNotFound(f"data set {dataset} was deleted in this moment; {again}") from error
            try:
                fcntl.flock(folder, how)
                if _stands_at(place, folder):  # while we waited it may have been deleted, and have come again
                    yield
                    return
            finally:
                os.close(folder)

    def _place(self, dataset: str) -> Path:
        place = self.folder / dataset
        if not ID.fullmatch(dataset) or not place.is_dir():
            raise _not_found(dataset)
        return place

    # --- the folder ---

    def _new_folder(self, prefix: str) -> Path:
        self._claim_folder()
        with _disk_errors():
            return Path(tempfile.mkdtemp(prefix=prefix, dir=self.folder))

    def _claim_folder(self) -> None:
        """Make the folder; a process that is alone with it clears away what others, now gone, have left."""
        if self._claim is not None:
            return
        with _disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            claim = (self.folder / ".lock").open("ab")
        with suppress(BlockingIOError):
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in (*self.folder.glob(".incoming-*"), *self.folder.glob(".deleted-*")):
                shutil.rmtree(left, ignore_errors=True)
        fcntl.flock(claim, fcntl.LOCK_SH)
        self._claim = claim


async def _run(command: list[str], log: IO[bytes]) -> tuple[int, bytes]:
    """Run a program to its end: its exit code and what it printed. It doesn't outlive this call, nor this process."""
    stdin, ours = os.pipe()  # ours is closed by the system too, should this process be killed
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # it has threads of its own, and few processors
            start_new_session=True,
        )
        try:
            said, _ = await process.communicate()
            return process.returncode or 0, said
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    finally:
        os.close(stdin)
        os.close(ours)


async def _to_its_end(work: Callable[[A], R], argument: A) -> R:
    """In a thread, which can't be cancelled: whoever is, waits for it first."""
    task = asyncio.create_task(asyncio.to_thread(work, argument))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _printable(name: str) -> str:
    return "".join(letter for letter in name if letter.isprintable())[:100] or UPLOAD


def _failure(code: int, said: bytes, log: bytes) -> Exception:
    """What a check that came to nothing says, as an error."""
    try:
        facts: dict[str, Any] = json.loads(said.splitlines()[-1])
        reason, message = facts.pop("code"), facts.pop("message")
    except (IndexError, ValueError, KeyError):
        reason = "os_error"
    if reason == "disk_full":
        return _disk_full()
    if reason != "os_error":
        return DatasetRefused(message, reason=reason, **facts)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    logger.error("check failed", extra={"exit_code": code, "log": log.decode(errors="replace")})
    return CheckFailed(f"the check of the data set {how}; the log has more. Nothing was kept")


@contextmanager
def _log(folder: Path) -> Iterator[IO[bytes]]:
    with _disk_errors():
        file = (folder / "log.txt").open("w+b")
    with file:
        yield file


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full() from error
        raise StateUnwritable(
            f"the state folder can't be written: {error.strerror}; see to SAFELIGHT_STATE's owner and rights"
        ) from error


def _disk_full() -> DiskFull:
    return DiskFull(
        "there is no room for this data set in the state folder; delete data sets that nobody needs, or let "
        "SAFELIGHT_STATE be on a larger disk"
    )


def _not_found(dataset: str) -> DatasetNotFound:
    return DatasetNotFound(f"there is no data set {dataset[:40]!r}; GET /datasets lists those that there are")


def _stands_at(place: Path, folder: int) -> bool:
    try:
        return os.path.samestat(os.fstat(folder), os.stat(place))
    except FileNotFoundError:
        return False


def _created_at(place: Path) -> datetime:
    return datetime.fromtimestamp((place / DATA).stat().st_mtime, UTC)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
