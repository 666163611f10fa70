"""What the server does under load, each with a rule that it passes or fails; the exit code is 1 where one fails.

    python -m benchmarks.load open       arrivals that don't wait for answers, at 50 % and 80 % of the peak
    python -m benchmarks.load overload   twice the peak for a minute: what is answered, what is refused, and after it
    python -m benchmarks.load soak       a million requests of every form: memory, descriptors, threads
    python -m benchmarks.load start      from the start of the process to the first good answer, beside `import torch`

Each starts a server of its own with the shipped models and default settings, and leaves its verdicts for
`python -m benchmarks.targets`. The rules, and a run: docs/load.md.
"""

import argparse
import base64
import http.client
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.openloop import Client, Load, Outcome, poisson, post
from benchmarks.peers import forms
from benchmarks.serving import BOUNDARY, MODELS, ROOT, bodies, processor, wait_until_it_answers, wrk
from benchmarks.targets import RESULTS, Verdict, save
from training.processors import processors

CONNECTIONS = 64
DEADLINE = 10.0  # seconds; the default of SAFELIGHT_DEADLINE_SECONDS
AFTER = 5.0  # seconds at a tenth of the peak that follow the overload
UNLOADED = 0.05  # of the peak: a request that seldom meets another

LATENCY_AT = {0.5: 3.0, 0.8: 8.0}  # share of the peak -> largest p99, in unloaded p50s
QUEUE_GROWTH = 16.0  # pictures, over the run, along the line through all samples
GOODPUT = 0.9  # of the peak
HONEST = 0.95  # of the refusals
EARLY, LATE = 1.5, 0.5  # seconds that Retry-After, a whole number, may be above and below the time that was needed
RECOVERY = 1.0  # seconds
MEMORY = 800.0  # MB
MEMORY_GROWTH = 20.0  # MB, after the warm-up
START = 1.5  # times `import torch`

FORM = f"multipart/form-data; boundary={BOUNDARY}"


def main() -> None:
    options = parse()
    if not shutil.which("wrk") and options.scenario in ("open", "overload"):
        sys.exit("this needs wrk: apt-get install wrk")
    print(f"- {processor()}, {processors()} processors; client and server share them")
    verdicts, begun, idle, ours = [], time.perf_counter(), idle_seconds(), os.times()
    with tempfile.TemporaryDirectory() as folder:
        for verdict in SCENARIOS[options.scenario](Path(folder), options):
            print(f"{'pass' if verdict.passed else 'FAIL'}: {verdict.rule}: {verdict.found}", flush=True)
            verdicts.append(verdict)
    whole = time.perf_counter() - begun
    busy = whole * (os.cpu_count() or 1) - (idle_seconds() - idle)
    others = busy - (sum(os.times()[:4]) - sum(ours[:4]))  # ours: this process, and its children that have ended
    told = f"other programs took {max(0.0, others) / whole:.0%} of one processor meanwhile"
    print(f"- {told}")
    extent = {"soak": f"{options.count:,} requests", "start": f"n = {options.repetitions}"}
    how_much = extent.get(options.scenario, f"{options.seconds:g} s a load")
    machine = f"{processor()}, {processors()} processors shared with the client"
    save(options.scenario, verdicts, f"{machine}; {how_much}; {told}", options.results)
    sys.exit(not all(verdict.passed for verdict in verdicts))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--model", choices=MODELS, help="cifar10 for open and overload, both for start if left out")
    parser.add_argument("--seconds", type=float, default=60, help="of each load of open and overload")
    parser.add_argument("--count", type=int, default=1_000_000, help="requests of soak")
    parser.add_argument("--repetitions", type=int, default=7, help="of start")
    parser.add_argument("--trace", type=Path, help="soak: write every sample to this file, one JSON object a line")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to leave the verdicts")
    return parser.parse_args()


# --- scenarios --------------------------------------------------------------------------------------------------------


