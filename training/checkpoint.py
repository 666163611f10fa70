"""Checkpoints: the whole state of a run, to go on from exactly; and bare weights, to build a network from.

A checkpoint is written beside its place and renamed. Only finite weights are ever saved, so the file on disk is always
the last good state.
"""

import hashlib
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialize
from torch import Tensor, nn

from training import SafelightError
from training.bundle.manifest import CHECKPOINT, Manifest
from training.networks import Network, build


class CheckpointError(SafelightError):
    """A checkpoint that is missing, damaged, or of another run than the one that is asked for."""


@dataclass
class State:
    """Where a run stands. `identity` says which run: recipe, seed, data, steps; `arithmetic`, what it began with."""

    identity: dict[str, Any]
    arithmetic: dict[str, str]
    step: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0  # of the epoch under way, over its images so far
    right: int = 0
    seen: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)  # one row an epoch
    attempt: int = 0  # of fine-tuning: how often it went back to here with smaller steps
    gradients: list[dict[str, float]] = field(default_factory=list)  # their lengths by layer, one row an epoch
    over: bool = False  # before its last step: nothing got better any more
    best: dict[str, Tensor] | None = None  # the weights with the best hold-out accuracy so far, where they are kept

    @property
    def precision(self) -> torch.dtype:
        """What convolutions are computed in, from the run's beginning to its end."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.arithmetic["precision"]]

    def count(self, loss_sum: float, right: int, seen: int, seconds: float) -> None:
        """One more step is done: `seen` pictures, so many of them `right`; `seconds` since the run began."""
        self.step += 1
        self.loss_sum += loss_sum
        self.right += right
        self.seen += seen
        self.seconds = seconds


def save(path: Path, state: State, network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """Write one file, whole or not at all. Raises CheckpointError, also rather than save weights that aren't finite."""
    if not all_finite(network):
        raise CheckpointError("the weights are not finite; they are not saved")
    write(
        path,
        {
            "state": vars(state),
            "network": network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        },
    )


def write(path: Path, content: dict[str, Any]) -> None:
    """Tensors, numbers, strings and collections of them as one file, whole or not at all. Raises CheckpointError."""
    temporary = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch makes RuntimeErrors of a full disk
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path} can't be written: {str(error).splitlines()[0]}") from error


def load(path: Path, identity: dict[str, Any], network: nn.Module, optimizers: list[torch.optim.Optimizer]) -> State:
    """Restore everything that `save` wrote. Raises CheckpointError, also where the run is another one."""
    with reading(path) as content:
        state = State(**content["state"])
    for key, value in identity.items():
        if state.identity.get(key) != value:
            raise CheckpointError(
                f"{path} is of a run with {key} {_short(state.identity.get(key))}, not {_short(value)}; "
                "start anew in another folder, or ask for the same run"
            )
    network.load_state_dict(content["network"])
    for optimizer, saved in zip(optimizers, content["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state


def read_progress(path: Path) -> tuple[int, int]:
    """Steps done and steps in all. Raises CheckpointError."""
    with reading(path) as content:
        state = State(**content["state"])
        return (state.identity["steps"] if state.over else state.step), state.identity["steps"]


@contextmanager
def reading(path: Path) -> Iterator[dict[str, Any]]:
    """What `write` wrote; no code from the file is run.

    Raises CheckpointError where the file is missing or damaged, also if that shows only when its content is used.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load doesn't look at the checksums that torch.save wrote
            if name := archive.testzip():
                raise zipfile.BadZipFile(f"{name} has a wrong checksum")
        yield torch.load(path, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"no checkpoint at {path}") from None
    except Exception as error:  # there is no end to what reading damaged bytes can raise
        reason = f"{type(error).__name__} {error}".splitlines()[0]
        raise CheckpointError(f"{path} is damaged: {reason}; start a new run") from error


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "…"


def all_finite(network: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in network.state_dict().values())


# --- bare weights -----------------------------------------------------------------------------------------------------


def save_weights(path: Path, network: nn.Module) -> None:
    path.write_bytes(_serialized(network))  # and not save_file, which lets nobody else read the file


def weights_sha256(network: nn.Module) -> str:
    """The digest of the file that `save_weights` would write."""
    return hashlib.sha256(_serialized(network)).hexdigest()


def _serialized(network: nn.Module) -> bytes:
    tensors: dict[str, Tensor] = {
        name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()
    }
    return serialize(tensors)


def load_network(folder: Path, manifest: Manifest) -> Network:
    """Build a bundle's network and load its weights, running no code from the file. Raises CheckpointError."""
    try:
        network = build(manifest.network.name, manifest.network.arguments)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"no network {manifest.network.name!r} can be built as the manifest says: {error}"
        ) from error
    try:
        network.load_state_dict(load_file(folder / CHECKPOINT))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise CheckpointError(f"{folder / CHECKPOINT} doesn't fit the network: {str(error).splitlines()[0]}") from error
    return network.eval()
