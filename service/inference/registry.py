"""Which versions exist, which are good, and which one answers.

The artifacts folder is the truth: it is scanned at start and then again and again, so a finished job, a person who
copies a folder, and another worker's promotion all arrive the same way. A version is loaded beside the others,
verified and warmed, before it may answer; it leaves only after its last request.
"""

import asyncio
import gc
import os
import time
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, Self, TypeVar

import torch

from service.errors import (
    DeadlineExceeded,
    ModelNotFound,
    ModelUnloaded,
    NothingActive,
    NotReady,
    ServiceError,
    VersionActive,
    VersionNotFound,
    VersionRefused,
)
from service.inference import engine
from service.inference.batcher import Batcher
from service.inference.cache import Cache
from service.inference.predictor import Predictor, ranked
from service.inference.turns import EngineThread
from service.telemetry import BATCH_SIZE, LAST_BATCH, PENDING, logger
from training.bundle import store
from training.bundle.manifest import BundleError, Manifest, ManifestInvalid
from training.bundle.store import BundleRef

T = TypeVar("T")
Signature = tuple[tuple[str, int, int], ...]  # (name, size, modification time) of every file


@dataclass(frozen=True)
class Limits:
    """What an engine and its queue may take; from the settings."""

    device: torch.device
    threads: int
    max_batch: int
    queue_size: int
    max_pixels: int
    loaded_versions: int
    rescan_seconds: float
    cache_bytes: int = 0
    precision: engine.Precision = "auto"


@dataclass(eq=False)
class Entry:
    """One version that was found. `state` is unverified, then ready (on disk), loaded (in memory) or refused."""

    ref: BundleRef
    signature: Signature
    state: Literal["unverified", "ready", "loaded", "refused"] = "unverified"
    manifest: Manifest | None = None
    reason: str | None = None  # why it was refused, or can't be loaded now
    predictor: Predictor | None = None  # while it is loaded
    used: float = 0.0  # when it was last asked, monotonic seconds
    vanished: bool = False  # its folder has gone


@dataclass(eq=False)
class Line:
    """One model: its versions by number, oldest first, and the active one."""

    entries: dict[str, Entry] = field(default_factory=dict)
    active: str | None = None
    held_back: bool = False  # no version answers until one is activated
    unloaded: bool = False  # no version answers, nor is in memory, until the model is loaded
    ignored: str | None = None  # a pointer that can't be followed, so that it is logged once


class _Meter:
    """The batcher's figures, under this version's labels."""

    def __init__(self, ref: BundleRef) -> None:
        self._pending = PENDING.labels(ref.model, ref.version)
        self._batch = BATCH_SIZE.labels(ref.model, ref.version)
        self._last = LAST_BATCH.labels(ref.model, ref.version)

    def pending(self, images: int) -> None:
        self._pending.set(images)

    def batch(self, size: int) -> None:
        self._batch.observe(size)
        self._last.set_to_current_time()