def open_loop(folder: Path, options: argparse.Namespace) -> Iterator[Verdict]:
    with running(folder) as server:
        requests, peak = prepare(folder, server, options)
        unloaded = percentile(latencies(server.load(poisson(peak * UNLOADED, 20), requests)), 50)
        print(f"- unloaded: p50 {unloaded * 1000:.1f} ms at {peak * UNLOADED:.0f} requests/s")
        for share, most in LATENCY_AT.items():
            load = server.load(poisson(peak * share, options.seconds), requests)
            p50, p99 = (percentile(latencies(load), q) for q in (50, 99))
            print(f"- {share:.0%}: {describe(load)}")
            yield Verdict(
                f"p99 at {share:.0%} of the peak is at most {most:.0f} times the unloaded p50",
                f"{p99 / unloaded:.1f} times ({p99 * 1000:.1f} ms; p50 {p50 * 1000:.1f} ms)",
                p99 <= most * unloaded,
            )
            counts = under_way(load.outcomes, options.seconds)
            yield no_growth(f"what is under way at {share:.0%} doesn't grow", *counts, QUEUE_GROWTH, "requests")


def overload(folder: Path, options: argparse.Namespace) -> Iterator[Verdict]:
    with running(folder) as server:
        requests, peak = prepare(folder, server, options)
        unloaded = percentile(latencies(server.load(poisson(peak * UNLOADED, 20), requests)), 50)
        after = [options.seconds + due for due in poisson(peak / 10, AFTER, seed=1)]
        load = server.load(poisson(2 * peak, options.seconds) + after, requests)
        print(f"- twice the peak for {options.seconds:.0f} s, then a tenth of it for {AFTER:.0f} s: {describe(load)}")
        print(f"- under way: {spread(under_way(load.outcomes, options.seconds)[1])}")
        yield from judge_overload(load.outcomes, peak, options.seconds, unloaded)


def judge_overload(outcomes: Sequence[Outcome], peak: float, seconds: float, unloaded: float) -> Iterator[Verdict]:
    during = [one for one in outcomes if one.due < seconds]
    accepted = [one for one in during if one.status == 200]
    rate = sum(one.done <= seconds for one in accepted) / seconds
    yield Verdict(
        f"goodput is at least {GOODPUT:.0%} of the peak", f"{rate / peak:.0%} ({rate:.0f}/s)", rate >= GOODPUT * peak
    )
    others = Counter(one.status for one in during if one.status not in (200, 429))
    yield Verdict("all others are refused with 429", f"others: {dict(others) or 'none'}", not others)
    p50, p99 = (percentile([one.latency for one in accepted], share) for share in (50, 99))
    yield Verdict(
        "p99 of what was accepted is within the deadline",
        f"{p99:.2f} s of {DEADLINE:.0f}; p50 {p50:.2f} s",
        p99 <= DEADLINE,
    )
    refused = sum(one.status == 429 for one in during)
    errors = retry_errors(during)
    honest = sum(-LATE <= error <= EARLY for error in errors)
    yield Verdict(
        f"Retry-After is when what was waiting is done, for {HONEST:.0%} of the refused",
        f"{honest} of {refused}; told less needed: {spread(errors)} s",
        honest >= HONEST * refused,
    )
    recovered = recovery(outcomes, seconds, unloaded)
    yield Verdict(
        f"within {RECOVERY:.0f} s of its end all are answered, and as quickly as at half the peak",
        f"{recovered:.2f} s",
        recovered <= RECOVERY,
    )


