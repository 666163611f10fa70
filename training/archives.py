"""Archives from strangers, read so that they can do no harm: a zip, a tar (plain, gz, bz2, xz), or a folder.

Nothing is unpacked to disk under a name that the archive chose. Sizes are counted while reading; what headers say of
them is believed only where it is reason to refuse.
"""

import bz2
import gzip
import lzma
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from os import walk
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, Self, cast

from training import SafelightError
from training.layout import DatasetError, is_hidden, shown

CHUNK = 2**16
MAX_FILE_BYTES = 2**28  # of one file, unpacked: an archive can promise anything. A 50-megapixel bitmap has 150 MB
AMPLE_BYTES = 2**26  # so much may come out of an archive of any size: a few drawings as BMP pack a thousandfold
HEADER_BYTES = 2**20  # of one tar entry, with its extended ones; they are read into memory whole
PACKED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}

# What unpacking raises on damaged bytes. RuntimeError and NotImplementedError: a zip packed in a way that isn't read.
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RuntimeError,
)


class ArchiveUnreadable(DatasetError):
    """Neither a zip nor a tar, or one that is truncated or damaged."""


class ArchiveEmpty(DatasetError):
    """Nothing in it."""


class ArchiveUnsafe(DatasetError):
    """An entry that leads outside, is a link or a device, or shares its bytes with another."""


class ArchiveEncrypted(DatasetError):
    """An entry that needs a password."""


class ArchiveTooLarge(DatasetError):
    """More entries or bytes than the limit, or more bytes than such an archive honestly holds."""


class EntryDamaged(SafelightError):
    """One file of the archive can't be read; the others can."""


class EntryTooLarge(SafelightError):
    """One file of the archive is larger than a picture may be."""


Content = bytes | EntryDamaged | EntryTooLarge


@dataclass(frozen=True)
class Limits:
    entries: int = 200_000
    file_bytes: int = MAX_FILE_BYTES
    total_bytes: int = 2**34
    ratio: int = 100  # unpacked bytes for each packed one, beyond AMPLE_BYTES; pictures hardly pack at all


LIMITS = Limits()


class Archive(Protocol):
    """What can be read: `files` first, which finds what is wrong with the whole; then the contents."""

    def files(self) -> list[PurePosixPath]:
        """The path of every file. Raises the Archive… errors."""
        ...

    def contents(self, wanted: Container[PurePosixPath]) -> Iterator[tuple[PurePosixPath, Content]]:
        """Each wanted file with its content, or with what is wrong with it alone."""
        ...


@contextmanager
def opened(path: Path, limits: Limits = LIMITS) -> Iterator[Archive]:
    """Open whatever lies there. Raises ArchiveUnreadable, ArchiveEmpty and ArchiveTooLarge."""
    if path.is_dir():
        yield _Folder(path, limits)
        return
    with path.open("rb") as file:
        head = file.read(tarfile.BLOCKSIZE)
    if not head:
        raise ArchiveEmpty("the archive is empty (0 bytes); send a zip or a tar of class folders")
    if unpack := next((unpack for magic, unpack in PACKED.items() if head.startswith(magic)), None):
        yield _Tar(path, limits, unpack)
    elif _starts_tar(head):
        yield _Tar(path, limits, open)
    elif head.startswith(b"PK") or zipfile.is_zipfile(path):
        with _Zip.opened(path, limits) as archive:
            yield archive
    else:
        raise ArchiveUnreadable("this is neither a zip nor a tar (plain, gz, bz2 or xz); pack the class folders as one")


def _safe_path(name: str) -> PurePosixPath:
    """A path below the archive's root; backslashes, which some Windows packers write, separate too."""
    parts = name.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts or re.match(r"[A-Za-z]:", name):
        raise ArchiveUnsafe(
            f"the entry {shown(name)!r} leads outside of the archive; pack the class folders themselves, by relative "
            "paths",
            entry=shown(name),
        )
    return PurePosixPath(*(part for part in parts if part not in ("", ".")))


def _no_plain_file(name: str, what: str) -> ArchiveUnsafe:
    return ArchiveUnsafe(
        f"the entry {shown(name)!r} is a {what}; pack plain files and folders only", entry=shown(name), kind=what
    )


