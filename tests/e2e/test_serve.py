"""The real server in its own process: start, stop, limits on the wire, several workers."""

import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import torch
from torch import Tensor, nn

from service.__main__ import main
from tests.tiny import Greys, Pair, Server, Slow, grey, make_bundle, reseal, serving
from training.processors import processors

PNG = {"Content-Type": "image/png"}


def start(*arguments: str, path: Path | None = None, **settings: str) -> subprocess.CompletedProcess[str]:
    """Start a server that can't succeed; what lies under `path` is imported before what is installed."""
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SAFELIGHT_")}
    environ |= {f"SAFELIGHT_{name.upper()}": value for name, value in settings.items()}
    environ |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


def lines(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def test_it_answers_then_stops_with_exit_code_0_at_sigterm(artifacts: Path, tmp_path: Path) -> None:
    with serving(artifacts, tmp_path, default_model="greys") as server:
        reply = httpx.post(f"{server.url}/predict", content=grey(5), headers=PNG).json()
        assert reply["predictions"][0]["label"] == "grey-5"
        assert server.stop() == 0


def test_ctrl_c_is_a_clean_end_too(artifacts: Path, tmp_path: Path) -> None:
    with serving(artifacts, tmp_path) as server:
        assert server.stop(signal.SIGINT) == 0
    assert "Traceback" not in server.log.read_text()


def test_requests_under_way_at_sigterm_are_finished(tmp_path: Path) -> None:
    make_bundle(tmp_path / "artifacts", module=Slow())
    pictures = [("file", ("a", grey(index % 16))) for index in range(200)]
    settings = {"default_model": "greys", "max_batch": "1", "deadline_seconds": "60"}
    with serving(tmp_path / "artifacts", tmp_path, **settings) as server:
        replies: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: replies.append(httpx.post(f"{server.url}/predict", files=pictures, timeout=60))
        )
        asking.start()
        while pending(server.url) == 0:
            time.sleep(0.01)
        assert server.stop() == 0
        asking.join()
    labels = [entry["label"] for entry in replies[0].json()["predictions"]]
    assert labels == [f"grey-{index % 16}" for index in range(200)]


def test_requests_under_way_in_several_workers_at_sigterm_are_finished(tmp_path: Path) -> None:
    make_bundle(tmp_path / "artifacts", module=Slow(rounds=200))
    files = [("file", ("a", grey(index % 16))) for index in range(60)]
    settings = {"default_model": "greys", "max_batch": "1", "deadline_seconds": "60"}
    with serving(tmp_path / "artifacts", tmp_path, "--workers", "2", **settings) as server:
        until(lambda: len(both_workers(server)) == 2)
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(httpx.post, f"{server.url}/predict", files=files, timeout=60) for _ in range(4)]
            until(lambda: pending(server.url) == 4 * 60)
            assert server.stop() == 0
        labels = [[entry["label"] for entry in one.result().json()["predictions"]] for one in asking]
    assert labels == [[f"grey-{index % 16}" for index in range(60)]] * 4
    assert "Traceback" not in server.log.read_text()


def both_workers(server: Server) -> list[dict[str, object]]:
    return [line for line in lines(server.log) if line["event"] == "Application startup complete."]


def until(seen: Callable[[], bool], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.02)


def metric(url: str, name: str) -> float:
    """The sum over all models and versions."""
    text = httpx.get(f"{url}/metrics").text
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def pending(url: str) -> float:
    return metric(url, "safelight_pending_images")


def test_while_it_drains_it_says_so_and_still_answers(artifacts: Path, tmp_path: Path) -> None:
    with serving(artifacts, tmp_path, default_model="greys", drain_seconds="6") as server:
        server.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 4
        while (ready := httpx.get(f"{server.url}/health/ready")).status_code == 200 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (ready.status_code, ready.json()["code"]) == (503, "not_ready")
        assert ready.json()["detail"] == "the service is stopping; requests under way are finished"
        reply = httpx.post(f"{server.url}/predict", content=grey(5), headers=PNG)
        assert reply.json()["predictions"][0]["label"] == "grey-5"
        assert server.process.wait(30) == 0


