"""The client that doesn't wait, and the rules of `benchmarks/load.py`."""

import itertools
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import load, targets
from benchmarks.openloop import Client, Outcome, poisson, post
from tests.tiny import Server, Slow, grey, make_bundle, serving


def test_arrivals_are_independent_of_each_other_and_the_same_each_time() -> None:
    due = poisson(200, 100)
    gaps = [later - earlier for earlier, later in itertools.pairwise(due)]
    assert due == sorted(due) == poisson(200, 100)
    assert (due[0] >= 0, due[-1] < 100) == (True, True)
    assert len(due) == pytest.approx(20_000, abs=4 * 20_000**0.5)
    assert statistics.mean(gaps) == pytest.approx(1 / 200, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 200, rel=0.05)  # as of the exponential distribution


@pytest.mark.parametrize(("share", "value"), [(50, 2), (51, 3), (99, 4), (25, 1), (100, 4)])
def test_a_percentile_is_one_of_the_values(share: float, value: float) -> None:
    assert load.percentile([4, 1, 3, 2], share) == value


def test_growth_is_along_the_line_through_all_samples_so_that_one_spike_is_none() -> None:
    assert load.growth([0, 1, 2, 3, 4], [10, 12, 14, 16, 18]) == pytest.approx(8)
    assert load.growth([0, 1, 2, 3, 4], [10, 10, 500, 10, 10]) == pytest.approx(0)


def test_under_way_is_what_was_due_and_is_not_done() -> None:
    outcomes = [Outcome(0.5, 1.5, 200), Outcome(0.9, 0.95, 429), Outcome(1.0, 2.0, 200), Outcome(1.8)]
    assert load.under_way(outcomes, 3.5) == ([1.0, 2.0, 3.0], [2, 1, 1])


def test_retry_after_is_held_against_when_what_was_waiting_was_done() -> None:
    waiting = [Outcome(0.0, 2.5, 200), Outcome(0.5, 3.2, 200)]
    later = Outcome(1.5, 9.0, 200)
    refused = [Outcome(1.0, 1.2, 429, retry_after=3.0), Outcome(4.0, 4.1, 429, retry_after=1.0)]
    errors = load.retry_errors([*waiting, refused[0], later, refused[1]])
    assert errors == pytest.approx([3.0 - (3.2 - 1.2), 1.0 - (9.0 - 4.1)])


def test_recovery_is_when_ten_in_a_row_are_answered_and_most_of_them_quickly() -> None:
    during = Outcome(9.0, 12.0, 200)
    refused = [Outcome(10 + at / 100, 10 + at / 100 + 0.01, 429) for at in range(20)]
    slow = [Outcome(10.2 + at / 100, 11, 200) for at in range(20)]
    quick = [Outcome(10.4 + at / 100, 10.4 + at / 100 + 0.01, 200) for at in range(20)]
    assert load.recovery([during, *quick], 10.4, unloaded=0.01) == 0
    assert load.recovery([during, *refused, *slow, *quick], 10, unloaded=0.01) == pytest.approx(0.35)
    assert load.recovery([during, *refused, *slow], 10, unloaded=0.01) == float("inf")


def test_memory_descriptors_and_threads_are_of_the_whole_tree(server: Server) -> None:
    tree = load.family(server.process.pid)
    assert tree[0] == server.process.pid
    assert 50_000 < load.kilobytes(tree[0], "Rss") < 4_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    make_bundle(folder / "artifacts", module=Slow())
    settings = {"default_model": "greys", "max_batch": "1", "queue_size": "4", "max_images": "4"}
    with serving(folder / "artifacts", folder, **settings) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    host, port = server.url.removeprefix("http://").split(":")
    with Client(host, int(port)) as client:
        yield client


def test_more_than_the_server_can_do_is_refused_at_once_and_all_of_it_is_accounted_for(client: Client) -> None:
    """Requests that are due at once don't wait for each other in the client."""
    request = post("/predict", grey(5), "image/png")
    found = client.at([0.0] * 40, [request])
    counts = {status: len(found.with_status(status)) for status in (200, 429)}
    assert sum(counts.values()) == 40
    assert counts[200] >= 4
    assert counts[429] > 0
    assert {one.retry_after is not None for one in found.with_status(429)} == {True}
    assert found.connections == 40
    assert client.at([0.0], [request]).outcomes[0].status == 200


def test_a_closed_loop_counts_the_answers_that_are_not_the_expected_ones(client: Client) -> None:
    requests = [post("/predict", grey(5), "image/png"), post("/predict", b"no picture", "image/png")]
    assert client.closed(20, 2, requests, [200, 400]) == 0
    assert client.answered == 20
    assert client.closed(20, 2, requests, [200, 200]) == 10


def test_every_form_of_the_soak_is_answered_as_it_expects(tmp_path: Path) -> None:
    requests, statuses = load.mixed(tmp_path)
    assert len(requests) == len(statuses)
    assert set(statuses) == {200, 400, 404}
    assert sum(b" /v2/" in request[:40] for request in requests) > len(requests) / 3
    shutil.copytree(load.ROOT / "artifacts" / "mnist", tmp_path / "artifacts" / "mnist")
    with serving(tmp_path / "artifacts", tmp_path, log_level="error") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with Client(host, int(port)) as client:
            assert client.closed(len(requests), 8, requests, statuses) == 0


def test_verdicts_are_left_for_the_table_of_targets(tmp_path: Path) -> None:
    """What isn't measured yet says so; what was missed stands out."""
    assert targets.report(tmp_path).count("| not measured yet |") == len(targets.SOURCES)
    found = [targets.Verdict("memory stays within 800 MB", "773 MB", True), targets.Verdict("no more", "+30", False)]
    targets.save("soak", found, "2 processors", tmp_path)
    lines = targets.report(tmp_path).splitlines()
    assert "| memory stays within 800 MB | 773 MB | met |" in lines
    assert "| no more | +30 | **missed** |" in lines
    assert lines[-1] == f"- `make soak`: {time.strftime('%Y-%m-%d')}, 2 processors"
    assert targets.report(tmp_path).count("| not measured yet |") == len(targets.SOURCES) - 1


def test_the_table_replaces_the_one_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    marks = "<!-- measured: targets -->", "<!-- measured end -->"
    page.write_text(f"before\n{marks[0]}\nold\n{marks[1]}\n<!-- measured: peers -->\nkept\n{marks[1]}\n")
    targets.write_into(page, "targets", "new")
    assert page.read_text() == f"before\n{marks[0]}\nnew\n{marks[1]}\n<!-- measured: peers -->\nkept\n{marks[1]}\n"
    with pytest.raises(SystemExit, match="0 places between <!-- measured: stages -->"):
        targets.write_into(page, "stages", "new")


@pytest.mark.parametrize("page", targets.PAGES, ids=lambda page: page.name)
def test_the_pages_have_a_place_for_the_targets(page: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(page, tmp_path))
    targets.write_into(copy, "targets", "new")
    assert "<!-- measured: targets -->\nnew\n<!-- measured end -->" in copy.read_text()
