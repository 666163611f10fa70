"""A client that asks when a request is due, whether or not earlier ones have been answered.

Real callers don't wait for each other: a client that does (closed loop, as wrk) asks less where the server is slow, and
so never sees a queue. Latency counts from the time at which a request was due; one that is sent late counts too.

Sockets and epoll without an event loop's layers, for client and server share the processors: about 40 µs a request.
"""

import select
import socket
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

PATIENCE = 30.0  # seconds, for answers after the last request was due


@dataclass(slots=True)
class Outcome:
    """One request; times in seconds since the load began. Status 0: no answer came."""

    due: float
    done: float = float("inf")
    status: int = 0
    retry_after: float | None = None  # as told, in seconds

    @property
    def latency(self) -> float:
        return self.done - self.due


@dataclass
class Load:
    """All outcomes in the order in which they were due."""

    outcomes: list[Outcome]
    seconds: float  # from the first due to the last answer
    client_cpu: float  # this client's share of one processor
    connections: int  # most at once

    def with_status(self, *statuses: int) -> list[Outcome]:
        return [one for one in self.outcomes if one.status in statuses]


@dataclass(eq=False)
class _Connection:
    socket: socket.socket
    received: bytes = b""
    outcome: Outcome | None = None  # what it waits for
    request: bytes = b""
    fresh: bool = True  # nothing has been answered on it yet


