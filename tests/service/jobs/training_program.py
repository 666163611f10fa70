"""A training program without training: what the service sees of `python -m training finetune`, in milliseconds a step.

A process like any other, that keeps to the same rules: run folder, events, signals, exit codes. The "weights" depend on
every step that led to them. What it is to suffer is set with the recipe: `--set die_at=3`.
"""

import argparse
import fcntl
import hashlib
import json
import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

DEFAULTS = {"steps": 5, "pause": 0.02, "checking": 0.0, "deaf": False, "words": "no idea", "linger": 0.0}
DEFAULTS |= dict.fromkeys(("die_at", "fail_at", "exit_at", "abort_at"))


def main() -> int:
    options = parse()
    folder = options.resume or options.run
    settings = begin(folder, options)
    lock = (folder / "lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    events = (folder / "events.jsonl").open("ab", buffering=0)
    events.truncate((folder / "events.jsonl").read_bytes().rfind(b"\n") + 1)

    def tell(event: str, **facts: object) -> None:
        line = {"at": datetime.now(UTC).isoformat(), "event": event} | facts
        events.write(json.dumps(line).encode() + b"\n")

    asked = listen(settings, options.stop_at_eof)
    held = holdable(tell, asked) if options.holdable and not settings["deaf"] else []
    say(f"pid {os.getpid()} {' '.join(sys.argv[1:])}")
    return train(folder, settings, tell, asked, held, options)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("finetune")
    parser.add_argument("base", nargs="?")
    for name in ("dataset", "name", "seed", "promote", "limit", "artifacts", "data", "device", "memory-bytes"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--deadline-seconds", type=float)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--guest", action="store_true")
    parser.add_argument("--stop-at-eof", action="store_true")
    parser.add_argument("--holdable", action="store_true")
    return parser.parse_args()


def begin(folder: Path, options: argparse.Namespace) -> dict:
    run = folder / "run.json"
    if options.resume is None:
        assert not run.exists(), "a run that has begun is gone on with by --resume"
        overrides = {key: json.loads(value) for key, _, value in (word.partition("=") for word in options.set)}
        write(run, DEFAULTS | overrides | {"base": options.base, "name": options.name, "seed": int(options.seed)})
    return json.loads(run.read_text())


def listen(settings: dict, stop_at_eof: bool) -> threading.Event:
    asked = threading.Event()
    signal.signal(signal.SIGTERM, (lambda *_: None) if settings["deaf"] else (lambda *_: asked.set()))

    def until_alone() -> None:
        while os.read(0, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if stop_at_eof:
        threading.Thread(target=until_alone, daemon=True).start()
    return asked


def holdable(tell, asked: threading.Event) -> list[float]:
    """Wait from SIGTSTP to SIGCONT; the seconds of each wait."""
    held = []

    def hold(*_: object) -> None:
        begun = time.monotonic()
        released = threading.Event()
        signal.signal(signal.SIGCONT, lambda *_: released.set())
        tell("held")
        while not (released.is_set() or asked.is_set()):
            time.sleep(0.01)
        held.append(time.monotonic() - begun)
        tell("released")

    signal.signal(signal.SIGTSTP, hold)
    return held


def train(
    folder: Path, settings: dict, tell, asked: threading.Event, held: list[float], options: argparse.Namespace
) -> int:
    state = {"step": 0, "weights": str(settings["seed"])}
    if (folder / "checkpoint.pt").exists():
        state = json.loads((folder / "checkpoint.pt").read_text())
    begun = time.monotonic()
    time.sleep(settings["checking"])
    tell("validated", report={"pictures": 40})
    steps = settings["steps"]
    facts = {"recipe": "program", "dataset": "x", "seed": settings["seed"], "device": "cpu", "precision": "float32"}
    tell("started", **facts, steps=steps, step=state["step"])
    while (step := state["step"]) < steps:
        if asked.is_set():
            tell("interrupted", step=step)
            time.sleep(settings["linger"])
            return 130
        if time.monotonic() - begun - sum(held) > options.deadline_seconds and not settings["deaf"]:
            return fail(tell, "deadline_passed", "it took too long")
        if step == settings["die_at"]:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == settings["fail_at"]:
            return fail(tell, "diverged", "the loss rose and rose")
        if step == settings["abort_at"]:
            say(settings["words"])
            os.abort()
        if step == settings["exit_at"]:
            say(settings["words"])
            return 1
        time.sleep(settings["pause"])
        state = {"step": step + 1, "weights": hashlib.sha256(f"{state['weights']} {step}".encode()).hexdigest()}
        write(folder / "checkpoint.pt", state)
        tell("checkpointed", step=step + 1, path=str(folder / "checkpoint.pt"))
        left = (steps - step - 1) * settings["pause"]
        figures = {"loss": 1 / (step + 1), "accuracy": step / steps, "images_per_second": 9.0, "seconds_left": left}
        tell("progress", step=step + 1, steps=steps, epoch=(step + 1) / steps, **figures)
    return publish(Path(options.artifacts), settings["name"], state["weights"], tell)


def fail(tell, code: str, message: str) -> int:
    tell("failed", code=code, message=message)
    return 3


def publish(artifacts: Path, name: str, weights: str, tell) -> int:
    (artifacts / name).mkdir(parents=True, exist_ok=True)
    write(artifacts / name / "weights", weights)
    tell("published", model=name, version="1", accuracy=0.9)
    figures = {"metrics": {"accuracy": 0.9}, "gate": {}, "comparisons": {}, "seconds": 1.0}
    summary = "fixed 9 of 10, broke 1; promoted"
    result = {"model": name, "version": "1", "promoted": True, "decision": "promoted", "summary": summary}
    tell("decided", result=result | figures)
    return 0


def say(text: str) -> None:
    os.write(1, f"{text}\n".encode())


def write(path: Path, content: object) -> None:
    temporary = path.with_name(f".{path.name}-{os.getpid()}")  # two services' jobs publish under one name
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)


if __name__ == "__main__":
    sys.exit(main())