class Registry:
    def __init__(self, artifacts: Path, limits: Limits, default_model: str) -> None:
        self.artifacts = artifacts
        self.limits = limits
        self.default_model = default_model
        self.lines: dict[str, Line] = {}
        self.unreadable: dict[str, str] = {}  # models whose folder can't be listed, and why
        self._changing = asyncio.Lock()  # one change at a time: a scan, a load, a promotion
        self._looking = asyncio.Lock()  # of many that ask for the same, one looks
        self._engines = EngineThread()
        self._decoders = ThreadPoolExecutor(limits.threads, "decode")
        self._loader = ThreadPoolExecutor(1, "loader")
        self._cache = Cache(limits.cache_bytes) if limits.cache_bytes else None
        self._tasks: set[asyncio.Task[object]] = set()  # the event loop itself holds tasks only weakly

    @classmethod
    @asynccontextmanager
    async def open(cls, artifacts: Path, limits: Limits, default_model: str) -> AsyncIterator[Self]:
        """Load until a model answers, the default one first, then the others beside its answers, and keep watching.

        Raises OSError where artifacts can't be read.
        """
        registry = cls(artifacts, limits, default_model)
        await registry._follow_until_one_answers()
        watcher = asyncio.create_task(registry._watch(), name="watcher")
        try:
            yield registry
        finally:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
            await registry.close()

    # --- asking ---

    @property
    def loaded(self) -> dict[BundleRef, Predictor]:
        entries = [entry for line in self.lines.values() for entry in line.entries.values()]
        return {entry.ref: entry.predictor for entry in entries if entry.predictor}

    def at_hand(self, model: str | None, version: str | None) -> Predictor | None:
        """What `asked` and `predictor` would find without looking at the folder or loading anything, if they would."""
        line = self.lines.get(self.default_model if model is None else model)
        if line is None or line.unloaded:
            return None
        entry = line.entries.get((line.active or "") if version is None else version)
        return entry.predictor if entry else None

    async def predictor(self, entry: Entry, deadline: float | None = None) -> Predictor:
        """The predictor of a version, loaded if it isn't, by a deadline in the event loop's time.

        Raises VersionRefused, VersionNotFound, NotReady, DeadlineExceeded. A load goes on where its caller stops
        waiting: the next one finds it further, or done.
        """
        entry.used = time.monotonic()
        if entry.predictor:
            return entry.predictor
        predictor = await self._by(deadline, self._load_on_demand(entry.ref))
        if predictor is None:
            raise _not_loaded(self.found(entry.ref.model, entry.ref.version))
        return predictor

    async def asked(self, model: str | None, version: str | None, deadline: float | None = None) -> Entry:
        """As `entry`, of what has come into the folder by now. Raises DeadlineExceeded too."""
        model = self.default_model if model is None else model
        await self.look_for(model, version, deadline)
        return self.entry(model, version)

    async def look_for(self, model: str, version: str | None, deadline: float | None = None) -> None:
        """Take in at once what is asked for and isn't known here: another worker's job may just have published it.

        Raises NameInvalid, DeadlineExceeded.
        """
        if not self._knows(model, version) and await self._has_come(model, version):
            await self._by(deadline, self._take_in(model, version))

    def _knows(self, model: str, version: str | None) -> bool:
        line = self.lines.get(model)
        if line is None or line.unloaded:
            return line is not None
        return line.active is not None if version is None else version in line.entries

    async def _has_come(self, model: str, version: str | None) -> bool:
        """Whether a look at the folder would help: a flood of names that nobody knows isn't worth one each."""
        there, held_back = await asyncio.to_thread(_versions_of, self.artifacts, model)
        line = self.lines.get(model, Line())
        if version is not None:
            return version in there
        unverified = any(entry.state == "unverified" for entry in line.entries.values())
        return not held_back and (line.held_back or unverified or not there <= line.entries.keys())

    async def _take_in(self, model: str, version: str | None) -> None:
        async with self._looking:
            if not self._knows(model, version):  # who waited before this one may have looked
                await self.follow()

    async def _by(self, deadline: float | None, work: Coroutine[None, None, T]) -> T:
        """What goes on where its caller stops waiting. Raises DeadlineExceeded."""
        try:
            async with asyncio.timeout_at(deadline):
                return await asyncio.shield(self._start(work))
        except TimeoutError:
            raise DeadlineExceeded("the deadline passed in the load stage", stage="load") from None

    def line(self, model: str) -> Line:
        store.check_model_name(model)
        if model not in self.lines and model in self.unreadable:
            raise NotReady(f"model {model} can't be read: {self.unreadable[model]}")
        if model not in self.lines:
            known = ", ".join(self.lines) or "none"
            raise ModelNotFound(f"there is no model {model!r}; there is {known}")
        return self.lines[model]

    def found(self, model: str, version: str) -> Entry:
        """A version, in whatever state it is."""
        line = self.line(model)
        store.check_version(version)
        if version not in line.entries:
            raise VersionNotFound(f"model {model} has no version {version}; it has {', '.join(line.entries)}")
        return line.entries[version]

    def entry(self, model: str | None, version: str | None) -> Entry:
        """The version that is to answer: of the default model if none is named, and the active one if none is.

        Raises ModelNotFound, ModelUnloaded, VersionNotFound, VersionRefused, NothingActive, NotReady.
        """
        model = self.default_model if model is None else model
        line = self.line(model)
        if line.unloaded:
            raise ModelUnloaded(
                f"model {model} is unloaded; let it answer again: POST /v2/repository/models/{model}/load"
            )
        if version is None and line.active is None:
            raise self._nothing_active(model, line)
        entry = self.found(model, (line.active or "") if version is None else version)
        if entry.state == "refused":
            raise _not_loaded(entry)
        return entry

    def _nothing_active(self, model: str, line: Line) -> ServiceError:
        if line.held_back:
            versions = ", ".join(line.entries)
            return NothingActive(
                f"no version of {model} is active: none has passed its gate yet; name one (version={versions}), "
                f"or let one answer: PUT /models/{model}/active"
            )
        if any(entry.state == "unverified" for entry in line.entries.values()):
            return NotReady(f"the versions of {model} are still being verified; try again in a moment")
        reasons = "; ".join(f"{entry.ref} was refused: {entry.reason}" for entry in line.entries.values())
        return VersionRefused(f"no version of {model} can answer: {reasons}; publish one that can")

    # --- changing ---

    async def activate(self, model: str, version: str) -> None:
        """Let a version answer: load it beside the others, write the pointer, swap. No request is lost."""
        await self.look_for(model, version)
        async with self._changing:
            entry = self.entry(model, version)
            await self._load(entry)
            if entry.predictor is None:
                raise _not_loaded(entry)
            await self._write(entry.ref, partial(store.activate, self.artifacts, entry.ref))
            self.lines[model].active, self.lines[model].held_back = version, False
            logger.info("activated", extra={"model": model, "version": version})

    async def unload(self, model: str) -> None:
        """Let no version of a model answer, here or in other workers, also after a restart; what was admitted is
        answered. Raises ModelNotFound, ArtifactsUnwritable."""
        async with self._changing:
            line = self.line(model)
            await self._write(model, partial(store.unload, self.artifacts, model))
            self._rest(line)
            logger.info("unloaded", extra={"model": model})

    async def load(self, model: str) -> None:
        """Let a model answer: as it did before it was unloaded, or as its folder says now.

        Raises ModelNotFound, VersionRefused, ArtifactsUnwritable.
        """
        await self.follow()
        line = self.line(model)
        if line.unloaded:
            async with self._changing:
                await self._write(model, partial(store.load, self.artifacts, model))
                await self._follow(model, line)
        if line.active is None and not line.held_back:
            raise self._nothing_active(model, line)

    async def delete(self, model: str, version: str) -> None:
        """Remove a version from memory and disk; requests that it has already admitted are answered."""
        await self.follow()  # another worker may just have published it, promoted it, or promoted another
        async with self._changing:
            line, entry = self.line(model), self.found(model, version)
            on_disk = await asyncio.to_thread(store.active, self.artifacts, model)
            if version in (line.active, on_disk):
                raise VersionActive(f"{entry.ref} is active; let another version answer first")
            await self._write(entry.ref, partial(store.delete, self.artifacts, entry.ref))
            self._unload(line.entries.pop(version))
            logger.info("deleted", extra={"model": model, "version": version})

    async def _write(self, what: BundleRef | str, change: partial[None]) -> None:
        try:
            await asyncio.to_thread(change)
        except (ManifestInvalid, FileNotFoundError) as error:  # since the last scan
            raise VersionNotFound(f"{what} has gone from the artifacts folder") from error
        except OSError as error:
            raise store.ArtifactsUnwritable(f"the artifacts folder can't be written: {error.strerror}") from error

    # --- following the folder ---

    async def scan(self) -> None:
        """Bring memory in line with the folder: let the versions answer that it names, then verify what is new."""
        await self.follow()
        lines = [line for line in self.lines.values() if not line.unloaded]
        entries = [entry for line in lines for entry in line.entries.values()]
        for entry in (entry for entry in entries if entry.state == "unverified"):
            async with self._changing:  # let go between versions: requests may be waiting for one
                await self._load(entry)
                self._evict()

    async def follow(self) -> None:
        """Forget what has vanished, note what is new, and follow each model's pointer. Raises OSError."""
        await self._look()
        for model, line in list(self.lines.items()):
            async with self._changing:
                await self._follow(model, line)
                self._forget(model, line)

    async def _follow_until_one_answers(self) -> None:
        """As `follow`, but the lines that are left are only given the version that their pointer names: who asks for it
        before it is loaded waits for that."""
        await self._look()
        answering = False
        for model, line in sorted(self.lines.items(), key=lambda found: found[0] != self.default_model):
            if not answering:
                await self._follow(model, line)
                answering = line.active is not None
                continue
            line.unloaded = await asyncio.to_thread(store.unloaded, self.artifacts, model)
            if not line.unloaded and not await asyncio.to_thread(store.held_back, self.artifacts, model):
                wanted = await asyncio.to_thread(store.active, self.artifacts, model)
                line.active = wanted if wanted in line.entries else None

    async def _look(self) -> None:
        async with self._changing:
            self._reconcile(*await asyncio.to_thread(_find, self.artifacts))

    def _reconcile(self, found: dict[BundleRef, Signature], unreadable: dict[str, str]) -> None:
        """One entry for each version in the folder; a new one where it changed since it was refused or unloaded.

        One that has vanished is only marked: it goes once another answers in its place.
        """
        for model in unreadable.keys() - self.unreadable.keys():
            logger.warning("model can't be read", extra={"model": model, "reason": unreadable[model]})
        self.unreadable = unreadable
        for model, line in self.lines.items():
            for entry in line.entries.values():
                entry.vanished = entry.ref not in found and model not in unreadable  # else what is in memory goes on
        for ref, signature in found.items():
            entries = self.lines.setdefault(ref.model, Line()).entries
            known = entries.get(ref.version)
            # A loaded version stays: what is in memory was verified, whatever has happened to its files.
            if known is None or (known.signature != signature and known.state != "loaded"):
                entries[ref.version] = Entry(ref, signature)
        for line in self.lines.values():
            line.entries = {version: line.entries[version] for version in sorted(line.entries, key=int)}

    async def _follow(self, model: str, line: Line) -> None:
        """Let the version answer that the folder names, once it is loaded; the one before it answers meanwhile.

        Where it is refused, or none is named: the one that answers now; else the newest good one before it; else the
        oldest good one.
        """
        line.unloaded = await asyncio.to_thread(store.unloaded, self.artifacts, model)
        if line.unloaded:
            self._rest(line)
            return
        line.held_back = await asyncio.to_thread(store.held_back, self.artifacts, model)
        if line.held_back:
            line.active = None
            return
        wanted = await asyncio.to_thread(store.active, self.artifacts, model)
        before = [version for version in line.entries if wanted and int(version) < int(wanted)]
        order = dict.fromkeys([wanted, line.active, *reversed(before), *line.entries])
        there = {version: entry for version, entry in line.entries.items() if not entry.vanished}
        line.active = await self._first_good([there[version] for version in order if version in there])
        ignored = wanted if wanted != line.active else None
        if ignored not in (None, line.ignored):
            logger.warning("pointer not followed", extra={"model": model, "wanted": wanted, "active": line.active})
        line.ignored = ignored

    def _forget(self, model: str, line: Line) -> None:
        for entry in [entry for entry in line.entries.values() if entry.vanished]:
            logger.info("vanished", extra={"model": model, "version": entry.ref.version})
            self._unload(line.entries.pop(entry.ref.version))
        if not line.entries:
            del self.lines[model]

    async def _first_good(self, entries: list[Entry]) -> str | None:
        for entry in entries:
            await self._load(entry)
            if entry.predictor:
                return entry.ref.version
        return None

    async def _watch(self) -> None:
        bring_in_line = self.follow  # first what `open` left; the versions that don't answer can wait for the next
        while True:
            try:
                await bring_in_line()
            except OSError as error:
                logger.error("artifacts can't be read", extra={"reason": str(error)})
            except Exception:  # whatever it was, the next scan is due
                logger.exception("scan failed")
            await asyncio.sleep(self.limits.rescan_seconds)
            bring_in_line = self.scan

    # --- loading and unloading ---

    async def _load_on_demand(self, ref: BundleRef) -> Predictor | None:
        async with self._changing:
            entry = self.lines.get(ref.model, Line()).entries.get(
                ref.version
            )  # a scan may have put another in its place
            if entry is None:
                return None
            await self._load(entry)
            predictor = entry.predictor
            self._evict()
            return predictor

    async def _load(self, entry: Entry) -> None:
        """Give an entry its predictor, or the reason why it can't have one."""
        if entry.state in ("loaded", "refused"):
            return
        begun = time.monotonic()
        loop = asyncio.get_running_loop()
        names = {"model": entry.ref.model, "version": entry.ref.version}
        try:
            entry.manifest = await loop.run_in_executor(self._loader, store.read_manifest, self.artifacts, entry.ref)
            folder = entry.ref.path(self.artifacts)
            loaded = await loop.run_in_executor(
                self._loader,
                engine.load,
                folder,
                entry.manifest,
                self.limits.device,
                self.limits.precision,
                self.limits.max_batch,
            )
        except Exception as error:  # a bundle is somebody's program: whatever it raises, only this version suffers
            foreseen = isinstance(error, (BundleError, OSError))
            entry.reason = str(error) if foreseen else f"its verification failed: {error!r}"
            by_the_machine = isinstance(error.__cause__ or error, OSError) or not isinstance(error, BundleError)
            if entry.state == "unverified" or not by_the_machine:  # one that was good before gets another chance
                entry.state = "refused"
            logger.warning("can't be loaded", extra=names | {"reason": entry.reason}, exc_info=not foreseen)
            return
        entry.state, entry.reason = "loaded", None
        entry.predictor = self._new_predictor(entry.ref, loaded)
        entry.used = time.monotonic()
        logger.info("loaded", extra=names | {"engine": loaded.chosen, "seconds": round(entry.used - begun, 2)})

    def _new_predictor(self, ref: BundleRef, loaded: engine.Engine) -> Predictor:
        batcher = Batcher(
            ranked(loaded.run, loaded.manifest),
            ranked(loaded.run_beside, loaded.manifest),
            self._engines,
            max_batch=self.limits.max_batch,
            queue_size=self.limits.queue_size,
            seconds_per_image=loaded.seconds_per_image(self.limits.max_batch),
            lone_seconds=loaded.seconds_per_image(1),
            meter=_Meter(ref),
        )
        return Predictor(
            loaded, batcher, self._decoders, self._cache, threads=self.limits.threads, max_pixels=self.limits.max_pixels
        )

    def _unload(self, entry: Entry) -> None:
        """Let go of an engine once its last request is answered; nobody waits for that."""
        if entry.predictor is not None:
            self._start(_let_go(entry.predictor))
            entry.predictor, entry.state = None, "ready"

    def _rest(self, line: Line) -> None:
        line.unloaded, line.active = True, None
        for entry in line.entries.values():
            self._unload(entry)

    def _evict(self) -> None:
        """Unload the versions that were used longest ago, beyond the limit; active ones stay."""
        idle = [
            entry
            for line in self.lines.values()
            for version, entry in line.entries.items()
            if entry.predictor and version != line.active
        ]
        idle.sort(key=lambda entry: entry.used, reverse=True)
        for entry in idle[self.limits.loaded_versions :]:
            self._unload(entry)

    def _start(self, work: Coroutine[None, None, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        await asyncio.gather(*self._tasks)  # a load that nobody waits for any more comes to its end
        entries = [entry for line in self.lines.values() for entry in line.entries.values()]
        await asyncio.gather(*(entry.predictor.close() for entry in entries if entry.predictor))
        self._engines.close()
        for executor in (self._decoders, self._loader):
            executor.shutdown(cancel_futures=True)


async def _let_go(predictor: Predictor) -> None:
    await predictor.close()
    del predictor
    gc.collect()  # of a module's parts, which hold each other; by itself the collector comes seldom


def _find(artifacts: Path) -> tuple[dict[BundleRef, Signature], dict[str, str]]:
    """Every version in the folder with its signature, and the models that can't be read with the reason."""
    found, unreadable = {}, {}
    for model in store.models(artifacts):
        try:
            for ref in store.versions(artifacts, model):
                found[ref] = _signature(ref.path(artifacts))
        except OSError as error:
            unreadable[model] = str(error)
    return found, unreadable


def _versions_of(artifacts: Path, model: str) -> tuple[set[str], bool]:
    """Those that a model has in the folder, and whether none of them is to answer. Raises NameInvalid."""
    try:
        return {ref.version for ref in store.versions(artifacts, model)}, store.held_back(artifacts, model)
    except OSError:  # of which the scan tells
        return set(), True


def _signature(folder: Path) -> Signature:
    signature = []
    for root, _, names in os.walk(folder):
        for path in (os.path.join(root, name) for name in names):
            with suppress(OSError):  # it went while we looked: the next scan sees another signature
                facts = os.lstat(path)
                signature.append((path, facts.st_size, facts.st_mtime_ns))
    return tuple(sorted(signature))


def _not_loaded(entry: Entry) -> ServiceError:
    if entry.state == "refused":
        return VersionRefused(f"{entry.ref} was refused: {entry.reason}; ask for another version", reason=entry.reason)
    return NotReady(f"{entry.ref} can't be loaded now: {entry.reason}; try again in a moment")
