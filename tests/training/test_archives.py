"""Archives from strangers: what is read, and what is refused before any harm comes of it."""

import gzip
import io
import os
import stat
import struct
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import tarred, zipped
from training import archives
from training.archives import (
    ArchiveEmpty,
    ArchiveEncrypted,
    ArchiveUnreadable,
    ArchiveUnsafe,
    EntryDamaged,
    EntryTooLarge,
    Limits,
    opened,
)
from training.layout import DatasetError

FILES = {"cat/1.png": b"a" * 3000, "cat/2.png": b"", "dög/" + "x" * 300 + ".png": b"c" * 700}
SEND_AGAIN = "send the whole file again"


def read(path: Path, limits: Limits = archives.LIMITS) -> dict[str, object]:
    with opened(path, limits) as archive:
        files = archive.files()
        return {str(name): content for name, content in archive.contents(set(files))}


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "upload"
    path.write_bytes(content)
    return path


def refusal(path: Path, limits: Limits = archives.LIMITS) -> tuple[str, str, dict[str, object]]:
    with pytest.raises(DatasetError) as found:
        read(path, limits)
    return type(found.value).__name__, str(found.value), found.value.facts


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pack",
    [
        zipped,
        lambda files: zipped(files, zipfile.ZIP_DEFLATED),
        lambda files: zipped(files, zipfile.ZIP_LZMA),
        tarred,
        lambda files: tarred(files, "gz"),
        lambda files: tarred(files, "bz2"),
        lambda files: tarred(files, "xz"),
        lambda files: b"#!/bin/sh\n" + zipped(files),
    ],
    ids=["zip", "deflated", "lzma", "tar", "tar.gz", "tar.bz2", "tar.xz", "self-extracting"],
)
def test_each_kind_of_archive_is_read(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    assert read(written(tmp_path, pack(FILES))) == FILES


def test_a_folder_is_read_without_what_is_hidden(tmp_path: Path) -> None:
    for name, content in {"cat/1.png": b"1", ".git/x": b"", "cat/.DS_Store": b"", "__MACOSX/cat/1.png": b""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert read(tmp_path) == {"cat/1.png": b"1"}


def test_only_what_is_wanted_is_given(tmp_path: Path) -> None:
    for pack in (zipped, tarred):
        with opened(written(tmp_path, pack(FILES))) as archive:
            assert list(archive.contents({PurePosixPath("cat/2.png")})) == [(PurePosixPath("cat/2.png"), b"")]


def test_backslashes_separate_and_dots_do_not_count(tmp_path: Path) -> None:
    assert read(written(tmp_path, tarred({"./pets\\cat//1.png": b"1"}))) == {"pets/cat/1.png": b"1"}


def test_unflagged_utf_8_names_are_read_as_macos_writes_them(tmp_path: Path) -> None:
    name = "käse".encode()
    content = zipped({"cat/" + "x" * len(name): b"1"}).replace(b"x" * len(name), name)
    assert read(written(tmp_path, content)) == {"cat/käse": b"1"}


# --- paths ------------------------------------------------------------------------------------------------------------

OUTSIDE = ["../evil.png", "cat/../../evil.png", "/etc/evil.png", "C:\\evil.png", "c:evil.png", "..\\evil.png", "\\evil"]


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_path_that_leads_outside_is_refused(
    tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes], name: str
) -> None:
    kind, message, facts = refusal(written(tmp_path, pack({"cat/1.png": b"", name: b""})))
    assert (kind, facts) == ("ArchiveUnsafe", {"entry": name})
    assert message == (
        f"the entry {name!r} leads outside of the archive; pack the class folders themselves, by relative paths"
    )


@given(st.text(max_size=40))
def test_whatever_its_name_an_entry_stays_below_the_root(name: str) -> None:
    try:
        path = archives._safe_path(name)
    except ArchiveUnsafe:
        return
    assert not path.is_absolute()
    assert ".." not in path.parts
    assert os.path.commonpath(["/folder", os.path.normpath(f"/folder/{path}")]) == "/folder"


def link_in_a_tar(kind: bytes) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        info = tarfile.TarInfo("cat/1.png")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    return packed.getvalue()


def special_in_a_zip(mode: int) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        info = zipfile.ZipInfo("cat/1.png")
        info.create_system, info.external_attr = 3, mode << 16
        archive.writestr(info, "/etc/passwd")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (link_in_a_tar(tarfile.SYMTYPE), "link"),
        (link_in_a_tar(tarfile.LNKTYPE), "link"),
        (link_in_a_tar(tarfile.CHRTYPE), "device or pipe"),
        (link_in_a_tar(tarfile.FIFOTYPE), "device or pipe"),
        (special_in_a_zip(stat.S_IFLNK | 0o777), "link"),
        (special_in_a_zip(stat.S_IFBLK | 0o600), "device or pipe"),
    ],
    ids=["tar-symlink", "tar-hardlink", "tar-device", "tar-pipe", "zip-symlink", "zip-device"],
)
def test_links_and_devices_are_refused(tmp_path: Path, content: bytes, what: str) -> None:
    assert refusal(written(tmp_path, content)) == (
        "ArchiveUnsafe",
        f"the entry 'cat/1.png' is a {what}; pack plain files and folders only",
        {"entry": "cat/1.png", "kind": what},
    )


