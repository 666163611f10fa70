"""Data sets: class folders in every shape that people pack them in, MNIST and CIFAR-10, and the cache."""

import hashlib
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.tiny import squares, write_class_folders
from training import datasets
from training.bundle.manifest import InputSpec
from training.datasets import Dataset, Split, class_folders, holdout
from training.layout import DatasetError

SPEC = InputSpec(channels=1, height=12, width=12, fit="stretch")
COLOUR = InputSpec(channels=3, height=6, width=8, fit="stretch")


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """`squares` as train/<class>/*.png and test/<class>/*.png."""
    return write_class_folders(tmp_path / "squares", squares(12))


@pytest.fixture
def unsplit(tmp_path: Path) -> Path:
    """<class>/*.png: ten cats, five dogs, each picture of a shade of its own."""
    root = tmp_path / "pets"
    for label, count in (("cat", 10), ("dog", 5)):
        (root / label).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (12, 12), 100 * (label == "dog") + index).save(root / label / f"{index}.png")
    return root


def zipped(folder: Path, name: str = "packed.zip", prefix: str = "") -> Path:
    path = folder.parent / name
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):  # the order in a zip is anybody's
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def wrapped(folder: Path, depth: int = 1) -> Path:
    for level in range(depth):
        outer = folder.with_name(f"wrapped-{level}")
        outer.mkdir()
        folder = folder.rename(outer / folder.name).parent
    return folder


def same(a: Dataset, b: Dataset) -> bool:
    return (a.classes, a.skipped, a.sha256) == (b.classes, b.skipped, b.sha256)


def counts(split: Split) -> list[int]:
    return torch.bincount(split.labels).tolist()


# --- class folders ----------------------------------------------------------------------------------------------------


def test_split_folders_keep_their_splits(split: Path) -> None:
    dataset, original = class_folders(split, SPEC), squares(12)
    assert (dataset.name, dataset.classes, dataset.skipped) == ("squares", ("filled", "hollow"), ())
    for read, written in ((dataset.train, original.train), (dataset.test, original.test)):
        by_class = written.labels.argsort(stable=True)  # as the folders are read: class by class, name by name
        assert torch.equal(read.images, written.images[by_class])
        assert torch.equal(read.labels, written.labels[by_class])


@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_validation_folder_is_the_test_split(split: Path, name: str) -> None:
    before = class_folders(split, SPEC)
    (split / "test").rename(split / name)
    assert same(class_folders(split, SPEC), before)


def test_a_validation_folder_beside_a_test_folder_is_a_part_of_train(split: Path) -> None:
    before = class_folders(split, SPEC)
    for label in before.classes:
        (split / "val" / label).mkdir(parents=True)
        Image.new("L", (12, 12), 7).save(split / "val" / label / "one.png")
    dataset = class_folders(split, SPEC)
    assert [count + 1 for count in counts(before.train)] == counts(dataset.train)
    assert torch.equal(dataset.test.images, before.test.images)


def test_unsplit_folders_are_split_4_to_1_in_each_class_and_always_alike(unsplit: Path) -> None:
    dataset = class_folders(unsplit, SPEC)
    assert dataset.classes == ("cat", "dog")
    assert (counts(dataset.train), counts(dataset.test)) == ([8, 4], [2, 1])
    shutil.rmtree(unsplit.parent / ".safelight")
    assert same(class_folders(unsplit, SPEC), dataset)


def test_train_folders_without_test_ones_are_split(split: Path) -> None:
    shutil.rmtree(split / "test")
    dataset = class_folders(split, SPEC)
    assert (counts(dataset.train), counts(dataset.test)) == ([5, 5], [1, 1])


@pytest.mark.parametrize("depth", [1, 2])
def test_folders_that_merely_wrap_are_looked_through(split: Path, depth: int) -> None:
    before = class_folders(split, SPEC)
    assert same(class_folders(wrapped(split, depth), SPEC), before)


@pytest.mark.parametrize("prefix", ["", "squares/", "a/b/"])
def test_a_zip_and_a_folder_give_the_same_data_set(split: Path, prefix: str) -> None:
    assert same(class_folders(zipped(split, prefix=prefix), SPEC), class_folders(split, SPEC))


def test_a_zip_of_unsplit_folders_is_split_as_the_folder_is(unsplit: Path) -> None:
    assert same(class_folders(zipped(unsplit), SPEC), class_folders(unsplit, SPEC))


