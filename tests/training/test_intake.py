"""What is found in a data set: the whole report, and every reason to refuse one."""

import io
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import encode, make_bundle, pictures, reseal, tarred, zipped
from training import intake
from training.archives import Limits, opened
from training.bundle.images import decode
from training.bundle.manifest import InputSpec
from training.bundle.replay import REPLAY, Replay, pixel_digest, write_replay
from training.dataset_report import Report
from training.datasets import class_folders
from training.intake import DATA, REPORT, Base, FolderOccupied
from training.layout import DatasetError, TooManyClasses

Files = dict[str, bytes]
COLOUR = InputSpec(channels=3, height=16, width=16, fit="stretch")


@pytest.fixture
def pets() -> Files:
    return pictures("cat", "dog")


@pytest.fixture
def check(tmp_path: Path) -> Callable[..., Report]:
    """Pack files and check them."""

    def check(files: Files, pack: Callable[[Files], bytes] = zipped, **options: Any) -> Report:
        path = tmp_path / "pets.zip"
        path.write_bytes(pack(files))
        with opened(path) as archive:
            return intake.check(archive, "pets", **options)

    return check


def base(tmp_path: Path, *, replay: Replay | None = None, fit: str = "stretch", classes: tuple[str, ...] = ()) -> Base:
    """A model for pictures of 16 x 16, with its memory of what it was measured on."""
    ref = make_bundle(tmp_path / "artifacts")
    folder = ref.path(tmp_path / "artifacts")
    if replay:
        write_replay(folder / REPLAY, replay)
    spec = COLOUR if fit == "stretch" else InputSpec(channels=1, height=28, width=28, fit="digit")
    reseal(folder, input=spec, classes=classes or ("Cat", "horse"))
    return Base.read(tmp_path / "artifacts", ref)


def remembering(*contents: bytes) -> Replay:
    digests = np.stack([pixel_digest(decode(content, COLOUR)) for content in contents])
    none = np.zeros((0, 2), np.float16), np.zeros(0, np.int64)
    return Replay(*none, *none, test_digests=digests)


def jpeg(png: bytes) -> bytes:
    return encode(Image.open(io.BytesIO(png)).resize((64, 64), Image.Resampling.NEAREST), "JPEG", quality=95)


def test_the_whole_report_of_a_clean_data_set(check: Callable[..., Report], pets: Files) -> None:
    report = check(pets)
    assert report.model_dump() == {
        "id": report.id,
        "name": "pets",
        "images": 20,
        "bytes": sum(map(len, pets.values())),
        "divided": False,
        "classes": (
            {"name": "cat", "images": 10, "train": None, "test": None},
            {"name": "dog", "images": 10, "train": None, "test": None},
        ),
        "rejected": {"count": 0, "by_code": {}, "first": ()},
        "duplicates": {"count": 0, "first": ()},
        "near_duplicates": {"count": 0, "first": ()},
        "contradictions": {"count": 0, "first": ()},
        "base": None,
        "sizes": {
            "smallest": {"width": 16, "height": 16},
            "median": {"width": 16, "height": 16},
            "largest": {"width": 16, "height": 16},
            "upscaled": 0,
        },
        "polarity": None,
        "notes": (),
    }


