"""The targets, what was found, and whether that is enough: one table, which no hand writes.

    python -m benchmarks.targets           print it
    python -m benchmarks.targets --docs    and write it into README.md and docs/performance.md; `make targets`

Each script that measures something with a target leaves its verdicts in .bench/results, the last ones it found: peers,
stages, and each scenario of load. What isn't there yet stands in the table as not measured.
"""

import argparse
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / ".bench" / "results"
PAGES = (ROOT / "README.md", ROOT / "docs" / "performance.md")

SOURCES = {  # what is measured, by the name of its file, and how
    "peers": "`make bench-peers`",
    "stages": "`make bench-stages`",
    "open": "`make load`",
    "overload": "`make overload`",
    "soak": "`make soak`",
    "start": "`make start`",
}


@dataclass(frozen=True)
class Verdict:
    rule: str
    found: str
    passed: bool


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the scripts left their verdicts")
    parser.add_argument("--docs", action="store_true", help="write the table into README.md and docs/performance.md")
    options = parser.parse_args()
    text = report(options.results)
    print(text)
    if options.docs:
        for page in PAGES:
            write_into(page, "targets", text)


def save(name: str, verdicts: Sequence[Verdict], conditions: str, results: Path = RESULTS) -> None:
    """Keep what was found last, for the table."""
    results.mkdir(parents=True, exist_ok=True)
    found = {"conditions": f"{time.strftime('%Y-%m-%d')}, {conditions}", "verdicts": [asdict(one) for one in verdicts]}
    (results / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n")


def report(results: Path) -> str:
    rows: list[tuple[str, ...]] = []
    conditions = []
    for name, command in SOURCES.items():
        path = results / f"{name}.json"
        if not path.exists():
            rows.append((f"what {command} measures", "not measured yet", ""))
            continue
        saved = json.loads(path.read_text())
        found = [Verdict(**verdict) for verdict in saved["verdicts"]]
        rows += [(one.rule, one.found, "met" if one.passed else "**missed**") for one in found]
        conditions.append(f"- {command}: {saved['conditions']}")
    return "\n\n".join(part for part in (table(("target", "found", "verdict"), rows), "\n".join(conditions)) if part)


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *lines))


def write_into(page: Path, name: str, text: str) -> None:
    """Put what was measured between the marks that a page has for it."""
    begin, end = f"<!-- measured: {name} -->", "<!-- measured end -->"
    new, count = re.subn(
        f"({re.escape(begin)}\n).*?({re.escape(end)})",
        lambda match: f"{match[1]}{text}\n{match[2]}",
        page.read_text(),
        flags=re.S,
    )
    if count != 1:
        raise SystemExit(f"{page} has {count} places between {begin} and {end}; it needs one")
    page.write_text(new)


if __name__ == "__main__":
    main()