class _Meter:
    """Counts what comes out of one archive."""

    def __init__(self, limits: Limits, packed: int) -> None:
        self.limits = limits
        self._packed = packed
        self._most = min(limits.total_bytes, max(AMPLE_BYTES, limits.ratio * packed))
        self._entries = 0
        self._bytes = 0

    def entry(self) -> None:
        self._entries += 1
        if self._entries > self.limits.entries:
            raise ArchiveTooLarge(
                f"the archive has more than {self.limits.entries} entries; send a part of them",
                limit=self.limits.entries,
            )

    def add(self, count: int) -> None:
        self._bytes += count
        if self._bytes <= self._most:
            return
        if self._most == self.limits.total_bytes:
            raise ArchiveTooLarge(
                f"the archive unpacks to more than {self._most} bytes; send a part of it, or smaller pictures",
                limit=self._most,
            )
        raise ArchiveTooLarge(
            f"the archive has {self._packed} bytes and unpacks to more than {self._most}; the limit is "
            f"{self.limits.ratio} times its size: pack pictures as they are",
            limit=self._most,
        )


class _Metered:
    """A file whose bytes are counted as they come; within `headroom`, where it is set."""

    def __init__(self, file: IO[bytes], meter: _Meter) -> None:
        self._file = file
        self._meter = meter
        self.headroom: int | None = None

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._meter.add(len(data))
        if self.headroom is not None:
            self.headroom -= len(data)
            if self.headroom < 0:
                raise ArchiveUnreadable(
                    f"an entry's header in the tar has more than {HEADER_BYTES} bytes; pack it anew"
                )
        return data


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


