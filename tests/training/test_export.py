"""Export: a bundle is the network that was trained, or there is no bundle."""

import subprocess
import sys
import zipfile
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import training
from tests.tiny import TINY, squares
from training import published
from training.bundle import store
from training.bundle.golden import read_golden
from training.bundle.manifest import CHECKPOINT, GOLDEN, MANIFEST, MODULE, InputSpec, Manifest
from training.bundle.store import BundleRef
from training.checkpoint import load_network
from training.datasets import holdout
from training.devices import device_name
from training.drawings import golden_images
from training.evaluate import infer
from training.export import (
    ExportFailed,
    Measured,
    export,
    measure,
    origin,
    read_module,
    write_module,
    write_portable_module,
)
from training.loop import Trained, new_network, train
from training.networks import ConvNet, build, macs, parameters

CPU = torch.device("cpu")
RECIPE = TINY.model_copy(update={"views": "shifts"})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(2)
    return train(RECIPE, squares(), tmp_path_factory.mktemp("run"), seed=5, device=CPU, emit=lambda _: None)


@pytest.fixture
def trained(original: Trained) -> Trained:
    return deepcopy(original)


@pytest.fixture
def measured(original: Trained) -> Measured:
    return measure(original, squares(), RECIPE)


def publish(trained: Trained, measured: Measured, artifacts: Path) -> BundleRef:
    what = origin(trained, squares(), RECIPE, seed=5, model="tiny")
    return export(trained.network, what, measured, trained.history, artifacts)


def pixels(count: int, shape: tuple[int, int, int], seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=random)


# --- what is published ------------------------------------------------------------------------------------------------


def test_a_published_bundle_loads_back_and_is_the_network_that_was_trained(
    trained: Trained, measured: Measured, tmp_path: Path
) -> None:
    ref = publish(trained, measured, tmp_path)
    assert ref == BundleRef("tiny", "1")
    published.verify(ref, tmp_path)
    manifest, module = published.load(ref, tmp_path)
    loaded = load_network(ref.path(tmp_path), manifest).state_dict()
    assert loaded.keys() == trained.network.state_dict().keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in trained.network.state_dict().items())
    test = squares().test.images
    assert torch.allclose(infer(module, test, CPU), infer(trained.network, test, CPU), rtol=0, atol=1e-4)


def test_no_file_tells_where_it_was_made(trained: Trained, measured: Measured, tmp_path: Path) -> None:
    """TorchScript keeps the stack of every traced operation, source paths included."""
    folder = publish(trained, measured, tmp_path).path(tmp_path)
    with zipfile.ZipFile(folder / MODULE) as archive:
        contents = [archive.read(name) for name in archive.namelist()]
    contents += [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    places = [str(Path(module.__file__).parent).encode() for module in (training, torch)]
    assert not any(place in content for place in places for content in contents)


def test_the_manifest_tells_everything(trained: Trained, measured: Measured, tmp_path: Path) -> None:
    folder = publish(trained, measured, tmp_path).path(tmp_path)
    manifest = store.read_manifest(tmp_path, BundleRef("tiny", "1"))
    arguments = {"widths": [16], "stem_width": 8, "stem_kernel": 3, "activation": "relu", "channels": 1, "classes": 2}
    assert manifest.model_dump(exclude={"created_at", "files"}) == {
        "format_version": 1,
        "format": "torchscript",
        "model": "tiny",
        "version": "1",
        "classes": ("filled", "hollow"),
        "input": {"channels": 1, "height": 12, "width": 12, "fit": "stretch"},
        "network": {
            "name": "convnet",
            "arguments": arguments,
            "parameters": parameters(trained.network),
            "macs": macs(trained.network, (1, 12, 12)),
        },
        "recipe": {"name": "tiny", "settings": RECIPE.model_dump(mode="json"), "seed": 5},
        "training": {
            "dataset": {
                "name": "squares",
                "sha256": squares().sha256,
                "train": 64,
                "holdout": 16,
                "test": 80,
                "skipped": 0,
            },
            "epochs": 4,
            "seconds": round(trained.seconds, 1),
            "device": device_name(CPU),
            "precision": trained.arithmetic["precision"],
            "torch": torch.__version__,
        },
        "parent": None,
        "metrics": measured.metrics.model_dump(),
        "calibration": measured.calibration.model_dump(),
        "ood": measured.ood.model_dump(),
    }
    assert manifest.files == store.folder_facts(folder)
    report = {"metrics.json", "learning-curve.png", "confusion.png", "model-card.md"}
    assert manifest.files.keys() == {MODULE, CHECKPOINT, GOLDEN} | {f"report/{name}" for name in report}


def test_the_golden_samples_are_our_own_drawings_and_the_network_s_answers(
    trained: Trained, measured: Measured, tmp_path: Path
) -> None:
    folder = publish(trained, measured, tmp_path).path(tmp_path)
    golden = read_golden(folder / GOLDEN, Manifest.parse((folder / MANIFEST).read_bytes()))
    assert np.array_equal(golden.images, golden_images(RECIPE.input))
    assert np.array_equal(golden.logits, infer(trained.network, torch.from_numpy(golden.images), CPU).numpy())


def test_version_numbers_rise_and_nothing_else_is_left(trained: Trained, measured: Measured, tmp_path: Path) -> None:
    first = publish(trained, measured, tmp_path)
    before = {path: path.read_bytes() for path in first.path(tmp_path).rglob("*") if path.is_file()}
    assert publish(trained, measured, tmp_path) == BundleRef("tiny", "2")
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"1", "2", store.LAST}
    assert store.active(tmp_path, "tiny") is None


