"""The table of training runs: what it says of a row, and that a row stays until it is measured again."""

import json
from pathlib import Path

import pytest

from benchmarks import training
from benchmarks.training import Measured, Row, Run

MONDAY = Measured("2026-11-30, two processors", [Run(0.99, 0.992, 4.0, 2.0, 1.1), Run(0.992, 0.993, 5.0, 2.2, 1.2)])
ROWS = {"mnist-99": Row("mnist-99", 2, 0.99, seconds=5), "softmax": Row("softmax", 1)}


def test_a_row_has_means_deviations_and_what_was_aimed_at() -> None:
    first, *_, legend, notes = training.report(ROWS, {"mnist-99": MONDAY}).split("\n\n")
    head, _, measured, missing = first.splitlines()
    assert head.startswith("| recipe | n | aim | single view |")
    assert measured == (
        "| `mnist-99` | 2 | 99.00% | 99.10% ± 0.14% | 99.25% ± 0.07% | 4.5 of 5 (4.0 to 5.0) | 2.1 | 1.2 | 1 |"
    )
    assert missing == "| `softmax` |  | 92 % | not measured yet |  |  |  |  |  |"
    assert legend.startswith("Accuracy: mean ± deviation")
    assert notes == "1. 2026-11-30, two processors"


def test_a_row_is_kept_until_it_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "KEPT", tmp_path / "training.json")
    tuesday = Measured("2026-12-01, two processors", [Run(0.925, 0.925, 3.0, 2.0, 1.0)])
    assert training.keep({"mnist-99": MONDAY}) == {"mnist-99": MONDAY}
    assert training.keep({"softmax": tuesday}) == {"mnist-99": MONDAY, "softmax": tuesday}
    assert training.keep({"mnist-99": tuesday}) == {"mnist-99": tuesday, "softmax": tuesday}
    assert list(json.loads((tmp_path / "training.json").read_text())) == ["mnist-99", "softmax"]


@pytest.mark.parametrize(("seconds", "passed"), [(4.0, False), (5.0, True)])
def test_a_target_is_met_or_missed(seconds: float, passed: bool) -> None:
    accuracy, time = training.judge("mnist-99", Row("mnist-99", 2, 0.991, seconds=seconds), {"mnist-99": MONDAY.runs})
    assert (accuracy.rule, accuracy.found, accuracy.passed) == (
        "`mnist-99`: mean accuracy, single view, at least 99.10%",
        "99.10% (n = 2)",
        True,
    )
    assert (time.rule, time.found, time.passed) == (f"`mnist-99`: at most {seconds:g} s", "4.5 s", passed)
