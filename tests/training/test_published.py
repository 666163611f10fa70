"""What is done with a published version and no server: verify, measure, ask. A bad one is refused, whatever it is."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tests.tiny import Greys, grey, make_bundle, reseal, squares, write_class_folders
from training import SafelightError, published
from training.bundle import store
from training.bundle.golden import GoldenMismatch
from training.bundle.images import FORMATS
from training.bundle.int8 import INT8, read_int8, write_int8
from training.bundle.manifest import CHECKPOINT, GOLDEN, MANIFEST, MODULE, BundleError, ManifestInvalid
from training.bundle.store import BundleRef, DigestMismatch, FileMalformed, FileMissing
from training.layout import DatasetError

TINY_1, GREYS_1 = BundleRef("tiny", "1"), BundleRef("greys", "1")


class Failing(nn.Module):
    """Takes pictures of three channels only."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.stem(pixels.float()).mean((2, 3))


@pytest.fixture
def bundle(tiny: Path) -> Path:
    return TINY_1.path(tiny)


# --- verify -----------------------------------------------------------------------------------------------------------


def test_a_good_version_is_verified(tiny: Path) -> None:
    published.verify(TINY_1, tiny)


@pytest.mark.parametrize("name", [MODULE, CHECKPOINT, GOLDEN, "report/confusion.png"])
def test_a_file_that_was_changed_or_lost_is_named(tiny: Path, bundle: Path, name: str) -> None:
    content = (bundle / name).read_bytes()
    (bundle / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(DigestMismatch, match=f"^{name} has sha256"):
        published.verify(TINY_1, tiny)
    (bundle / name).unlink()
    with pytest.raises(FileMissing, match=f"^{name} is missing$"):
        published.verify(TINY_1, tiny)


def change_weights(bundle: Path, by: float) -> None:
    weights = load_file(bundle / CHECKPOINT)
    save_file(weights | {"head.weight": weights["head.weight"] + by}, bundle / CHECKPOINT)


def change_means(bundle: Path) -> None:
    int8 = read_int8(bundle / INT8)
    assert int8 is not None
    fewer = tuple(means[1:] for means in int8.ranges.means)
    write_int8(bundle / INT8, replace(int8, ranges=replace(int8.ranges, means=fewer)))


def change_golden(bundle: Path) -> None:
    golden = load_file(bundle / GOLDEN)
    save_file(golden | {"logits": golden["logits"] + 0.01}, bundle / GOLDEN)


# Each of them has the digests of its manifest: somebody built it so.
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda folder: change_weights(folder, 0.5), GoldenMismatch, f"{CHECKPOINT} misses the golden logits by "),
        (change_golden, GoldenMismatch, rf"{MODULE} misses the golden logits by 1\.0e-02"),
        (change_means, GoldenMismatch, f"{INT8} is of another network: there are 8 input channels and 7 means"),
        (lambda folder: (folder / CHECKPOINT).write_text("weights"), GoldenMismatch, ".* doesn't fit the network: "),
        (lambda folder: (folder / GOLDEN).write_text("golden"), GoldenMismatch, f"{GOLDEN} can't be read: "),
        (lambda folder: (folder / MODULE).write_text("module"), FileMalformed, f"{MODULE} isn't a TorchScript file: ."),
        (
            lambda folder: torch.jit.script(Failing()).save(folder / MODULE),
            GoldenMismatch,
            f"{MODULE} doesn't run: .*channels",
        ),
    ],
    ids=[
        "weights",
        "golden logits",
        "means of fewer channels",
        "no weights",
        "no golden samples",
        "no module",
        "module that fails",
    ],
)
def test_a_version_that_contradicts_itself_is_refused(
    tiny: Path, bundle: Path, damage: Callable[[Path], object], error: type[BundleError], message: str
) -> None:
    damage(bundle)
    reseal(bundle)
    with pytest.raises(error, match=f"^{message}"):
        published.verify(TINY_1, tiny)


def test_a_network_that_is_not_known_here_is_refused(artifacts: Path) -> None:
    with pytest.raises(GoldenMismatch, match="^no network 'convnet' can be built as the manifest says: "):
        published.verify(GREYS_1, artifacts)


def test_a_version_that_is_not_there_is_refused(tiny: Path) -> None:
    with pytest.raises(ManifestInvalid, match=f"^{MANIFEST} can't be read: No such file or directory$"):
        published.verify(BundleRef("tiny", "9"), tiny)


# --- evaluate ---------------------------------------------------------------------------------------------------------


def evaluate(artifacts: Path, ref: BundleRef = TINY_1, **options: object) -> published.Evaluation:
    defaults = {"dataset": None, "data": None, "device": "cpu", "tta": False, "strict": False, "download": False}
    return published.evaluate(ref, artifacts, **defaults | options)


def test_measuring_again_gives_the_published_figures(tiny_run: Path) -> None:
    found = evaluate(tiny_run / "artifacts", dataset=str(tiny_run / "squares"))
    manifest = store.read_manifest(tiny_run / "artifacts", TINY_1)
    assert (found.ref, found.note) == (TINY_1, None)
    assert sum(row[index] for index, row in enumerate(found.confusion)) == round(80 * found.metrics.accuracy)
    assert found.metrics.model_dump() == {
        name: value if isinstance(value, dict | None) else pytest.approx(value, abs=1e-4)
        for name, value in manifest.metrics.model_dump().items()
    }