def test_the_digest_tells_data_sets_apart() -> None:
    original = squares(12)
    relabelled = Dataset("squares", ("hollow", "filled"), original.train, original.test)
    swapped = Dataset("squares", original.classes, original.test, original.train)
    digests = {dataset.sha256 for dataset in (original, relabelled, swapped, squares(14), squares(12, seed=5))}
    assert len(digests) == 5
    assert original.sha256 == squares(12).sha256


@pytest.mark.parametrize(
    "name",
    [
        ".DS_Store",
        "train/.DS_Store",
        "train/filled/.DS_Store",
        "train/filled/._0001.png",
        "train/filled/Thumbs.db",
        "train/.hidden/0001.png",
        "__MACOSX/train/filled/._0001.png",
    ],
)
@pytest.mark.parametrize("pack", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_hidden_and_system_files_are_not_seen(split: Path, name: str, pack: Callable[[Path], Path]) -> None:
    before = class_folders(split, SPEC)
    (split / name).parent.mkdir(parents=True, exist_ok=True)
    (split / name).write_bytes(b"\0\0\0\1Bud1")
    assert same(class_folders(pack(split), SPEC), before)


def test_a_readme_beside_the_folders_is_no_picture(split: Path) -> None:
    before = class_folders(split, SPEC)
    (split / "README.md").write_text("# Squares")
    assert same(class_folders(split, SPEC), before)


def test_pictures_of_all_sizes_and_kinds_are_made_to_fit(unsplit: Path) -> None:
    Image.new("RGBA", (40, 30), (250, 0, 0, 255)).save(unsplit / "cat" / "large.webp")
    Image.new("CMYK", (5, 3)).save(unsplit / "dog" / "small.jpg")
    dataset = class_folders(unsplit, COLOUR)
    assert dataset.skipped == ()
    assert len(dataset.train) + len(dataset.test) == 17
    assert dataset.train.images.shape[1:] == COLOUR.shape
    assert dataset.train.images.dtype == torch.uint8


@pytest.mark.parametrize("pack", [lambda folder: folder, zipped], ids=["folder", "zip"])
def test_a_damaged_picture_is_named_and_left_out(split: Path, pack: Callable[[Path], Path]) -> None:
    (split / "train" / "filled" / "0000.png").write_bytes(b"\x89PNG\r\n\x1a\n, or so it says")
    (split / "train" / "hollow" / "notes.txt").write_text("hello")
    dataset = class_folders(pack(split), SPEC)
    assert [text.partition(":")[0] for text in dataset.skipped] == ["train/filled/0000.png", "train/hollow/notes.txt"]
    assert counts(dataset.train) == [5, 6]


@pytest.mark.parametrize("is_cached", [False, True])
def test_a_damaged_picture_ends_a_strict_run(split: Path, is_cached: bool) -> None:
    (split / "train" / "filled" / "0000.png").write_bytes(b"")
    if is_cached:
        class_folders(split, SPEC)
    with pytest.raises(
        DatasetError, match=r"^1 pictures can't be read, the first of them train/filled/0000\.png: .*0 b"
    ):
        class_folders(split, SPEC, strict=True)


def test_a_damaged_part_of_a_zip_is_named_and_left_out(split: Path) -> None:
    path = zipped(split)
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("train/filled/0002.png").header_offset
    content = bytearray(path.read_bytes())
    content[offset + 80] ^= 0xFF
    path.write_bytes(content)
    [skipped] = class_folders(path, SPEC).skipped
    assert skipped.startswith("train/filled/0002.png: Bad CRC-32")


def test_a_zip_with_a_password_says_so(split: Path) -> None:
    path = zipped(split)
    content = path.read_bytes()
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        start = content.find(mark)
        while start >= 0:
            content = content[: start + flags] + b"\1\0" + content[start + flags + 2 :]
            start = content.find(mark, start + 4)
    path.write_bytes(content)
    with pytest.raises(DatasetError, match="none of 24 files could be read as a picture, .*password"):
        class_folders(path, SPEC)


def test_a_picture_that_lies_too_deep_is_named(split: Path) -> None:
    deep = split / "train" / "hollow" / "2024"
    deep.mkdir()
    Image.new("L", (12, 12)).save(deep / "1.PNG")
    (deep / "notes.txt").write_text("no picture")
    dataset = class_folders(split, SPEC)
    assert dataset.skipped == ("train/hollow/2024/1.PNG: lies in no class's folder, or too deep in one",)


def test_a_part_of_a_zip_that_unpacks_to_too_much_is_named(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (split / "train" / "hollow" / "bomb.png").write_bytes(bytes(100_000))
    monkeypatch.setattr(datasets, "MAX_FILE_BYTES", 50_000)
    dataset = class_folders(zipped(split), SPEC)
    assert dataset.skipped == ("train/hollow/bomb.png: it unpacks to 100000 bytes; the limit is 50000",)


def test_what_is_left_out_is_told_with_ten_names() -> None:
    dataset = squares(12)
    few = Dataset(dataset.name, dataset.classes, dataset.train, dataset.test, ("a: empty", "b: empty"))
    many = Dataset(dataset.name, dataset.classes, dataset.train, dataset.test, tuple(map(str, range(12))))
    assert datasets.describe_skipped(few) == "2 of the data set's files are left out: a: empty; b: empty"
    assert datasets.describe_skipped(many).endswith("left out: 0; 1; 2; 3; 4; 5; 6; 7; 8; 9; and 2 more")


def test_a_source_means_the_same_from_anywhere(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(split.parent)
    assert [datasets.find_source(name) for name in ("mnist", "cifar10", "squares")] == ["mnist", "cifar10", str(split)]


def test_mixed_layouts_are_refused(split: Path) -> None:
    (split / "filled").mkdir()
    shutil.copy(split / "train" / "filled" / "0000.png", split / "filled")
    with pytest.raises(DatasetError, match=r"some pictures lie under train/ and test/ and others, as filled/0000\.png"):
        class_folders(split, SPEC)


def test_one_class_is_refused(unsplit: Path) -> None:
    shutil.rmtree(unsplit / "dog")
    with pytest.raises(DatasetError, match="^only one class, 'cat'; a classifier needs at least 2$"):
        class_folders(unsplit, SPEC)


def test_a_class_that_is_only_tested_is_refused(split: Path) -> None:
    shutil.rmtree(split / "train" / "hollow")
    with pytest.raises(DatasetError, match=r"^class 'hollow' has too few training pictures \(0\)"):
        class_folders(split, SPEC)


def test_a_class_of_damaged_pictures_is_refused(split: Path) -> None:
    for path in (split / "train" / "hollow").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"^class 'hollow' has too few training pictures \(0\)"):
        class_folders(split, SPEC)


def test_a_class_with_one_training_picture_is_refused(split: Path) -> None:
    for path in sorted((split / "train" / "hollow").iterdir())[1:]:
        path.unlink()
    with pytest.raises(DatasetError, match=r"^class 'hollow' has too few training pictures \(1\); it needs at"):
        class_folders(split, SPEC)


def test_a_missing_test_split_is_refused(split: Path) -> None:
    for path in (split / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DatasetError, match="^the test split has no picture$"):
        class_folders(split, SPEC)


@pytest.mark.parametrize("names", [[], ["0.png"], ["readme.txt", "a/b/c/0.png"]])
def test_a_folder_without_class_folders_is_refused(tmp_path: Path, names: list[str]) -> None:
    root = tmp_path / "empty"
    root.mkdir()
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    with pytest.raises(
        DatasetError, match="^no pictures found: expected <class>/<picture>, or train/<class>/<picture>"
    ):
        class_folders(root, SPEC)


@pytest.mark.parametrize("content", [b"", b"PK\x05\x06", b"hello", b"\x1f\x8b"])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "data.zip").write_bytes(content)
    with pytest.raises(DatasetError, match=r"data\.zip is neither a folder nor a readable zip"):
        class_folders(tmp_path / "data.zip", SPEC)


def test_a_folder_is_named_as_it_is_called_from_anywhere(split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(split)
    assert datasets.load(".", SPEC).name == "squares"


# --- MNIST and CIFAR-10 -----------------------------------------------------------------------------------------------


def write_mnist(root: Path, images: np.ndarray, labels: list[int]) -> None:
    """MNIST's four files, as torchvision lays them out."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part in ("train", "t10k"):
        header = struct.pack(">IIII", 2051, *images.shape)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, len(labels)) + bytes(labels))


def test_mnist_is_read_from_torchvision_s_layout(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    write_mnist(tmp_path, images, [3, 1, 4, 1])
    dataset = datasets.load("mnist", InputSpec(channels=1, height=28, width=28, fit="digit"), tmp_path)
    assert (dataset.name, dataset.classes) == ("mnist", tuple("0123456789"))
    assert np.array_equal(dataset.train.images[:, 0].numpy(), images)
    assert dataset.test.labels.tolist() == [3, 1, 4, 1]


def test_mnist_can_be_had_in_another_shape(tmp_path: Path) -> None:
    write_mnist(tmp_path, np.full((4, 28, 28), 77, np.uint8), [0, 1, 2, 3])
    dataset = datasets.load("mnist", COLOUR, tmp_path)
    assert torch.equal(dataset.train.images, torch.full((4, *COLOUR.shape), 77, dtype=torch.uint8))


@pytest.mark.parametrize("keep", [0, 3, 10, 1000])
def test_damaged_mnist_is_named(tmp_path: Path, keep: int) -> None:
    write_mnist(tmp_path, np.zeros((4, 28, 28), np.uint8), [0, 1, 2, 3])
    path = tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DatasetError, match="^no MNIST: looked for .*train-images-idx3-ubyte"):
        datasets.load("mnist", SPEC, tmp_path)


@pytest.mark.parametrize(
    ("source", "what", "places"),
    [
        ("mnist", "MNIST", ["MNIST/raw/train-images-idx3-ubyte"]),
        ("cifar10", "CIFAR-10", ["cifar10.zip", "cifar-10-batches-py"]),
    ],
)
def test_missing_data_names_path_variable_and_flag(tmp_path: Path, source: str, what: str, places: list[str]) -> None:
    with pytest.raises(DatasetError, match=f"^no {what}: looked for ") as caught:
        datasets.load(source, SPEC, tmp_path)
    wanted = [*(str(tmp_path / place) for place in places), "SAFELIGHT_DATA", "--data", "--download"]
    assert [word for word in wanted if word not in str(caught.value)] == []


@pytest.mark.parametrize("source", ["mnist", "cifar10"])
def test_no_data_folder_names_variable_and_flags(source: str) -> None:
    with pytest.raises(DatasetError, match="needs a data folder: set SAFELIGHT_DATA or pass --data, and --download"):
        datasets.load(source, SPEC)


def test_an_unknown_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="it is neither mnist, cifar10, nor an existing folder or zip"):
        datasets.load(str(tmp_path / "absent"), SPEC)


def test_cifar10_is_read_from_a_zip_of_class_folders(tmp_path: Path, split: Path) -> None:
    zipped(split, "cifar10.zip")
    dataset = datasets.load("cifar10", SPEC, tmp_path)
    assert (dataset.name, dataset.classes, counts(dataset.train)) == ("cifar10", ("filled", "hollow"), [6, 6])


def test_cifar10_is_read_as_torchvision_lays_it_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import CIFAR10

    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()

    def write(name: str, content: object) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(level: int) -> dict[str, object]:
        pixels = np.zeros((2, 3072), np.uint8)
        pixels[:, :1024] = level  # red comes first
        return {"data": pixels, "labels": [level, 9]}

    train = [[name, write(name, batch(number))] for number, (name, _) in enumerate(CIFAR10.train_list)]
    test = [[name, write(name, batch(7))] for name, _ in CIFAR10.test_list]
    kinds = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = CIFAR10.meta | {"md5": write(CIFAR10.meta["filename"], {"label_names": kinds})}
    for name, value in (("train_list", train), ("test_list", test), ("meta", meta)):
        monkeypatch.setattr(CIFAR10, name, value)

    dataset = datasets.load("cifar10", InputSpec(channels=3, height=32, width=32, fit="cover"), tmp_path)
    assert (dataset.name, list(dataset.classes)) == ("cifar10", kinds)
    assert dataset.train.labels.tolist() == [0, 9, 1, 9, 2, 9, 3, 9, 4, 9]
    assert dataset.train.images[::2].amax((2, 3)).tolist() == [[level, 0, 0] for level in range(5)]
    assert dataset.test.labels.tolist() == [7, 9]


@pytest.mark.data
def test_mnist_is_the_published_one(data: Path) -> None:
    dataset = datasets.load("mnist", InputSpec(channels=1, height=28, width=28, fit="digit"), data)
    assert counts(dataset.train) == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert counts(dataset.test) == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    values = dataset.train.images.float() / 255
    assert (values.mean().item(), values.std().item()) == pytest.approx((0.1307, 0.3081), abs=1e-4)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cifar10_is_the_published_one(data: Path) -> None:
    dataset = datasets.load("cifar10", InputSpec(channels=3, height=32, width=32, fit="cover"), data)
    kinds = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert (dataset.classes, dataset.skipped) == (kinds, ())
    assert (counts(dataset.train), counts(dataset.test)) == ([5000] * 10, [1000] * 10)
    channels = [dataset.train.images[:, channel].double() / 255 for channel in range(3)]
    assert [c.mean().item() for c in channels] == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert [c.std().item() for c in channels] == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)


@pytest.mark.data
def test_the_sample_for_fine_tuning_is_whole(data: Path) -> None:
    dataset = datasets.load(str(data / "finetune-sample.zip"), InputSpec(channels=3, height=32, width=32, fit="cover"))
    assert (dataset.classes, dataset.skipped) == (("apple", "bicycle", "lamp", "leopard", "rocket"), ())
    assert (counts(dataset.train), counts(dataset.test)) == ([200] * 5, [100] * 5)


# --- the hold-out -----------------------------------------------------------------------------------------------------


def numbered(*per_class: int) -> Split:
    labels = torch.arange(len(per_class)).repeat_interleave(torch.tensor(per_class))
    return Split(torch.arange(len(labels)).view(-1, 1, 1, 1), labels)


def test_the_hold_out_is_a_share_of_each_class_and_at_least_one() -> None:
    rest, held = holdout(numbered(100, 50, 2), 0.1)
    assert (counts(rest), counts(held)) == ([90, 45, 1], [10, 5, 1])


def test_every_image_is_either_held_out_or_not() -> None:
    rest, held = holdout(numbered(30, 20), 0.3)
    assert sorted([*rest.images.flatten().tolist(), *held.images.flatten().tolist()]) == list(range(50))


def test_the_hold_out_is_always_the_same_unless_the_seed_differs() -> None:
    first, again, other = (holdout(numbered(100, 100), 0.1, seed)[1].images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- the cache --------------------------------------------------------------------------------------------------------


def caches(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def test_decoded_pictures_are_kept_and_read_again(split: Path) -> None:
    first = class_folders(split, SPEC)
    [cache] = caches(split.parent / ".safelight")
    assert same(class_folders(split, SPEC), first)
    tensors = load_file(cache)
    tensors["train.images"][:] = 7
    with datasets.safe_open(cache, "pt") as file:
        save_file(tensors, cache, file.metadata())
    assert (class_folders(split, SPEC).train.images == 7).all()


def test_a_changed_picture_is_decoded_anew(split: Path) -> None:
    before = class_folders(split, SPEC)
    Image.new("L", (12, 12), 99).save(split / "train" / "filled" / "0000.png")
    after = class_folders(split, SPEC)
    assert (after.train.images[0] == 99).all()
    assert torch.equal(after.train.images[1:], before.train.images[1:])
    assert len(caches(split.parent / ".safelight")) == 2


@pytest.mark.parametrize("change", ["rename", "add", "remove", "move"])
def test_any_change_of_a_folder_misses_the_cache(split: Path, change: str) -> None:
    before = class_folders(split, SPEC).sha256
    picture = split / "train" / "filled" / "0000.png"
    if change == "rename":
        (split / "train" / "filled").rename(split / "train" / "solid")
        (split / "test" / "filled").rename(split / "test" / "solid")
    elif change == "add":
        shutil.copy(picture, picture.with_name("9999.png"))
    elif change == "remove":
        picture.unlink()
    else:
        picture.rename(split / "train" / "hollow" / "9999.png")
    assert class_folders(split, SPEC).sha256 != before


def test_another_input_is_another_cache(split: Path) -> None:
    assert class_folders(split, SPEC).train.images.shape[1:] == SPEC.shape
    assert class_folders(split, COLOUR).train.images.shape[1:] == COLOUR.shape


def test_what_was_skipped_is_remembered(split: Path) -> None:
    (split / "train" / "filled" / "0000.png").write_bytes(b"")
    assert class_folders(split, SPEC).skipped == class_folders(split, SPEC).skipped != ()


@pytest.mark.parametrize("content", [b"", b"torn", b"\xff" * 100], ids=["empty", "short", "ones"])
def test_a_torn_cache_is_made_anew(split: Path, content: bytes) -> None:
    before = class_folders(split, SPEC)
    [cache] = caches(split.parent / ".safelight")
    cache.write_bytes(content)
    assert same(class_folders(split, SPEC), before)
    assert load_file(cache)["train.labels"].tolist() == before.train.labels.tolist()


def test_a_read_only_folder_is_left_alone(tmp_path: Path, split: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path / "read-only"
    place.mkdir()
    split.rename(place / "squares")
    place.chmod(0o555)
    before = sorted(place.rglob("*"))
    dataset = class_folders(place / "squares", SPEC)
    assert sorted(place.rglob("*")) == before
    assert len(caches(tmp_path / "cache" / "safelight")) == 1
    assert same(class_folders(place / "squares", SPEC), dataset)
    place.chmod(0o755)


def test_where_no_cache_can_be_kept_the_pictures_are_still_read(
    tmp_path: Path, split: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    tmp_path.chmod(0o555)
    assert len(class_folders(split, SPEC).train) == 12
    tmp_path.chmod(0o755)