def _read(file: _Readable, limits: Limits) -> Content:
    """All of a file, unless it is too large for a picture."""
    chunks, length = [], 0
    while chunk := file.read(CHUNK):
        length += len(chunk)
        if length > limits.file_bytes:
            reason = f"it unpacks to more than {limits.file_bytes} bytes, the limit of one file"
            return EntryTooLarge(reason, limit=limits.file_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


# --- folder -----------------------------------------------------------------------------------------------------------


class _Folder:
    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self._limits = limits

    def files(self) -> list[PurePosixPath]:
        meter, found = self._meter(), []
        for root, folders, names in walk(self._path):
            below = PurePosixPath(Path(root).relative_to(self._path).as_posix())
            folders[:] = [name for name in folders if not is_hidden(PurePosixPath(name))]
            seen = [below / name for name in names if not is_hidden(PurePosixPath(name))]
            for path in [*seen, *(below / name for name in folders)]:
                meter.entry()
                self._check(path)
            found += seen
        return found

    def _meter(self) -> _Meter:
        return _Meter(self._limits, packed=self._limits.total_bytes)  # nothing is packed: there is no ratio to keep

    def _check(self, path: PurePosixPath) -> None:
        mode = (self._path / path).lstat().st_mode
        if stat.S_ISLNK(mode):
            raise _no_plain_file(str(path), "link")
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise _no_plain_file(str(path), "device or pipe")

    def contents(self, wanted: Container[PurePosixPath]) -> Iterator[tuple[PurePosixPath, Content]]:
        meter = self._meter()
        for path in (path for path in self.files() if path in wanted):
            try:
                with (self._path / path).open("rb") as file:
                    yield path, _read(_Metered(file, meter), self._limits)
            except OSError as error:
                yield path, EntryDamaged(f"it can't be read: {error.strerror}")


# --- zip --------------------------------------------------------------------------------------------------------------


class _Zip:
    def __init__(self, archive: zipfile.ZipFile, limits: Limits, packed: int) -> None:
        self._archive = archive
        self._limits = limits
        self._packed = packed

    @classmethod
    @contextmanager
    def opened(cls, path: Path, limits: Limits) -> Iterator[Self]:
        with ExitStack() as stack:
            try:
                _check_length(path, limits)
                archive = stack.enter_context(zipfile.ZipFile(path))
            except DAMAGED as error:
                raise ArchiveUnreadable("the zip is truncated or damaged; send the whole file again") from error
            yield cls(archive, limits, path.stat().st_size)

    def files(self) -> list[PurePosixPath]:
        meter, found = _Meter(self._limits, self._packed), []
        for info in self._archive.infolist():
            meter.entry()
            path, kind = _zip_path(info), info.external_attr >> 16
            if stat.S_ISLNK(kind):
                raise _no_plain_file(str(path), "link")
            if stat.S_IFMT(kind) and not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise _no_plain_file(str(path), "device or pipe")
            if info.flag_bits & 0x2041:  # encrypted, strongly encrypted, encrypted directory
                raise ArchiveEncrypted(
                    f"the entry {shown(path)!r} needs a password; pack the pictures without one", entry=shown(path)
                )
            if not info.is_dir():
                meter.add(info.file_size)
                found.append(path)
        self._check_overlap()
        if not found:
            raise ArchiveEmpty("the zip holds no file; pack the class folders with the pictures in them")
        return found

    def _check_overlap(self) -> None:
        """No two entries may share bytes: that is how kilobytes become petabytes."""
        end = 0
        for info in sorted(self._archive.infolist(), key=lambda info: info.header_offset):
            if info.header_offset < end:
                name = shown(_zip_path(info))
                raise ArchiveUnsafe(f"the entry {name!r} shares its bytes with another; pack them anew", entry=name)
            # The least that it takes: its local header may have more extra fields than the directory says.
            end = info.header_offset + 30 + len(info.orig_filename) + info.compress_size

    def contents(self, wanted: Container[PurePosixPath]) -> Iterator[tuple[PurePosixPath, Content]]:
        meter = _Meter(self._limits, self._packed)
        for info in self._archive.infolist():
            if (path := _zip_path(info)) in wanted and not info.is_dir():
                yield path, self._read(info, meter)

    def _read(self, info: zipfile.ZipInfo, meter: _Meter) -> Content:
        try:
            with self._archive.open(info) as file:
                return _read(_Metered(file, meter), self._limits)
        except DAMAGED as error:
            return EntryDamaged(f"it can't be unpacked: {str(error) or type(error).__name__}")


def _zip_path(info: zipfile.ZipInfo) -> PurePosixPath:
    """Without its flag a name's encoding is a guess: UTF-8, which macOS writes unflagged, else code page 437."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return _safe_path(name)


def _check_length(path: Path, limits: Limits) -> None:
    """Walk the directory at the zip's end, which zipfile would read into memory whole. What is amiss, it will say."""
    size = path.stat().st_size
    with path.open("rb") as file:
        before = file.seek(max(0, size - 2**16 - 98))
        tail = file.read()
        end = tail.rfind(b"PK\5\6")
        if end < 0 or len(tail) < end + 22:
            return
        (length,) = struct.unpack_from("<L", tail, end + 12)
        if end >= 76 and tail.startswith(b"PK\6\7", end - 20) and tail.startswith(b"PK\6\6", end - 76):  # zip64
            end -= 76
            (length,) = struct.unpack_from("<Q", tail, end + 40)
        if length > before + end:
            return
        file.seek(before + end - length)
        meter = _Meter(limits, packed=size)
        while (header := file.read(46)).startswith(b"PK\1\2") and len(header) == 46:
            meter.entry()
            file.seek(sum(struct.unpack_from("<HHH", header, 28)), 1)


# --- tar --------------------------------------------------------------------------------------------------------------


class _Tar:
    def __init__(self, path: Path, limits: Limits, unpack: Callable[..., Any]) -> None:
        self._path = path
        self._limits = limits
        self._unpack = unpack

    def files(self) -> list[PurePosixPath]:
        found = [path for path, _ in self._entries()]
        if not found:
            raise ArchiveEmpty("the tar holds no file; pack the class folders with the pictures in them")
        return found

    def contents(self, wanted: Container[PurePosixPath]) -> Iterator[tuple[PurePosixPath, Content]]:
        for path, file in self._entries():
            if path in wanted:
                yield path, _read(file, self._limits)

    def _entries(self) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
        """Every file, to be read before the next one is asked for. One pass: a tar can't be entered in the middle."""
        meter = _Meter(self._limits, packed=self._path.stat().st_size)
        try:
            with self._unpack(self._path, "rb") as unpacked:
                stream = _Metered(unpacked, meter)
                stream.headroom = HEADER_BYTES
                with tarfile.open(fileobj=cast(IO[bytes], stream), mode="r|", tarinfo=_Member) as archive:
                    while (member := archive.next()) is not None:
                        archive.members = []  # type: ignore[attr-defined]  # it would keep them all
                        meter.entry()
                        if not member.isdir():
                            stream.headroom = None
                            yield from self._file(archive, member)
                        stream.headroom = HEADER_BYTES
        except DAMAGED as error:
            reason = str(error) or type(error).__name__
            raise ArchiveUnreadable(f"the tar is truncated or damaged ({reason}); send the whole file again") from error

    def _file(self, archive: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
        path = _safe_path(member.name)
        if member.issym() or member.islnk():
            raise _no_plain_file(member.name, "link")
        file = archive.extractfile(member) if member.isreg() and not member.issparse() else None
        if file is None:
            raise _no_plain_file(member.name, "device or pipe")
        yield path, file
        while file.read(CHUNK):  # what the reader left, so that what follows is a header
            pass


class _Member(tarfile.TarInfo):
    """tarfile takes a header that is cut off or damaged for the tar's end, unless it is the first."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the end, as it should be: a block of zeros
            raise
        except tarfile.HeaderError as error:
            raise ArchiveUnreadable(f"the tar is truncated or damaged ({error}); send the whole file again") from error


def _starts_tar(head: bytes) -> bool:
    if not head.strip(b"\0"):  # one without entries
        return True
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True
