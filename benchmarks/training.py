"""Training against its targets: seconds from the start of the process to the last evaluation, and accuracy, over seeds.

    python -m benchmarks.training                       every row
    python -m benchmarks.training --rows mnist-996 --seeds 10
    python -m benchmarks.training --docs                and write the table into docs/training.md; `make bench-training`

All rows take hours, so what is written is kept in benchmarks/training.json: a row stays as it was until it is measured
again, and what was never measured says so. Each run is a process of its own, with the data decoded and cached; rows
take turns, seed by seed. It needs MNIST and CIFAR-10 in SAFELIGHT_DATA. A row's recipe is trained on all of the
training split but for a hold-out of 1 %, or its own where that chooses the weights (600 digits, of which all epochs
miss six, choose by chance); the test split is read once a run. What a figure is compared with stands beside it: our
own target, or what was published.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

BEGUN = time.perf_counter()

from benchmarks.targets import RESULTS, ROOT, Verdict, save, table, write_into  # noqa: E402 - the clock comes first


@dataclass(frozen=True)
class Row:
    recipe: str
    seeds: int
    accuracy: float | None = None  # the mean that is aimed at
    views: bool = False  # averaged over views, or the single one
    seconds: float | None = None  # the median that is aimed at
    memory: float | None = None  # GB


ROWS = {
    "cifar10-94": Row("cifar10-94", 5, 0.94, views=True, seconds=180, memory=6),
    "cifar10-94-single": Row("cifar10-94-single", 5, 0.94, seconds=360, memory=6),
    "mnist-996": Row("mnist-996", 10, 0.996, seconds=40, memory=6),
    "mnist-99": Row("mnist-99", 10, 0.99, seconds=5, memory=6),
}
KEPT = ROOT / "benchmarks" / "training.json"
REFERENCE = "plain airbench94"  # ours is measured against it in the same run
FASTER = 2.8  # times the reference


@dataclass(frozen=True)
class Run:
    single: float
    views: float
    seconds: float  # from the start of the process
    to_first_step: float
    memory: float  # GB, at its most


@dataclass(frozen=True)
class Measured:
    """A row as it was measured last."""

    conditions: str
    runs: list[Run]


def main() -> None:
    options = parse()
    if options.one:
        print(json.dumps(asdict(one(options.one, options.seed))))
        return
    runs: dict[str, list[Run]] = defaultdict(list)
    wanted = {name: row for name, row in rows().items() if name in (options.rows or rows())}
    for seed in range(max(options.seeds or row.seeds for row in wanted.values())):
        for name, row in wanted.items():
            if seed < (options.seeds or row.seeds):
                runs[name].append(measure(name, row, seed))
                print(f"- {name}, seed {seed}: {runs[name][-1]}", flush=True)
    verdicts = [verdict for name, row in wanted.items() for verdict in judge(name, row, runs)]
    now = conditions()
    measured = {name: Measured(now, found) for name, found in runs.items() if found}
    print(report(wanted, measured))
    for verdict in verdicts:
        print(f"{'met' if verdict.passed else 'MISSED'}: {verdict.rule}: {verdict.found}")
    save("training", verdicts, now, options.results)
    if options.docs:
        write_into(ROOT / "docs" / "training.md", "training", report(rows(), keep(measured)))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=rows(), help="some of them")
    parser.add_argument("--seeds", type=int, help="of each, in place of its own number")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/training.md")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the verdicts go")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # what each process is started with
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def rows() -> dict[str, Row]:
    """The targets, the reference, and every recipe with a published figure."""
    from training.recipes import RECIPES

    classics = {name: Row(name, 1, recipe.expected_accuracy) for name, recipe in RECIPES.items() if recipe.published}
    return {REFERENCE: Row(REFERENCE, 1)} | ROWS | classics


def measure(name: str, row: Row, seed: int) -> Run:
    module = ["benchmarks.plain_airbench"] if name == REFERENCE else ["benchmarks.training", "--one", row.recipe]
    command = [sys.executable, "-m", *module, "--seed", str(seed)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        sys.exit(f"{name}, seed {seed}: {ended.stderr.strip().splitlines()[-1]}")
    return Run(**json.loads(ended.stdout.splitlines()[-1]))


def one(name: str, seed: int) -> Run:
    """Train by a recipe in this process."""
    import torch

    from training import datasets, loop
    from training.devices import choose_device, in_precision, keep_freed_memory
    from training.evaluate import accuracy, infer
    from training.processors import processors
    from training.recipes import override, recipe

    keep_freed_memory()
    torch.set_num_threads(processors())
    chosen, device = recipe(name), choose_device()
    if chosen.patience is None:
        chosen = override(chosen, ["holdout=0.01"])
    data = datasets.load(chosen.dataset, chosen.input, Path(os.environ["SAFELIGHT_DATA"]))
    first: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        trained = loop.train(
            chosen,
            data,
            Path(folder),
            seed=seed,
            device=device,
            watched=False,
            emit=lambda event: first.append(time.perf_counter()) if event.event == "progress" and not first else None,
        )
    network, images, labels = trained.network.folded(), data.test.images, data.test.labels
    with in_precision(getattr(torch, trained.arithmetic["precision"]), device):
        single = views = accuracy(infer(network, images, device, batch=500), labels)
        if chosen.views != "none":
            views = accuracy(infer(network, images, device, chosen.views, batch=500), labels)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return Run(single, views, time.perf_counter() - BEGUN, first[0] - BEGUN, memory)


def judge(name: str, row: Row, runs: dict[str, list[Run]]) -> Iterator[Verdict]:
    found = runs[name]
    scores = [run.views if row.views else run.single for run in found]
    if row.accuracy is not None:
        sort = "averaged over views" if row.views else "single view"
        mean = statistics.mean(scores)
        rule = f"`{name}`: mean accuracy, {sort}, at least {row.accuracy:.2%}"
        yield Verdict(rule, f"{mean:.2%} (n = {len(scores)})", mean >= row.accuracy)
    if row.seconds is not None:
        seconds = statistics.median(run.seconds for run in found)
        yield Verdict(f"`{name}`: at most {row.seconds:g} s", f"{seconds:.1f} s", seconds <= row.seconds)
    if row.memory is not None:
        memory = max(run.memory for run in found)
        yield Verdict(f"`{name}`: at most {row.memory:g} GB", f"{memory:.1f} GB", memory <= row.memory)
    if name == "cifar10-94" and runs[REFERENCE]:
        times = [statistics.median(run.seconds for run in runs[which]) for which in (REFERENCE, name)]
        ratio = times[0] / times[1]
        yield Verdict(f"`{name}`: at least {FASTER} times the reference", f"{ratio:.2f} times", ratio >= FASTER)


def keep(measured: dict[str, Measured]) -> dict[str, Measured]:
    """Put these rows in place of what was kept of them before; all that is kept now."""
    before = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    kept = {name: Measured(row["conditions"], [Run(**run) for run in row["runs"]]) for name, row in before.items()}
    kept |= measured
    KEPT.write_text(json.dumps({name: asdict(row) for name, row in kept.items()}, indent=1) + "\n")
    return kept


def report(shown: dict[str, Row], measured: dict[str, Measured]) -> str:
    """One table; `note` is the number of the conditions that a row was measured under."""
    from training.recipes import RECIPES

    lines = []
    notes = list(dict.fromkeys(row.conditions for row in measured.values()))
    for name, row in shown.items():
        recipe = RECIPES.get(row.recipe)
        aim = recipe.published if recipe and recipe.published else f"{row.accuracy:.2%}" if row.accuracy else ""
        if name not in measured:
            lines.append((f"`{name}`", "", aim, "not measured yet", "", "", "", "", ""))
            continue
        found = measured[name].runs
        single, views = ([getattr(run, part) for run in found] for part in ("single", "views"))
        scores = [f"{statistics.mean(part):.2%}{deviation(part)}" for part in (single, views)]
        times = [run.seconds for run in found]
        spread = f" ({min(times):.1f} to {max(times):.1f})" if len(times) > 1 else ""
        within = f" of {row.seconds:g}" if row.seconds else ""
        first = f"{statistics.median(run.to_first_step for run in found):.1f}"
        memory = f"{max(run.memory for run in found):.1f}"
        time_taken = f"{statistics.median(times):.1f}{within}{spread}"
        of_views = scores[1] if views != single else ""
        note = str(notes.index(measured[name].conditions) + 1)
        lines.append((f"`{name}`", str(len(found)), aim, scores[0], of_views, time_taken, first, memory, note))
    head = ("recipe", "n", "aim", "single view", "with views", "seconds", "to first step", "GB", "note")
    legend = "Accuracy: mean ± deviation over seeds; seconds: median (least to greatest)."
    told = [f"{number}. {note}" for number, note in enumerate(notes, 1)]
    return "\n\n".join([table(head, lines), legend, "\n".join(told)])


def deviation(values: Sequence[float]) -> str:
    return f" ± {statistics.stdev(values):.2%}" if len(values) > 1 else ""


def conditions() -> str:
    import torch

    from benchmarks.serving import processor
    from training.devices import training_precision
    from training.processors import processors

    precision = str(training_precision(torch.device("cpu"))).removeprefix("torch.")
    return (
        f"{time.strftime('%Y-%m-%d')}, {processor()}, {processors()} threads, convolutions in {precision} "
        f"where the recipe leaves the choice, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