def test_a_port_in_use_is_one_sentence(artifacts: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = start(artifacts=str(artifacts), port=str(port))
    sentence = f"safelight: can't listen on 127.0.0.1:{port}: Address already in use; set SAFELIGHT_PORT to another\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", sentence)


@contextmanager
def nobody() -> Iterator[None]:
    """Not root, who reads whatever he likes."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "No such file or directory"),
        ("file", "Not a directory"),
        ("below a file", "Not a directory"),
        ("forbidden", "Permission denied"),
    ],
)
def test_an_unreadable_artifacts_folder_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    reason: str,
    workers: str,
) -> None:
    path = tmp_path / "models"
    if kind == "forbidden":
        path.mkdir(mode=0)
    elif kind != "missing":
        path.write_text("")
        path = path / "below" if kind == "below a file" else path
    monkeypatch.setenv("SAFELIGHT_ARTIFACTS", str(path))
    monkeypatch.setenv("SAFELIGHT_WORKERS", workers)
    with nobody() if kind == "forbidden" else nullcontext():
        assert main([]) == 2
    assert capsys.readouterr() == (
        "",
        f"safelight: the artifacts folder {path} can't be read: {reason}; "
        "set SAFELIGHT_ARTIFACTS to the folder that holds the models\n",
    )


def test_a_state_folder_that_can_not_be_made_is_one_sentence(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ended = start(artifacts=str(artifacts), state=str(tmp_path / "file" / "state"))
    sentence = (
        f"safelight: the state folder {tmp_path}/file/state can't be written: Not a directory; "
        "set SAFELIGHT_STATE to one that can\n"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", sentence)


def test_a_database_that_can_not_be_reached_is_one_sentence(artifacts: Path, tmp_path: Path) -> None:
    url = f"postgresql://safelight@/none?host={tmp_path}"
    ended = start(artifacts=str(artifacts), state=str(tmp_path / "state"), database_url=url)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert re.fullmatch(r"safelight: the database of jobs can't be used: .*; try again in a moment\n", ended.stderr)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SAFELIGHT_PROT", "1", "there is no setting SAFELIGHT_PROT; docs/settings.md lists those that exist"),
        ("SAFELIGHT_DEVICE", "tpu", "device 'tpu' isn't available here; there is "),
    ],
)
def test_a_wrong_setting_or_device_is_one_sentence(
    artifacts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    value: str,
    sentence: str,
) -> None:
    monkeypatch.setenv("SAFELIGHT_ARTIFACTS", str(artifacts))
    monkeypatch.setenv(name, value)
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n"), err.startswith(f"safelight: {sentence}")) == ("", 1, True)


@pytest.mark.parametrize(
    ("host", "sentence"),
    [
        ("no-such-host.invalid", "can't listen on SAFELIGHT_HOST=no-such-host.invalid: "),
        ("a..b", "can't listen on SAFELIGHT_HOST=a..b: "),
        (
            "192.0.2.1",
            "can't listen on 192.0.2.1:8000: Cannot assign requested address; set SAFELIGHT_HOST to another\n",
        ),
    ],
)
def test_a_host_that_is_not_this_machine_is_one_sentence(artifacts: Path, host: str, sentence: str) -> None:
    ended = start(artifacts=str(artifacts), host=host)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith(f"safelight: {sentence}")


def test_it_listens_on_ipv6_too(artifacts: Path, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 on this machine")
    with serving(artifacts, tmp_path, default_model="greys", host="::1") as server:
        assert server.url.startswith("http://[::1]:")
        reply = httpx.post(f"{server.url}/predict", content=grey(5), headers=PNG).json()
        assert reply["predictions"][0]["label"] == "grey-5"


def test_it_says_at_the_start_what_it_derived_from_the_machine(artifacts: Path, tmp_path: Path) -> None:
    with serving(artifacts, tmp_path, default_model="greys") as server:
        _, derived = said(server)
        info = httpx.get(f"{server.url}/info").json()
    threads = "1 thread" if processors() == 1 else f"{processors()} threads"
    assert derived == f"1 worker, {threads}, greys@1: {info['engines'][0]['engine']}"
    assert (info["workers"], info["threads"]) == (1, processors())


def test_several_workers_divide_the_machine_and_say_so(artifacts: Path, tmp_path: Path) -> None:
    with serving(artifacts, tmp_path, "--workers", "2", default_model="greys") as server:
        _, derived = said(server)
        info = httpx.get(f"{server.url}/info").json()
    each = max(1, processors() // 2)
    assert derived == f"2 workers, {'1 thread' if each == 1 else f'{each} threads'}, each chooses its engines"
    assert (info["workers"], info["threads"]) == (2, each)


def said(server: Server) -> list[str]:
    """What it printed after its address."""
    assert server.process.stdout is not None
    return [server.process.stdout.readline().strip() for _ in range(2)]


def test_workers_that_cannot_start_end_with_one_sentence(artifacts: Path, tmp_path: Path) -> None:
    (tmp_path / "fastapi_offline.py").write_text("raise ImportError('a broken installation')\n")
    ended = start("--workers", "2", path=tmp_path, artifacts=str(artifacts), port="0")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.endswith("safelight: a worker process couldn't start; the log above has the reason\n")
    assert "a broken installation" in ended.stderr


def test_a_bad_bundle_keeps_no_worker_from_starting(artifacts: Path, tmp_path: Path) -> None:
    ref = make_bundle(artifacts)
    torch.jit.script(Pair()).save(ref.path(artifacts) / "model.ts")
    reseal(ref.path(artifacts))
    (artifacts / "pets" / "active").mkdir(parents=True)
    with serving(artifacts, tmp_path, "--workers", "2", default_model="greys") as server:
        reply = httpx.post(f"{server.url}/predict", content=grey(5), headers=PNG).json()
        assert (reply["version"], reply["predictions"][0]["label"]) == ("1", "grey-5")


def test_check_verifies_every_model_and_ends(artifacts: Path) -> None:
    ref = make_bundle(artifacts, activate=False)
    command = [sys.executable, "-m", "service", "--check"]
    environ = os.environ | {"SAFELIGHT_ARTIFACTS": str(artifacts)}
    good = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (good.returncode, good.stdout) == (0, "greys@1: good\ngreys@2: good\n")
    (ref.path(artifacts) / "model.ts").unlink()
    bad = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert (bad.returncode, bad.stdout) == (1, "greys@1: good\ngreys@2: model.ts is missing\n")


def test_check_of_a_folder_without_models_fails(tmp_path: Path) -> None:
    ended = start("--check", artifacts=str(tmp_path))
    sentence = f"safelight: there is no model in {tmp_path}; safelight train makes one\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", sentence)


def test_a_body_over_the_limit_is_refused_while_it_streams(artifacts: Path, tmp_path: Path) -> None:
    """A chunked body declares no length; the refusal comes before its end, and the connection is closed."""
    with serving(artifacts, tmp_path, default_model="greys", max_body_bytes="100000") as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
            connection.sendall(head.encode())
            chunk = b"2000\r\n" + b"x" * 0x2000 + b"\r\n"
            for _ in range(13):  # 106,496 bytes, and no end
                connection.sendall(chunk)
            reply = b""
            while part := connection.recv(65536):
                reply += part
        head, _, body = reply.decode().partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 413 ")
        assert "connection: close" in head.lower()
        problem = json.loads(body)
        assert (problem["code"], problem["limit"]) == ("body_too_large", 100000)
        assert httpx.post(f"{server.url}/predict", content=grey(5), headers=PNG).status_code == 200


def test_a_body_that_declares_too_much_is_refused_before_any_of_it_is_sent(artifacts: Path, tmp_path: Path) -> None:
    with serving(artifacts, tmp_path, default_model="greys") as server:
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\nContent-Length: 999999999\r\n\r\n"
            connection.sendall(head.encode())
            reply = b""
            while part := connection.recv(65536):
                reply += part
        head, _, body = reply.decode().partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 413 ")
        assert json.loads(body)["detail"] == (
            "the body has 999999999 bytes; the limit is 33554432 (SAFELIGHT_MAX_BODY_BYTES): "
            "send fewer or smaller pictures"
        )


def test_a_full_queue_refuses_before_the_picture_is_sent(tmp_path: Path) -> None:
    make_bundle(tmp_path / "artifacts", module=Slow(rounds=200))
    settings = {
        "default_model": "greys",
        "max_batch": "1",
        "queue_size": "100",
        "max_images": "100",
        "deadline_seconds": "60",
    }
    pictures = [("file", ("a", grey(1)))] * 100
    with serving(tmp_path / "artifacts", tmp_path, **settings) as server, ThreadPoolExecutor(1) as pool:
        before = pool.submit(httpx.post, f"{server.url}/predict", files=pictures, timeout=60)
        until(lambda: pending(server.url) == 100)
        address = urlsplit(server.url)
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
            reply = connection.recv(65536).decode()
            assert not before.done()
            connection.sendall(bytes(1000))
            assert connection.recv(1) == b""  # idle for 5 s: uvicorn's own protocol would leave it open
        assert before.result().status_code == 200
    head, _, body = reply.partition("\r\n\r\n")
    assert head.startswith("HTTP/1.1 429 Too Many Requests\r\n")
    assert "\r\ndate: " in head
    assert json.loads(body)["code"] == "queue_full"


def test_pictures_of_a_client_that_has_gone_are_not_computed(tmp_path: Path) -> None:
    make_bundle(tmp_path / "artifacts", module=Slow(rounds=200))
    settings = {"default_model": "greys", "max_batch": "1", "deadline_seconds": "60"}
    with serving(tmp_path / "artifacts", tmp_path, **settings) as server:
        before = batches(server.url)
        address = urlsplit(server.url)
        request = httpx.Request("POST", f"{server.url}/predict", files=[("file", ("a", grey(1)))] * 250)
        head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            connection.sendall(f"POST /predict HTTP/1.1\r\n{head}\r\n".encode() + request.read())
            until(lambda: batches(server.url) - before >= 2)
        until(lambda: any(line.get("status") == 499 for line in lines(server.log)))
        computed = batches(server.url)
        assert computed - before < 200  # of 250, of which each takes some hundredths of a second
        (line,) = (line for line in lines(server.log) if line.get("status") == 499)
        assert (line["code"], line["model"], line["version"], line["images"]) == ("client_gone", "greys", "1", 250)
        time.sleep(0.3)
        assert batches(server.url) - computed <= 1  # the one that was running
        assert pending(server.url) == 0
        assert httpx.post(f"{server.url}/predict", content=grey(5), headers=PNG).status_code == 200


def batches(url: str) -> float:
    text = httpx.get(f"{url}/metrics").text
    counts = (line for line in text.splitlines() if line.startswith("safelight_batch_size_count{"))
    return sum(float(line.split()[-1]) for line in counts)


def test_promotion_and_rollback_under_load_lose_no_request_and_every_worker_follows(
    artifacts: Path, tmp_path: Path
) -> None:
    make_bundle(artifacts, activate=False)
    settings = {"default_model": "greys", "rescan_seconds": "0.1"}
    with serving(artifacts, tmp_path, "--workers", "2", **settings) as server:
        until(lambda: len(both_workers(server)) == 2)
        ended = threading.Event()

        def ask(level: int) -> set[str]:
            """Ask again and again, each time over a new connection, so that either worker may be met."""
            seen = set()
            while not ended.is_set():
                response = httpx.post(f"{server.url}/predict", content=grey(level), headers=PNG)
                assert response.status_code == 200, response.text
                assert response.json()["predictions"][0]["label"] == f"grey-{level}"
                seen.add(response.json()["version"])
            return seen

        def answers_from(version: str) -> bool:
            replies = [httpx.post(f"{server.url}/predict", content=grey(1), headers=PNG).json() for _ in range(12)]
            return {reply["version"] for reply in replies} == {version}

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask, level) for level in range(4)]
            try:
                for version in ("2", "1", "2"):
                    reply = httpx.put(f"{server.url}/models/greys/active", json={"version": version}, timeout=30)
                    assert (reply.status_code, reply.json()["active"]) == (200, version)
                    until(lambda version=version: answers_from(version))  # type: ignore[misc]
                # And gone at once: the other worker may not have followed yet.
                reply = httpx.put(f"{server.url}/models/greys/active", json={"version": "1"}, timeout=30)
                assert reply.status_code == 200
                assert httpx.delete(f"{server.url}/models/greys/versions/2", timeout=30).status_code == 204
                until(lambda: answers_from("1"))
            finally:
                ended.set()
        assert set().union(*(one.result() for one in asking)) == {"1", "2"}


def test_several_workers_answer_and_share_metrics(artifacts: Path, tmp_path: Path) -> None:
    with serving(artifacts, tmp_path, "--workers", "2", default_model="greys") as server:
        until(lambda: len(both_workers(server)) == 2)
        for index in range(40):  # a connection each, so that both workers are met
            reply = httpx.post(f"{server.url}/predict", content=grey(index % 16), headers=PNG).json()
            assert reply["predictions"][0]["label"] == f"grey-{index % 16}"
        text = httpx.get(f"{server.url}/metrics").text
        assert 'safelight_images_total{model="greys",version="1"} 40.0' in text
        loaded = [line for line in lines(server.log) if line["event"] == "loaded" and line["version"] == "1"]
        assert len(loaded) == 2
        assert server.stop() == 0


def test_a_worker_that_is_killed_is_replaced_and_what_it_had_pending_is_forgotten(tmp_path: Path) -> None:
    make_bundle(tmp_path / "artifacts", module=Slow())
    files = [("file", ("a", grey(1)))] * 200
    settings = {"default_model": "greys", "max_batch": "1"}
    with serving(tmp_path / "artifacts", tmp_path, "--workers", "2", **settings) as server:
        until(lambda: len(both_workers(server)) == 2)
        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(httpx.post, f"{server.url}/predict", files=files, timeout=30)
            until(lambda: pending(server.url) == 200)
            for pid in children(server.process.pid):
                os.kill(pid, signal.SIGKILL)
            assert isinstance(asking.exception(), httpx.TransportError)
        until(lambda: len(both_workers(server)) == 4, 75)  # uvicorn may be waiting 30 s for a pong from the dead
        assert pending(server.url) == 0


def children(pid: int) -> list[int]:
    """The worker processes; multiprocessing's resource tracker is a child too."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [child for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_loading_and_dropping_a_version_200_times_leaves_memory_where_it_was(artifacts: Path, tmp_path: Path) -> None:
    for _ in range(2):
        make_bundle(artifacts, module=Heavy(), activate=False)
    with serving(artifacts, tmp_path, default_model="greys", loaded_versions="1") as server:
        with httpx.Client(base_url=server.url) as client:

            def load_and_drop(times: int) -> list[float]:
                """The memory after each: one of the two fits beside the active version; a request drops the other."""
                memory = []
                for turn in range(times):
                    reply = client.post(f"/predict?version={2 + turn % 2}", content=grey(1), headers=PNG)
                    assert reply.json()["predictions"][0]["label"] == "grey-1"
                    memory.append(resident_megabytes(server.process.pid))
                return memory

            load_and_drop(20)
            memory = load_and_drop(200)  # one reading may be 13 MB off, by when the last threads hand theirs back
            assert statistics.median(memory[-20:]) - statistics.median(memory[:20]) <= 10
        loads = [line for line in lines(server.log) if line["event"] == "loaded"]
        assert len(loads) >= 220


class Heavy(Greys):
    """Greys with 8 MB of weights, so that one that stays behind shows."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2_000_000))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.by_mean(pixels) * self.weight.mean()


def resident_megabytes(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
