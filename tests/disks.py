"""Disks that are too small or can't be written, as they are found in the wild; root alone can make them."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, str], Path]]:
    """Makes a folder a disk of its own, of a size like "2m"; what it held isn't seen any more."""
    yield from _mounting(lambda place, size: [["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]])


@pytest.fixture
def read_only() -> Iterator[Callable[[Path], Path]]:
    """Makes a folder one that nobody can write, not even root."""
    yield from _mounting(
        lambda place: [["mount", "--bind", str(place), str(place)], ["mount", "-o", "remount,bind,ro", str(place)]]
    )


def _mounting(commands: Callable[..., list[list[str]]]) -> Iterator[Callable[..., Path]]:
    mounted: list[Path] = []

    def mount(place: Path, *options: str) -> Path:
        place.mkdir(parents=True, exist_ok=True)
        for command in commands(place, *options):
            if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
                pytest.skip("mounting a disk takes root's rights")
            if place not in mounted:
                mounted.append(place)
        return place

    yield mount
    for place in mounted:
        subprocess.run(["umount", str(place)], check=True)
