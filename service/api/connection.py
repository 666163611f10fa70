"""Whether anybody still waits for the answer."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

from service.errors import ClientGone

T = TypeVar("T")

PATIENCE = 0.2  # seconds: of work that is done by then little would be saved, and to watch takes a task of its own


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Do the work unless the client leaves first; then what is left of it is dropped. Raises ClientGone."""
    worker, has_gone = asyncio.current_task(), False
    watcher: asyncio.Task[None] | None = None
    assert worker is not None

    async def watch() -> None:
        nonlocal has_gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        has_gone = True
        worker.cancel()

    def begin_to_watch() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    timer = asyncio.get_running_loop().call_later(PATIENCE, begin_to_watch)
    try:
        return await work
    except asyncio.CancelledError:
        if has_gone and not worker.uncancel():  # by us, and by nobody else
            raise ClientGone("the client closed the connection before its answer was ready") from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
