"""Several processes that train one network: they end with the weights of one that trains alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import TINY, as_settings, squares, write_class_folders
from training import runs
from training.loop import CHECKPOINT
from training.ranks import ALONE, Ranks
from training.recipes import SGD, Recipe

# Without norms, whose statistics would be each process's own, the sums are the same but for their order.
PLAIN = TINY.model_copy(
    update={
        "network": "perceptron",
        "arguments": {"height": 12, "width": 12, "widths": [8]},
        "optimizer": SGD(lr=0.1, momentum=0.9),
        "shift": 0,
        "epochs": 2,
        "clip_norm": 1.0,
        "precision": "float32",
    }
)


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--", "training", *words]
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=110)


def words(recipe: Recipe, data: Path, run: Path) -> list[str]:
    settings = as_settings(recipe)
    return ["train", "mnist", *settings, "--name", "tiny", "--dataset", str(data), "--run", str(run), "--no-publish"]


def test_one_process_alone_has_everything_to_do() -> None:
    batch = torch.arange(7)
    assert torch.equal(ALONE.share(batch), batch)
    assert ALONE.sum([1.5, True], torch.device("cpu")) == [1.5, True]
    assert ALONE.is_first


def test_a_batch_is_dealt_out_to_all() -> None:
    batch = torch.arange(7)
    shares = [Ranks(rank, 3).share(batch).tolist() for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


@pytest.mark.slow
def test_two_processes_end_with_the_weights_of_one(tmp_path: Path) -> None:
    data = write_class_folders(tmp_path / "squares", squares())
    together = torchrun(*words(PLAIN, data, tmp_path / "together"))
    assert together.returncode == 0, together.stderr
    assert together.stderr.count("trained; publish it with:") == 1  # one of them speaks
    plan = runs.Plan(model="tiny", recipe=PLAIN, seed=0, dataset=str(data))
    runs.create(tmp_path / "alone", plan)
    runs.execute(tmp_path / "alone", runs.Options(tmp_path), lambda _: None, resume=False, publish=False)
    ends = [torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("together", "alone")]
    for name, tensor in ends[0]["network"].items():
        assert torch.allclose(tensor, ends[1]["network"][name], atol=1e-5), name
    rows = [[row["train_accuracy"] for row in end["state"]["history"]] for end in ends]
    assert rows[0] == rows[1]
    events = [json.loads(line) for line in (tmp_path / "together" / runs.EVENTS).read_text().splitlines()]
    assert [event["event"] for event in events].count("epoch") == 2


@pytest.mark.slow
def test_processes_that_train_together_must_be_told_where() -> None:
    ended = torchrun("train", "mnist")
    assert ended.returncode != 0
    assert "processes that train together must be told their --run" in " ".join(ended.stderr.split())
