"""What a run has told: its events file, read by the page and while it is being written.

An event's id is the number of its line. Only whole lines count; what a kill cut short, the next process takes away.
Histories grow to many thousands of events: read them in a thread, and make objects only of those that are asked for.
"""

import json
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training import events
from training.events import Event

EVENTS = "events.jsonl"

Numbered = tuple[int, Event]  # the line, from 1, and what it says


class Tail:
    """Follows a file from its first line on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self.lines = 0  # that have been read

    def read(self, limit: int | None = None) -> list[bytes]:
        """The whole lines that have come since, or the first `limit` of them."""
        lines = self._next(limit)
        self._offset += sum(map(len, lines))
        self.lines += len(lines)
        return lines

    def at_end(self) -> bool:
        return not self._next(1)

    def _next(self, limit: int | None) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                return list(takewhile(_is_whole, islice(file, limit)))
        except FileNotFoundError:
            return []


def page(path: Path, *, after: int, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """The events behind line `after`, and whether there are more."""
    tail = Tail(path)
    tail.read(after)
    lines = tail.read(limit + 1)
    found = [{"id": after + 1 + index} | json.loads(line) for index, line in enumerate(lines[:limit])]
    return found, len(lines) > limit


def parse(lines: list[bytes]) -> list[Event]:
    """What this version of the service understands of them: a newer one's run may tell more."""
    found = []
    for line in lines:
        try:
            found.append(events.parse(line))
        except ValidationError:
            continue
    return found


def newest(path: Path, limit: int, last: int | None = None) -> list[Numbered]:
    """Of the events that are understood, so many at most, from line `last` or the end of the file back."""
    lines = Tail(path).read(last)
    found: list[Numbered] = []
    while lines and len(found) < limit:
        number, line = len(lines), lines.pop()
        found += [(number, event) for event in parse([line])]
    return found


def _is_whole(line: bytes) -> bool:
    return line.endswith(b"\n")
