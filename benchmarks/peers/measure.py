"""One server, started anew: its start, its answers held against the module's own, and its loads."""

import http.client
import json
import os
import re
import resource
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import forms, processes
from benchmarks.peers.forms import Form, Rows
from benchmarks.peers.servers import HERE, ROOT, Safelight, Server

MANY = 64  # pictures in the large request
MANY_CONNECTIONS = 4
CHECKED = 20  # pictures, each sent twice, eight at a time, so that they are batched together
STARTUP_SECONDS = 120
TOLERANCE = 0.05  # of a probability: what `safelight module` allows a module in another precision

Result = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is sent, and how long."""

    pictures: list[bytes]
    expected: Rows  # the module's own probabilities
    calibrated: Rows  # the same with the manifest's temperature
    connections: list[int]
    seconds: int
    warmup: int
    quiet_cores: float
    patience: float
    logs: Path

    def expected_of(self, server: Server) -> Rows:
        return self.calibrated if server.calibrated else self.expected


@dataclass
class Running:
    """A server that answers at an address of this machine."""

    server: Server
    process: subprocess.Popen[bytes]
    port: int
    mark: str
    cold_start: float = 0.0

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def pids(self) -> list[int]:
        return processes.marked(self.mark)


def measure(server: Server, plan: Plan, wanted: list[str] | None) -> Iterator[tuple[str, Result]]:
    """Every form that a server has (or those that are wanted), by name. Raises RuntimeError where it doesn't start.

    Forms take turns at each number of connections: what is compared was measured within seconds.
    """
    processes.wait_until_quiet(plan.quiet_cores, plan.patience, [])
    with started(server, plan) as running, tempfile.TemporaryDirectory() as folder:
        cold_start = {"cold_start_s": round(running.cold_start, 2)}
        asked = [
            Asked(name, form, Path(folder)) for name, form in server.forms().items() if not wanted or name in wanted
        ]
        good = []
        for one in asked:
            try:
                one.check(running, plan)
            except NotAnswered as error:
                yield one.name, cold_start | {"error": str(error)}
            else:
                good.append(one)
        for one in good:
            wrk(running.address, max(plan.connections), plan.warmup, one.singles)
        for connections in plan.connections:
            for one in good:
                one.result["loads"][str(connections)] = load(running, connections, one.singles, plan)
        for one in good:
            if one.form.many:
                one.load_many(running, plan)
            yield one.name, cold_start | one.result


class Asked:
    """One form of a server: its requests, in files that wrk reads, and what was measured with them."""

    def __init__(self, name: str, form: Form, folder: Path) -> None:
        self.name, self.form = name, form
        self.singles, self.many = folder / f"{name}-singles", folder / f"{name}-many"
        self.result: Result = {"work": form.work, "loads": {}}

    def check(self, running: Running, plan: Plan) -> None:
        """Hold a few answers against the module's own. Raises NotAnswered."""
        answers = [row for row in plan.expected_of(running.server)[:CHECKED] for _ in range(2)]
        self.result["check"] = compare(ask_all(running, self.form, plan), answers)
        contents = [self.form.encode([picture]) for picture in plan.pictures]
        write_requests(self.singles, [forms.request(running.address, self.form.path, content) for content in contents])

    def load_many(self, running: Running, plan: Plan) -> None:
        """Many pictures a request."""
        path, encode = self.form.many_path or self.form.path, self.form.encode_many or self.form.encode
        content = encode(plan.pictures[:MANY])
        answers = self.form.decode(*post(running, path, content), running.server.classes)
        check = compare(answers, plan.expected_of(running.server)[:MANY])
        write_requests(self.many, [forms.request(running.address, path, content)])
        wrk(running.address, MANY_CONNECTIONS, 1, self.many)
        figures = load(running, MANY_CONNECTIONS, self.many, plan)
        self.result["many"] = figures | {"check": check, "images_per_s": round(figures["rps"] * MANY, 1)}


# --- start ------------------------------------------------------------------------------------------------------------


@contextmanager
def started(server: Server, plan: Plan) -> Iterator[Running]:
    """Start a server in a folder and a process group of its own; all of it is gone at the end."""
    port, mark = free_port(), uuid.uuid4().hex
    # A short path: Ray keeps sockets in it, whose names may have 107 characters.
    with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as folder:
        work = Path(folder)
        server.prepare(work, port)
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("SAFELIGHT_", "PEERS_", "P_"))}
        environ = kept | {processes.MARK: mark, "PYTHONUNBUFFERED": "1"} | server.all_environment(work, port)
        log = plan.logs / f"{re.sub(r'[^a-z0-9]+', '-', server.title)}.log"
        with log.open("wb") as output:
            begun = time.perf_counter()
            process = subprocess.Popen(
                server.command(work, port),
                env=environ,
                cwd=ROOT if isinstance(server, Safelight) else work,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        running = Running(server, process, port, mark)
        try:
            wait_until_it_answers(running, plan, log)
            running.cold_start = time.perf_counter() - begun
            yield running
        finally:
            processes.end(process, mark)


def wait_until_it_answers(running: Running, plan: Plan, log: Path) -> None:
    """Until the first right prediction. Raises RuntimeError with the log's end."""
    form = next(iter(running.server.forms().values()))
    content, last = form.encode(plan.pictures[:1]), "nothing listens"
    until = time.monotonic() + STARTUP_SECONDS
    while time.monotonic() < until:
        if running.process.poll() is not None:
            raise RuntimeError(f"it ended with {running.process.returncode}: {end_of(log)}")
        try:
            post(running, form.path, content)
        except NotAnswered as error:
            last = str(error)
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"no answer in {STARTUP_SECONDS} s ({last}): {end_of(log)}")


