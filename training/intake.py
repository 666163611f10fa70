"""A stranger's pictures to a data set that can be trained on: each is decoded and compared, and all is reported.

`check` refuses what can't be learnt from, and can write the rest in one form, `data.zip` with `dataset.json`, whose
bytes depend on nothing but the pictures. Needs no torch.
"""

import hashlib
import json
import os
import tempfile
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from io import BytesIO
from itertools import groupby
from operator import attrgetter
from pathlib import Path, PurePosixPath
from typing import IO, TypeVar

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from training import SafelightError, archives
from training.archives import Archive, Content
from training.bundle import store
from training.bundle.classes import BUILT_IN, known
from training.bundle.digits import border_pixels
from training.bundle.images import FORMATS, ImageRejected, decode
from training.bundle.manifest import InputSpec, Manifest
from training.bundle.replay import REPLAY, Replay, read_replay
from training.bundle.staging import private_folder
from training.dataset_report import (
    SHOWN,
    BaseModelFacts,
    ClassCounts,
    Contradiction,
    Contradictions,
    Copies,
    Copy,
    Polarity,
    Rejection,
    Rejections,
    Report,
    Size,
    Sizes,
)
from training.duplicates import Signatures, groups, pairs
from training.events import code_of
from training.layout import DatasetError, Place, below_root, class_names, places, shown
from training.processors import processors

DATA = "data.zip"
REPORT = "dataset.json"

MIN_PER_CLASS = 5
MIN_IMAGES = 20
MIN_TRAIN = 2  # of a class that came divided: one is held out of training to tune by
MAX_THREADS = 8  # each may hold a picture of 50 megapixels

PLAIN = InputSpec(channels=3, height=32, width=32, fit="stretch")  # what pictures are compared as, without a base
GREY = InputSpec(channels=1, height=28, width=28, fit="stretch")
NESTED = {".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"}
EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "MPO": "jpg", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}

T = TypeVar("T")
R = TypeVar("R")


class TooFewImages(DatasetError):
    """Fewer than five pictures in a class, or twenty in all, once what can't be used is left out."""


class SplitIncomplete(DatasetError):
    """A class with fewer than two pictures under train/, or none under test/."""


class LimitNotHere(DatasetError):
    """Only of a built-in data set can so many pictures be asked for."""


class FolderOccupied(SafelightError):
    """There is something where the checked data set should be written."""


@dataclass(frozen=True)
class Base:
    """The model that the data set is meant for."""

    manifest: Manifest
    replay: Replay | None

    @classmethod
    def read(cls, artifacts: Path, ref: store.BundleRef) -> "Base":
        """Raises BundleError."""
        manifest = store.read_manifest(artifacts, ref)
        return cls(manifest, read_replay(ref.path(artifacts) / REPLAY))

    def __str__(self) -> str:
        return f"{self.manifest.model}@{self.manifest.version}"


@dataclass(frozen=True, slots=True)
class Looks:
    """What is kept of one picture: not its pixels, of which there may be gigabytes."""

    sha256: str  # of the file
    pixels: bytes  # digest of what the model sees
    signature: Signatures
    size: Size
    bytes: int
    extension: str
    is_test_picture: bool  # of the base
    is_dark_on_light: bool


@dataclass(frozen=True, slots=True)
class Picture:
    file: str
    split: str  # "train", "test", or "" where the data set isn't divided
    label: str
    looks: Looks
    offset: int  # in the spool


def opened(source: str, data: Path | None, limit: int | None) -> AbstractContextManager[Archive]:
    """A zip, tar or folder; or `mnist` or `cifar10`, of which `limit` training pictures. Raises DatasetError."""
    if source in BUILT_IN:
        from training.builtin import BuiltIn  # needs torch, and two seconds

        return nullcontext(BuiltIn(source, data, limit))
    if limit is not None:
        raise LimitNotHere("a limit is for mnist and cifar10; of your own pictures, pack as many as you want")
    return archives.opened(Path(source))


