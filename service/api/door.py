"""Who finds no room is told so at the door: at a request's head, before it becomes a task and its body is read.

Under overload there are more refusals than answers, and what refusals take of the processors the answers don't get.
Most of that was what surrounds a call: a task, its messages, the layers around an endpoint.
"""

import asyncio
import time
from typing import cast

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from service.api import inference_protocol, kserve, predictions, problems
from service.api.middleware import identify, note
from service.errors import QueueFull
from service.inference.registry import Registry
from service.settings import Settings
from service.telemetry import logger

ROUTES = [
    route
    for router in (predictions.router, inference_protocol.infer_router, kserve.router)
    for route in router.routes
    if isinstance(route, APIRoute) and route.endpoint in (predictions.predict, inference_protocol.infer, kserve.predict)
]


class _Over:
    """In place of a cycle that has sent its response: uvicorn asks it, and passes over what comes of the body."""

    response_complete = True
    message_event = asyncio.Event()


class Door(HttpToolsProtocol):
    """uvicorn's protocol, which first asks whether there is room for one picture.

    What is uncommon it leaves to the application, which refuses in the same words, but later.
    """

    def on_headers_complete(self) -> None:
        reply = self._reply() if self._may_answer() else None
        if reply is None:
            self._unset_keepalive_if_required()  # a refusal in the same segment may have begun to count
            super().on_headers_complete()
            return
        self.cycle = self.cycle or cast(RequestResponseCycle, _Over())
        self.transport.write(reply)
        self.on_response_complete()

    def on_message_complete(self) -> None:
        """uvicorn stops to count where a body comes after its answer, and wouldn't begin again."""
        super().on_message_complete()
        is_over = self.cycle is not None and self.cycle.response_complete and not self.parser.should_upgrade()
        if is_over and self.timeout_keep_alive_task is None:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _may_answer(self) -> bool:
        """Not before an answer that is still to come, and not to who doesn't read what is sent. Nor where the
        connection ends with the answer, or a body has no plain length."""
        is_free = (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused
        stays = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        is_plain = not self.parser.should_upgrade() and all(name != b"transfer-encoding" for name, _ in self.headers)
        return is_free and stays and is_plain

    def _reply(self) -> bytes | None:
        """The refusal, counted and logged, if it is one."""
        begun = time.perf_counter()
        try:
            scope = self._head()
            refused = refusal(scope)
            if refused is None:
                return None
            note(scope, refused.status_code, begun)
        except Exception:  # from here uvicorn would make it a 400; in the application it is found again, and told
            logger.exception("the door failed")
            return None
        lines = [b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *refused.raw_headers)]
        return b"".join([STATUS_LINE[refused.status_code], *lines, b"\r\n", refused.body])

    def _head(self) -> Scope:
        """uvicorn's scope of the request, as far as it matters here. An escaped path (%) isn't decoded: it matches no
        model, and is let in."""
        path, _, query = self.url.partition(b"?")
        scope = cast(Scope, self.scope)
        scope["method"] = self.parser.get_method().decode("ascii")
        scope["path"], scope["query_string"] = path.decode("latin-1"), query
        return scope


def refusal(scope: Scope) -> Response | None:
    """What a request is told that asks a version for a prediction which has no room; None for any other request."""
    if scope["method"] != "POST":
        return None
    for route in ROUTES:
        if found := route.path_regex.match(scope["path"]):
            return _knock(scope, route, found.groupdict())
    return None


def _knock(scope: Scope, route: APIRoute, names: dict[str, str]) -> Response | None:
    """`names` are those in the path of model and version."""
    registry: Registry = scope["state"]["registry"]
    settings: Settings = scope["state"]["settings"]
    try:
        question = predictions.Question(**names) if names else predictions.read_question(scope)
    except RequestValidationError:
        return None
    predictor = registry.at_hand(question.model, question.version)
    if predictor is None:
        return None
    try:
        predictor.knock(asyncio.get_running_loop().time() + question.seconds(settings.deadline_seconds))
    except QueueFull as error:
        scope["route"] = route  # the metrics' label
        request_id = identify(scope)
        scope["state"]["log"] |= {"model": predictor.manifest.model, "version": predictor.manifest.version}
        response = problems.refuse(Request(scope), error)
        response.raw_headers.append((b"x-request-id", request_id.encode()))
        return response
    return None