def test_what_is_no_picture_is_rejected_with_the_reason(check: Callable[..., Report], pets: Files) -> None:
    png = pets["cat/00.png"]
    wrong = {
        "cat/notes.txt": b"hello",
        "cat/empty.png": b"",
        "cat/cut.png": png[: len(png) // 2],
        "cat/large.png": encode(Image.new("1", (8000, 8000))),
        "cat/more.zip": zipped({"x.png": png}),
        "dog/deep/er.png": png,
        "dog/.DS_Store": b"",
        "README.md": b"# Pets",
    }
    report = check(pets | wrong)
    assert report.images == 20
    assert (report.rejected.count, report.rejected.by_code) == (
        6,
        {"image_corrupt": 1, "image_too_large": 1, "misplaced": 1, "nested_archive": 1, "not_an_image": 2},
    )
    assert [(one.file, one.code) for one in report.rejected.first] == [
        ("cat/cut.png", "image_corrupt"),
        ("cat/empty.png", "not_an_image"),
        ("cat/large.png", "image_too_large"),
        ("cat/more.zip", "nested_archive"),
        ("cat/notes.txt", "not_an_image"),
        ("dog/deep/er.png", "misplaced"),
    ]
    details = {one.file: one.detail for one in report.rejected.first}
    assert details["cat/large.png"] == (
        "the image has 8000 x 8000 = 64000000 pixels; the limit is 50000000: scale it down"
    )
    assert details["dog/deep/er.png"] == "it lies in no class's folder, or too deep in one"


def test_a_hundred_rejections_are_named_and_all_are_counted(check: Callable[..., Report], pets: Files) -> None:
    report = check(pets | {f"cat/{number:03}.txt": b"hello" for number in range(150)})
    assert (report.rejected.count, report.rejected.by_code, len(report.rejected.first)) == (
        150,
        {"not_an_image": 150},
        100,
    )


def test_a_duplicate_is_kept_once(check: Callable[..., Report], pets: Files) -> None:
    same_pixels = encode(Image.open(io.BytesIO(pets["cat/00.png"])), "BMP")
    report = check(pets | {"cat/copy.png": pets["cat/00.png"], "cat/same.bmp": same_pixels})
    assert (report.images, report.classes[0].images) == (20, 10)
    assert report.duplicates.model_dump() == {
        "count": 2,
        "first": ({"file": "cat/copy.png", "of": "cat/00.png"}, {"file": "cat/same.bmp", "of": "cat/00.png"}),
    }


def test_a_picture_with_two_labels_is_rejected_under_both(check: Callable[..., Report]) -> None:
    files = pictures("cat", "dog", "fox", count=11)
    report = check(files | {"dog/also.png": files["cat/00.png"], "cat/again.png": files["cat/00.png"]})
    assert [one.images for one in report.classes] == [10, 11, 11]
    assert report.contradictions.model_dump() == {
        "count": 1,
        "first": ({"files": ("cat/00.png", "cat/again.png", "dog/also.png"), "classes": ("cat", "dog")},),
    }
    assert report.rejected.by_code == {"contradicting_labels": 3}
    assert {one.detail for one in report.rejected.first} == {"the same picture is in 'cat' and 'dog'"}


def divided(count: int = 10) -> Files:
    train, test = pictures("cat", "dog", count=count), pictures("cat", "dog", count=4, seed=1)
    return {f"train/{name}": content for name, content in train.items()} | {
        f"test/{name}": content for name, content in test.items()
    }


def test_a_test_picture_that_nearly_is_a_training_picture_is_left_out(check: Callable[..., Report]) -> None:
    files = divided()
    near = jpeg(files["train/cat/03.png"])
    copy = files["train/dog/01.png"]
    report = check(
        files | {"test/cat/near.jpg": near, "test/dog/copy.png": copy, "train/cat/near.jpg": near[:-1] + b"\0"}
    )
    assert report.divided
    assert [(one.name, one.train, one.test) for one in report.classes] == [("cat", 11, 4), ("dog", 10, 4)]
    assert [one.model_dump() for one in report.duplicates.first] == [
        {"file": "test/cat/near.jpg", "of": "train/cat/near.jpg"},
        {"file": "test/dog/copy.png", "of": "train/dog/01.png"},
    ]
    without = check(files | {"test/cat/near.jpg": near})
    assert without.near_duplicates.model_dump() == {
        "count": 1,
        "first": ({"file": "test/cat/near.jpg", "of": "train/cat/03.png"},),
    }
    assert (without.images, without.classes[0].test) == (28, 4)


def test_flat_pictures_are_not_near_duplicates(check: Callable[..., Report]) -> None:
    flat = {
        f"{split}/{label}/{shade}.png": encode(Image.new("RGB", (16, 16), (first + shade,) * 3))
        for split, first in (("train", 0), ("test", 40))
        for label, first in (("dark", first), ("light", first + 100))
        for shade in range(10)
    }
    report = check(flat)
    assert (report.images, report.near_duplicates.count, report.duplicates.count) == (40, 0, 0)


def test_near_repeats_are_told_of_where_nothing_is_divided_yet(check: Callable[..., Report], pets: Files) -> None:
    report = check(pets | {"cat/near.jpg": jpeg(pets["cat/03.png"])})
    assert report.notes == (
        "1 pictures nearly repeat another; those stay on one side when fine-tuning divides the set",
    )


def test_pictures_that_the_base_was_measured_on_are_rejected(check: Callable[..., Report], tmp_path: Path) -> None:
    more = pictures("cat", "dog", count=11)
    found = check(more, base=base(tmp_path, replay=remembering(more["cat/00.png"], more["dog/05.png"])))
    assert found.rejected.model_dump() == {
        "count": 2,
        "by_code": {"base_test_picture": 2},
        "first": (
            {"file": "cat/00.png", "code": "base_test_picture", "detail": "greys@1 was measured on this picture"},
            {"file": "dog/05.png", "code": "base_test_picture", "detail": "greys@1 was measured on this picture"},
        ),
    }
    assert found.base is not None
    assert found.base.model_dump() == {
        "model": "greys",
        "version": "1",
        "known": {"cat": "Cat"},
        "new": ("dog",),
        "test_pictures": 2,
    }


def test_what_the_base_does_not_remember_is_said(check: Callable[..., Report], pets: Files, tmp_path: Path) -> None:
    report = check(pets, base=base(tmp_path))
    assert report.base is not None
    assert report.base.test_pictures is None
    assert report.notes == ("greys@1 doesn't remember its test set, so pictures of it can't be told",)


def test_polarity_and_enlarged_pictures_are_noted_for_digits(check: Callable[..., Report], tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    files = {}
    for number in range(24):
        ink = np.full((20, 20), 240 if number < 8 else 10, np.uint8)
        ink[4:16, 8 : 10 + number % 4] = random.integers(100, 140, (12, 2 + number % 4))
        files[f"{number % 2}/{number}.png"] = encode(Image.fromarray(ink))
    report = check(files, base=base(tmp_path, fit="digit", replay=remembering(files["0/0.png"]), classes=("0", "1")))
    assert (report.polarity.model_dump(), report.sizes.upscaled) == ({"dark_on_light": 8, "light_on_dark": 16}, 24)  # type: ignore[union-attr]
    assert report.notes[:2] == (
        "24 pictures are smaller than the 28 x 28 of greys@1 and are enlarged",
        "8 pictures are dark on light; greys@1 sees them turned around, as digits are",
    )


def test_classes_that_differ_much_in_size_are_noted(check: Callable[..., Report]) -> None:
    report = check(pictures("cat", count=40) | pictures("dog", count=12, seed=1))
    assert report.notes == ("classes differ much in size: 'cat' has 40 pictures, 'dog' 12",)


def test_what_a_killed_check_left_beside_its_folder_goes(
    check: Callable[..., Report], pets: Files, tmp_path: Path
) -> None:
    left = tmp_path / "out" / ".checked-safelight-x0"
    (left / "content").mkdir(parents=True)
    (left / "content" / "data.zip").write_bytes(b"half")
    check(pets, into=tmp_path / "out" / "checked")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["checked"]


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "kind", "message", "facts"),
    [
        (
            pictures("cat", count=30),
            "TooFewClasses",
            "only one class, 'cat'; a classifier needs at least 2, a folder each",
            {"classes": 1, "limit": 2},
        ),
        (
            pictures("cat", count=20) | pictures("dog", count=4, seed=1) | {"dog/x.png": b"", "dog/y.txt": b"y"},
            "TooFewImages",
            "class 'dog' has 4 pictures (2 not_an_image left out); each needs at least 5",
            {"label": "dog", "images": 4, "limit": 5, "left_out": {"not_an_image": 2}},
        ),
        (
            pictures("cat", "dog", count=9) | {"cat/copy.png": pictures("cat", count=1)["cat/00.png"]},
            "TooFewImages",
            "the data set has 18 pictures (1 duplicate left out); it needs at least 20",
            {"images": 18, "limit": 20, "left_out": {"duplicate": 1}},
        ),
        (
            {name: content for name, content in divided(20).items() if not name.startswith("test/dog")},
            "SplitIncomplete",
            "class 'dog' has 20 pictures under train/ and 0 under test/; it needs 2 and 1, or leave train/ and test/ "
            "out: fine-tuning divides the set itself",
            {"label": "dog", "train": 20, "test": 0, "left_out": {}},
        ),
        (
            {"readme.txt": b"no pictures"},
            "NoPictures",
            "no pictures found: expected <class>/<picture>, or train/<class>/<picture> and test/<class>/<picture>",
            {},
        ),
        (
            divided() | {"cat/1.png": b""},
            "LayoutMixed",
            "some pictures lie under train/ and test/ and others, as cat/1.png, do not; use one layout",
            {"file": "cat/1.png"},
        ),
    ],
    ids=["one-class", "few-in-one", "few-in-all", "no-test", "no-pictures", "mixed"],
)
def test_what_cannot_be_learnt_from_is_refused(
    check: Callable[..., Report], files: Files, kind: str, message: str, facts: dict[str, object]
) -> None:
    with pytest.raises(DatasetError) as found:
        check(files)
    assert (type(found.value).__name__, str(found.value), found.value.facts) == (kind, message, facts)


