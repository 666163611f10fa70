"""What a run has told: its events file, read by the page and while it is being written.

An event's id is the number of its line. Only whole lines count; what a kill cut short, the next process takes away.
"""

import json
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
        lines = self._rest()[:limit]
        self._offset += sum(map(len, lines))
        self.lines += len(lines)
        return lines

    def at_end(self) -> bool:
        return not self._rest()

    def _rest(self) -> list[bytes]:
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return []
        return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


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


def numbered(path: Path) -> list[Numbered]:
    """Every event so far that is understood."""
    return [(number, event) for number, line in enumerate(Tail(path).read(), 1) for event in parse([line])]
