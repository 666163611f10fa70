"""Data sets: MNIST, CIFAR-10, and any folder or zip with one folder of pictures per class.

Each becomes two uint8 tensors in memory. Pictures are decoded once and the result is cached beside them, keyed by
content. Knows nothing of networks.
"""

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from training.archives import MAX_FILE_BYTES
from training.bundle.classes import BUILT_IN
from training.bundle.images import ImageRejected, Pixels, decode, fit
from training.bundle.manifest import InputSpec
from training.layout import DatasetError, below_root, places
from training.processors import processors

UNSPLIT_TEST_SHARE = 0.2
UNSPLIT_SEED = 0
CACHE_FORMAT = 2

# What reading one picture raises. RuntimeError: a zip's part that needs a password, or is packed in an unknown way.
UNREADABLE = (ImageRejected, zipfile.BadZipFile, zlib.error, RuntimeError, EOFError, OSError)
# What torchvision raises on files that are absent, and on files that were cut short.
MISSING = (RuntimeError, OSError, ValueError, KeyError, AssertionError)


@dataclass(frozen=True)
class Split:
    images: Tensor  # [N, C, H, W] uint8
    labels: Tensor  # [N] int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor) -> "Split":
        return Split(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    name: str
    classes: tuple[str, ...]  # in index order
    train: Split
    test: Split
    skipped: tuple[str, ...] = ()  # pictures that were left out, each with the reason

    @property
    def sha256(self) -> str:
        """Of the class names and every pixel and label, in their order."""
        digest = hashlib.sha256(json.dumps(self.classes).encode())
        for split in (self.train, self.test):
            digest.update(split.images.numpy().data)
            digest.update(split.labels.numpy().data)
        return digest.hexdigest()


def find_source(name: str) -> str:
    """`mnist`, `cifar10`, or the whole path of a folder or zip, so that it means the same from anywhere."""
    return name if name in BUILT_IN else os.path.abspath(name)


def load(
    source: str, spec: InputSpec, data: Path | None = None, *, strict: bool = False, download: bool = False
) -> Dataset:
    """Load `mnist`, `cifar10`, or the folder or zip at a path, as pictures of `spec`. Raises DatasetError."""
    if source == "mnist":
        return _mnist(spec, _data_folder(data, "MNIST"), download)
    if source == "cifar10":
        return _cifar10(spec, _data_folder(data, "CIFAR-10"), download, strict)
    path = Path(source)
    if not path.exists():
        raise DatasetError(
            f"no data set {source!r}: it is neither mnist, cifar10, nor an existing folder or zip of class folders"
        )
    return class_folders(path, spec, strict=strict)


def describe_skipped(dataset: Dataset) -> str:
    """Which pictures were left out, and why: the first ten by name."""
    names = "; ".join(dataset.skipped[:10])
    more = f"; and {len(dataset.skipped) - 10} more" if len(dataset.skipped) > 10 else ""
    return f"{len(dataset.skipped)} of the data set's files are left out: {names}{more}"


def holdout(split: Split, share: float, seed: int = 0) -> tuple[Split, Split]:
    """Divide a split into (the rest, this share of each class, at least one image); the same way at every call."""
    held = _stratified(split.labels, share, seed)
    return split[~held], split[held]


def _stratified(labels: Tensor, share: float, seed: int) -> Tensor:
    """Mark this share of each class, at least one image of each: [N] bool."""
    marked = torch.zeros(len(labels), dtype=torch.bool)
    generator = torch.Generator().manual_seed(seed)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        order = torch.randperm(len(members), generator=generator)
        marked[members[order[: max(1, round(share * len(members)))]]] = True
    return marked


# --- MNIST and CIFAR-10, as torchvision lays them out -----------------------------------------------------------------


def _data_folder(data: Path | None, what: str) -> Path:
    if data is None:
        raise DatasetError(
            f"{what} needs a data folder: set SAFELIGHT_DATA or pass --data, and --download to fetch it there"
        )
    return data


def _mnist(spec: InputSpec, data: Path, download: bool) -> Dataset:
    from torchvision.datasets import MNIST  # a second to import; folders don't need it

    try:
        train, test = (MNIST(data, train=train, download=download) for train in (True, False))
    except MISSING as error:
        raise _missing("MNIST", data / "MNIST" / "raw" / "train-images-idx3-ubyte", error) from error
    splits = [Split(_fit_all(part.data.unsqueeze(1), spec), part.targets.long()) for part in (train, test)]
    return Dataset("mnist", BUILT_IN["mnist"], splits[0], splits[1])


def _cifar10(spec: InputSpec, data: Path, download: bool, strict: bool) -> Dataset:
    archive = data / "cifar10.zip"
    if archive.exists():
        return class_folders(archive, spec, strict=strict)
    from torchvision.datasets import CIFAR10

    try:
        train, test = (CIFAR10(data, train=train, download=download) for train in (True, False))
    except MISSING as error:
        raise _missing("CIFAR-10", f"{archive} and {data / 'cifar-10-batches-py'}", error) from error
    splits = [
        Split(_fit_all(torch.from_numpy(part.data).permute(0, 3, 1, 2), spec), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return Dataset("cifar10", tuple(train.classes), splits[0], splits[1])


def _missing(what: str, looked_for: Path | str, error: Exception) -> DatasetError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return DatasetError(
        f"no {what}: looked for {looked_for} ({reason}); set SAFELIGHT_DATA or --data to the folder that has it, "
        "or add --download to fetch it"
    )


def _fit_all(images: Tensor, spec: InputSpec) -> Tensor:
    """Bring decoded images [N, C, H, W] to another input; unchanged where they already are that."""
    if images.shape[1:] == spec.shape:
        return images.contiguous()
    mode = "L" if spec.channels == 1 else "RGB"
    pictures = (Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).convert(mode) for image in images)
    return torch.from_numpy(np.stack([fit(picture, spec) for picture in pictures]))


# --- folders and zips of class folders --------------------------------------------------------------------------------

Files = dict[PurePosixPath, Callable[[], bytes]]  # path below the root → its content


def class_folders(path: Path, spec: InputSpec, *, strict: bool = False) -> Dataset:
    """Read `train/<class>/*` and `test/<class>/*`, or `<class>/*` which is then split 4 : 1. Raises DatasetError.

    `val/` stands for `test/` where that is missing; beside it, it is one more part of train.

    A picture that can't be decoded is named and left out, or with `strict` ends the run.
    """
    path = Path(os.path.abspath(path))  # "." has no name to call the data set by
    with _files(path) as files:
        cache = _cache_path(path, files, spec)
        dataset = _read_cache(cache, path.stem)
        if dataset is None:
            dataset = _decode_all(path.stem, files, spec, strict)
            _write_cache(cache, dataset)
    if strict and dataset.skipped:
        raise DatasetError(f"{len(dataset.skipped)} pictures can't be read, the first of them {dataset.skipped[0]}")
    return dataset


@contextmanager
def _files(path: Path) -> Iterator[Files]:
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.is_file())
        files = {PurePosixPath(file.relative_to(path).as_posix()): file.read_bytes for file in found}
        yield {below: files[path] for path, below in below_root(files).items()}
        return
    try:
        archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        raise DatasetError(f"{path} is neither a folder nor a readable zip ({error})") from error
    with archive:
        infos = {PurePosixPath(info.filename): info for info in archive.infolist() if not info.is_dir()}
        yield {below: partial(_unpack, archive, infos[path]) for path, below in below_root(infos).items()}


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    if info.file_size > MAX_FILE_BYTES:
        raise ImageRejected(f"it unpacks to {info.file_size} bytes; the limit is {MAX_FILE_BYTES}")
    return archive.read(info)


def _decode_all(name: str, files: Files, spec: InputSpec, strict: bool) -> Dataset:
    pictures, misplaced = places(files)
    classes = tuple(sorted({place.label for place in pictures.values()}))
    if len(classes) < 2:
        raise DatasetError(f"only one class, {classes[0]!r}; a classifier needs at least 2")

    def decode_one(path: PurePosixPath) -> Pixels | str:
        try:
            return decode(files[path](), spec)
        except UNREADABLE as error:
            return f"{path}: {error}"

    console = Console(stderr=True)
    with ThreadPoolExecutor(processors()) as pool:
        results = track(
            pool.map(decode_one, pictures),
            f"decoding {name}",
            total=len(pictures),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        decoded = list(results)
    lost = [f"{path}: lies in no class's folder, or too deep in one" for path in misplaced]
    skipped = (*(result for result in decoded if isinstance(result, str)), *lost)
    if strict and skipped:
        raise DatasetError(f"{len(skipped)} pictures can't be read, the first of them {skipped[0]}")
    good = [(pictures[path], item) for path, item in zip(pictures, decoded, strict=True) if not isinstance(item, str)]
    if not good:
        raise DatasetError(f"none of {len(pictures)} files could be read as a picture, the first of them {skipped[0]}")
    images = torch.from_numpy(np.stack([pixels for _, pixels in good]))  # [N, C, H, W]
    labels = torch.tensor([classes.index(place.label) for place, _ in good])
    splits = {place.split for place, _ in good}
    if "" not in splits:
        tested = "test" if "test" in splits else "val"
        is_test = torch.tensor([place.split == tested for place, _ in good])
    else:
        is_test = _stratified(labels, UNSPLIT_TEST_SHARE, UNSPLIT_SEED)
    everything = Split(images, labels)
    return _checked(Dataset(name, classes, everything[~is_test], everything[is_test], skipped))


def _checked(dataset: Dataset) -> Dataset:
    if len(dataset.test) == 0:
        raise DatasetError("the test split has no picture")
    counts = [
        torch.bincount(split.labels, minlength=len(dataset.classes)).tolist() for split in (dataset.train, dataset.test)
    ]
    for label, trained, tested in zip(dataset.classes, *counts, strict=True):
        if trained < 2:
            raise DatasetError(
                f"class {label!r} has too few training pictures ({trained}); it needs at least 2, as one is held out"
            )
        if tested == 0:
            raise DatasetError(f"class {label!r} has no picture in the test split")
    return dataset


# --- the cache --------------------------------------------------------------------------------------------------------


def _cache_path(path: Path, files: Files, spec: InputSpec) -> Path:
    """Where this content, decoded for this input, is kept: beside the data, or if that is read-only in ~/.cache."""
    digest = hashlib.sha256(f"{CACHE_FORMAT} {spec.model_dump_json()}".encode())
    if path.is_dir():
        for name, read in files.items():
            digest.update(str(name).encode() + b"\0" + hashlib.sha256(read()).digest())
    else:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    # Mode bits, not os.access: a folder marked read-only stays untouched even when root asks.
    beside = path.parent.stat().st_mode & 0o222 and os.access(path.parent, os.W_OK)
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "safelight"
    folder = path.parent / ".safelight" if beside else user
    return folder / f"{path.stem}-{digest.hexdigest()[:16]}.safetensors"


def _read_cache(cache: Path, name: str) -> Dataset | None:
    try:
        with safe_open(cache, "pt") as file:
            facts = json.loads(file.metadata()["facts"])
            splits = [
                Split(file.get_tensor(f"{part}.images"), file.get_tensor(f"{part}.labels"))
                for part in ("train", "test")
            ]
    except (OSError, SafetensorError):  # not there, or torn: decode again
        return None
    return Dataset(name, tuple(facts["classes"]), splits[0], splits[1], tuple(facts["skipped"]))


def _write_cache(cache: Path, dataset: Dataset) -> None:
    temporary = cache.with_name(f".{cache.name}-{os.getpid()}")
    tensors = {
        f"{name}.{part}": getattr(split, part).contiguous()
        for name, split in (("train", dataset.train), ("test", dataset.test))
        for part in ("images", "labels")
    }
    facts = {"facts": json.dumps({"classes": dataset.classes, "skipped": dataset.skipped})}
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, facts)
        os.replace(temporary, cache)
    except (OSError, SafetensorError):  # a full disk or a home that can't be written costs time, not the run
        with suppress(OSError):
            temporary.unlink()
