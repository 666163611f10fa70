"""A request as it comes in. Starlette's objects for the same take three times as long, and each request needs these."""

from starlette.types import Receive, Scope


def header(scope: Scope, name: bytes) -> str | None:
    """By its name in lower case; the first, where there are several."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


async def read_body(receive: Receive) -> bytes:
    """All of it. What `receive` raises passes through; `middleware.BodyLimit` sees to it that the body has an end."""
    chunks, more = [], True
    while more:
        message = await receive()
        chunks.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(chunks)
