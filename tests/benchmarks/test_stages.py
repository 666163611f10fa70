"""The scripts that say where the time goes, run for moments: what they find isn't looked at, but that they find it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import stages
from benchmarks.targets import ROOT


@pytest.mark.slow
def test_each_stage_of_a_request_has_its_time_and_the_whole_its_verdict(tmp_path: Path) -> None:
    words = ["--model", "mnist", "--rounds", "2", "--requests", "64", "--results", str(tmp_path)]
    printed = run("benchmarks.stages", *words)
    rows = re.findall(r"^\| \**([a-z ]+?)\** \| .* \| \**(-?\d+) \((-?\d+)–(-?\d+)\)\** \|$", printed, re.M)
    assert [name for name, *_ in rows] == [*stages.ROWS, "all and batch"]
    middle = {name: int(value) for name, value, *_ in rows}
    assert all(int(least) <= middle[name] <= int(most) for name, _, least, most in rows)
    assert min(middle[name] for name in ("parse", "decode", "queue", "respond")) > 0
    assert middle["all"] <= middle["all and batch"]
    (verdict,) = json.loads((tmp_path / "stages.json").read_text())["verdicts"]
    assert verdict["rule"] == "a `/predict` of mnist beside the engine, 64 under way: at most 170 µs"
    told = {name: f"{value} ({least}–{most}) µs" for name, value, least, most in rows}
    assert verdict["found"] == told["all and batch"]


@pytest.mark.slow
def test_bare_loops_have_their_rates() -> None:
    words = ["--model", "mnist", "--seconds", "0.1", "--repetitions", "2", "--json"]
    rates = json.loads(run("benchmarks.floor", *words))
    assert list(rates) == [
        "engine, one picture",
        "engine, 64 pictures",
        "decoding, one thread",
        "both, in turns",
        "both, side by side",
        "both, in a process for each processor",
    ]
    assert [len(found) for found in rates.values()] == [2] * 6
    assert min(rate for found in rates.values() for rate in found) > 0


def run(module: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
