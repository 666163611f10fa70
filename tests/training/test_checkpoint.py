"""Checkpoints: whole or not at all, always finite, and never trusted unread."""

import json
import pickle
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.tiny import TINY, reseal, squares
from training import checkpoint
from training.bundle import store
from training.bundle.manifest import CHECKPOINT, Manifest
from training.bundle.store import BundleRef
from training.checkpoint import CheckpointError, State, load_network, read_progress, save_weights
from training.loop import new_network
from training.networks import ConvNet
from training.optimizers import build_optimizers

IDENTITY = {"recipe": {"name": "tiny", "epochs": 4.0}, "seed": 7, "dataset": "0" * 64, "steps": 16}
ARITHMETIC = {"device": "cpu", "threads": 2}

Optimizers = list[torch.optim.Optimizer]


def stepped(seed: int = 0, steps: int = 3) -> tuple[ConvNet, Optimizers]:
    """A network and its optimizers, after some steps."""
    torch.manual_seed(seed)
    network, split = new_network(TINY, squares()), squares(seed=seed).train
    optimizers = build_optimizers(network, TINY, TINY.batch_size)
    for _ in range(steps):
        nn.functional.cross_entropy(network(split.images), split.labels).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return network, optimizers


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good checkpoint."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, State(IDENTITY, ARITHMETIC, step=3), *stepped())
    return path


def load(path: Path) -> State:
    return checkpoint.load(path, IDENTITY, *stepped(seed=1))


def test_everything_that_is_saved_is_restored(tmp_path: Path) -> None:
    state = State(IDENTITY, ARITHMETIC, 3, 1.5, 20.25, 40, 48, [{"epoch": 1, "train_loss": 0.5}])
    saved, loaded = stepped(seed=0), stepped(seed=1, steps=1)
    checkpoint.save(tmp_path / "checkpoint.pt", state, *saved)
    assert checkpoint.load(tmp_path / "checkpoint.pt", IDENTITY, *loaded) == state
    for name, tensor in saved[0].state_dict().items():
        assert torch.equal(loaded[0].state_dict()[name], tensor)
    for before, after in zip(saved[1], loaded[1], strict=True):
        first, second = before.state_dict(), after.state_dict()
        assert first["param_groups"] == second["param_groups"]
        for index, kept in first["state"].items():
            assert all(torch.equal(second["state"][index][name], tensor) for name, tensor in kept.items())


def test_saving_leaves_one_file_and_replaces_the_last(path: Path) -> None:
    checkpoint.save(path, State(IDENTITY, ARITHMETIC, step=9), *stepped())
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert read_progress(path) == (9, 16)


