"""Bundles on disk: whole or absent, numbered once, and never trusted unread."""

import os
import pickle
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from safetensors.numpy import save_file

from tests.tiny import GREYS, make_manifest
from training.bundle import store
from training.bundle.manifest import CHECKPOINT, GOLDEN, MANIFEST, MODULE, ManifestInvalid
from training.bundle.store import BundleRef, DigestMismatch, FileMalformed, FileMissing, NameInvalid

Publish = Callable[..., BundleRef]


def write_files(folder: Path) -> None:
    """What a bundle holds, as far as the store cares."""
    (folder / MODULE).write_bytes(b"a module")
    save_file({"weight": np.arange(3, dtype=np.float32)}, folder / CHECKPOINT)
    (folder / GOLDEN).write_bytes(b"golden samples")
    (folder / "report").mkdir()
    (folder / "report" / "metrics.json").write_text("{}")


def publish_into(root: Path, model: str = "greys") -> BundleRef:
    with store.staging(root, model) as folder:
        write_files(folder)
        return store.publish(folder, root, model, lambda version: make_manifest(model, version, GREYS, folder))


def fail_to_publish_into(root: Path) -> None:
    with store.staging(root, "greys") as folder:
        write_files(folder)
        raise OSError("disk full")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "artifacts"


@pytest.fixture
def publish(root: Path) -> Publish:
    return lambda model="greys": publish_into(root, model)


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


# --- publishing -------------------------------------------------------------------------------------------------------


def test_a_published_version_is_whole_and_nothing_else_is_left(root: Path, publish: Publish) -> None:
    ref = publish()
    store.check_files(ref.path(root), store.read_manifest(root, ref))
    files = {MANIFEST, MODULE, CHECKPOINT, GOLDEN, "report/metrics.json"}
    assert names(root / "greys") == {f"1/{name}" for name in files} | {store.LAST}
    assert ref.path(root).stat().st_mode & 0o777 == 0o755


def test_nothing_is_seen_before_the_rename(root: Path, publish: Publish) -> None:
    publish()
    seen = []

    def describe(version: str) -> store.Manifest:
        seen.append(store.versions(root, "greys"))
        return make_manifest("greys", version, GREYS, folder)

    with store.staging(root, "greys") as folder:
        write_files(folder)
        store.publish(folder, root, "greys", describe)
    assert seen == [[BundleRef("greys", "1")]]
    assert store.versions(root, "greys") == [BundleRef("greys", "1"), BundleRef("greys", "2")]


