"""Bundles on disk: publish by rename, list, check, activate.

A version is complete or absent, never half there: it is written beside its place, flushed, then renamed. Knows
nothing of networks; what the files hold is `manifest`'s business.
"""

import fcntl
import hashlib
import math
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from training import SafelightError
from training.bundle.manifest import (
    CHECKPOINT,
    MANIFEST,
    BundleError,
    FileFacts,
    Manifest,
    ManifestInvalid,
    ModelName,
    Version,
)
from training.bundle.staging import private_folder

ACTIVE = "active"
NONE = "none"  # in place of a version: none answers those who name none
UNLOADED = "unloaded"  # while this file is there, the model doesn't answer at all
LAST = ".last"  # the highest version ever given, so that a deleted version's number isn't used again
LOOKS = ".looks"  # a line for each candidate and the hold-out that it was held against, also of deleted versions

_MODEL_NAME = TypeAdapter(ModelName)
_VERSION = TypeAdapter(Version)


class FileMissing(BundleError):
    """The manifest lists a file that isn't there."""


class DigestMismatch(BundleError):
    """A file isn't the one that was published."""


class FileMalformed(BundleError):
    """A file isn't of the kind that its name says."""


class NameInvalid(BundleError):
    """Not a name that a model or a version can have."""


class ArtifactsUnwritable(SafelightError):
    """The system lets nobody write where versions are."""


@dataclass(frozen=True, order=True)
class BundleRef:
    """One version of one model, by name. Names are checked here, so a ref can't point outside artifacts."""

    model: str
    version: str

    def __post_init__(self) -> None:
        check_model_name(self.model)
        check_version(self.version)

    def __str__(self) -> str:
        return f"{self.model}@{self.version}"

    def path(self, artifacts: Path) -> Path:
        return artifacts / self.model / self.version


def check_model_name(name: str) -> None:
    """Raises NameInvalid."""
    try:
        _MODEL_NAME.validate_python(name)
    except ValidationError:
        rule = "1 to 63 of a-z, 0-9, '.', '_' and '-', and starts with a letter or digit"
        raise NameInvalid(f"{name[:80]!r} can't be a model's name: a name is {rule}") from None


def check_version(version: str) -> None:
    """Raises NameInvalid."""
    try:
        _VERSION.validate_python(version)
    except ValidationError:
        raise NameInvalid(f"{version[:80]!r} can't be a version: versions are whole numbers from 1") from None


def models(artifacts: Path) -> list[str]:
    """The names of all models that have a folder, sorted. Raises OSError where artifacts can't be read."""
    with os.scandir(artifacts) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and _is_model(entry.name))


def versions(artifacts: Path, model: str) -> list[BundleRef]:
    """The published versions of one model, oldest first; none where the model doesn't exist."""
    check_model_name(model)
    folder = artifacts / model
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        numbers = sorted(int(entry.name) for entry in entries if entry.is_dir() and _is_version(entry.name))
    return [BundleRef(model, str(number)) for number in numbers]


def read_manifest(artifacts: Path, ref: BundleRef) -> Manifest:
    """Read and validate one manifest, and that it stands in its own folder. Raises ManifestInvalid."""
    path = ref.path(artifacts) / MANIFEST
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ManifestInvalid(f"{MANIFEST} can't be read: {error.strerror}") from error
    manifest = Manifest.parse(text)
    if (manifest.model, manifest.version) != (ref.model, ref.version):
        raise ManifestInvalid(f"{MANIFEST} is of {manifest.model}@{manifest.version} but lies in the folder of {ref}")
    return manifest


def readable_manifest(artifacts: Path, ref: BundleRef) -> Manifest | None:
    """None where `read_manifest` would refuse it."""
    try:
        return read_manifest(artifacts, ref)
    except ManifestInvalid:
        return None


def namesakes(artifacts: Path, model: str) -> list[Manifest]:
    """Whose classes a new version must have: the newest version that can be read, and the one that answers."""
    manifests = (readable_manifest(artifacts, ref) for ref in reversed(versions(artifacts, model)))
    newest = next((manifest for manifest in manifests if manifest), None)
    ref = answering(artifacts, model)
    answers = readable_manifest(artifacts, ref) if ref else None
    return [manifest for manifest in (newest, answers) if manifest]


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check every file's presence, size and digest. Raises FileMissing or DigestMismatch, naming the file."""
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FileMissing(f"{name} is missing")
        found = file_facts(path)
        if found.bytes != facts.bytes:
            raise DigestMismatch(f"{name} has {found.bytes} bytes; the manifest says {facts.bytes}")
        if found.sha256 != facts.sha256:
            raise DigestMismatch(f"{name} has sha256 {found.sha256[:12]}…; the manifest says {facts.sha256[:12]}…")


def check_checkpoint(folder: Path, manifest: Manifest) -> None:
    """Check that the checkpoint is safetensors, as its name says, and not code. Raises FileMalformed."""
    try:
        with safe_open(folder / CHECKPOINT, "numpy") as file:
            count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise FileMalformed(f"{CHECKPOINT} isn't a safetensors file: {error}") from error
    if count < manifest.network.parameters:
        raise FileMalformed(
            f"{CHECKPOINT} has {count} values; the network has {manifest.network.parameters} parameters"
        )


def file_facts(path: Path) -> FileFacts:
    with path.open("rb") as file:
        return FileFacts(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=os.fstat(file.fileno()).st_size)


