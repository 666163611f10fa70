"""What of the start can be seen without a process; tests/e2e/test_serve.py has the rest."""

import asyncio
import socket
from contextlib import ExitStack

import uvloop

from service.__main__ import LISTENERS, _copies


def test_new_connections_are_taken_by_the_dozen_however_busy_the_loop_is() -> None:
    count = 4 * LISTENERS

    async def turns(listeners: list[socket.socket]) -> int:
        """Times around the event loop until all that wait are connected."""
        connected: list[asyncio.BaseTransport] = []

        class Connection(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connected.append(transport)

        loop = asyncio.get_running_loop()
        with ExitStack() as stack:
            for listener in listeners:
                stack.callback((await loop.create_server(Connection, sock=listener, backlog=count)).close)
            for _ in range(count):
                stack.enter_context(socket.create_connection(listeners[0].getsockname()))
            turn = 0
            while len(connected) < count:
                await asyncio.sleep(0)
                turn += 1
            for transport in connected:
                transport.close()
        return turn

    assert uvloop.run(turns(_copies(socket.create_server(("127.0.0.1", 0)), LISTENERS))) < 20
