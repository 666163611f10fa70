"""From what was measured to tables: medians with their spread, ours beside the best of the others, and the verdicts."""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.floor import BOTH
from benchmarks.targets import Verdict, table

OURS = "safelight"
MANY = "64 a request"
TIMES = {"1": 3.0, "16": 1.7, "64": 1.4, MANY: 1.5}  # the best other's rate, of /predict given a form
P99_AT = ("1", "64")  # where it must be no worse than the best other's, too
OF_THE_FLOOR = 0.85

# A row is one server asked in one form: {"server", "form", "repetitions": [what `measure` gave, …]}.
Row = dict[str, Any]
Measured = dict[str, Any]  # {"conditions": {name: text}, "rows": [Row, …], "floor": {loop: [rate, …]}}


def report(measured: Measured) -> str:
    """Everything as Markdown."""
    rows = measured["rows"]
    parts = [
        "\n".join(f"- {name}: {text}" for name, text in measured["conditions"].items()),
        loads(rows),
        whole(rows),
        floor(measured.get("floor", {})),
        ratios(rows),
        failures(rows),
    ]
    return "\n\n".join(part for part in parts if part)


def loads(rows: list[Row]) -> str:
    head = ("server", "asked by", "at once", "requests/s", "p50 ms", "p99 ms", "failed", "CPU s/1000", "others' cores")
    lines = []
    for row in rows:
        for connections in connection_counts([row]):
            runs = [run["loads"][connections] for run in good(row) if connections in run["loads"]]
            spreads = [spread(runs, "rps", 0), spread(runs, "p50_ms", 1), spread(runs, "p99_ms", 1)]
            failed = str(sum(run["failed"] for run in runs))
            cost = [median(runs, "cpu_s_per_1000", 2), median(runs, "others_cores", 2)]
            lines.append((row["server"], row["form"], connections, *spreads, failed, *cost))
    return table(head, lines)


def whole(rows: list[Row]) -> str:
    head = ("server", "asked by", "cold start s", "RSS / PSS MiB", "images/s, 64 a request", "answers checked")
    lines = []
    for row in rows:
        runs = good(row)
        if not runs:
            lines.append((row["server"], row["form"], "", "", "", "did not run"))
            continue
        last = [list(run["loads"].values())[-1] for run in runs]
        memory = f"{median(last, 'rss_mib', 0)} / {median(last, 'pss_mib', 0)}"
        many = [run["many"] for run in runs if "many" in run]
        images = spread(many, "images_per_s", 0) if many else "one picture a request"
        lines.append((row["server"], row["form"], spread(runs, "cold_start_s", 1), memory, images, checked(runs)))
    return table(head, lines)