@dataclass
class Client:
    """Use it in a `with`, for one load at a time."""

    host: str
    port: int
    most: int = 4096  # connections
    _epoll: select.epoll = field(default_factory=select.epoll)
    _open: dict[int, _Connection] = field(default_factory=dict)
    _idle: list[_Connection] = field(default_factory=list)  # the last one used first: the others may close
    _waiting: deque[tuple[Outcome, bytes]] = field(default_factory=deque)  # for a connection
    _begun: float = 0.0
    _answered: int = 0
    _peak: int = 0

    def at(self, due: Sequence[float], requests: Sequence[bytes]) -> Load:
        """Ask request by request, in turns of `requests`, at these times in seconds from now (ascending)."""
        outcomes = [Outcome(moment) for moment in due]
        self._start()
        cpu, sent, end = time.process_time(), 0, (due[-1] if len(due) else 0) + PATIENCE
        while self._answered < len(outcomes) and (now := self._now()) < end:
            while sent < len(outcomes) and outcomes[sent].due <= now:
                self._ask(outcomes[sent], requests[sent % len(requests)])
                sent += 1
            self._listen(outcomes[sent].due - self._now() if sent < len(outcomes) else end - now)
        return self._finish(outcomes, cpu)

    def closed(self, count: int, connections: int, requests: Sequence[bytes], statuses: Sequence[int]) -> int:
        """Ask `count` requests, always `connections` at once; how many weren't answered with the status of their turn.

        For long runs: nothing is kept of a request once it is answered.
        """
        self._start()
        sent = wrong = 0
        under_way: deque[tuple[Outcome, int]] = deque()
        while self._answered < count:
            while sent < count and sent - self._answered < connections:
                outcome = Outcome(self._now())
                under_way.append((outcome, statuses[sent % len(statuses)]))
                self._ask(outcome, requests[sent % len(requests)])
                sent += 1
            self._listen(1.0)
            if self._now() - (under_way[0][0].due if under_way else self._now()) > PATIENCE:
                raise TimeoutError(f"a request wasn't answered in {PATIENCE:.0f} s, after {self._answered} that were")
            while under_way and under_way[0][0].done < float("inf"):
                outcome, expected = under_way.popleft()
                wrong += outcome.status != expected
        return wrong + sum(outcome.status != expected for outcome, expected in under_way)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in list(self._open.values()):
            self._drop(connection)
        self._epoll.close()

    @property
    def answered(self) -> int:
        return self._answered

    # --- inside ---

    def _start(self) -> None:
        self._begun, self._answered, self._peak = time.perf_counter(), 0, len(self._open)

    def _now(self) -> float:
        return time.perf_counter() - self._begun

    def _finish(self, outcomes: list[Outcome], cpu: float) -> Load:
        seconds = self._now()
        return Load(outcomes, seconds, (time.process_time() - cpu) / seconds, self._peak)

    def _ask(self, outcome: Outcome, request: bytes) -> None:
        if self._idle:
            self._send(self._idle.pop(), outcome, request)
        elif len(self._open) < self.most:
            self._send(self._connect(), outcome, request)
        else:
            self._waiting.append((outcome, request))

    def _connect(self) -> _Connection:
        new = socket.create_connection((self.host, self.port), timeout=10)
        new.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection = self._open[new.fileno()] = _Connection(new)
        self._epoll.register(new.fileno(), select.EPOLLIN)
        self._peak = max(self._peak, len(self._open))
        return connection

    def _send(self, connection: _Connection, outcome: Outcome, request: bytes) -> None:
        connection.outcome, connection.request, connection.received = outcome, request, b""
        try:
            connection.socket.sendall(request)
        except OSError:
            self._lost(connection)

    def _listen(self, seconds: float) -> None:
        """Take what has come by then. `select` on epoll's own descriptor waits to the microsecond; epoll to the ms."""
        select.select([self._epoll], [], [], max(0.0, seconds))
        for descriptor, _ in self._epoll.poll(0):
            connection = self._open.get(descriptor)
            if connection is not None:
                self._read(connection)

    def _read(self, connection: _Connection) -> None:
        try:
            data = connection.socket.recv(1 << 18)
        except OSError:
            data = b""
        if not data:
            self._lost(connection)
            return
        connection.received += data
        head, blank, body = connection.received.partition(b"\r\n\r\n")
        if not blank or connection.outcome is None:
            return
        head = head.lower()
        if len(body) < int(_header(head, b"content-length") or 0):
            return
        self._note(connection.outcome, int(head[9:12]), _header(head, b"retry-after"))
        connection.outcome, connection.fresh = None, False
        if _header(head, b"connection") == b"close":
            self._drop(connection)
        else:
            self._release(connection)

    def _note(self, outcome: Outcome, status: int, retry_after: bytes | None = None) -> None:
        outcome.done, outcome.status = self._now(), status
        outcome.retry_after = float(retry_after) if retry_after is not None else None
        self._answered += 1

    def _release(self, connection: _Connection) -> None:
        if self._waiting:
            self._send(connection, *self._waiting.popleft())
        else:
            self._idle.append(connection)

    def _lost(self, connection: _Connection) -> None:
        """An idle connection may be closed by the server at any time; what was just sent on it is sent on a new one."""
        outcome, request = connection.outcome, connection.request
        retry = outcome is not None and not connection.fresh and not connection.received
        self._drop(connection)
        if outcome is None:
            return
        if retry:
            self._send(self._connect(), outcome, request)
        else:
            self._note(outcome, 0)

    def _drop(self, connection: _Connection) -> None:
        self._epoll.unregister(connection.socket.fileno())
        del self._open[connection.socket.fileno()]
        if connection in self._idle:
            self._idle.remove(connection)
        connection.socket.close()


def _header(head: bytes, name: bytes) -> bytes | None:
    """From a head in lower case."""
    start = head.find(b"\r\n" + name + b":")
    return head[start + len(name) + 3 :].partition(b"\r\n")[0].strip() if start >= 0 else None


def poisson(rate: float, seconds: float, seed: int = 0) -> list[float]:
    """When requests are due that come independently of each other, `rate` a second: ascending, within `seconds`."""
    random = np.random.default_rng(seed)
    moments: list[float] = []
    last = 0.0
    while last < seconds:
        gaps = random.exponential(1 / rate, max(16, int(rate * seconds / 4)))
        moments += (last + np.cumsum(gaps)).tolist()
        last = moments[-1]
    return [moment for moment in moments if moment < seconds]


def post(path: str, body: bytes, content_type: str, headers: Iterable[tuple[str, str]] = ()) -> bytes:
    """A whole HTTP request, ready to be sent again and again."""
    lines = [f"POST {path} HTTP/1.1", "Host: safelight", f"Content-Type: {content_type}"]
    lines += [f"Content-Length: {len(body)}", *(f"{name}: {value}" for name, value in headers)]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