@pytest.mark.parametrize("is_folder", [False, True])
def test_links_in_a_folder_are_refused_too(tmp_path: Path, is_folder: bool) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path if is_folder else "/etc/passwd")
    assert refusal(tmp_path / "data")[:2] == (
        "ArchiveUnsafe",
        "the entry 'cat' is a link; pack plain files and folders only",
    )


def test_a_pipe_in_a_folder_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cat")
    assert refusal(tmp_path)[2] == {"entry": "cat", "kind": "device or pipe"}


# --- bombs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["zip", "gz", "xz"])
def test_what_packs_too_well_is_refused(tmp_path: Path, packing: Any) -> None:
    files = {"cat/1.png": bytes(70_000_000)}
    path = written(tmp_path, zipped(files, zipfile.ZIP_DEFLATED) if packing == "zip" else tarred(files, packing))
    size = path.stat().st_size
    assert refusal(path) == (
        "ArchiveTooLarge",
        f"the archive has {size} bytes and unpacks to more than 67108864; the limit is 100 times its size: "
        "pack pictures as they are",
        {"limit": 67_108_864},
    )


def lying_zip(claimed: int) -> bytes:
    """A zip whose directory and local header claim a size that isn't so."""
    content = zipped({"cat/1.png": bytes(1_000_000)}, zipfile.ZIP_DEFLATED)
    return content.replace(struct.pack("<L", 1_000_000), struct.pack("<L", claimed))


def test_a_size_that_is_claimed_is_not_believed(tmp_path: Path) -> None:
    [content] = read(written(tmp_path, lying_zip(5))).values()
    assert isinstance(content, EntryDamaged)
    assert str(content).startswith("it can't be unpacked: ")


def test_bytes_are_counted_while_they_are_read(tmp_path: Path) -> None:
    files = {f"cat/{index}.png": os.urandom(1000) for index in range(5)}
    for pack in (zipped, tarred):
        kind, message, facts = refusal(written(tmp_path, pack(files)), Limits(total_bytes=4_000))
        assert (kind, facts) == ("ArchiveTooLarge", {"limit": 4_000})
        assert message == "the archive unpacks to more than 4000 bytes; send a part of it, or smaller pictures"


def overlapping_zip() -> bytes:
    """Two entries of the directory that share one file's bytes."""
    content = zipped({"cat/1.png": b"x" * 500, "cat/2.png": b"y"})
    first, second = (content.find(b"PK\1\2"), content.rfind(b"PK\1\2"))
    return content[: second + 42] + content[first + 42 : first + 46] + content[second + 46 :]


def test_entries_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    assert refusal(written(tmp_path, overlapping_zip())) == (
        "ArchiveUnsafe",
        "the entry 'cat/2.png' shares its bytes with another; pack them anew",
        {"entry": "cat/2.png"},
    )


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_too_many_entries_are_refused(tmp_path: Path, pack: Callable[[dict[str, bytes]], bytes]) -> None:
    assert refusal(written(tmp_path, pack(FILES)), Limits(entries=2)) == (
        "ArchiveTooLarge",
        "the archive has more than 2 entries; send a part of them",
        {"limit": 2},
    )


def test_a_million_entries_are_counted_without_being_held(tmp_path: Path) -> None:
    """The directory alone; zipfile would make an object of each."""
    entry = struct.pack("<4s4B4HL2L5H2L", b"PK\1\2", 20, 3, 20, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    count = 1_000_000
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65_535, 65_535, len(entry) * count, 0, 0)
    path = written(tmp_path, b"PK\3\4" + entry * count + end)
    begun = time.monotonic()
    assert refusal(path)[0] == "ArchiveTooLarge"
    assert time.monotonic() - begun < 5


