"""From what was measured to tables: medians with their spread, and ours beside the best of the others."""

import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OURS = "safelight"
MANY = "64 a request"
MARKS = ("<!-- measured: peers -->", "<!-- measured end -->")

# A row is one server asked in one form: {"server", "form", "repetitions": [what `measure_form` gave, …]}.
Row = dict[str, Any]
Measured = dict[str, Any]  # {"conditions": {name: text}, "rows": [Row, …]}


def report(measured: Measured) -> str:
    """Everything as Markdown."""
    rows = measured["rows"]
    parts = [
        "\n".join(f"- {name}: {text}" for name, text in measured["conditions"].items()),
        loads(rows),
        whole(rows),
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


def checked(runs: list[dict[str, Any]]) -> str:
    checks = [check for run in runs for check in (run["check"], run.get("many", {}).get("check")) if check]
    bad = [check for check in checks if not check["good"]]
    if bad:
        return "WRONG: " + bad[0].get("why", f"off by {bad[0]['difference']:.2g}")
    return f"yes, within {max(check['difference'] for check in checks):.1g}"


def ratios(rows: list[Row]) -> str:
    """Each of our rows beside the best other server that is given the same: pictures, or pixels."""
    head = ("load", "ours", "rate", "best other", "ratio")
    lines = []
    for row in (row for row in rows if row["server"].startswith(OURS)):
        for load in [*connection_counts([row]), MANY]:
            rate = rate_of(row, load)
            others = {r["server"]: rate_of(r, load) for r in rows if not r["server"].startswith(OURS) and same(r, row)}
            known = {server: other for server, other in others.items() if other}
            if rate is None or not known:
                continue
            best = max(known, key=lambda server: known[server])
            title = f"{load} at once" if load != MANY else MANY
            lines.append(
                (
                    title,
                    f"{row['server']}, {row['form']}",
                    f"{rate:,.0f}",
                    f"{known[best]:,.0f} ({best})",
                    f"{rate / known[best]:.2f}",
                )
            )
    return table(head, lines) if lines else ""


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


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines))


def write_into(page: Path, text: str) -> None:
    """Put the tables between the marks of a page."""
    begin, end = map(re.escape, MARKS)
    new, count = re.subn(
        f"({begin}\n).*?({end})", lambda match: f"{match[1]}{text}\n{match[2]}", page.read_text(), flags=re.S
    )
    if count != 1:
        raise SystemExit(f"{page} has {count} places between {MARKS[0]} and {MARKS[1]}; it needs one")
    page.write_text(new)
