"""Fixtures of the training tests: a model that was really trained, made once."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.tiny import TINY, squares, write_class_folders
from training import runs


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in `run`, its data in `squares`, and what it published, tiny@1, in `artifacts`. To read only."""
    torch.set_num_threads(2)
    root = tmp_path_factory.mktemp("tiny")
    data = write_class_folders(root / "squares", squares())
    runs.create(root / "run", runs.Plan(model="tiny", recipe=TINY, seed=0, dataset=str(data)))
    runs.execute(root / "run", runs.Options(artifacts=root / "artifacts"), lambda _: None, resume=False)
    return root


@pytest.fixture
def tiny(tiny_run: Path, tmp_path: Path) -> Path:
    """An artifacts folder with tiny@1, to do anything with."""
    return shutil.copytree(tiny_run / "artifacts", tmp_path / "artifacts", dirs_exist_ok=True)