@contextmanager
def disk_that_takes(size: int) -> Iterator[None]:
    """No file of this process may grow beyond a size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def save_where_there_is_little_room(path: Path, size: int) -> None:
    with disk_that_takes(size):
        checkpoint.save(path, State(IDENTITY, ARITHMETIC, step=9), *stepped(seed=1))


@pytest.mark.parametrize("size", [0, 1000, 20_000])
def test_a_disk_that_is_full_leaves_the_last_checkpoint_as_it_was(path: Path, size: int) -> None:
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match=f"^{path} can't be written: ."):
        save_where_there_is_little_room(path, size)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["head.weight", "groups.0.norm1.running_var"])
def test_weights_that_are_not_finite_are_not_saved(path: Path, name: str, value: float) -> None:
    before = path.read_bytes()
    network, optimizers = stepped()
    network.state_dict()[name].view(-1)[0] = value
    with pytest.raises(CheckpointError, match="^the weights are not finite; they are not saved$"):
        checkpoint.save(path, State(IDENTITY, ARITHMETIC), network, optimizers)
    assert path.read_bytes() == before


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("weights"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(bytes(10_000)),
        lambda path: torch.save({"weights": torch.zeros(3)}, path),
        lambda path: torch.save({"state": {"epoch": 3}}, path),
        lambda path: path.write_bytes(pickle.dumps({"state": {}})),
        flip_a_bit,
    ],
    ids=["empty", "text", "cut", "cut short", "zeros", "no state", "another state", "pickle", "flipped"],
)
def test_a_damaged_file_is_named(path: Path, damage: Callable[[Path], object]) -> None:
    damage(path)
    for read in (load, read_progress):
        with pytest.raises(CheckpointError, match=f"^{path} is damaged: ."):
            read(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (load, read_progress):
        with pytest.raises(CheckpointError, match=f"^no checkpoint at {tmp_path / 'none.pt'}$"):
            read(tmp_path / "none.pt")


class Touch:
    """Code in a pickle: writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_not_run(path: Path) -> None:
    torch.save({"state": Touch(path.with_name("touched"))}, path)
    with pytest.raises(CheckpointError, match="is damaged: UnpicklingError"):
        load(path)
    assert not path.with_name("touched").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 8}, "of a run with seed 7, not 8; start anew in another folder, or ask for the same run"),
        ({"steps": 20}, "of a run with steps 16, not 20;"),
        ({"dataset": "1" * 64}, f"of a run with dataset {'0' * 60}…, not {'1' * 60}…;"),
        ({"recipe": {"name": "tiny"}}, "of a run with recipe {'name': 'tiny', 'epochs': 4.0}, not {'name': 'tiny'};"),
        ({"precision": "float32"}, "of a run with precision None, not float32;"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_changes_nothing(
    path: Path, change: dict[str, object], message: str
) -> None:
    network, optimizers = stepped(seed=1)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(CheckpointError) as refused:
        checkpoint.load(path, IDENTITY | change, network, optimizers)
    assert str(refused.value).startswith(f"{path} is {message}")
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


# --- bare weights -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bundle(tiny: Path) -> Path:
    return BundleRef("tiny", "1").path(tiny)


def manifest_of(bundle: Path) -> Manifest:
    return store.read_manifest(bundle.parents[1], BundleRef("tiny", "1"))


def test_weights_make_the_network_again(bundle: Path, tmp_path: Path) -> None:
    network = load_network(bundle, manifest_of(bundle))
    assert not network.training
    save_weights(tmp_path / CHECKPOINT, network)
    before, after = load_file(bundle / CHECKPOINT), load_file(tmp_path / CHECKPOINT)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(pickle.dumps({"head.weight": 1})),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: save_file({"head.weight": torch.zeros(2, 16)}, path),
        lambda path: save_file(load_file(path) | {"head.weight": torch.zeros(2, 9)}, path),
        lambda path: save_file(load_file(path) | {"tail.weight": torch.zeros(1)}, path),
    ],
    ids=["missing", "empty", "pickle", "cut", "too little", "another shape", "too much"],
)
def test_weights_of_another_network_are_refused(bundle: Path, damage: Callable[[Path], object]) -> None:
    manifest = manifest_of(bundle)
    damage(bundle / CHECKPOINT)
    with pytest.raises(CheckpointError, match=f"^{bundle / CHECKPOINT} doesn't fit the network: ."):
        load_network(bundle, manifest)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "transformer"},
        {"arguments": {}},
        {"arguments": {"channels": 1, "classes": 2, "layers": 3}},
        {"arguments": json.loads('{"channels": 1, "classes": 2, "widths": "16", "stem_width": 8, "stem_kernel": 3}')},
        {"arguments": {"channels": 1, "classes": 2, "widths": [-1], "stem_width": 8, "stem_kernel": 3}},
        {"arguments": {"channels": 1, "classes": 2, "widths": [], "stem_width": 8, "stem_kernel": 3}},
    ],
    ids=["name", "no arguments", "unknown argument", "a word for a number", "less than none", "no widths"],
)
def test_a_network_that_can_not_be_built_is_refused(bundle: Path, change: dict[str, object]) -> None:
    reseal(bundle, network=manifest_of(bundle).network.model_copy(update=change))
    with pytest.raises(CheckpointError, match="^no network '.*' can be built as the manifest says: "):
        load_network(bundle, manifest_of(bundle))
