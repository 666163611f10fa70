"""A job's events as a stream of server-sent events: what there is, what comes, and at the end the job itself."""

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event

from service.jobs.history import Tail, parse
from service.jobs.job import TERMINAL
from service.jobs.store import JobStore
from service.lifecycle import Lifecycle

MEDIA_TYPE = "text/event-stream"
POLL_SECONDS = 0.3
PORTION = 100  # events; after so many others have their turn
HEARTBEAT_SECONDS = 15.0  # proxies close a connection on which nothing comes for a minute or so


async def stream(jobs: JobStore, job_id: str, tail: Tail, lifecycle: Lifecycle) -> AsyncIterator[bytes]:
    """Each event's id is its line's number. Ends with an event `end` that holds the job, or when the service stops."""
    sent = time.monotonic()
    while not lifecycle.draining:
        job = await asyncio.to_thread(jobs.get, job_id)  # before its events: those of a job that is over are all there
        begun, lines = tail.lines, await asyncio.to_thread(tail.read, PORTION)
        for number, line in enumerate(lines, begun + 1):
            kinds = [event.event for event in parse([line])]
            yield format_sse_event(data_str=line.decode().rstrip(), event=next(iter(kinds), None), id=str(number))
            sent = time.monotonic()
        if len(lines) == PORTION:
            continue  # there may be more of them
        if job.status in TERMINAL:
            yield format_sse_event(data_str=job.model_dump_json(), event="end")
            return
        if time.monotonic() > sent + HEARTBEAT_SECONDS:
            yield KEEPALIVE_COMMENT
            sent = time.monotonic()
        await asyncio.sleep(POLL_SECONDS)