# --- the module -------------------------------------------------------------------------------------------------------

NETWORKS = {
    "grey": ((1, 12, 12), {"widths": [16], "stem_width": 8, "stem_kernel": 3}),
    "stride": ((1, 28, 28), {"widths": [8, 16], "stem_width": 8, "stem_kernel": 5, "stem_stride": 2}),
    "whitened": ((3, 32, 32), {"widths": [8, 16, 16], "stem_width": 24, "stem_kernel": 2, "whiten": True}),
    "not square": ((3, 20, 33), {"widths": [8, 16], "stem_width": 8, "stem_kernel": 3, "activation": "silu"}),
}


def used(name: str) -> tuple[ConvNet, tuple[int, int, int]]:
    """A network whose norms and filters are those of training, not of the beginning."""
    torch.manual_seed(0)
    shape, arguments = NETWORKS[name]
    network = build("convnet", {"channels": shape[0], "classes": 5, **arguments})
    network.initialize(pixels(64, shape))
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        for seed in range(5):
            network.train()(pixels(32, shape, seed))
    return network.eval(), shape


@pytest.mark.parametrize("name", NETWORKS)
def test_the_module_agrees_with_the_network_at_any_batch_size(name: str, tmp_path: Path) -> None:
    network, shape = used(name)
    write_module(tmp_path / MODULE, network, shape)
    module = read_module(tmp_path / MODULE)
    images = pixels(65, shape)
    expected = infer(network, images, CPU)
    assert expected.std() > 0.01
    for size in (1, 2, 3, 16, 65):
        logits = module(images[:size])
        assert (logits.dtype, logits.shape) == (torch.float32, (size, 5))
        assert (logits - expected[:size]).abs().max() <= 1e-4


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_portable_module_agrees_with_the_network_at_any_batch_size(
    name: str, precision: torch.dtype, tolerance: float, tmp_path: Path
) -> None:
    """bfloat16 has eight bits: logits may be off by 3 % of their spread, float32's by 1e-4. A stem that whitens blows
    small differences up, so it stays in float32."""
    network, shape = used(name)
    write_portable_module(tmp_path / "portable.ts", network, shape, precision)
    module = torch.jit.load(tmp_path / "portable.ts")
    for layer, parameter in module.named_parameters():
        in_full = name == "whitened" and layer.startswith("network.stem.")
        assert parameter.dtype == (torch.float32 if in_full else precision), layer
    images = pixels(65, shape)
    expected = infer(network, images, CPU)
    for size in (1, 2, 3, 16, 65):
        logits = module(images[:size])
        assert (logits.dtype, logits.shape) == (torch.float32, (size, 5))
        assert (logits - expected[:size]).abs().max() <= tolerance * (expected.max() - expected.min())


