"""Safelight beside other model servers: one machine, one network, one client, taking turns. `make bench-peers`

`setup.sh` makes the environments first. All servers run the shipped cifar10 bundle: Safelight as it is by default, the
others its fastest TorchScript form. Servers are started anew at each repetition, and another one goes first each time.
"""

import argparse
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks import pictures
from benchmarks.peers import processes, report
from benchmarks.peers.forms import Rows
from benchmarks.peers.measure import MANY, MANY_CONNECTIONS, Plan, measure
from benchmarks.peers.servers import APPS, KINDS, ROOT, Safelight, Server, choose
from benchmarks.serving import active
from benchmarks.targets import RESULTS, save, write_into
from training.bundle import store
from training.bundle.manifest import MODULE, Manifest
from training.processors import processors

REF = active("cifar10")
PRECISIONS = ("float32", "bfloat16")
PACKAGES = ["torch", "fastapi", "uvicorn", "litserve", "bentoml", "ray", "torchserve", "mlserver", "nvidia-pytriton"]


def main() -> None:
    options = parse()
    if options.show:
        measured = json.loads(Path(options.show).read_text())
    else:
        if not shutil.which("wrk"):
            sys.exit("the benchmark needs wrk: apt-get install wrk")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are ended
        measured = run(options)
    text = report.report(measured)
    print(text)
    conditions = measured["conditions"]
    if verdicts := list(report.verdicts(measured)):
        told = "; ".join(conditions[name] for name in ("machine", "n") if name in conditions)
        save("peers", verdicts, told, options.results)
    if options.docs:
        write_into(ROOT / "docs" / "performance.md", "peers", text)
        write_into(ROOT / "README.md", "summary", report.summary(measured))


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    home = os.environ.get("PEERS", ROOT / ".bench" / "peers")
    parser.add_argument("--home", type=Path, default=home, help="where setup.sh made the environments (PEERS)")
    parser.add_argument("--servers", nargs="+", default=["all"], help=f"NAME or NAME:key=value+…: {', '.join(KINDS)}")
    parser.add_argument("--kind", nargs="+", choices=("multipart", "raw", "v2"), help="ask Safelight only so")
    parser.add_argument("--reps", type=int, default=3, help="repetitions")
    parser.add_argument("--duration", type=int, default=4, help="seconds of each load")
    parser.add_argument("--conc", default="1,16,64", help="connections of each load")
    parser.add_argument("--warmup", type=int, default=2, help="seconds before the first load")
    parser.add_argument("--quiet", type=float, default=0.25, help="begin a load when others use fewer cores than this")
    parser.add_argument("--patience", type=float, default=5, help="seconds to wait for that")
    parser.add_argument("--json", type=Path, help="write every figure here  [default: HOME/results/TIME.json]")
    parser.add_argument("--show", help="measure nothing: make the tables of this JSON file")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to leave the verdicts")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md and README.md")
    return parser.parse_args(words)


def run(options: argparse.Namespace) -> dict[str, Any]:
    home = options.home.resolve()
    manifest = store.read_manifest(ROOT / "artifacts", REF)
    connections = [int(count) for count in options.conc.split(",")]
    for folder in ("results", "logs", "models"):
        (home / folder).mkdir(parents=True, exist_ok=True)
    contents = pictures.pictures(REF.model, manifest.input)
    module, timed = fastest_form(home, manifest)
    logits = own_logits(home, manifest, contents)
    servers = choose(options.servers, home, module, list(manifest.classes))
    plan = Plan(
        pictures=contents,
        expected=[softmax(row) for row in logits],
        calibrated=[softmax(row, manifest.calibration.temperature) for row in logits],
        connections=connections,
        seconds=options.duration,
        warmup=options.warmup,
        quiet_cores=options.quiet,
        patience=options.patience,
        logs=home / "logs",
    )
    measured: dict[str, Any] = {"conditions": conditions(options, servers, timed), "rows": [], "floor": {}}
    path = options.json or home / "results" / f"{time.strftime('%Y%m%d-%H%M%S')}.json"
    turns: list[Server | None] = [*servers, None]  # the last is the bare loops'
    for repetition in range(options.reps):
        first = repetition % len(turns)
        for server in turns[first:] + turns[:first]:
            if server is None:
                bare_loops(plan, measured["floor"])
            else:
                one(server, plan, options.kind if isinstance(server, Safelight) else None, measured["rows"])
            path.write_text(json.dumps(measured, indent=1) + "\n")
    order = {server.title: index for index, server in enumerate(servers)}
    measured["rows"].sort(key=lambda row: order[row["server"]])
    path.write_text(json.dumps(measured, indent=1) + "\n")
    print(f"every figure is in {path}", file=sys.stderr)
    return measured


def one(server: Server, plan: Plan, wanted: list[str] | None, rows: list[report.Row]) -> None:
    """Measure a server once; one that fails is noted, and the others go on."""
    print(time.strftime("%H:%M:%S"), server.title, end="", file=sys.stderr, flush=True)
    try:
        if not server.installed:
            raise RuntimeError("not set up (setup.sh says why)")
        for form, result in measure(server, plan, wanted):
            note(rows, server, form, result)
            rates = {count: load["rps"] for count, load in result.get("loads", {}).items()}
            print(f"  {form}: {rates or result.get('error')}", end="", file=sys.stderr, flush=True)
    except (RuntimeError, OSError, ValueError, KeyError, subprocess.SubprocessError) as error:
        note(rows, server, "-", {"error": f"{type(error).__name__}: {error}"})
        print(f"  failed: {error}", end="", file=sys.stderr)
    print(file=sys.stderr)