def soak(folder: Path, options: argparse.Namespace) -> Iterator[Verdict]:
    requests, statuses = mixed(folder)
    with running(folder) as server, Client(server.host, server.port) as client:
        with Samples(server, lambda: client.answered, options.trace) as samples:
            begun = time.perf_counter()
            wrong = client.closed(options.count, CONNECTIONS, requests, statuses)
            seconds = time.perf_counter() - begun
        print(f"- {options.count} requests in {seconds:.0f} s, {options.count / seconds:.0f} a second")
        samples.settle(0.1)
        for name, unit in (("rss", "MB"), ("pss", "MB"), ("descriptors", ""), ("threads", ""), ("pending", "")):
            print(f"- {name}: {spread(samples.of(name)[1])} {unit}")
    yield Verdict("every answer is the expected one", f"{wrong} weren't", wrong == 0)
    most = max(sample.rss for sample in samples.taken)
    yield Verdict(f"memory stays within {MEMORY:.0f} MB", f"{most:.0f} MB", most <= MEMORY)
    for name, rule, growth_allowed, unit in (
        ("rss", "memory doesn't grow after the warm-up", MEMORY_GROWTH, "MB"),
        ("descriptors", "descriptors don't grow", 2, ""),
        ("threads", "threads don't grow", 2, ""),  # a pool's last one, taken midway, lies on a line that grows by 1.5
        ("pending", "pending doesn't grow", QUEUE_GROWTH, "pictures"),
    ):
        yield no_growth(rule, *samples.of(name), growth_allowed, unit)


def start(folder: Path, options: argparse.Namespace) -> Iterator[Verdict]:
    models = [options.model] if options.model else list(MODELS)
    requests = {
        model: post(f"/predict?model={model}", bodies(folder, model)[0][0].read_bytes(), FORM) for model in models
    }
    torch: list[float] = []
    ours: dict[str, list[float]] = {model: [] for model in models}
    for repetition in range(options.repetitions + 1):
        torch.append(timed(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True)))
        for model, request in requests.items():
            begun = time.perf_counter()
            with running(folder, wait=False) as server:
                server.until_good(request)
                ours[model].append(time.perf_counter() - begun)
        if repetition == 0:  # it read the files from the disk
            for seconds in (torch, *ours.values()):
                seconds.clear()
    print(f"- import torch: {spread(torch)} s; n = {options.repetitions}")
    for model, seconds in ours.items():
        print(f"- to the first good answer of {model}: {spread(seconds)} s")
        ratio = statistics.median(seconds) / statistics.median(torch)
        rule = f"the first good answer of {model} comes within {START} times `import torch`"
        yield Verdict(rule, f"{ratio:.2f} times, {spread(seconds)} s", ratio <= START)


SCENARIOS: dict[str, Callable[[Path, argparse.Namespace], Iterator[Verdict]]] = {
    "open": open_loop,
    "overload": overload,
    "soak": soak,
    "start": start,
}


def prepare(folder: Path, server: "Server", options: argparse.Namespace) -> tuple[list[bytes], float]:
    """Requests of one picture each, and the peak that a closed loop finds with them, in requests a second."""
    model = options.model or "cifar10"
    path = f"/predict?model={model}"
    singles, _ = bodies(folder, model)
    wrk(server.url + path, singles, CONNECTIONS, 3)  # warm
    runs = [wrk(server.url + path, singles, CONNECTIONS, 5) for _ in range(3)]
    peak = statistics.median(run["rps"] for run in runs)
    print(f"- peak of {model}: {peak:.0f} requests/s (wrk, {CONNECTIONS} connections, 3 x 5 s), ", end="")
    print(f"p50 {statistics.median(run['p50_ms'] for run in runs):.0f} ms", flush=True)
    return [post(path, single.read_bytes(), FORM) for single in singles], peak