def test_twenty_thousand_classes_are_refused_before_a_picture_is_looked_at(check: Callable[..., Report]) -> None:
    begun = time.monotonic()
    with pytest.raises(TooManyClasses, match=r"^the data set has 20001 classes; the limit is 1000: a folder is one cl"):
        check({f"{number}/1.png": b"" for number in range(20_001)})
    assert time.monotonic() - begun < 20


# --- what is written --------------------------------------------------------------------------------------------------


def test_what_is_written_is_what_training_reads(check: Callable[..., Report], tmp_path: Path) -> None:
    files = divided() | {"train/cat/broken.png": b""}
    report = check(files, into=tmp_path / "kept")
    assert Report.model_validate_json((tmp_path / "kept" / REPORT).read_bytes()) == report
    dataset = class_folders(tmp_path / "kept" / DATA, COLOUR)
    assert (dataset.classes, len(dataset.train), len(dataset.test), dataset.skipped) == (("cat", "dog"), 20, 8, ())
    written = {bytes(image.numpy().data) for image in torch.cat([dataset.train.images, dataset.test.images])}
    assert written == {bytes(decode(content, COLOUR).data) for content in files.values() if content}


def test_the_same_pictures_give_the_same_bytes_however_they_come(check: Callable[..., Report], tmp_path: Path) -> None:
    files = pictures("käse", "猫") | {"käse/notes.txt": b""}
    backwards = dict(reversed(files.items()))
    renamed = {f"a/b/{name.replace('.png', '-x.PNG')}": content for name, content in files.items()}
    forms = ((files, zipped), (backwards, zipped), (renamed, tarred))
    reports = [check(*form, into=tmp_path / f"kept-{number}") for number, form in enumerate(forms)]
    assert len({report.id for report in reports}) == 1
    assert len({(tmp_path / f"kept-{number}" / DATA).read_bytes() for number in range(3)}) == 1
    assert check(pictures("käse", "hund")).id != reports[0].id
    with zipfile.ZipFile(tmp_path / "kept-0" / DATA) as archive:
        infos = archive.infolist()
    assert {info.filename.partition("/")[0] for info in infos} == {"käse", "猫"}
    assert {(info.compress_type, info.date_time, info.external_attr >> 16) for info in infos} == {
        (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0), 0o644)
    }