def bare_loops(plan: Plan, rates: dict[str, list[float]]) -> None:
    """Once each, in a process of their own."""
    print(time.strftime("%H:%M:%S"), "bare loops", end="", file=sys.stderr, flush=True)
    processes.wait_until_quiet(plan.quiet_cores, plan.patience, [])
    command = [sys.executable, "-m", "benchmarks.floor", "--json", "--repetitions", "1", "--seconds", f"{plan.seconds}"]
    found = json.loads(subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout)
    for name, measured in found.items():
        rates.setdefault(name, []).extend(measured)
    print(f"  {found}", file=sys.stderr)


def note(rows: list[report.Row], server: Server, form: str, result: dict[str, Any]) -> None:
    for row in rows:
        if (row["server"], row["form"]) == (server.title, form):
            row["repetitions"].append(result)
            return
    rows.append({"server": server.title, "form": form, "settings": server.settings, "repetitions": [result]})


# --- the network ------------------------------------------------------------------------------------------------------


def fastest_form(home: Path, manifest: Manifest) -> tuple[Path, str]:
    """Of the bundle's own file and its exports, the one that is fastest bare; and what was timed, in words."""
    paths = {"the bundle's own file": REF.path(ROOT / "artifacts") / MODULE}
    for precision in PRECISIONS:
        path = home / "models" / f"{REF.model}-{precision}.ts"
        words = ["module", str(REF), "--precision", precision, "--output", str(path)]
        subprocess.run([sys.executable, "-m", "training", *words], cwd=ROOT, check=True, capture_output=True)
        paths[f"safelight module --precision {precision}"] = path
    times = json.loads(in_base(home, manifest, ["times", *map(str, paths.values())]))
    best = fastest(times)
    told = [
        f"{name} {' and '.join(f'{ms:.1f} ms' for ms in times[str(path)].values())}" for name, path in paths.items()
    ]
    chosen = next(name for name, path in paths.items() if str(path) == best)
    return Path(best), f"{chosen}. Bare, on one thread, batches of 1 and 32: {'; '.join(told)}"


def fastest(times: dict[str, dict[str, float]]) -> str:
    """By the geometric mean over batch sizes: a lone request and a full batch count alike."""
    return min(times, key=lambda name: math.prod(times[name].values()))


def own_logits(home: Path, manifest: Manifest, contents: list[bytes]) -> Rows:
    """What the bundle's float32 module says of the pictures, in the peers' environment."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{index}.png") for index in range(len(contents))]
        for file, content in zip(files, contents, strict=True):
            file.write_bytes(content)
        words = ["logits", str(REF.path(ROOT / "artifacts") / MODULE)]
        logits: Rows = json.loads(in_base(home, manifest, words, "\n".join(map(str, files))))
    return logits


def in_base(home: Path, manifest: Manifest, words: list[str], lines: str = "") -> str:
    python = home / "venvs" / "base" / "bin" / "python"
    if not python.exists():
        sys.exit(f"there are no environments in {home}: run benchmarks/peers/setup.sh")
    environ = os.environ | {"PEERS_CLASSES": ",".join(manifest.classes), "CUDA_VISIBLE_DEVICES": ""}
    command = [str(python), str(APPS / "reference.py"), *words]
    return subprocess.run(command, env=environ, input=lines, stdout=subprocess.PIPE, text=True, check=True).stdout


def softmax(logits: list[float], temperature: float = 1.0) -> list[float]:
    powers = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    return [power / sum(powers) for power in powers]


# --- conditions -------------------------------------------------------------------------------------------------------


def conditions(options: argparse.Namespace, servers: list[Server], timed: str) -> dict[str, str]:
    others = [server for server in servers if server.installed and not isinstance(server, Safelight)]
    settings = {server.title: server.settings for server in others}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{processor()}, {processors()} processors, shared with the client; {platform.system()}, "
        f"Python {platform.python_version()}",
        "client": "wrk, one thread, connections kept and never idle",
        "n": f"repetitions: {options.reps}, each {options.duration} s a load after {options.warmup} s of warm-up, "
        "every server started anew each time; medians (least–greatest)",
        "network": f"{REF}; the others run {timed}",
        "pictures": f"{pictures.describe()}; {MANY} a request: {MANY_CONNECTIONS} at once",
        "threads": "of the others one a process (more were slower); Safelight as by default, one for each processor",
        "Safelight's versions": ", ".join(f"{name} {version(name)}" for name in ("torch", "openvino", "fastapi")),
        "the others' versions": ", ".join(versions(others)),
        "the others' settings": "; ".join(
            f"{title} {' '.join(f'{key}={value}' for key, value in chosen.items())}"
            for title, chosen in settings.items()
        ),
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return f"{name} {'with' if 'amx_bf16' in flags else 'without'} AMX"


def versions(servers: list[Server]) -> list[str]:
    """Of what each environment has of interest."""
    program = (
        "import importlib.metadata as m\n"
        f"for n in {PACKAGES}:\n"
        "    if any(True for _ in m.distributions(name=n)): print(n, m.version(n))"
    )
    found: dict[str, str] = {}  # the first of each name: MLServer brings a FastAPI of its own
    for python in {server.python: None for server in servers}:
        done = subprocess.run([python, "-c", program], capture_output=True, text=True, check=True)
        found = dict(line.split() for line in done.stdout.splitlines()) | found
    return [f"{name} {found[name]}" for name in PACKAGES if name in found]


if __name__ == "__main__":
    main()