def test_a_portable_module_needs_nothing_but_torch(tmp_path: Path) -> None:
    network, shape = used("whitened")
    write_portable_module(tmp_path / "portable.ts", network, shape, torch.bfloat16)
    program = (
        "import sys, torch; y = torch.jit.load('portable.ts')(torch.zeros(3, 3, 32, 32, dtype=torch.uint8)); "
        "print(y.dtype, list(y.shape), 'training' in sys.modules)"
    )
    words = [sys.executable, "-I", "-W", "ignore", "-c", program]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "torch.float32 [3, 5] False\n"


def test_the_network_is_left_as_it_was(tmp_path: Path) -> None:
    network, shape = used("grey")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    write_module(tmp_path / MODULE, network, shape)
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# --- what is not published --------------------------------------------------------------------------------------------


def test_a_module_that_disagrees_is_refused_and_nothing_is_left(
    trained: Trained, measured: Measured, tmp_path: Path
) -> None:
    good = deepcopy(trained)
    # Folding a norm into the convolution before the pooling is right for a scale above 0 only.
    trained.network.groups[0].norm1.weight.data.fill_(-1)
    with pytest.raises(ExportFailed, match=rf"^{MODULE} differs from the network by \d\.\de[+-]\d+ in a logit"):
        publish(trained, measured, tmp_path)
    assert list((tmp_path / "tiny").iterdir()) == []
    assert publish(good, measured, tmp_path) == BundleRef("tiny", "1")


def test_a_bundle_that_can_not_be_described_is_not_published(
    trained: Trained, measured: Measured, tmp_path: Path
) -> None:
    publish(trained, measured, tmp_path)
    trained.network.head.weight.data.fill_(float("nan"))
    with pytest.raises(store.BundleError, match="golden logits are not all finite"):
        publish(trained, measured, tmp_path)
    assert {path.name for path in (tmp_path / "tiny").iterdir()} == {"1", store.LAST}


# --- measuring --------------------------------------------------------------------------------------------------------


def test_the_hold_out_calibrates_and_the_test_set_is_reported(trained: Trained, measured: Measured) -> None:
    assert torch.equal(trained.held.images, holdout(squares().train, RECIPE.holdout)[1].images)
    assert (measured.metrics.n, int(measured.confusion.sum())) == (80, 80)
    assert measured.metrics.accuracy == float(measured.confusion.diag().sum() / 80)
    assert measured.metrics.accuracy_tta is not None
    assert measured.ood.score == "energy"
    assert measured.ood.true_positive_rate >= 0.9


def test_views_are_measured_only_where_the_recipe_has_them(trained: Trained) -> None:
    assert measure(trained, squares(), TINY).metrics.accuracy_tta is None


def test_a_picture_of_colour_is_exported_as_well(tmp_path: Path) -> None:
    grey, spec = squares(), InputSpec(channels=3, height=12, width=12, fit="cover")
    recipe = TINY.model_copy(update={"input": spec, "epochs": 1})
    splits = [type(split)(split.images.repeat(1, 3, 1, 1), split.labels) for split in (grey.train, grey.test)]
    dataset = type(grey)("coloured", grey.classes, *splits)
    (tmp_path / "run").mkdir()
    trained = train(recipe, dataset, tmp_path / "run", seed=0, device=CPU, emit=lambda _: None)
    assert new_network(recipe, dataset).state_dict().keys() == trained.network.state_dict().keys()
    measured = measure(trained, dataset, recipe)
    what = origin(trained, dataset, recipe, seed=0, model="coloured")
    ref = export(trained.network, what, measured, trained.history, tmp_path)
    published.verify(ref, tmp_path)
