"""What surrounds every request: its id, its log line and metrics, the last catch, and the cap on its body."""

import logging
import math
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from prometheus_client import Counter
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import problems
from service.api.asgi import header
from service.errors import BodyTooLarge, ClientGone, QueueFull
from service.telemetry import REQUESTS, log_request, logger

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
QUEUE_FULL = problems.PROBLEMS[QueueFull].code
QUIET = ("/health/", "/metrics")  # asked every few seconds by machines; logged at debug


class Observe:
    """Give each request an id, answer what nobody caught with a plain 500, and write one line about it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.perf_counter()
        request_id = identify(scope)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception:
            logger.exception("unexpected error", extra={"request_id": request_id, "path": scope["path"]})
            if not status:
                detail = f"the error is in the log under request id {request_id}"
                await problems.reply(Request(scope), problems.INTERNAL, detail)(scope, receive, send_with_id)
        finally:
            note(scope, status, begun)


def identify(scope: Scope) -> str:
    """Give a request its id, the client's own where that can be one, and an empty log."""
    offered = header(scope, b"x-request-id") or ""
    request_id = offered if REQUEST_ID.fullmatch(offered) else secrets.token_hex(16)
    state = scope.setdefault("state", {})
    state["request_id"], state["log"] = request_id, {}
    return request_id


def note(scope: Scope, status: int, begun: float) -> None:
    """Count a request that is over, and write its line; `begun` is in `perf_counter` seconds."""
    route = getattr(scope.get("route"), "path", "unmatched")
    state = scope["state"]
    _requests(route, status).inc()
    if state["log"].get("code") != QUEUE_FULL or _refusals[route, state["log"].get("model", "")].is_told(state["log"]):
        level = logging.DEBUG if scope["path"].startswith(QUIET) else logging.INFO
        facts = {"request_id": state["request_id"], "method": scope["method"], "path": scope["path"], "status": status}
        milliseconds = round((time.perf_counter() - begun) * 1000, 2)
        log_request(level, facts | {"ms": milliseconds} | state["log"])


@cache  # to look for it among all that there are takes five times as long
def _requests(route: str, status: int) -> Counter:
    return REQUESTS.labels(route, str(status))


class Refusals:
    """Those for want of room get a line a second, not one each: they come by the thousand, when time is short."""

    def __init__(self) -> None:
        self._told = -math.inf
        self._untold = 0

    def is_told(self, facts: dict[str, Any]) -> bool:
        """Whether this one gets a line; if so, `refused` is how many have come since the last that did."""
        self._untold += 1
        now = time.monotonic()
        if now - self._told < 1:
            return False
        facts["refused"], self._told, self._untold = self._untold, now, 0
        return True


_refusals: defaultdict[tuple[str, str], Refusals] = defaultdict(Refusals)  # by route and model


@dataclass(frozen=True)
class Cap:
    """The most bytes that a body may have, and what to say of it."""

    max_bytes: int
    setting: str
    remedy: str


class BodyLimit:
    """Refuse a body over the limit: by its declared length before any of it is read, else as soon as it is passed.

    A client that leaves before its body's end is a ClientGone, whoever was reading. Paths that stream larger bodies to
    disk have caps of their own.
    """

    def __init__(self, app: ASGIApp, cap: Cap, by_path: Mapping[str, Cap] | None = None) -> None:
        self.app = app
        self.cap = cap
        self.by_path = by_path or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        cap = self.by_path.get(scope["path"], self.cap)
        length = header(scope, b"content-length") or ""
        declared = int(length) if length.isdigit() else 0
        received, whole = 0, False

        async def receive_capped() -> Message:
            nonlocal received, whole
            if declared > cap.max_bytes:
                raise _too_large(f"{declared}", cap)
            message = await receive()
            if message["type"] == "http.disconnect" and not whole:
                raise ClientGone("the client closed the connection before its request was whole")
            whole = not message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > cap.max_bytes:
                raise _too_large(f"more than {cap.max_bytes}", cap)
            return message

        await self.app(scope, receive_capped, send)


def _too_large(size: str, cap: Cap) -> BodyTooLarge:
    return BodyTooLarge(
        f"the body has {size} bytes; the limit is {cap.max_bytes} ({cap.setting}): {cap.remedy}", limit=cap.max_bytes
    )
