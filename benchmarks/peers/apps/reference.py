"""The module's own answers, and what its forms cost: what the harness needs torch for.

`reference.py logits MODEL` reads one path of a picture a line and prints [N][K] as JSON;
`reference.py times MODEL...` prints milliseconds by file and batch size.
"""

import json
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from workload import decode

BATCHES = (1, 32)
ROUNDS = 15


def logits(path: str) -> list[list[float]]:
    pictures = [torch.tensor(decode(Path(line.rstrip("\n")).read_bytes())) for line in sys.stdin]
    return torch.jit.load(path)(torch.stack(pictures).permute(0, 3, 1, 2)).tolist()


def times(paths: list[str]) -> dict[str, dict[int, float]]:
    """Median milliseconds of each module, on one thread; they take turns, so that a busy machine is so for all."""
    modules = {path: torch.jit.load(path).eval() for path in paths}
    result: dict[str, dict[int, float]] = {path: {} for path in paths}
    for batch in BATCHES:
        pixels = torch.randint(0, 256, (batch, 32, 32, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
        seconds: dict[str, list[float]] = {path: [] for path in paths}
        for _ in range(ROUNDS):
            for path, module in modules.items():
                begun = time.perf_counter()
                module(pixels)
                seconds[path].append(time.perf_counter() - begun)
        for path in paths:
            result[path][batch] = round(statistics.median(seconds[path][3:]) * 1000, 3)  # the first three warm it up
    return result


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    torch.set_num_threads(1)
    with torch.inference_mode():
        print(json.dumps(logits(sys.argv[2]) if sys.argv[1] == "logits" else times(sys.argv[2:])))
