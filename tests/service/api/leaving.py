"""A client that closes its connection before it has its answer."""

from collections.abc import Mapping

from fastapi.testclient import TestClient
from starlette.types import Message


def leave(client: TestClient, path: str, headers: Mapping[str, str], body: bytes, *, whole: bool = True) -> int:
    """POST a body, or a part of one, and go: the status that nobody sees."""
    messages: list[Message] = [
        {"type": "http.request", "body": body, "more_body": not whole},
        {"type": "http.disconnect"},
    ]
    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "state": dict(client.app_state),
    }
    statuses: list[int] = []

    async def receive() -> Message:
        return messages.pop(0)

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    assert client.portal is not None
    client.portal.call(client.app, scope, receive, send)
    return statuses[0]
