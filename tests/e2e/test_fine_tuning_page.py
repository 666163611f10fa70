"""A new user's path: the lines of docs/fine-tuning.md and the README, typed in order, with pictures new to the base."""

import json
import re
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import serving

ROOT = Path(__file__).parents[2]


def commands(text: str) -> list[str]:
    """Of all its blocks of shell."""
    return [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]


LINES = commands((ROOT / "docs" / "fine-tuning.md").read_text().partition("## What is made")[0])


class Shell:
    """A terminal; its curl speaks to another port than 8000."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address

    def type(self, line: str) -> str:
        """What a line prints."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line.replace("localhost:8000", self.address) + "\necho; echo over: $?\n")
        self.process.stdin.flush()
        said = ""
        while not (printed := self.process.stdout.readline()).startswith("over: "):
            assert printed, said  # the shell is gone
            said += printed
        assert printed == "over: 0\n", said
        return said

    def asked(self, line: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.type(line))
        return answer


@contextmanager
def shell(folder: Path, url: str) -> Iterator[Shell]:
    with subprocess.Popen(
        ["sh"],
        cwd=folder,
        env={"PATH": "/usr/bin:/bin"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield Shell(process, url.removeprefix("http://"))


def events(stream: str) -> list[tuple[str, dict[str, Any]]]:
    """The kind of each event, and what it says."""
    found = re.findall(r"^event: (\w+)\ndata: (.*)$", stream, re.M)
    return [(kind, json.loads(said)) for kind, said in found]


def test_the_readme_and_the_page_have_the_same_four_lines() -> None:
    section = (ROOT / "README.md").read_text().partition("## A model of your own")[2].partition("\n## ")[0]
    assert commands(section) == LINES
    assert len(LINES) == 4


@pytest.mark.data
@pytest.mark.timeout(1800)  # on a busy machine; on one of its own, two minutes
def test_one_line_trains_one_watches_one_predicts_and_one_rolls_back(tmp_path: Path, data: Path) -> None:
    train, watch, predict, roll_back = LINES
    shutil.copy(data / "finetune-sample.zip", tmp_path / "pets.zip")
    with zipfile.ZipFile(tmp_path / "pets.zip") as archive:
        leopard = next(name for name in sorted(archive.namelist()) if "test/leopard/" in name and name.endswith("png"))
        (tmp_path / "pet.png").write_bytes(archive.read(leopard))
    shutil.copytree(ROOT / "artifacts", tmp_path / "artifacts")
    with serving(tmp_path / "artifacts", tmp_path) as server, shell(tmp_path, server.url) as terminal:
        assert re.fullmatch(r"job-[0-9a-f]{24}\n\n", terminal.type(train))
        told = events(terminal.type(watch))
        steps = [said["step"] for kind, said in told if kind == "progress"]
        assert steps == sorted(
            set(steps)
        )  # of quick ones some are left out; how many there are, early stopping decides
        assert (steps[0], steps[-1]) == (
            1,
            max(said["step"] for kind, said in told if kind in ("epoch", "checkpointed")),
        )
        assert {"validated", "started", "progress", "epoch"} <= {kind for kind, _ in told}
        assert [kind for kind, _ in told[-3:]] == ["published", "decided", "end"]
        job = told[-1][1]
        assert (job["status"], job["model"], job["name"]) == ("succeeded", "cifar10", "pets"), job
        result = job["result"]
        assert (result["version"], result["promoted"]) == ("1", True)
        assert result["metrics"]["accuracy"] >= 0.88  # of 500 test pictures
        assert re.fullmatch(r"\d+ of 500 right, .*; promoted", result["summary"])
        answer = terminal.asked(predict)
        assert (answer["model"], answer["version"], answer["predictions"][0]["label"]) == ("pets", "1", "leopard")

        settings = """-F promote=always -F seed=1 -F 'recipe={"depth": "head"}' """
        terminal.type(train.replace("localhost:8000", settings + "localhost:8000"))
        result = events(terminal.type(watch))[-1][1]["result"]
        assert (result["version"], result["promoted"]) == ("2", True)
        assert result["comparisons"].keys() == {"candidate", "active", "nearest_mean", "majority"}
        assert terminal.asked(predict)["version"] == "2"
        assert terminal.asked(roll_back)["active"] == "1"
        assert terminal.asked(predict)["version"] == "1"


@pytest.mark.data
def test_the_line_that_trains_prints_why_pictures_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(b"no zip")
    shutil.copytree(ROOT / "artifacts", tmp_path / "artifacts")
    with serving(tmp_path / "artifacts", tmp_path) as server, shell(tmp_path, server.url) as terminal:
        problem = terminal.asked(LINES[0])
    assert (problem["status"], problem["code"], problem["reason"]) == (422, "dataset_refused", "archive_unreadable")
