"""The busiest routes, answered before FastAPI's router and the layers around it."""

from collections.abc import Awaitable, Callable, Sequence

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Receive, Scope, Send

from service.api import problems
from training import SafelightError

Endpoint = Callable[[Request], Awaitable[Response]]


class Direct:
    """Call the endpoints of `routes` with their request and nothing in between; anything else is FastAPI's.

    FastAPI has nothing to read for them, and would take 70 µs over that, half of what all the rest takes. They are
    among its routes as well: for their documentation, and for what other methods on their paths are told.
    """

    def __init__(self, app: ASGIApp, routes: Sequence[BaseRoute]) -> None:
        self.app = app
        self.routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            for route in self.routes:
                match, found = route.matches(scope)
                if match is Match.FULL:
                    scope.update(found)  # the route, the metrics' label, and what its path says
                    response = await _answer(found["endpoint"], Request(scope, receive, send))
                    await response(scope, receive, send)
                    return
        await self.app(scope, receive, send)


async def _answer(endpoint: Endpoint, request: Request) -> Response:
    try:
        return await endpoint(request)
    except SafelightError as error:
        return problems.refuse(request, error)
    except RequestValidationError as error:
        return await problems.on_invalid_parameter(request, error)
