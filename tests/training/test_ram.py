import os
from pathlib import Path

import pytest

from training.ram import memory

ALL = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ["memory.max", "memory/memory.limit_in_bytes"])
@pytest.mark.parametrize(
    ("limit", "expected"), [("268435456", 268_435_456), ("9223372036854771712", ALL), ("max", ALL), ("", ALL)]
)
def test_a_container_s_limit_counts(tmp_path: Path, name: str, limit: str, expected: int) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(limit + "\n")
    assert memory(tmp_path) == expected


def test_without_a_limit_all_memory_is_ours(tmp_path: Path) -> None:
    assert memory(tmp_path / "absent") == ALL
