"""What this machine is."""

import pytest
import torch

from training.devices import (
    DeviceUnavailable,
    available_devices,
    choose_device,
    device_name,
    each_of,
    keep_freed_memory,
    training_precision,
)
from training.processors import processors


@pytest.mark.parametrize("wanted", ["cuda:99", "tpu", "CPU", "cpu:1", "auto "])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(wanted: str) -> None:
    with pytest.raises(DeviceUnavailable, match=f"^device '{wanted}' isn't available here; there is .*cpu, or auto$"):
        choose_device(wanted)


@pytest.mark.parametrize("wanted", [None, "", "auto"])
@pytest.mark.parametrize(
    ("gpus", "mps", "best", "all_of_them"),
    [
        (2, True, "cuda", ["cuda", "cuda:0", "cuda:1", "mps", "cpu"]),
        (0, True, "mps", ["mps", "cpu"]),
        (0, False, "cpu", ["cpu"]),
    ],
)
def test_the_best_device_is_chosen_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, gpus: int, mps: bool, best: str, all_of_them: list[str], wanted: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert (choose_device(wanted), available_devices()) == (torch.device(best), all_of_them)


@pytest.mark.parametrize(
    ("gpus", "wanted", "spread"),
    [
        (2, "auto", ["cuda:0", "cuda:1"]),
        (2, "cuda", ["cuda:0", "cuda:1"]),
        (2, "cuda:1", ["cuda:1"]),
        (2, "cpu", ["cpu"]),
        (1, "auto", ["auto"]),
        (0, "auto", ["auto"]),
    ],
)
def test_jobs_are_spread_over_all_gpus_where_none_is_named(
    monkeypatch: pytest.MonkeyPatch, gpus: int, wanted: str, spread: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert each_of(wanted) == spread


def test_the_cpu_can_always_be_chosen() -> None:
    device = choose_device("cpu")
    assert device == torch.device("cpu")
    assert device_name(device) == f"cpu ({processors()} threads)"
    assert training_precision(device) in (torch.float32, torch.bfloat16)


def test_memory_settings_do_no_harm() -> None:
    keep_freed_memory()
    assert torch.ones(1_000_000).sum() == 1_000_000
