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

ROUTES = [
    route
    for router in (predictions.router, inference_protocol.infer_router, kserve.router)
    for route in router.routes
    if isinstance(route, APIRoute) and route.endpoint in (predictions.predict, inference_protocol.infer, kserve.predict)
]


class _Answered:
    """In place of a cycle that has sent its response: what comes of the request's body is passed over."""

    response_complete = True
    message_event = asyncio.Event()


class Door(HttpToolsProtocol):
    """uvicorn's protocol, which first asks whether there is room for one picture.

    It refuses what is common. The rest is let in, and refused in the same words by the queue itself, if need be.
    """

    def on_headers_complete(self) -> None:
        begun = time.perf_counter()
        scope = self._head()
        refused = refusal(scope) if self._may_answer() else None
        if refused is None:
            super().on_headers_complete()
            return
        self.cycle = self.cycle or cast(RequestResponseCycle, _Answered())
        headers = [*self.server_state.default_headers, *refused.raw_headers]
        lines = [b"%b: %b\r\n" % header for header in headers]
        self.transport.write(b"".join([STATUS_LINE[refused.status_code], *lines, b"\r\n", refused.body]))
        self.on_response_complete()
        note(scope, refused.status_code, begun)

    def _may_answer(self) -> bool:
        """Not before an answer that is still to come, and not to who doesn't read what is sent. Nor where the
        connection ends with the answer, which would be lost with a body that wasn't read."""
        is_free = (self.cycle is None or self.cycle.response_complete) and not self.flow.write_paused
        stays = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        return is_free and stays and not self.parser.should_upgrade()

    def _head(self) -> Scope:
        """What is known of the request, in ASGI's words. A path with escapes (%) is as it came, and no route's here."""
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
            return _refusal(scope, route, found.groupdict())
    return None


def _refusal(scope: Scope, route: APIRoute, names: dict[str, str]) -> Response | None:
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