def test_a_form_is_named_by_what_it_is(check: Callable[..., Report], tmp_path: Path, pets: Files) -> None:
    image = Image.open(io.BytesIO(pets.pop("cat/09.png")))
    check(pets | {"cat/jpeg-in-truth.png": encode(image, "JPEG")}, into=tmp_path / "kept")
    with zipfile.ZipFile(tmp_path / "kept" / DATA) as archive:
        assert sorted({name.rpartition(".")[2] for name in archive.namelist()}) == ["jpg", "png"]


def test_nothing_is_left_where_a_set_is_refused(check: Callable[..., Report], tmp_path: Path) -> None:
    (tmp_path / "place").mkdir()
    with pytest.raises(DatasetError):
        check(pictures("cat", "dog", count=3), into=tmp_path / "place" / "kept")
    assert os.listdir(tmp_path / "place") == []


def test_a_folder_that_holds_something_is_left_alone(check: Callable[..., Report], tmp_path: Path, pets: Files) -> None:
    with pytest.raises(FolderOccupied, match=r" is there already and isn't empty; name another folder$"):
        check(pets, into=tmp_path)


def test_a_check_of_a_small_archive_is_bounded(tmp_path: Path, pets: Files) -> None:
    (tmp_path / "pets.zip").write_bytes(zipped(pets))
    with opened(tmp_path / "pets.zip", Limits(file_bytes=10)) as archive, pytest.raises(DatasetError) as found:
        intake.check(archive, "pets")
    assert found.value.facts["left_out"] == {"entry_too_large": 20}
