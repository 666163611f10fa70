"""What bare loops make of the same pictures: decoding and the engine, and nothing else.

Run `python -m benchmarks.floor [--model cifar10]`; medians of the repetitions, with the least and the greatest in
brackets. What a server is held against is the best of those that do both: on all processors they decode beside the
engine, or each processor decodes and computes by itself, in a process with an engine of one thread.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import torch

from benchmarks.pictures import COUNT, describe, pictures
from service.inference import engine
from training.bundle import store
from training.bundle.images import decode
from training.bundle.store import BundleRef
from training.processors import processors

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
BOTH = "both, "  # what the names of loops begin with that decode and compute

Rates = dict[str, list[float]]  # pictures a second, by the loop's name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10", choices=("cifar10", "mnist"))
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print the rates of all repetitions as JSON")
    options = parser.parse_args()
    loops = Loops(options.model, processors())
    rates = loops.rates(options.seconds, options.repetitions)
    if options.json:
        print(json.dumps(rates))
        return
    print(f"{loops.ref}, {loops.engine.chosen}, {processors()} processors; {describe()}; n = {options.repetitions}")
    for name, found in rates.items():
        middle = statistics.median(found)
        print(f"{name}: {middle:,.0f} ({min(found):,.0f}-{max(found):,.0f}) pictures/s, {1e6 / middle:,.0f} us each")


class Loops:
    """One model's engine of so many threads, and the pictures that it is given."""

    def __init__(self, model: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self.ref = BundleRef(model, store.active(ARTIFACTS, model) or "1")
        self.manifest = store.read_manifest(ARTIFACTS, self.ref)
        self.engine = engine.load(self.ref.path(ARTIFACTS), self.manifest, torch.device("cpu"))
        self.files = pictures(model, self.manifest.input)

    def rates(self, seconds: float, repetitions: int) -> Rates:
        """Of each loop, in turns."""
        images = self.decoded()
        context = multiprocessing.get_context("spawn")
        ready = self.ref.model, context.Barrier(processors())
        with ThreadPoolExecutor(1) as ahead, ProcessPoolExecutor(processors(), context, _load, ready) as each:
            loops: dict[str, Callable[[], float]] = {
                "engine, one picture": lambda: _rate(lambda: self.engine.run(images[:1]), 1, seconds),
                f"engine, {COUNT} pictures": lambda: _rate(lambda: self.engine.run(images), COUNT, seconds),
                "decoding, one thread": lambda: _rate(self.decoded, COUNT, seconds),
                f"{BOTH}in turns": lambda: _rate(self.in_turns, COUNT, seconds),
                f"{BOTH}side by side": lambda: _rate(self.side_by_side(ahead), COUNT, seconds),
                f"{BOTH}in a process for each processor": lambda: _together(each, seconds),
            }
            rounds = [{name: loop() for name, loop in loops.items()} for _ in range(repetitions)]
        return {name: [round(found[name], 1) for found in rounds] for name in loops}

    def decoded(self) -> engine.Images:
        return np.stack([decode(file, self.manifest.input) for file in self.files])  # [64, C, H, W]

    def in_turns(self) -> None:
        self.engine.run(self.decoded())

    def side_by_side(self, ahead: ThreadPoolExecutor) -> Callable[[], None]:
        """The next batch is decoded while this one is computed."""
        coming = [ahead.submit(self.decoded)]

        def step() -> None:
            current = coming.pop().result()
            coming.append(ahead.submit(self.decoded))
            self.engine.run(current)

        return step


# --- in each process of `_together` ---


def _load(model: str, ready: Barrier) -> None:
    global alone, all_ready
    alone, all_ready = Loops(model, 1), ready


def _rate_alone(seconds: float) -> float:
    all_ready.wait()  # so that each process has one of these
    return _rate(alone.in_turns, COUNT, seconds)


# --- here ---


def _together(processes: ProcessPoolExecutor, seconds: float) -> float:
    """All at once; the first time they load an engine before."""
    running = [processes.submit(_rate_alone, seconds) for _ in range(processors())]
    return sum(one.result() for one in running)


def _rate(step: Callable[[], object], count: int, seconds: float) -> float:
    """Pictures a second."""
    step()
    begun, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < seconds:
        step()
        done += count
    return done / taken


if __name__ == "__main__":
    main()