def folder_facts(folder: Path) -> dict[str, FileFacts]:
    """What `files` of a manifest says of a folder's content; the manifest itself is left out."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): file_facts(path) for path in files}


def active(artifacts: Path, model: str) -> str | None:
    """The version that answers when a request names none; None before the first activation."""
    version = _pointer(artifacts, model)
    return version if _is_version(version) else None


def _pointer(artifacts: Path, model: str) -> str:
    check_model_name(model)
    try:
        return (artifacts / model / ACTIVE).read_text(errors="replace").strip()
    except OSError:  # not there, or no file that can be read
        return ""


def answering(artifacts: Path, model: str) -> BundleRef | None:
    """The version that answers: the active one, or the oldest where nobody ever said which."""
    if version := active(artifacts, model):
        return BundleRef(model, version)
    return None if held_back(artifacts, model) else next(iter(versions(artifacts, model)), None)


def held_back(artifacts: Path, model: str) -> bool:
    """Whether no version is to answer until one is activated."""
    return _pointer(artifacts, model) == NONE


def hold_back(artifacts: Path, model: str) -> None:
    """Let no version of a model answer until one is activated; the model may not have any yet."""
    check_model_name(model)
    (artifacts / model).mkdir(parents=True, exist_ok=True)
    _write_line(artifacts / model / ACTIVE, NONE)


def unloaded(artifacts: Path, model: str) -> bool:
    """Whether a model was unloaded: none of its versions answers, whichever is active."""
    return (artifacts / model / UNLOADED).exists()


def unload(artifacts: Path, model: str) -> None:
    _write_line(artifacts / model / UNLOADED, datetime.now(UTC).isoformat(timespec="seconds"))


def load(artifacts: Path, model: str) -> None:
    """Take back `unload`."""
    (artifacts / model / UNLOADED).unlink(missing_ok=True)


def activate(artifacts: Path, ref: BundleRef) -> None:
    """Make a published version the active one, in one rename. Raises ManifestInvalid where it isn't there."""
    read_manifest(artifacts, ref)
    _write_line(artifacts / ref.model / ACTIVE, ref.version)


def delete(artifacts: Path, ref: BundleRef) -> None:
    """Remove a version: renamed out of sight first, so that nobody sees half of it go."""
    folder = artifacts / ref.model
    with private_folder(folder, ".deleted-") as doomed, _highest_number(folder):
        os.rename(ref.path(artifacts), doomed / ref.version)  # and its number counts, also where it was copied here


def check_writable(artifacts: Path, model: str) -> None:
    """Raises ArtifactsUnwritable where no version of a model could be published: better before the work than after."""
    place = artifacts / model if (artifacts / model).exists() else artifacts
    if not os.access(place, os.W_OK | os.X_OK):
        raise ArtifactsUnwritable(
            f"{place} can't be written, so no version could be published there; see to the owner and rights of the "
            "artifacts folder (SAFELIGHT_ARTIFACTS)"
        )


def looked(artifacts: Path, model: str, hold_out: str, weights: str) -> int:
    """Note that a candidate is held against a hold-out, by their digests: how many were so far, this one included."""
    check_model_name(model)
    (artifacts / model).mkdir(parents=True, exist_ok=True)
    look = f"{hold_out} {weights}\n"
    with (artifacts / model / LOOKS).open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        looks = set(file)
        if look not in looks:
            file.write(look)
            file.flush()
            os.fsync(file.fileno())
    return sum(line.startswith(hold_out) for line in looks | {look})


@contextmanager
def staging(artifacts: Path, model: str) -> Iterator[Path]:
    """A private folder beside the model's versions, to write a bundle into; removed unless it was published, and where
    its process was killed, by the next one that stages a version of the model."""
    check_model_name(model)
    parent = artifacts / model
    parent.mkdir(parents=True, exist_ok=True)
    with private_folder(parent, ".staging-") as folder:
        yield folder


def publish(staged: Path, artifacts: Path, model: str, describe: Callable[[str], Manifest]) -> BundleRef:
    """Give a staged folder the next version number and make it visible.

    `describe` makes the manifest once the number is known. Everything is flushed to disk before the rename, so a
    power cut leaves either no version or a whole one.
    """
    with _highest_number(artifacts / model, plus=1) as number:
        ref = BundleRef(model, str(number))
        (staged / MANIFEST).write_text(describe(ref.version).model_dump_json(indent=2) + "\n")
        _flush(staged)
        staged.chmod(0o755)  # whatever the umask: the service may run as another user
        os.rename(staged, ref.path(artifacts))
        _flush_folder(artifacts / model)
    return ref


@contextmanager
def _highest_number(folder: Path, plus: int = 0) -> Iterator[int]:
    """Write down the highest number that was ever given, or the one after it; others, in any process, wait for it."""
    with os.fdopen(os.open(folder / LAST, os.O_RDWR | os.O_CREAT, 0o644), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        given = [int(ref.version) for ref in versions(folder.parent, folder.name)]
        number = max(given + [int(word) for word in file.read().split()], default=0) + plus
        file.seek(0)  # written over in place: the lock is on this file, and a number is never shorter than the last
        file.write(f"{number}\n")
        file.flush()
        os.fsync(file.fileno())
        yield number


def _is_model(name: str) -> bool:
    try:
        check_model_name(name)
    except NameInvalid:
        return False
    return True


def _is_version(name: str) -> bool:
    try:
        check_version(name)
    except NameInvalid:
        return False
    return True


def _write_line(path: Path, line: str) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{threading.get_ident()}")
    with temporary.open("w") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _flush_folder(path.parent)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            _flush_folder(path)
    _flush_folder(folder)


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