def mixed(folder: Path) -> tuple[list[bytes], list[int]]:
    """Requests in every form, good and bad, and the status that each must get; `mnist`, whose pictures take least."""
    singles, many = bodies(folder, "mnist")
    pictures = [single.read_bytes().split(b"\r\n\r\n", 1)[1].rpartition(b"\r\n--")[0] for single in singles]
    asked: list[tuple[bytes, int]] = []
    for index, (single, picture) in enumerate(zip(singles, pictures, strict=True)):
        asked += [
            (ask(single.read_bytes(), FORM), 200),
            (ask(picture, "image/png"), 200),
            (ask(in_json(picture), "application/json"), 200),
            (ask_v2(forms.v2_pixels([picture])), 200),
            (ask_v2(forms.v2_pictures([picture])), 200),
        ]
        if index % 8 == 0:
            asked += [
                (ask(picture[:40] + bytes(40), "image/png"), 400),
                (ask(b"not a picture", "image/png"), 400),
                (ask(picture, "image/png", model="dogs"), 404),
                (ask(in_json(picture, picture, b"not a picture"), "application/json"), 200),
                (ask_v2(forms.v2_pictures([picture, b"not a picture"])), 400),
                (ask_v2(forms.v2_pixels([picture] * 3), model="dogs"), 404),
            ]
    asked.append((ask(many.read_bytes(), FORM), 200))
    asked += [(ask_v2(encode(pictures)), 200) for encode in (forms.v2_pixels, forms.v2_pictures)]
    return [request for request, _ in asked], [status for _, status in asked]


def ask(body: bytes, content_type: str, *, model: str = "mnist") -> bytes:
    return post(f"/predict?model={model}", body, content_type)


def ask_v2(content: forms.Content, *, model: str = "mnist") -> bytes:
    """By the Open Inference Protocol, in binary."""
    headers, body = content
    kind = headers.pop("Content-Type")
    return post(f"/v2/models/{model}/infer", body, kind, headers.items())


def in_json(*pictures: bytes) -> bytes:
    return json.dumps({"images": [base64.b64encode(picture).decode() for picture in pictures]}).encode()


# --- rules ------------------------------------------------------------------------------------------------------------


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that `share` percent don't exceed; infinite where there is none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * share / 100) - 1)] if ordered else float("inf")


def growth(times: Sequence[float], values: Sequence[float]) -> float:
    """How much the values rise over the time, along the straight line that fits them best."""
    slope = statistics.linear_regression(times, values).slope
    return slope * (max(times) - min(times))


def recovery(outcomes: Sequence[Outcome], end: float, unloaded: float) -> float:
    """Seconds from the end of an overload until ten requests in a row are answered, half of them as quickly as the rule
    for half the peak has it; infinite where that doesn't come."""
    later = sorted((one for one in outcomes if one.due >= end), key=lambda one: one.due)
    for first in range(len(later) - 9):
        ten = later[first : first + 10]
        latency = percentile([one.latency if one.status == 200 else math.inf for one in ten], 50)
        if all(one.status == 200 for one in ten) and latency <= LATENCY_AT[0.5] * unloaded:
            return ten[0].due - end
    return math.inf


def retry_errors(outcomes: Sequence[Outcome]) -> list[float]:
    """Of each refusal that told one: Retry-After less the time that what was under way then took to be done."""
    kept = sorted((one for one in outcomes if one.status == 200), key=lambda one: one.due)
    refused = sorted((one for one in outcomes if one.retry_after is not None), key=lambda one: one.done)
    errors, reached, last = [], 0, 0.0
    for refusal in refused:
        while reached < len(kept) and kept[reached].due <= refusal.due:
            last = max(last, kept[reached].done)
            reached += 1
        assert refusal.retry_after is not None
        errors.append(refusal.retry_after - max(0.0, last - refusal.done))
    return errors


def under_way(outcomes: Sequence[Outcome], seconds: float) -> tuple[list[float], list[int]]:
    """Each second, and how many were due by then and not done, wherever they were: in the server or before it."""
    moments = [float(second) for second in range(1, int(seconds) + 1)]
    return moments, [sum(one.due <= moment < one.done for one in outcomes) for moment in moments]