@pytest.mark.parametrize("views", ["none", "shifts"])
def test_test_time_augmentation_is_measured_apart_where_the_recipe_has_it(
    tiny: Path, bundle: Path, tiny_run: Path, views: str
) -> None:
    recipe = store.read_manifest(tiny, TINY_1).recipe
    reseal(bundle, recipe=recipe.model_copy(update={"settings": recipe.settings | {"views": views}}))
    source = str(tiny_run / "squares")
    single, both = (evaluate(tiny, dataset=source, tta=tta).metrics for tta in (False, True))
    assert single.accuracy_tta is None
    assert (both.accuracy_tta is not None) == (views == "shifts")
    assert both.model_copy(update={"accuracy_tta": None}) == single


def test_data_of_other_classes_is_refused(tiny: Path, tmp_path: Path) -> None:
    dataset = squares(12)
    renamed = write_class_folders(tmp_path / "pets", type(dataset)("pets", ("cat", "dog"), dataset.train, dataset.test))
    with pytest.raises(SafelightError, match=f"^{renamed} has the classes cat, dog; tiny@1 has filled, hollow$"):
        evaluate(tiny, dataset=str(renamed))


def test_data_that_is_not_there_is_refused(tiny: Path) -> None:
    with pytest.raises(DatasetError, match="^no data set 'squares': it is neither mnist, cifar10, nor an existing"):
        evaluate(tiny, dataset="squares")


def test_a_model_of_somebodys_own_data_asks_where_that_is(tiny: Path) -> None:
    sentence = "tiny@1 was trained on 'squares', a folder or zip; say where it is with --dataset"
    with pytest.raises(SafelightError, match=f"^{sentence}$"):
        evaluate(tiny)


@pytest.mark.parametrize("model", ["mnist", "cifar10"])
def test_a_shipped_bundle_has_at_most_20_megabytes_and_no_path_of_the_machine_that_made_it(model: str) -> None:
    artifacts = Path(__file__).parents[2] / "artifacts"
    folder = BundleRef(model, store.active(artifacts, model) or "").path(artifacts)
    contents = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    assert sum(map(len, contents)) <= 20_000_000
    with zipfile.ZipFile(folder / "model.ts") as module:
        contents += [module.read(name) for name in module.namelist()]
    assert not any(word in content for content in contents for word in (b"/home/", b"/tmp/", b"site-packages"))


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize(("model", "least"), [("mnist", 0.997), ("cifar10", 0.944)])
def test_the_shipped_models_score_what_they_say(data: Path, model: str, least: float) -> None:
    artifacts = Path(__file__).parents[2] / "artifacts"
    ref = BundleRef(model, store.active(artifacts, model) or "")
    found = evaluate(artifacts, ref, data=data).metrics.accuracy
    assert found == pytest.approx(store.read_manifest(artifacts, ref).metrics.accuracy, abs=2e-4)
    assert found >= least


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    """A shade of grey, no picture, no file, and another shade."""
    paths = [tmp_path / name for name in ("three.png", "notes.txt", "none.png", "nine.webp")]
    paths[0].write_bytes(grey(3))
    paths[1].write_text("dear diary")
    paths[3].write_bytes(grey(9, "WEBP", size=40))
    return paths


def test_each_file_has_its_answer_or_its_error(artifacts: Path, pictures: list[Path]) -> None:
    first, *bad, last = published.predict(GREYS_1, artifacts, pictures, top_k=2, device="cpu")
    assert [result.path for result in (first, *bad, last)] == pictures
    assert [result.answer and result.answer.best["label"] for result in (first, last)] == ["grey-3", "grey-9"]
    assert [result.error for result in (first, last)] == [None, None]
    assert [result.answer for result in bad] == [None, None]
    assert [result.error for result in bad] == [
        f"this is no image of a format that is read here; send one of {', '.join(FORMATS)}",
        f"[Errno 2] No such file or directory: '{pictures[2]}'",
    ]


def test_an_answer_reads_like_that_of_the_service(artifacts: Path, pictures: list[Path]) -> None:
    (result,) = published.predict(GREYS_1, artifacts, pictures[:1], top_k=2, device="cpu")
    middle = torch.exp(-(((56 - Greys().centres) / 16) ** 2))
    probability = float(middle[3] / middle.sum())
    scores = [
        {"label": "grey-3", "index": 3, "probability": pytest.approx(probability)},
        {"label": "grey-2", "index": 2, "probability": pytest.approx(probability / torch.e)},
    ]
    assert published.as_json(result) == {
        "file": str(pictures[0]),
        **scores[0],
        "scores": scores,
        "in_distribution": True,
    }
    assert published.as_row(result) == [
        "grey-3",
        f"{probability:.1%}",
        f"grey-2 {probability / torch.e:.1%}",
        "yes",
    ]


def test_an_error_takes_the_answer_s_place(artifacts: Path, pictures: list[Path]) -> None:
    (result,) = published.predict(GREYS_1, artifacts, pictures[1:2], top_k=2, device="cpu")
    assert published.as_json(result) == {"file": str(pictures[1]), "error": result.error}
    assert published.as_row(result) == ["", "", result.error, ""]


@pytest.mark.parametrize(("top_k", "shown"), [(1, 1), (3, 3), (99, 16)])
def test_no_more_classes_are_shown_than_there_are(
    artifacts: Path, pictures: list[Path], top_k: int, shown: int
) -> None:
    (result,) = published.predict(GREYS_1, artifacts, pictures[:1], top_k=top_k, device="cpu")
    assert result.answer is not None
    assert len(result.answer.scores) == shown


def test_a_changed_module_is_asked_nothing(tmp_path: Path, pictures: list[Path]) -> None:
    ref = make_bundle(tmp_path / "artifacts")
    with (ref.path(tmp_path / "artifacts") / MODULE).open("ab") as file:
        file.write(b"\0")
    with pytest.raises(DigestMismatch, match=f"^{MODULE} has "):
        published.predict(ref, tmp_path / "artifacts", pictures, top_k=1, device="cpu")
