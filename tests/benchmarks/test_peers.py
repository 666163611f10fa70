"""The harness of `make bench-peers`, as far as it goes without the other servers: shapes, tables, and whom it ends."""

import http.server
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks import pictures
from benchmarks.peers import forms, processes, report
from benchmarks.peers.__main__ import REF, fastest, note, parse, softmax
from benchmarks.peers.measure import compare, figures, parse_wrk, write_requests, wrk
from benchmarks.peers.servers import ALL, KINDS, ROOT, Server, choose
from benchmarks.targets import write_into
from training.bundle import store

CLASSES = ["cat", "dog"]
SPEC = store.read_manifest(ROOT / "artifacts", REF).input


def servers(*words: str) -> list[Server]:
    return choose(list(words), Path("home"), Path("model.ts"), CLASSES)


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_without_data_64_different_drawings_of_the_models_size_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SAFELIGHT_DATA", raising=False)
    sent = pictures.pictures("cifar10", SPEC)
    assert {Image.open(io.BytesIO(picture)).size for picture in sent} == {(32, 32)}
    assert (len(set(sent)), "drawn" in pictures.describe()) == (64, True)


@pytest.mark.data
def test_with_data_64_pictures_of_the_test_set_are_sent(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELIGHT_DATA", str(data))
    sent = pictures.pictures("cifar10", SPEC)
    assert (len(set(sent)), pictures.describe()) == (
        64,
        "64 PNGs of the model's own size, of the test set, evenly from all over",
    )


# --- requests and answers ---------------------------------------------------------------------------------------------


def test_a_request_is_whole() -> None:
    assert forms.request("127.0.0.1:1", "/predict", forms.raw([b"png"])) == (
        b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1:1\r\nContent-Type: image/png\r\nContent-Length: 3\r\n\r\npng"
    )


def test_a_form_has_a_part_for_each_picture() -> None:
    headers, body = forms.multipart("file")([b"one", b"two"])
    head = b'Content-Disposition: form-data; name="file"; filename="x.png"\r\nContent-Type: image/png\r\n\r\n'
    line = b"--" + forms.BOUNDARY.encode()
    assert headers == {"Content-Type": f"multipart/form-data; boundary={forms.BOUNDARY}"}
    assert body == line + b"\r\n" + head + b"one\r\n" + line + b"\r\n" + head + b"two\r\n" + line + b"--\r\n"


def test_pictures_go_undecoded_into_a_binary_tensor() -> None:
    headers, body = forms.v2_pictures([b"one", b"three"])
    size = int(headers[forms.V2_HEAD])
    assert json.loads(body[:size]) == {
        "inputs": [{"name": "pictures", "shape": [2, 1], "datatype": "BYTES", "parameters": {"binary_data_size": 16}}],
        "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
    }
    assert body[size:] == struct.pack("<I", 3) + b"one" + struct.pack("<I", 5) + b"three"


def test_pixels_go_channel_by_channel_into_a_binary_tensor() -> None:
    image = np.arange(3 * 32 * 32).reshape(3, 32, 32).astype(np.uint8)
    headers, body = forms.v2_pixels([pictures.encode(image)])
    size = int(headers[forms.V2_HEAD])
    (tensor,) = json.loads(body[:size])["inputs"]
    assert tensor == {
        "name": "pixels",
        "shape": [1, 3, 32, 32],
        "datatype": "UINT8",
        "parameters": {"binary_data_size": 3072},
    }
    assert body[size:] == image.tobytes()


def test_each_kind_of_answer_gives_the_same_rows() -> None:
    rows = [[0.25, 0.75], [0.5, 0.5]]
    named = [{"label": "x", "probabilities": {"dog": row[1], "cat": row[0]}} for row in rows]
    ours = {
        "predictions": [
            {"scores": [{"label": "dog", "probability": b}, {"label": "cat", "probability": a}]} for a, b in rows
        ]
    }
    outputs = [{"name": "label", "data": ["dog", "cat"]}, {"name": "probabilities", "data": [0.25, 0.75, 0.5, 0.5]}]
    binary = json.dumps(
        {
            "outputs": [
                {"name": "label", "parameters": {"binary_data_size": 3}},
                {"name": "probabilities", "parameters": {"binary_data_size": 16}},
            ]
        }
    ).encode()
    behind = b"abc" + np.float32(rows).tobytes()
    head = {"inference-header-content-length": str(len(binary))}
    assert forms.from_peers_json({}, json.dumps(named).encode(), CLASSES) == rows
    assert forms.from_peers_json({}, json.dumps(named[0]).encode(), CLASSES) == rows[:1]
    assert forms.from_safelight({}, json.dumps(ours).encode(), CLASSES) == rows
    assert forms.from_v2({}, json.dumps({"outputs": outputs}).encode(), CLASSES) == rows
    assert forms.from_v2(head, binary + behind, CLASSES) == rows
    with pytest.raises(ValueError, match="the answer has no output 'probabilities'"):
        forms.from_v2({}, json.dumps({"outputs": outputs[:1]}).encode(), CLASSES)


def test_answers_are_held_against_the_modules_own() -> None:
    assert compare([[0.5, 0.5]], [[0.5, 0.5]]) == {"good": True, "difference": 0.0}
    assert compare([[0.25, 0.75]], [[0.5, 0.5]]) == {"good": False, "difference": 0.25}
    assert compare([[0.5, 0.5]], [[0.5, 0.5]] * 2)["why"] == "1 answers for 2 pictures"


def test_a_temperature_softens() -> None:
    assert softmax([0.0, 0.0]) == [0.5, 0.5]
    assert softmax([2.0, 0.0], 2.0) == pytest.approx([0.7311, 0.2689], abs=1e-4)


# --- servers ----------------------------------------------------------------------------------------------------------


def test_all_are_ours_and_seven_others_and_one_of_them_given_pixels() -> None:
    names = ["safelight", "fastapi", "litserve", "bentoml", "ray", "torchserve", "mlserver", "triton"]
    assert [server.title for server in servers("all")] == [*names, "triton:input=pixels"] == ALL
    assert list(KINDS) == names


def test_settings_are_changed_by_name() -> None:
    (server,) = servers("triton:instances=1+max_batch=16")
    assert server.title == "triton:instances=1+max_batch=16"
    assert server.settings == {"instances": "1", "max_batch": "16", "http_threads": "2", "input": "pictures"}
    with pytest.raises(SystemExit, match="fastapi has no setting threads; it has workers"):
        servers("fastapi:threads=4")
    with pytest.raises(SystemExit, match="there is no server 'flask'; there are safelight, fastapi, "):
        servers("flask")


def test_every_server_listens_on_this_machine_only(tmp_path: Path) -> None:
    """Those that take their address on the command line; the others' programs and files have it."""
    files = [path.read_text() for path in (ROOT / "benchmarks" / "peers").rglob("*.py")]
    assert not [text for text in files if "0.0.0.0" in text.replace('"0.0.0.0" in text', "")]
    for name in ("fastapi", "bentoml"):
        assert "127.0.0.1" in servers(name)[0].command(tmp_path, 1)


def test_the_peers_environment_says_what_to_run() -> None:
    (server,) = servers("litserve:wait_ms=5")
    environ = server.all_environment(Path("work"), 8123)
    assert {
        key: environ[key] for key in ("PEERS_MODEL", "PEERS_CLASSES", "PEERS_THREADS", "PEERS_PORT", "P_WAIT_MS")
    } == {
        "PEERS_MODEL": "model.ts",
        "PEERS_CLASSES": "cat,dog",
        "PEERS_THREADS": "1",
        "PEERS_PORT": "8123",
        "P_WAIT_MS": "5",
    }


def test_the_fastest_form_is_so_at_both_batch_sizes() -> None:
    assert fastest({"a": {"1": 2.0, "32": 50.0}, "b": {"1": 3.0, "32": 30.0}, "c": {"1": 1.0, "32": 120.0}}) == "b"


def test_the_options_have_the_defaults_of_the_final_measurement() -> None:
    options = parse([])
    assert (options.servers, options.reps, options.duration, options.conc) == (["all"], 3, 4, "1,16,64")


# --- whom it ends -----------------------------------------------------------------------------------------------------


SLEEPS = [sys.executable, "-c", "import subprocess; subprocess.run(['sleep', '60'])"]


def start(mark: str) -> subprocess.Popen[bytes]:
    environ = os.environ | {processes.MARK: mark}
    return subprocess.Popen(SLEEPS, env=environ, start_new_session=True)


def test_a_server_ends_with_all_that_it_started_and_nothing_else_does() -> None:
    first, second = start("first"), start("second")
    try:
        while len(processes.marked("first")) < 2 or len(processes.marked("second")) < 2:
            assert first.poll() is second.poll() is None
        used, (rss, pss) = processes.cpu_seconds([first.pid]), processes.memory_mib(processes.marked("first"))
        processes.end(first, "first")
        assert (list(used), rss >= pss > 1) == ([first.pid], True)
        assert (processes.marked("first"), first.poll() is None) == ([], False)
        assert (len(processes.marked("second")), second.poll()) == (2, None)
    finally:
        processes.end(second, "second")
    assert processes.marked("second") == []


def test_the_wait_for_a_quiet_machine_ends_with_patience() -> None:
    assert processes.wait_until_quiet(-1.0, 0.0, []) >= 0


# --- load -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def address() -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers every third request with 503, and what it got."""
    got: list[bytes] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            got.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(503 if len(got) % 3 == 0 else 200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"127.0.0.1:{server.server_port}", got
        server.shutdown()


@pytest.mark.skipif(not shutil.which("wrk"), reason="needs wrk")
def test_the_client_sends_the_requests_in_turn_and_counts_refusals(
    address: tuple[str, list[bytes]], tmp_path: Path
) -> None:
    place, got = address
    write_requests(tmp_path / "requests", [forms.request(place, "/", ({}, body)) for body in (b"a\n", b"bb", b"c")])
    counted = figures(wrk(place, 1, 1, tmp_path / "requests"))
    assert got[:4] == [b"bb", b"c", b"a\n", b"bb"]  # the first one is only made, to see whether that works
    assert counted["failed"] == pytest.approx(len(got) / 3, abs=2)
    assert counted["rps"] == pytest.approx(len(got) * 2 / 3, rel=0.2)
    assert 0 < counted["p50_ms"] <= counted["p99_ms"]


def test_a_client_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="wrk failed: unable to connect"):
        parse_wrk("unable to connect")


# --- tables -----------------------------------------------------------------------------------------------------------


def run(rate: float, *, work: str = "pictures", many: float | None = None, difference: float = 0.0) -> dict[str, Any]:
    check = {"good": difference <= 0.05, "difference": difference}
    load = {"rps": rate, "p50_ms": 5.0, "p99_ms": 9.0, "failed": 0, "cpu_s_per_1000": 2.0}
    load |= {"rss_mib": 1200, "pss_mib": 900, "others_cores": 0.1}
    result: dict[str, Any] = {"cold_start_s": 2.5, "check": check, "work": work, "loads": {"16": load}}
    return result | ({"many": load | {"images_per_s": many, "check": check}} if many else {})


def row(server: str, *repetitions: dict[str, Any], form: str = "raw") -> report.Row:
    return {"server": server, "form": form, "settings": {}, "repetitions": list(repetitions)}


def test_rates_have_their_median_and_spread() -> None:
    assert report.loads([row("a", run(1000), run(1200), run(900))]).splitlines()[-1] == (
        "| a | raw | 16 | 1,000 (900–1,200) | 5.0 (5.0–5.0) | 9.0 (9.0–9.0) | 0 | 2.00 | 0.10 |"
    )


def test_what_holds_for_a_whole_server_has_a_table_of_its_own() -> None:
    rows = [row("a", run(1000, many=3000, difference=0.01)), row("b", run(1)), row("c", {"error": "no java"})]
    assert report.whole([*rows, row("d", run(1, difference=0.5))]).splitlines()[2:] == [
        "| a | raw | 2.5 | 1,200 / 900 | 3,000 | yes, within 0.01 |",
        "| b | raw | 2.5 | 1,200 / 900 | one picture a request | yes, within 0 |",
        "| c | raw |  |  |  | did not run |",
        "| d | raw | 2.5 | 1,200 / 900 | one picture a request | WRONG: off by 0.5 |",
    ]


def test_ours_stands_beside_the_best_of_those_that_do_the_same_work() -> None:
    rows = [
        row("safelight", run(1000, many=3000), run(2000, many=3000), run(1500, many=3000), form="multipart"),
        row("safelight", run(4000, work="pixels"), form="v2"),
        row("slow", run(500, many=6000)),
        row("fast", run(1000)),
        row("wrong", run(9000, difference=0.5)),
        row("pixels", run(2000, work="pixels")),
        row("absent", {"error": "not set up"}),
    ]
    assert report.ratios(rows).splitlines()[2:] == [
        "| 16 at once | safelight, multipart | 1,500 | 1,000 (fast) | 1.50 |",
        "| 64 a request | safelight, multipart | 3,000 | 6,000 (slow) | 0.50 |",
        "| 16 at once | safelight, v2 | 4,000 | 2,000 (pixels) | 2.00 |",
    ]


def test_what_was_not_measured_is_said_once() -> None:
    rows = [row("a", run(1)), row("b", {"error": "no\n java"}, {"error": "no\n java"})]
    assert report.failures(rows) == "Not measured:\n\n- b, raw: no java"
    assert report.failures(rows[:1]) == ""


def test_repetitions_of_a_server_gather_in_one_row() -> None:
    rows: list[report.Row] = []
    (server,) = servers("ray")
    for result in (run(1), run(2)):
        note(rows, server, "raw", result)
    assert rows == [row("ray", run(1), run(2)) | {"settings": server.settings}]


def test_bare_loops_of_the_same_run_have_a_table() -> None:
    rates = {"decoding": [9000.0], "both, in turns": [1000.0, 1300.0, 1200.0]}
    assert report.floor(rates).splitlines() == [
        "| bare loop | pictures/s |",
        "| --- | --- |",
        "| decoding | 9,000 |",
        "| both, in turns | 1,200 (1,000–1,300) |",
    ]


def compared(ours: float, other: float) -> list[report.Row]:
    return [
        row("safelight", run(ours, many=3000), form="multipart"),
        row("safelight", run(ours * 1.2), form="raw"),
        row("safelight", run(ours * 0.9, work="pixels"), form="v2"),
        row("fastapi", run(other / 2), form="multipart"),
        row("fast", run(other, many=2500)),
    ]


def test_each_target_gets_a_verdict() -> None:
    rates = {"engine": [9000.0], "both, in turns": [3000.0], "both, side by side": [3300.0]}
    found = list(report.verdicts({"rows": compared(1700, 1000), "floor": rates, "conditions": {}}))
    assert [(one.rule, one.found, one.passed) for one in found] == [
        ("`/predict`, 16 at once: 1.7 times the best other", "1.70 times: 1,700 for 1,000 (fast)", True),
        ("`/predict`, 64 a request: 1.5 times the best other", "1.20 times: 3,000 for 2,500 (fast)", False),
        (
            "`/predict`, 64 a request: 85% of the best bare loop that decodes and computes",
            "91%: 3,000 of 3,300 (both, side by side)",
            True,
        ),
        ("raw: at least as fast as a form", "1.20 times 16 at once", True),
        ("v2: at least as fast as a form", "0.90 times 16 at once", False),
    ]


def test_wrong_answers_are_a_verdict_and_have_no_rate() -> None:
    rows = [row("safelight", run(1000, difference=0.5), form=form) for form in ("multipart", "raw")]
    found = list(report.verdicts({"rows": [*rows, row("triton", run(500))], "floor": {}}))
    assert [(one.rule, one.found, one.passed) for one in found] == [
        ("`/predict`: answers within 0.05 of the module's own", "WRONG: off by 0.5", False),
        ("raw: answers within 0.05 of the module's own", "WRONG: off by 0.5", False),
    ]


def test_p99_is_held_against_the_best_other_s_where_that_is_a_target() -> None:
    loads = {"1": {"rps": 900, "p99_ms": 9.0}, "64": {"rps": 900, "p99_ms": 30.0}}
    theirs = {"1": {"rps": 300, "p99_ms": 8.9}, "64": {"rps": 100, "p99_ms": 30.0}}
    rows = [row("safelight", run(1) | {"loads": loads}, form="multipart"), row("a", run(1) | {"loads": theirs})]
    found = {one.rule: (one.found, one.passed) for one in report.verdicts({"rows": rows})}
    assert found["`/predict`, 1 at once: p99 no worse than its"] == ("9.0 ms for 8.9 ms", False)
    assert found["`/predict`, 64 at once: p99 no worse than its"] == ("30.0 ms for 30.0 ms", True)
    assert found["`/predict`, 1 at once: 3.0 times the best other"] == ("3.00 times: 900 for 300 (a)", True)


def test_without_ours_there_is_no_verdict() -> None:
    assert list(report.verdicts({"rows": [row("a", run(5))], "floor": {}})) == []


def test_the_readme_s_table_has_ours_plain_fastapi_and_the_best_other() -> None:
    conditions = {"date": "2026-11-30", "machine": "two processors", "n": "3", "client": "wrk"}
    assert report.summary({"rows": compared(1700, 1000), "conditions": conditions}).splitlines() == [
        "| `cifar10` | Safelight | plain FastAPI | the best other |",
        "| --- | --- | --- | --- |",
        "| 16 at once | **1,700 requests/s, p99 9.0 ms** | 500 requests/s, p99 9.0 ms "
        "| 1,000 requests/s, p99 9.0 ms (fast) |",
        "| 64 a request | **3,000 images/s** |  | 2,500 images/s (fast) |",
        "| memory (RSS) | 1,200 MiB | 1,200 MiB | 1,200 MiB (fast) |",
        "",
        "- date: 2026-11-30",
        "- machine: two processors",
        "- n: 3",
    ]


@pytest.mark.parametrize(("page", "name"), [("README.md", "summary"), ("docs/performance.md", "peers")])
def test_the_pages_have_places_for_the_tables(page: str, name: str, tmp_path: Path) -> None:
    copy = Path(shutil.copy(ROOT / page, tmp_path))
    write_into(copy, name, "new")
    assert f"<!-- measured: {name} -->\nnew\n<!-- measured end -->" in copy.read_text()


def test_saved_figures_are_shown_without_measuring(tmp_path: Path) -> None:
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps({"conditions": {"n": "1"}, "rows": [row("safelight", run(10)), row("a", run(5))]}))
    words = [sys.executable, "-m", "benchmarks.peers", "--show", str(saved), "--results", str(tmp_path)]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.findall(r"^- n: 1$|16 at once .*", printed, re.M) == [
        "- n: 1",
        "16 at once | safelight, raw | 10 | 5 (a) | 2.00 |",
    ]