def no_growth(rule: str, times: Sequence[float], values: Sequence[float], most: float, unit: str) -> Verdict:
    found = growth(times, values)
    return Verdict(f"{rule} by more than {most:g} {unit}".rstrip(), f"{found:+.1f} {unit}".rstrip(), found <= most)


def latencies(load: Load) -> list[float]:
    """One that wasn't answered well took forever."""
    return [one.latency if one.status == 200 else float("inf") for one in load.outcomes]


def describe(load: Load) -> str:
    statuses = ", ".join(f"{count} x {status}" for status, count in Counter(o.status for o in load.outcomes).items())
    return f"{statuses}; {load.connections} connections; CPU of this client {load.client_cpu:.0%} of one processor"


def spread(values: Sequence[float]) -> str:
    if not values:
        return "none"
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


# --- the server, and what it takes ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def load(self, due: Sequence[float], requests: Sequence[bytes]) -> Load:
        with Client(self.host, self.port) as client:
            return client.at(due, requests)

    def until_good(self, request: bytes) -> None:
        while self.process.poll() is None:
            try:
                if self.load([0.0], [request]).outcomes[0].status == 200:
                    return
            except ConnectionRefusedError:
                time.sleep(0.01)
        sys.exit(f"the server ended with {self.process.returncode} before it answered")


@contextmanager
def running(folder: Path, *, wait: bool = True) -> Iterator[Server]:
    """A server with default settings on a free port; it is gone at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SAFELIGHT_")}
    environ |= {"SAFELIGHT_ARTIFACTS": str(ROOT / "artifacts"), "SAFELIGHT_STATE": str(folder / "state")}
    command = [sys.executable, "-m", "service", "--port", str(port)]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=subprocess.DEVNULL, stderr=log)
    try:
        if wait:
            wait_until_it_answers(f"http://127.0.0.1:{port}/health/live", process)
        yield Server("127.0.0.1", port, process)
    finally:
        process.terminate()
        process.wait()


@dataclass(frozen=True)
class Sample:
    """Of the server's process and its children. Memory in MB of 10^6 bytes."""

    at: float
    answered: int
    rss: float
    pss: float
    descriptors: int
    threads: int
    pending: float


@dataclass
class Samples:
    """One a second, from a thread beside the load."""

    server: Server
    answered: Callable[[], int] = lambda: 0
    trace: Path | None = None
    taken: list[Sample] = field(default_factory=list)
    _over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> "Samples":
        self._begun = time.perf_counter()
        self._thread = threading.Thread(target=self._take)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def settle(self, share: float) -> None:
        """Forget the first share of them: the warm-up."""
        del self.taken[: int(len(self.taken) * share)]

    def of(self, name: str) -> tuple[list[float], list[float]]:
        """When, and what it was."""
        return [one.at for one in self.taken], [getattr(one, name) for one in self.taken]

    def _take(self) -> None:
        while not self._over.wait(1.0):
            sample = self._sample()
            self.taken.append(sample)
            if self.trace:
                with self.trace.open("a") as file:
                    file.write(json.dumps(asdict(sample)) + "\n")

    def _sample(self) -> Sample:
        tree = family(self.server.process.pid)
        return Sample(
            at=time.perf_counter() - self._begun,
            answered=self.answered(),
            rss=sum(kilobytes(pid, "Rss") for pid in tree) * 1024 / 1e6,
            pss=sum(kilobytes(pid, "Pss") for pid in tree) * 1024 / 1e6,
            descriptors=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in tree),
            threads=sum(len(os.listdir(f"/proc/{pid}/task")) for pid in tree),
            pending=pending(self.server),
        )


def idle_seconds() -> float:
    """Of all processors together, since the machine started."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return (int(fields[4]) + int(fields[5])) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(other for child in children for other in family(int(child)))]


def kilobytes(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def pending(server: Server) -> float:
    connection = http.client.HTTPConnection(server.host, server.port, timeout=60)
    try:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    finally:
        connection.close()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("safelight_pending_images{"))


def timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