def free_port() -> int:
    """The first of three free ports in a row: some servers take the next ones as well."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                for other in (port + 1, port + 2):
                    socket.create_server(("127.0.0.1", other)).close()
            except (OSError, OverflowError):
                continue
            return port


def end_of(log: Path) -> str:
    return log.read_bytes()[-1500:].decode("utf-8", "replace").strip()


# --- answers ----------------------------------------------------------------------------------------------------------


class NotAnswered(RuntimeError):
    """No answer, or one that isn't a success."""


def post(running: Running, path: str, content: forms.Content) -> tuple[forms.Headers, bytes]:
    """One request by itself: the answer's headers, in small letters, and its body. Raises NotAnswered."""
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=30)
    headers, body = content
    try:
        connection.request("POST", path, body=body, headers=headers)
        answer = connection.getresponse()
        received = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise NotAnswered(repr(error)) from error
    finally:
        connection.close()
    if answer.status != 200:
        raise NotAnswered(f"POST {path} is answered with {answer.status}: {received[:200].decode('utf-8', 'replace')}")
    return {name.lower(): value for name, value in answer.getheaders()}, received


def ask_all(running: Running, form: Form, plan: Plan) -> Rows:
    """Each of the first pictures twice, several at once: mixed-up answers would show."""

    def ask(picture: bytes) -> list[float]:
        (row,) = form.decode(*post(running, form.path, form.encode([picture])), running.server.classes)
        return row

    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(ask, [picture for picture in plan.pictures[:CHECKED] for _ in range(2)]))


def compare(rows: Rows, expected: Rows) -> Result:
    """How far a server's probabilities are from the module's own."""
    if len(rows) != len(expected):
        return {"good": False, "difference": None, "why": f"{len(rows)} answers for {len(expected)} pictures"}
    pairs = list(zip(rows, expected, strict=True))
    difference = max(abs(a - b) for row, other in pairs for a, b in zip(row, other, strict=True))
    return {"good": difference <= TOLERANCE, "difference": difference}


# --- load -------------------------------------------------------------------------------------------------------------


def write_requests(path: Path, requests: list[bytes]) -> None:
    """As `requests.lua` reads them."""
    path.write_bytes(b"".join(f"{len(request)}\n".encode() + request for request in requests))


def wrk(address: str, connections: int, seconds: int, requests: Path) -> Result:
    """Load from one thread that keeps its connections and asks again once it is answered."""
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s", "-s", str(HERE / "requests.lua")]
    command = ["wrk", *options, f"http://{address}/", "--", str(requests)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return parse_wrk(done.stdout + done.stderr)


def parse_wrk(output: str) -> Result:
    found = re.search(r"^RESULT (\{.*\})$", output, re.M)
    if not found:
        raise RuntimeError(f"wrk failed: {output[-400:]}")
    result: Result = json.loads(found[1])
    return result


def load(running: Running, connections: int, requests: Path, plan: Plan) -> Result:
    """Figures of one load, with the server's share of the machine; begun when nobody else uses it, or patience ends."""
    pids = running.pids
    before = processes.wait_until_quiet(plan.quiet_cores, plan.patience, pids)
    server, machine, client = processes.cpu_seconds(pids), processes.machine_seconds(), client_seconds()
    begun = time.perf_counter()
    counted = wrk(running.address, connections, plan.seconds, requests)
    seconds = time.perf_counter() - begun
    client, machine = client_seconds() - client, processes.machine_seconds() - machine
    pids = running.pids
    spent = sum(total - server.get(pid, 0.0) for pid, total in processes.cpu_seconds(pids).items())
    rss, pss = processes.memory_mib(pids)
    return figures(counted) | {
        "cpu_s_per_1000": round(spent / max(1, counted["requests"] - counted["status"]) * 1000, 3),
        "rss_mib": round(rss),
        "pss_mib": round(pss),
        "others_before_cores": round(before, 2),
        "others_cores": round(max(0.0, machine - spent - client) / seconds, 2),
    }


def figures(counted: Result) -> Result:
    """From wrk's counts; only answers of status below 400 are requests that were served."""
    return {
        "rps": round((counted["requests"] - counted["status"]) / (counted["duration_us"] / 1e6), 1),
        "p50_ms": counted["p50_us"] / 1000,
        "p99_ms": counted["p99_us"] / 1000,
        "failed": sum(counted[kind] for kind in ("status", "connect", "read", "write", "timeout")),
    }


def client_seconds() -> float:
    """Processor time of this process, and of wrk once it has ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
