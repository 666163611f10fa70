"""What a bare loop makes of the same pictures: decoding and the engine, and nothing else.

No server on this machine can answer faster. Run `python -m benchmarks.floor [--model cifar10]`; medians of the
repetitions, with the least and the greatest in brackets.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="cifar10", choices=("cifar10", "mnist"))
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    measure(options.model, options.seconds, options.repetitions)


def measure(model: str, seconds: float, repetitions: int) -> None:
    torch.set_num_threads(processors())
    ref = BundleRef(model, store.active(ARTIFACTS, model) or "1")
    manifest = store.read_manifest(ARTIFACTS, ref)
    loaded = engine.load(ref.path(ARTIFACTS), manifest, torch.device("cpu"))
    files = pictures(model, manifest.input)

    def decoded() -> engine.Images:
        return np.stack([decode(file, manifest.input) for file in files])  # [64, C, H, W]

    with ThreadPoolExecutor(1) as ahead:
        coming = [ahead.submit(decoded)]

        def side_by_side() -> None:
            """The next batch is decoded while this one is computed."""
            current = coming.pop().result()
            coming.append(ahead.submit(decoded))
            loaded.run(current)

        images = decoded()
        ways: dict[str, tuple[Callable[[], object], int]] = {
            "engine, one picture": (lambda: loaded.run(images[:1]), 1),
            f"engine, {COUNT} pictures": (lambda: loaded.run(images), COUNT),
            "decoding, one thread": (decoded, COUNT),
            "both, in turns": (lambda: loaded.run(decoded()), COUNT),
            "both, side by side": (side_by_side, COUNT),
        }
        rounds = [[_rate(*way, seconds) for way in ways.values()] for _ in range(repetitions)]
    print(f"{ref}, {loaded.chosen}, {processors()} threads; {describe()}; n = {repetitions}")
    for name, *found in zip(ways, *rounds, strict=True):
        middle = statistics.median(found)
        print(f"{name}: {middle:,.0f} ({min(found):,.0f}-{max(found):,.0f}) pictures/s, {1e6 / middle:,.0f} us each")


def _rate(way: Callable[[], object], count: int, seconds: float) -> float:
    """Pictures a second."""
    way()
    begun, done = time.perf_counter(), 0
    while (taken := time.perf_counter() - begun) < seconds:
        way()
        done += count
    return done / taken


if __name__ == "__main__":
    main()