def test_a_file_that_is_too_large_for_a_picture_is_left_out_alone(tmp_path: Path) -> None:
    for pack in (zipped, tarred):
        found = read(written(tmp_path, pack(FILES)), Limits(file_bytes=1000))
        large = found.pop("cat/1.png")
        assert isinstance(large, EntryTooLarge)
        assert (str(large), large.facts) == (
            "it unpacks to more than 1000 bytes, the limit of one file",
            {"limit": 1000},
        )
        assert found == {name: content for name, content in FILES.items() if name != "cat/1.png"}


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path: Path) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, 60_000_000
    path = written(tmp_path, gzip.compress(info.tobuf() + b"a" * info.size, 9))
    assert refusal(path)[:2] == (
        "ArchiveUnreadable",
        "an entry's header in the tar has more than 1048576 bytes; pack it anew",
    )


# --- what can't be read -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", ArchiveEmpty, "the archive is empty (0 bytes); send a zip or a tar of class folders"),
        (zipped({}), ArchiveEmpty, "the zip holds no file; pack the class folders with the pictures in them"),
        (
            zipped({"cat/": b""}),
            ArchiveEmpty,
            "the zip holds no file; pack the class folders with the pictures in them",
        ),
        (tarred({}), ArchiveEmpty, "the tar holds no file; pack the class folders with the pictures in them"),
        (zipped(FILES)[:-30], ArchiveUnreadable, f"the zip is truncated or damaged; {SEND_AGAIN}"),
        (
            b"hello",
            ArchiveUnreadable,
            "this is neither a zip nor a tar (plain, gz, bz2 or xz); pack the class folders as one",
        ),
        (
            gzip.compress(b"hello", mtime=0),
            ArchiveUnreadable,
            f"the tar is truncated or damaged (truncated header); {SEND_AGAIN}",
        ),
        (
            tarred(FILES, "gz")[:-20],
            ArchiveUnreadable,
            "the tar is truncated or damaged (Compressed file ended before the end-of-stream marker was reached); "
            + SEND_AGAIN,
        ),
    ],
    ids=["nothing", "empty-zip", "folders-only", "empty-tar", "cut-zip", "text", "no-tar", "cut-tar"],
)
def test_what_is_no_archive_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, kind: type[DatasetError], message: str
) -> None:
    assert refusal(written(tmp_path, content)) == (kind.__name__, message, {})


def test_a_tar_that_is_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    whole = tarred(FILES)
    end = len(whole.rstrip(b"\0")) + 512
    for length in range(512, end, 300):
        kind, message, _ = refusal(written(tmp_path, whole[:length]))
        assert (kind, message.endswith(SEND_AGAIN)) == ("ArchiveUnreadable", True)


def test_a_password_is_asked_to_be_taken_off(tmp_path: Path) -> None:
    content = bytearray(zipped(FILES))
    content[content.find(b"PK\1\2") + 8] |= 1
    assert refusal(written(tmp_path, bytes(content))) == (
        "ArchiveEncrypted",
        "the entry 'cat/1.png' needs a password; pack the pictures without one",
        {"entry": "cat/1.png"},
    )
    assert ArchiveEncrypted.__mro__[1] is DatasetError


def test_a_damaged_file_of_a_zip_is_left_out_alone(tmp_path: Path) -> None:
    content = bytearray(zipped(FILES))
    content[60] ^= 0xFF
    found = read(written(tmp_path, bytes(content)))
    assert str(found.pop("cat/1.png")) == "it can't be unpacked: Bad CRC-32 for file 'cat/1.png'"
    assert len(found) == 2


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pack=st.sampled_from([zipped(FILES), zipped(FILES, zipfile.ZIP_DEFLATED), tarred(FILES), tarred(FILES, "gz")]),
    changes=st.lists(st.tuples(st.integers(0, 4000), st.binary(min_size=1, max_size=8)), max_size=4),
    cut=st.none() | st.integers(0, 4000),
)
def test_a_damaged_archive_is_read_or_refused_and_nothing_else(
    tmp_path: Path, pack: bytes, changes: list[tuple[int, bytes]], cut: int | None
) -> None:
    content = bytearray(pack)
    for place, change in changes:
        content[place : place + len(change)] = change
    path = written(tmp_path, bytes(content[:cut]))
    try:
        found = read(path)
    except DatasetError:
        return
    assert all(isinstance(content, (bytes, EntryDamaged, EntryTooLarge)) for content in found.values())