def test_everything_is_flushed_to_disk(root: Path, publish: Publish, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed, fsync = set(), os.fsync

    def recording_fsync(descriptor: int) -> None:
        fsync(descriptor)
        flushed.add(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    folder = publish().path(root)
    assert {path.stat().st_ino for path in (folder, folder.parent, *folder.rglob("*"))} <= flushed


def test_staging_that_fails_leaves_nothing(root: Path, publish: Publish) -> None:
    publish()
    before = names(root)
    with pytest.raises(OSError, match="disk full"):
        fail_to_publish_into(root)
    assert names(root) == before
    assert [path.name for path in (root / "greys").iterdir() if path.is_dir()] == ["1"]


def test_a_bundle_that_can_not_be_described_is_not_published(root: Path) -> None:
    with pytest.raises(ManifestInvalid, match="model: Field required"), store.staging(root, "greys") as folder:
        store.publish(folder, root, "greys", lambda _: store.Manifest.parse('{"format_version": 1}'))
    assert store.versions(root, "greys") == []


def test_versions_are_sorted_as_numbers(root: Path, publish: Publish) -> None:
    refs = [publish() for _ in range(11)]
    assert [ref.version for ref in refs] == [str(number) for number in range(1, 12)]
    assert store.versions(root, "greys") == refs


def test_a_version_number_is_never_given_twice(root: Path, publish: Publish) -> None:
    for ref in [publish(), publish()]:
        store.delete(root, ref)
    assert publish() == BundleRef("greys", "3")


def test_a_folder_that_somebody_copied_in_counts(root: Path, publish: Publish) -> None:
    publish()
    (root / "greys" / "7").mkdir()
    assert publish() == BundleRef("greys", "8")


def test_models_are_numbered_each_for_itself(root: Path, publish: Publish) -> None:
    assert [publish("cats"), publish("ants"), publish("cats")] == [
        BundleRef("cats", "1"),
        BundleRef("ants", "1"),
        BundleRef("cats", "2"),
    ]
    assert store.models(root) == ["ants", "cats"]


def test_threads_that_publish_at_once_get_different_numbers(root: Path, publish: Publish) -> None:
    with ThreadPoolExecutor(8) as pool:
        refs = list(pool.map(lambda _: publish(), range(24)))
    assert sorted(refs, key=lambda ref: int(ref.version)) == store.versions(root, "greys")
    assert [store.read_manifest(root, ref).version for ref in refs] == [ref.version for ref in refs]


PUBLISHER = """
import sys
from pathlib import Path
from training.bundle import store
root = Path(sys.argv[1])
pattern = store.read_manifest(root, store.BundleRef("greys", "1"))
for _ in range(10):
    with store.staging(root, "greys") as folder:
        (folder / "model.ts").write_bytes(b"a module")
        ref = store.publish(folder, root, "greys", lambda version: pattern.model_copy(update={"version": version}))
    store.delete(root, ref)
    print(ref.version)
"""


def test_processes_that_publish_and_delete_at_once_never_share_a_number(root: Path, publish: Publish) -> None:
    publish()
    command = [sys.executable, "-c", PUBLISHER, str(root)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    numbers = [int(line) for process in processes for line in process.communicate()[0].split()]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert sorted(numbers) == list(range(2, 32))


# --- names ------------------------------------------------------------------------------------------------------------

TRAVERSAL = ["", ".", "..", "../greys", "a/b", "/etc", ".hidden", "Greys", "a" * 64, "a\n", "a\0b", "a b", "é"]


@pytest.mark.parametrize("name", TRAVERSAL)
def test_a_name_that_could_leave_the_folder_is_refused(root: Path, name: str) -> None:
    for use in (store.check_model_name, lambda n: BundleRef(n, "1"), lambda n: store.versions(root, n)):
        with pytest.raises(NameInvalid, match="can't be a model's name"):
            use(name)
    with pytest.raises(NameInvalid), store.staging(root, name):
        pass
    assert not root.exists()


@pytest.mark.parametrize("version", ["", "0", "01", "-1", "+1", "1.0", "1\n", " 1", "1/../2", "one", "1" * 10, "١"])
def test_what_is_no_version_is_refused(version: str) -> None:
    with pytest.raises(NameInvalid, match="can't be a version"):
        BundleRef("greys", version)


def test_folders_that_are_no_models_or_versions_are_not_listed(root: Path, publish: Publish) -> None:
    publish()
    for name in (".git", "Notes", "greys/notes", "greys/.staging-x", "greys/01"):
        (root / name).mkdir()
    (root / "readme").write_text("a file")
    (root / "greys" / "9").write_text("a file")
    assert store.models(root) == ["greys"]
    assert store.versions(root, "greys") == [BundleRef("greys", "1")]


# --- checking ---------------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", [MODULE, CHECKPOINT, GOLDEN, "report/metrics.json"])
@pytest.mark.parametrize(
    ("damage", "error", "what"),
    [
        (flip_a_bit, DigestMismatch, "has sha256 .*the manifest says"),
        (append, DigestMismatch, r"has \d+ bytes; the manifest says"),
        (truncate, DigestMismatch, r"has \d+ bytes; the manifest says"),
        (Path.unlink, FileMissing, "is missing"),
    ],
)
def test_damage_is_found_and_its_file_named(
    root: Path, publish: Publish, name: str, damage: Callable[[Path], None], error: type[Exception], what: str
) -> None:
    ref = publish()
    damage(ref.path(root) / name)
    with pytest.raises(error, match=f"^{name} {what}"):
        store.check_files(ref.path(root), store.read_manifest(root, ref))


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.trace,)


def test_a_pickle_in_place_of_the_checkpoint_is_refused_unread(root: Path, publish: Publish, tmp_path: Path) -> None:
    ref = publish()
    manifest = store.read_manifest(root, ref)
    (ref.path(root) / CHECKPOINT).write_bytes(pickle.dumps(Attack(tmp_path / "trace")))
    with pytest.raises(FileMalformed, match=rf"^{CHECKPOINT} isn't a safetensors file"):
        store.check_checkpoint(ref.path(root), manifest)
    assert not (tmp_path / "trace").exists()


def test_a_checkpoint_with_too_few_values_is_refused(root: Path, publish: Publish) -> None:
    ref = publish()
    manifest = store.read_manifest(root, ref)
    network = manifest.network.model_copy(update={"parameters": 4})
    store.check_checkpoint(ref.path(root), manifest)
    with pytest.raises(FileMalformed, match="has 3 values; the network has 4 parameters"):
        store.check_checkpoint(ref.path(root), manifest.model_copy(update={"network": network}))


def test_a_version_under_another_number_is_refused(root: Path, publish: Publish) -> None:
    publish().path(root).rename(root / "greys" / "2")
    with pytest.raises(ManifestInvalid, match="is of greys@1 but lies in the folder of greys@2"):
        store.read_manifest(root, BundleRef("greys", "2"))


def test_a_missing_manifest_says_so(root: Path) -> None:
    with pytest.raises(ManifestInvalid, match=r"manifest\.json can't be read: No such file"):
        store.read_manifest(root, BundleRef("greys", "1"))


# --- activating and deleting ------------------------------------------------------------------------------------------


def test_no_version_is_active_before_one_is_activated(root: Path, publish: Publish) -> None:
    publish()
    assert store.active(root, "greys") is None


def test_activating_a_version_that_is_not_there_changes_nothing(root: Path, publish: Publish) -> None:
    store.activate(root, publish())
    with pytest.raises(ManifestInvalid):
        store.activate(root, BundleRef("greys", "2"))
    assert store.active(root, "greys") == "1"


@pytest.mark.parametrize("content", [b"", b"two\n", b"../1\n", b"\xff\xfe\x00"])
def test_a_pointer_that_names_no_version_points_nowhere(root: Path, publish: Publish, content: bytes) -> None:
    publish()
    (root / "greys" / store.ACTIVE).write_bytes(content)
    assert store.active(root, "greys") is None


def test_a_reader_sees_the_old_pointer_or_the_new_one(root: Path, publish: Publish) -> None:
    refs = [publish(), publish()]
    store.activate(root, refs[0])
    done, seen = threading.Event(), set()

    def read() -> None:
        while not done.is_set():
            seen.add(store.active(root, "greys"))

    reader = threading.Thread(target=read)
    reader.start()
    for turn in range(200):
        store.activate(root, refs[turn % 2])
    done.set()
    reader.join()
    assert seen == {"1", "2"}


def test_threads_may_activate_at_once(root: Path, publish: Publish) -> None:
    refs = [publish(), publish()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda turn: store.activate(root, refs[turn % 2]), range(100)))
    assert store.active(root, "greys") in ("1", "2")
    assert {path.name for path in (root / "greys").iterdir()} == {"1", "2", store.ACTIVE, store.LAST}


def test_a_deleted_version_is_gone_without_a_trace(root: Path, publish: Publish) -> None:
    store.delete(root, publish())
    assert names(root) == {f"greys/{store.LAST}"}
    assert [path.name for path in (root / "greys").iterdir()] == [store.LAST]


def test_deleting_what_is_not_there_is_an_error_and_leaves_nothing(root: Path, publish: Publish) -> None:
    publish()
    before = sorted(root.rglob("*"))
    with pytest.raises(FileNotFoundError):
        store.delete(root, BundleRef("greys", "2"))
    assert sorted(root.rglob("*")) == before


# --- any sequence of these --------------------------------------------------------------------------------------------


def test_a_model_that_is_held_back_has_no_answering_version_until_one_is_activated(tmp_path: Path) -> None:
    store.hold_back(tmp_path, "greys")
    ref = publish_into(tmp_path)
    assert (store.held_back(tmp_path, "greys"), store.active(tmp_path, "greys")) == (True, None)
    assert store.answering(tmp_path, "greys") is None
    store.activate(tmp_path, ref)
    assert (store.held_back(tmp_path, "greys"), store.answering(tmp_path, "greys")) == (False, ref)


class Stored(RuleBasedStateMachine):
    """Publish, activate, delete and fail in any order; beside the store runs the simplest model of it."""

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.root = Path(self.folder.name) / "artifacts"
        self.given = 0
        self.kept: list[BundleRef] = []
        self.active: BundleRef | None = None

    def teardown(self) -> None:
        self.folder.cleanup()

    @rule()
    def publish(self) -> None:
        ref = publish_into(self.root)
        self.given += 1
        assert ref == BundleRef("greys", str(self.given))
        self.kept.append(ref)

    @rule()
    def fail(self) -> None:
        with pytest.raises(OSError, match="disk full"):
            fail_to_publish_into(self.root)

    @precondition(lambda self: self.kept)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        self.active = data.draw(st.sampled_from(self.kept))
        store.activate(self.root, self.active)

    @precondition(lambda self: set(self.kept) - {self.active})
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        doomed = data.draw(st.sampled_from([ref for ref in self.kept if ref != self.active]))
        store.delete(self.root, doomed)
        self.kept.remove(doomed)

    @invariant()
    def is_consistent(self) -> None:
        assert store.versions(self.root, "greys") == self.kept
        assert store.active(self.root, "greys") == (self.active and self.active.version)
        for ref in self.kept:
            store.check_files(ref.path(self.root), store.read_manifest(self.root, ref))

    @invariant()
    def has_no_litter(self) -> None:
        expected = {ref.version for ref in self.kept}
        expected |= {store.ACTIVE} if self.active else set()
        expected |= {store.LAST} if self.given else set()
        assert {path.name for path in self.root.glob("greys/*")} == expected


Stored.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
test_any_sequence_leaves_a_consistent_store = Stored.TestCase


def test_candidates_are_counted_for_each_model_and_hold_out(root: Path, publish: Publish) -> None:
    looks = [("greys", "a", "1"), ("greys", "a", "2"), ("greys", "a", "1"), ("greys", "b", "1"), ("pets", "a", "1")]
    digests = [(model, hold_out * 64, weights * 64) for model, hold_out, weights in looks]
    assert [store.looked(root, *look) for look in digests] == [1, 2, 2, 1, 1]
    store.delete(root, publish())
    assert [store.looked(root, *look) for look in digests] == [2, 2, 2, 1, 1]


def test_what_a_new_version_must_agree_with_is_the_newest_that_can_be_read_and_the_one_that_answers(
    root: Path, publish: Publish
) -> None:
    assert store.namesakes(root, "greys") == []
    first, second, third = (publish() for _ in range(3))
    (third.path(root) / MANIFEST).write_text("{")
    manifests = {ref: store.read_manifest(root, ref) for ref in (first, second)}
    assert store.namesakes(root, "greys") == [
        manifests[second],
        manifests[first],
    ]  # the oldest, before any is activated
    store.hold_back(root, "greys")
    assert store.namesakes(root, "greys") == [manifests[second]]
    store.activate(root, first)
    assert store.namesakes(root, "greys") == [manifests[second], manifests[first]]
