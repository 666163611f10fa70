"""Requests a second and latency of /predict, beside a plain FastAPI endpoint that runs the same module.

`make bench-serving`. Both servers take turns in one run, started anew each time; tables give the median and, in
brackets, the least and the greatest. The client is wrk on the same machine: it takes its share of the processors.
"""

import argparse
import json
import os
import platform
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import Progress

from benchmarks import pictures
from training.bundle import store
from training.bundle.store import BundleRef
from training.processors import processors

ROOT = Path(__file__).parents[1]
CONNECTIONS = (1, 16, 64)
MODELS = ("cifar10", "mnist")
IMAGES = pictures.COUNT  # different pictures, and pictures in the large request
BOUNDARY = "safelight-benchmark"

SERVERS = {
    "safelight": ["-m", "service"],
    "plain FastAPI": ["-m", "uvicorn", "benchmarks.plain_fastapi:app", "--no-access-log"],
}

Result = dict[str, float]


def main() -> None:
    options = parse()
    if not shutil.which("wrk"):
        sys.exit("the benchmark needs wrk: apt-get install wrk")
    results: dict[tuple[str, str, str], list[Result]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        files = {model: bodies(Path(folder), model) for model in MODELS}
        steps = options.repetitions * len(SERVERS) * len(MODELS) * (len(CONNECTIONS) + 1)
        task = progress.add_task("measuring", total=steps)
        for repetition in range(options.repetitions):
            names = list(SERVERS)[:: 1 if repetition % 2 == 0 else -1]  # another one goes first each time
            for name in names:
                with server(name) as address:
                    for model, (singles, many) in files.items():
                        url = f"{address}/predict?model={model}"
                        wrk(url, singles, 8, 2)  # warm
                        for connections in CONNECTIONS:
                            results[name, model, f"{connections}"].append(
                                wrk(url, singles, connections, options.seconds)
                            )
                            progress.advance(task)
                        results[name, model, "many"].append(wrk(url, [many], 4, options.seconds))
                        progress.advance(task)
    print(report(results, options))
    if options.json:
        raw = {" / ".join(key): runs for key, runs in results.items()}
        Path(options.json).write_text(json.dumps({"conditions": conditions(options), "results": raw}, indent=1) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--seconds", type=int, default=6, help="of each load")
    parser.add_argument("--json", help="write every figure to this file")
    return parser.parse_args()


# --- load -------------------------------------------------------------------------------------------------------------


def bodies(folder: Path, model: str) -> tuple[list[Path], Path]:
    """Multipart bodies: 64 with one picture each, and one with all 64."""
    spec = store.read_manifest(ROOT / "artifacts", active(model)).input
    contents = pictures.pictures(model, spec)
    singles = [write(folder / f"{model}-{index}", [picture]) for index, picture in enumerate(contents)]
    return singles, write(folder / f"{model}-many", contents)


def write(path: Path, contents: list[bytes]) -> Path:
    head = 'Content-Disposition: form-data; name="file"; filename="x.png"\r\nContent-Type: image/png'
    parts = [f"--{BOUNDARY}\r\n{head}\r\n\r\n".encode() + picture + b"\r\n" for picture in contents]
    path.write_bytes(b"".join(parts) + f"--{BOUNDARY}--\r\n".encode())
    return path


def wrk(url: str, files: list[Path], connections: int, seconds: int) -> Result:
    command = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", "benchmarks/post.lua", url]
    content_type = f"multipart/form-data; boundary={BOUNDARY}"
    environ = os.environ | {"BODIES": " ".join(map(str, files)), "CONTENT_TYPE": content_type}
    output = subprocess.run(command, env=environ, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result: Result = json.loads(output.splitlines()[-1])
    if result["errors"]:
        sys.exit(f"{int(result['errors'])} requests to {url} failed: a figure with errors is no figure")
    return result


@contextmanager
def server(name: str) -> Iterator[str]:
    """Start a server on a free port, as a user would with its defaults; it is gone at the end."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {key: value for key, value in os.environ.items() if not key.startswith("SAFELIGHT_")}
    environ["SAFELIGHT_ARTIFACTS"] = str(ROOT / "artifacts")
    process = subprocess.Popen(
        [sys.executable, *SERVERS[name], "--port", str(port)],
        cwd=ROOT,
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until_it_answers(f"http://127.0.0.1:{port}/docs", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    while process.poll() is None:
        try:
            httpx.get(url, timeout=5)
        except httpx.TransportError:
            time.sleep(0.05)
        else:
            return
    sys.exit(f"the server ended with {process.returncode} before it answered")


# --- report -----------------------------------------------------------------------------------------------------------


def report(results: dict[tuple[str, str, str], list[Result]], options: argparse.Namespace) -> str:
    lines = [f"- {name}: {value}" for name, value in conditions(options).items()]
    lines += ["", "| model | load | " + " | ".join(SERVERS) + " | ratio |", "|---|---|" + "---|" * (len(SERVERS) + 1)]
    for model in MODELS:
        for load in (*map(str, CONNECTIONS), "many"):
            images = IMAGES if load == "many" else 1
            rates = {name: [run["rps"] * images for run in results[name, model, load]] for name in SERVERS}
            ratios = [ours / plain for ours, plain in zip(*rates.values(), strict=True)]
            cells = " | ".join(cell(rates[name], results[name, model, load], load) for name in SERVERS)
            title = f"{IMAGES} pictures a request, 4 connections" if load == "many" else f"{load} at once"
            lines.append(f"| {model} | {title} | {cells} | {statistics.median(ratios):.1f} |")
    return "\n".join(lines)


def cell(rates: list[float], runs: list[Result], load: str) -> str:
    unit = "images/s" if load == "many" else "requests/s"
    p50, p99 = (statistics.median(run[key] for run in runs) for key in ("p50_ms", "p99_ms"))
    spread = f"({min(rates):,.0f}–{max(rates):,.0f})"
    return f"{statistics.median(rates):,.0f} {spread} {unit}, p50 {p50:.1f} ms, p99 {p99:.1f} ms"


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "processor": processor(),
        "processors": processors(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "openvino", "fastapi", "uvicorn")),
        "pictures": f"{pictures.describe()}; multipart",
        "n": f"{options.repetitions} repetitions of {options.seconds} s, taking turns; wrk with 1 thread beside them",
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.partition(": ")[2]
    return platform.processor()


def active(model: str) -> BundleRef:
    return BundleRef(model, store.active(ROOT / "artifacts", model) or "1")


if __name__ == "__main__":
    main()