def check(archive: Archive, name: str, *, base: Base | None = None, into: Path | None = None) -> Report:
    """Check every picture, report, and with `into` write the accepted ones there, all or nothing.

    Raises DatasetError for a set that is refused, and FolderOccupied.
    """
    if into is not None and into.exists() and (not into.is_dir() or any(into.iterdir())):
        raise FolderOccupied(f"{into} is there already and isn't empty; name another folder")
    below = below_root(archive.files())
    placed, misplaced = places(below.values())
    labels = class_names({place.label for place in placed.values()})
    nested = {path for path in below.values() if path.suffix.lower() in NESTED}
    wanted = {path: placed[file] for path, file in below.items() if file in placed and file not in nested}
    rejected = [_rejection(path, "misplaced", "it lies in no class's folder, or too deep in one") for path in misplaced]
    rejected += [
        _rejection(path, "nested_archive", "archives within archives aren't opened") for path in sorted(nested)
    ]
    with ExitStack() as stack:
        spool = stack.enter_context(tempfile.TemporaryFile(dir=into.parent)) if into else None
        pictures = []
        splits = _splits(wanted.values())
        for path, content, looks in _look_at_all(archive, wanted, name, base):
            file, place = below[path], wanted[path]
            if isinstance(looks, SafelightError):
                rejected.append(_rejection(file, code_of(looks), str(looks)))
                continue
            offset = spool.tell() if spool else 0
            if spool:
                spool.write(content)
            pictures.append(Picture(shown(file), splits[place.split], labels[place.label], looks, offset))
        report, kept = _judge(name, sorted(set(labels.values())), pictures, rejected, base)
        if into is not None and spool is not None:
            _write(into, report, kept, spool)
    return report


def _splits(wanted: Iterable[Place]) -> dict[str, str]:
    """What each split counts as: val is the test split where there is none, else one more part of train."""
    there = {place.split for place in wanted}
    return {"": "", "train": "train", "test": "test", "val": "train" if "test" in there else "test"}


# --- looking ----------------------------------------------------------------------------------------------------------


def _look_at_all(
    archive: Archive, wanted: dict[PurePosixPath, Place], name: str, base: Base | None
) -> Iterator[tuple[PurePosixPath, bytes, Looks | SafelightError]]:
    """Each file, its bytes, and what there is to know of it or why it is none; in the archive's order."""

    def look(item: tuple[PurePosixPath, Content]) -> tuple[PurePosixPath, bytes, Looks | SafelightError]:
        path, content = item
        if isinstance(content, SafelightError):
            return path, b"", content
        try:
            return path, content, _look(content, base)
        except ImageRejected as error:
            return path, b"", error

    console = Console(stderr=True)
    threads = min(processors(), MAX_THREADS)
    with ThreadPoolExecutor(threads) as pool:
        yield from track(
            _ahead(pool, look, archive.contents(wanted), threads + 2),
            f"checking {name}",
            total=len(wanted),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )


def _ahead(pool: ThreadPoolExecutor, work: Callable[[T], R], items: Iterable[T], most: int) -> Iterator[R]:
    """As pool.map, which would take in all items at once."""
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) > most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _look(content: bytes, base: Base | None) -> Looks:
    """Raises ImageRejected."""
    spec = base.manifest.input if base else PLAIN
    pixels = decode(content, spec)
    with Image.open(BytesIO(content), formats=FORMATS) as image:
        size, form = Size(width=image.width, height=image.height), image.format or ""
    return Looks(
        sha256=hashlib.sha256(content).hexdigest(),
        pixels=hashlib.sha256(pixels.data).digest(),
        signature=Signatures.of(pixels[None]),
        size=size,
        bytes=len(content),
        extension=EXTENSIONS[form],
        is_test_picture=bool(base and base.replay and base.replay.is_test_picture(pixels)),
        is_dark_on_light=spec.fit == "digit" and float(border_pixels(decode(content, GREY)[0]).mean()) > 127,
    )


# --- judging ----------------------------------------------------------------------------------------------------------


