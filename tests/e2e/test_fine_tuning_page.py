"""A new user's path: the curl lines of docs/fine-tuning.md, in order, with pictures that the base has never seen."""

import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import Server, serving

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "fine-tuning.md").read_text()
COMMANDS = re.findall(r"^curl .+", PAGE.partition("## What is made")[0], re.M)


@pytest.mark.data
@pytest.mark.timeout(900)  # on a busy machine; on one of its own, two minutes
def test_one_line_trains_one_watches_one_predicts_and_one_rolls_back(tmp_path: Path, data: Path) -> None:
    train, watch, look, predict, roll_back = COMMANDS
    shutil.copy(data / "finetune-sample.zip", tmp_path / "pets.zip")
    with zipfile.ZipFile(tmp_path / "pets.zip") as archive:
        leopard = next(name for name in sorted(archive.namelist()) if "test/leopard/" in name and name.endswith("png"))
        (tmp_path / "pet.png").write_bytes(archive.read(leopard))
    shutil.copytree(ROOT / "artifacts", tmp_path / "artifacts")
    with serving(tmp_path / "artifacts", tmp_path, state=str(tmp_path / "state")) as server:
        job = asked(train, tmp_path, server)
        assert (job["status"], job["model"], job["name"]) == ("queued", "cifar10", "pets")
        seen = run(watch, tmp_path, server, job["id"])
        assert seen.count("event: ") > 200
        assert "event: decided" in seen
        job = asked(look, tmp_path, server, job["id"])
        assert job["status"] == "succeeded", job
        result = job["result"]
        assert (result["version"], result["promoted"]) == ("1", True)
        assert result["metrics"]["accuracy"] >= 0.88  # of 500 test pictures
        assert re.fullmatch(r"\d+ of 500 right, .*; promoted", result["summary"])
        answer = asked(predict, tmp_path, server)
        assert (answer["model"], answer["version"], answer["predictions"][0]["label"]) == ("pets", "1", "leopard")

        again = asked(f'{train} -F promote=always -F seed=1 -F \'recipe={{"depth": "head"}}\'', tmp_path, server)
        run(watch, tmp_path, server, again["id"])
        result = asked(look, tmp_path, server, again["id"])["result"]
        assert (result["version"], result["promoted"]) == ("2", True)
        assert result["comparisons"].keys() >= {"candidate", "active"}
        assert asked(predict, tmp_path, server)["version"] == "2"
        assert asked(roll_back, tmp_path, server)["active"] == "1"
        assert asked(predict, tmp_path, server)["version"] == "1"


def run(command: str, folder: Path, server: Server, job: str = "") -> str:
    command = command.replace("localhost:8000", server.url.removeprefix("http://"))
    done = subprocess.run(
        ["sh", "-c", f"{command} -sS --fail-with-body"],
        cwd=folder,
        env={"JOB": job, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def asked(command: str, folder: Path, server: Server, job: str = "") -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(run(command, folder, server, job))
    return answer