def checks(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [check for run in runs for check in (run["check"], run.get("many", {}).get("check")) if check]


def wrong(runs: list[dict[str, Any]]) -> bool:
    return not all(check["good"] for check in checks(runs))


def checked(runs: list[dict[str, Any]]) -> str:
    bad = [check for check in checks(runs) if not check["good"]]
    if bad:
        return "WRONG: " + bad[0].get("why", f"off by {bad[0]['difference']:.2g}")
    return f"yes, within {max(check['difference'] for check in checks(runs)):.1g}"


def floor(rates: dict[str, list[float]]) -> str:
    """What bare loops made of the same pictures, in the same run."""
    lines = [(name, spread([{"rate": rate} for rate in found], "rate", 0)) for name, found in rates.items()]
    return table(("bare loop", "pictures/s"), lines) if lines else ""


def ratios(rows: list[Row]) -> str:
    """Each of our rows beside the best other server that is given the same: pictures, or pixels."""
    head = ("load", "ours", "rate", "best other", "ratio")
    lines = []
    for row in (row for row in rows if row["server"].startswith(OURS)):
        for load in [*connection_counts([row]), MANY]:
            rate, best = rate_of(row, load), best_other(rows, row, load)
            if rate is None or best is None:
                continue
            other = rate_of(best, load) or 0.0
            ours, theirs = f"{row['server']}, {row['form']}", f"{other:,.0f} ({best['server']})"
            lines.append((title(load), ours, f"{rate:,.0f}", theirs, f"{rate / other:.2f}"))
    return table(head, lines) if lines else ""


def title(load: str) -> str:
    return load if load == MANY else f"{load} at once"


def best_other(rows: list[Row], ours: Row, load: str) -> Row | None:
    others = [row for row in rows if not row["server"].startswith(OURS) and same(row, ours) and rate_of(row, load)]
    return max(others, key=lambda row: rate_of(row, load) or 0.0, default=None)


def verdicts(measured: Measured) -> Iterator[Verdict]:
    """The targets of /predict given a form, beside the best other and the bare loops; of our other forms, beside it."""
    rows = measured["rows"]
    forms = {row["form"]: row for row in rows if row["server"] == OURS}
    if "multipart" not in forms:
        return
    ours = forms.pop("multipart")
    for load, times in TIMES.items():
        rate, best = rate_of(ours, load), best_other(rows, ours, load)
        if rate is None or best is None:
            continue
        other = rate_of(best, load) or 0.0
        found = f"{rate / other:.2f} times: {rate:,.0f} for {other:,.0f} ({best['server']})"
        yield Verdict(f"`/predict`, {title(load)}: {times} times the best other", found, rate >= times * other)
        if load in P99_AT:
            p99, theirs = p99_of(ours, load), p99_of(best, load)
            found = f"{p99:.1f} ms for {theirs:.1f} ms"
            yield Verdict(f"`/predict`, {title(load)}: p99 no worse than its", found, p99 <= theirs)
    yield from beside_the_floor(rate_of(ours, MANY), measured.get("floor", {}))
    bad = {name: good(form) for name, form in {"`/predict`": ours, **forms}.items() if wrong(good(form))}
    for name, runs in bad.items():
        yield Verdict(f"{name}: answers within 0.05 of the module's own", checked(runs), False)
    if bad:
        return  # a rate of wrong answers is none
    for name, form in forms.items():
        ratios = {
            load: (rate_of(form, load) or 0.0) / (rate_of(ours, load) or 1.0) for load in connection_counts([form])
        }
        found = ", ".join(f"{ratio:.2f} times {title(load)}" for load, ratio in ratios.items())
        yield Verdict(f"{name}: at least as fast as a form", found, min(ratios.values()) >= 1)


def beside_the_floor(rate: float | None, rates: dict[str, list[float]]) -> Iterator[Verdict]:
    both = {name: statistics.median(found) for name, found in rates.items() if name.startswith(BOTH)}
    if rate is None or not both:
        return
    best = max(both, key=lambda name: both[name])
    found = f"{rate / both[best]:.0%}: {rate:,.0f} of {both[best]:,.0f} ({best})"
    rule = f"`/predict`, {MANY}: {OF_THE_FLOOR:.0%} of the best bare loop that decodes and computes"
    yield Verdict(rule, found, rate >= OF_THE_FLOOR * both[best])


def summary(measured: Measured) -> str:
    """For the README: ours given a form, plain FastAPI, and at each load the best of all others."""
    rows = measured["rows"]
    ours = next(row for row in rows if (row["server"], row["form"]) == (OURS, "multipart"))
    plain = next((row for row in rows if row["server"] == "fastapi"), None)
    lines = []
    for load in [*connection_counts([ours]), MANY]:
        best = best_other(rows, ours, load)
        others = [cell(plain, load) if plain else "", f"{cell(best, load)} ({best['server']})" if best else ""]
        lines.append((title(load), f"**{cell(ours, load)}**", *others))
    last = connection_counts([ours])[-1]
    best = best_other(rows, ours, last)
    lines.append(("memory (RSS)", memory(ours), memory(plain), f"{memory(best)} ({best['server']})" if best else ""))
    conditions = measured["conditions"]
    told = "\n".join(f"- {name}: {conditions[name]}" for name in ("date", "machine", "n") if name in conditions)
    return "\n\n".join([table(("`cifar10`", "Safelight", "plain FastAPI", "the best other"), lines), told])


def cell(row: Row, load: str) -> str:
    if load == MANY:
        many = [run["many"] for run in good(row) if "many" in run]
        return f"{spread(many, 'images_per_s', 0)} images/s" if many else ""
    runs = [run["loads"][load] for run in good(row) if load in run["loads"]]
    return f"{spread(runs, 'rps', 0)} requests/s, p99 {median(runs, 'p99_ms', 1)} ms" if runs else ""


def memory(row: Row | None) -> str:
    """After the last load of single pictures."""
    return f"{median([list(run['loads'].values())[-1] for run in good(row)], 'rss_mib', 0)} MiB" if row else ""


def p99_of(row: Row, load: str) -> float:
    return statistics.median(run["loads"][load]["p99_ms"] for run in good(row) if load in run["loads"])


def same(row: Row, other: Row) -> bool:
    return {run["work"] for run in good(row)} == {run["work"] for run in good(other)}


def rate_of(row: Row, load: str) -> float | None:
    """Median requests/s, or images/s of the large requests; None where it can't or its answers were wrong."""
    if load == MANY:
        rates = [run["many"]["images_per_s"] for run in good(row) if "many" in run and run["many"]["check"]["good"]]
    else:
        rates = [run["loads"][load]["rps"] for run in good(row) if load in run["loads"] and run["check"]["good"]]
    return statistics.median(rates) if rates else None


def failures(rows: list[Row]) -> str:
    found = {
        f"- {row['server']}, {row['form']}: {' '.join(run['error'].split())[:100]}": None
        for row in rows
        for run in row["repetitions"]
        if "error" in run
    }
    return "\n".join(["Not measured:", "", *found]) if found else ""


def good(row: Row) -> list[dict[str, Any]]:
    return [run for run in row["repetitions"] if "error" not in run]


def connection_counts(rows: list[Row]) -> list[str]:
    return list(dict.fromkeys(count for row in rows for run in good(row) for count in run["loads"]))


def median(runs: list[dict[str, Any]], key: str, digits: int) -> str:
    return f"{statistics.median(run[key] for run in runs):,.{digits}f}"


def spread(runs: list[dict[str, Any]], key: str, digits: int) -> str:
    """The median, and where there are several the least and the greatest."""
    values = [run[key] for run in runs]
    text = f"{statistics.median(values):,.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"