def _judge(
    name: str, classes: list[str], pictures: list[Picture], rejected: list[Rejection], base: Base | None
) -> tuple[Report, list[Picture]]:
    """Leave out what must not be in the set, and report. Raises DatasetError where too little remains."""
    pictures = sorted(pictures, key=lambda picture: (picture.split != "train", picture.file))  # of copies, train's stay
    tests = [picture for picture in pictures if picture.looks.is_test_picture]
    rejected += [_rejection(p.file, "base_test_picture", f"{base} was measured on this picture") for p in tests]
    pictures = [picture for picture in pictures if not picture.looks.is_test_picture]
    pictures, contradictions = _without_contradictions(pictures)
    for found in contradictions:
        reason = f"the same picture is in {' and '.join(map(repr, found.classes))}"
        rejected += [_rejection(file, "contradicting_labels", reason) for file in found.files]
    pictures, copies = _without_copies(pictures)
    pictures, near_copies = _without_near_copies(pictures)
    by_code = Counter(rejection.code for rejection in rejected)
    left_out = by_code + Counter(duplicate=len(copies), near_duplicate=len(near_copies))
    counts = _counts(classes, pictures)
    _check_counts(counts, left_out)
    sizes, polarity = _sizes(pictures, base), _polarity(pictures, base)
    return Report(
        id=_identity(pictures),
        name=name,
        images=len(pictures),
        bytes=sum(picture.looks.bytes for picture in pictures),
        divided=any(picture.split for picture in pictures),
        classes=tuple(counts),
        rejected=Rejections(
            count=len(rejected),
            by_code=dict(sorted(by_code.items())),
            first=tuple(sorted(rejected, key=attrgetter("file", "code"))[:SHOWN]),
        ),
        duplicates=Copies(count=len(copies), first=tuple(copies[:SHOWN])),
        near_duplicates=Copies(count=len(near_copies), first=tuple(near_copies[:SHOWN])),
        contradictions=Contradictions(count=len(contradictions), first=tuple(contradictions[:SHOWN])),
        base=_base_facts(base, classes, len(tests)) if base else None,
        sizes=sizes,
        polarity=polarity,
        notes=tuple(_notes(pictures, counts, sizes, polarity, base)),
    ), pictures


def _without_contradictions(pictures: list[Picture]) -> tuple[list[Picture], list[Contradiction]]:
    classes: dict[bytes, set[str]] = {}
    for picture in pictures:
        classes.setdefault(picture.looks.pixels, set()).add(picture.label)
    kept = [picture for picture in pictures if len(classes[picture.looks.pixels]) == 1]
    torn = sorted((p for p in pictures if len(classes[p.looks.pixels]) > 1), key=attrgetter("looks.pixels"))
    found = [
        Contradiction(files=tuple(picture.file for picture in group), classes=tuple(sorted(classes[pixels])))
        for pixels, group in groupby(torn, key=attrgetter("looks.pixels"))
    ]
    return kept, sorted(found, key=attrgetter("files"))


def _without_copies(pictures: list[Picture]) -> tuple[list[Picture], list[Copy]]:
    first: dict[bytes, Picture] = {}
    for picture in pictures:
        first.setdefault(picture.looks.pixels, picture)
    copies = [Copy(file=p.file, of=first[p.looks.pixels].file) for p in pictures if first[p.looks.pixels] is not p]
    return list(first.values()), copies


def _without_near_copies(pictures: list[Picture]) -> tuple[list[Picture], list[Copy]]:
    """Of a data set that came divided, without the test pictures that nearly are training pictures."""
    is_test = np.array([picture.split == "test" for picture in pictures], np.int64)
    if not is_test.any():
        return pictures, []
    like: dict[int, int] = {}
    for first, second in pairs(Signatures.joined([picture.looks.signature for picture in pictures]), is_test):
        for one, other in zip(first.tolist(), second.tolist(), strict=True):
            test, trained = (one, other) if is_test[one] else (other, one)
            like[test] = min(trained, like.get(test, trained))
    copies = [Copy(file=pictures[test].file, of=pictures[like[test]].file) for test in sorted(like)]
    return [picture for index, picture in enumerate(pictures) if index not in like], copies


def _counts(classes: list[str], pictures: list[Picture]) -> list[ClassCounts]:
    found = Counter((picture.label, picture.split) for picture in pictures)
    divided = any(picture.split for picture in pictures)
    return [
        ClassCounts(
            name=name,
            images=sum(found[name, split] for split in ("", "train", "test")),
            train=found[name, "train"] if divided else None,
            test=found[name, "test"] if divided else None,
        )
        for name in classes
    ]


def _check_counts(counts: list[ClassCounts], left_out: Counter[str]) -> None:
    """Raises TooFewImages and SplitIncomplete."""
    reasons = ", ".join(f"{count} {code}" for code, count in sorted(left_out.items()) if count)
    aside = f" ({reasons} left out)" if reasons else ""
    facts = {"left_out": {code: count for code, count in sorted(left_out.items()) if count}}
    least = min(counts, key=attrgetter("images"))
    if least.images < MIN_PER_CLASS:
        raise TooFewImages(
            f"class {least.name!r} has {least.images} pictures{aside}; each needs at least {MIN_PER_CLASS}",
            label=least.name,
            images=least.images,
            limit=MIN_PER_CLASS,
            **facts,
        )
    total = sum(count.images for count in counts)
    if total < MIN_IMAGES:
        raise TooFewImages(
            f"the data set has {total} pictures{aside}; it needs at least {MIN_IMAGES}",
            images=total,
            limit=MIN_IMAGES,
            **facts,
        )
    for count in counts:
        if count.test == 0 or (count.train is not None and count.train < MIN_TRAIN):
            raise SplitIncomplete(
                f"class {count.name!r} has {count.train} pictures under train/ and {count.test} under test/{aside}; it "
                f"needs {MIN_TRAIN} and 1, or leave train/ and test/ out: fine-tuning divides the set itself",
                label=count.name,
                train=count.train,
                test=count.test,
                **facts,
            )


def _base_facts(base: Base, classes: list[str], test_pictures: int) -> BaseModelFacts:
    same = known(classes, base.manifest.classes)
    return BaseModelFacts(
        model=base.manifest.model,
        version=base.manifest.version,
        known=same,
        new=tuple(name for name in classes if name not in same),
        test_pictures=test_pictures if base.replay else None,
    )


def _sizes(pictures: list[Picture], base: Base | None) -> Sizes:
    ordered = sorted(
        (picture.looks.size for picture in pictures), key=lambda size: (size.width * size.height, size.width)
    )
    upscaled = 0
    if base:
        spec = base.manifest.input
        upscaled = sum(size.width < spec.width and size.height < spec.height for size in ordered)
    return Sizes(smallest=ordered[0], median=ordered[len(ordered) // 2], largest=ordered[-1], upscaled=upscaled)


def _polarity(pictures: list[Picture], base: Base | None) -> Polarity | None:
    if base is None or base.manifest.input.fit != "digit":
        return None
    dark = sum(picture.looks.is_dark_on_light for picture in pictures)
    return Polarity(dark_on_light=dark, light_on_dark=len(pictures) - dark)


def _notes(
    pictures: list[Picture], counts: list[ClassCounts], sizes: Sizes, polarity: Polarity | None, base: Base | None
) -> Iterator[str]:
    if sizes.upscaled and base:
        spec = base.manifest.input
        yield f"{sizes.upscaled} pictures are smaller than the {spec.width} x {spec.height} of {base} and are enlarged"
    if polarity and polarity.dark_on_light:
        yield f"{polarity.dark_on_light} pictures are dark on light; {base} sees them turned around, as digits are"
    if base and base.replay is None:
        yield f"{base} doesn't remember its test set, so pictures of it can't be told"
    most, least = max(counts, key=attrgetter("images")), min(counts, key=attrgetter("images"))
    if most.images > 3 * least.images:
        yield f"classes differ much in size: {most.name!r} has {most.images} pictures, {least.name!r} {least.images}"
    if not any(picture.split for picture in pictures):
        ids = groups(Signatures.joined([picture.looks.signature for picture in pictures]))
        if repeated := len(ids) - len(np.unique(ids)):
            yield f"{repeated} pictures nearly repeat another; those stay on one side when fine-tuning divides the set"


def _rejection(file: PurePosixPath | str, code: str, detail: str) -> Rejection:
    return Rejection(file=shown(file), code=code, detail=detail)


# --- writing ----------------------------------------------------------------------------------------------------------


def _identity(pictures: list[Picture]) -> str:
    triples = sorted((picture.split, picture.label, picture.looks.sha256) for picture in pictures)
    return "ds-" + hashlib.sha256(json.dumps(triples).encode()).hexdigest()[:16]


def _write(into: Path, report: Report, pictures: list[Picture], spool: IO[bytes]) -> None:
    """Beside its place first, then renamed: whole or not at all."""
    with private_folder(into.parent, f".{into.name}-safelight-") as staging:
        with (staging / DATA).open("wb") as file:
            _write_zip(file, pictures, spool)
            _flush(file)
        with (staging / REPORT).open("wb") as file:
            file.write(report.model_dump_json(indent=1).encode() + b"\n")
            _flush(file)
        staging.chmod(0o755)  # whatever the umask
        os.rename(staging, into)


def _write_zip(file: IO[bytes], pictures: list[Picture], spool: IO[bytes]) -> None:
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for picture in sorted(pictures, key=attrgetter("split", "label", "looks.sha256")):
            path = PurePosixPath(picture.split, picture.label, f"{picture.looks.sha256}.{picture.looks.extension}")
            info = zipfile.ZipInfo(str(path))  # dated 1980, as every other
            info.create_system, info.external_attr = 3, 0o644 << 16
            spool.seek(picture.offset)
            archive.writestr(info, spool.read(picture.looks.bytes))


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())
