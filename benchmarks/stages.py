"""What a /predict costs beside the engine, stage by stage: processor time in microseconds.

    python -m benchmarks.stages [--model cifar10] [--docs]

The application is called by ASGI in this process, without a socket, with 64 requests under way: one PNG each, in a
form. `all` is what a request takes of the event loop's thread. Parsing, decoding and responding are timed where they
happen, in rounds of their own, for the clock takes time too; the way through the queue by asking the predictor for
pixels, 64 at a time; `around them` is what is left: layers, request id, counters, log line. What the engine's thread
does beside the engine is timed by itself. All take turns, and the figures are medians of the rounds with the least and
the greatest. Processor time isn't what others take, but their load shows in it.
"""

import argparse
import asyncio
import inspect
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from fastapi import FastAPI, Response
from starlette.types import Message

from benchmarks.peers import forms
from benchmarks.pictures import describe, pictures
from benchmarks.serving import ROOT, processor
from benchmarks.targets import RESULTS, Verdict, save, table, write_into
from service.api import predictions
from service.app import create_app
from service.inference import predictor
from service.settings import Settings
from training.bundle.answers import Ranking
from training.bundle.images import Pixels, decode
from training.processors import processors

UNDER_WAY = 64
TARGET = 170.0  # microseconds

ROWS = {  # what the stages are, in a request's order
    "parse": "the question, and the form's parts",
    "decode": "a PNG of the model's own size, to pixels",
    "queue": "let in, handed to the engine, woken by it, and counted",
    "respond": "the answer in words, as JSON, and sent",
    "around them": "layers, request id, counters, log line: what is left of `all`",
    "all": "of the event loop's thread",
    "batch": "beside the engine in its thread: put together, ranked",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cifar10", choices=("cifar10", "mnist"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--requests", type=int, default=512, help="of each stage in a round")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where to leave the verdict")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/performance.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        sys.stderr = nowhere  # log lines are made and written, but not shown
        found = uvloop.run(measure(options, Path(folder)))
    text, verdict = report(found, options)
    print(text)
    save("stages", [verdict], conditions(options), options.results)
    if options.docs:
        write_into(ROOT / "docs" / "performance.md", "stages", text)


# --- measuring --------------------------------------------------------------------------------------------------------

Figures = dict[str, list[float]]  # microseconds a request, one for each round

INSIDE: dict[str, list[tuple[Any, str]]] = {  # what of a request is timed where it happens: whose, and its name
    "parse": [(predictions, "_question"), (predictions, "read_pictures")],
    "decode": [(predictor, "decode_quickly"), (predictor, "decode")],
    "respond": [(Ranking, "answer"), (predictions, "_reply"), (Response, "__call__")],
}


@dataclass(frozen=True)
class Asked:
    """An application that is up, and what it is asked."""

    app: FastAPI
    state: dict[str, Any]
    predictor: predictor.Predictor
    query: bytes
    contents: list[forms.Content]
    pixels: list[Pixels]

    def request(self, place: int) -> tuple[dict[str, Any], Callable[[], Awaitable[Message]]]:
        """Scope and `receive`."""
        headers, body = self.contents[place % len(self.contents)]
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        raw += [(b"host", b"127.0.0.1:8000"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "method": "POST"}
        scope |= {"path": "/predict", "raw_path": b"/predict", "query_string": self.query, "headers": raw}
        scope |= {"state": self.state.copy(), "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000)}
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Message:
            return next(messages, None) or await asyncio.Future()

        return scope, receive


async def measure(options: argparse.Namespace, folder: Path) -> Figures:
    settings = Settings(
        artifacts=ROOT / "artifacts",
        state=folder / "state",
        default_model=options.model,
        rescan_seconds=1000,
        concurrent_jobs=0,
    )
    app = create_app(settings)
    async with app.router.lifespan_context(app) as state:
        asked = await prepare(app, dict(state), options.model)
        await one_round(asked, UNDER_WAY)  # to warm up
        rounds = [await one_round(asked, options.requests) for _ in range(options.rounds)]
    return {name: [found[name] * 1e6 for found in rounds] for name in rounds[0]}


async def prepare(app: FastAPI, state: dict[str, Any], model: str) -> Asked:
    registry = state["registry"]
    ready = await registry.predictor(registry.entry(model, None))
    files = pictures(model, ready.manifest.input)
    query = f"model={model}&top_k={len(ready.manifest.classes)}".encode()
    contents = [forms.multipart("file")([file]) for file in files]
    return Asked(app, state, ready, query, contents, [decode(file, ready.manifest.input) for file in files])


async def one_round(asked: Asked, count: int) -> dict[str, float]:
    """Seconds a request."""
    with timed_inside() as seconds:
        await whole(asked, count)
        found = {name: spent / count for name, spent in seconds.items()}
    found |= {"queue": await queue(asked, count), "all": await whole(asked, count), "batch": batch(asked, count)}
    return found | {"around them": found["all"] - sum(found[name] for name in ("parse", "decode", "queue", "respond"))}


async def whole(asked: Asked, count: int) -> float:
    requests = [asked.request(place) for place in range(count)]

    async def one(place: int) -> None:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        await asked.app(*requests[place], send)
        assert sent[0]["status"] == 200

    return await under_way(one, count)


async def queue(asked: Asked, count: int) -> float:
    async def one(place: int) -> None:
        deadline = asyncio.get_running_loop().time() + 60
        await asked.predictor.compute([asked.pixels[place % len(asked.pixels)]], deadline)

    return await under_way(one, count)


def batch(asked: Asked, count: int) -> float:
    """What comes before and after the engine in its thread; the engine itself is left out."""
    classes = len(asked.predictor.manifest.classes)
    logits = np.random.default_rng(0).normal(size=(len(asked.pixels), classes)).astype(np.float32)
    run = predictor.ranked(lambda _: logits, asked.predictor.manifest)
    begun = time.thread_time()
    for _ in range(0, count, len(asked.pixels)):
        run(np.stack(asked.pixels))
    return (time.thread_time() - begun) / count


async def under_way(one: Callable[[int], Awaitable[None]], count: int) -> float:
    """Seconds of this thread for each, with 64 of them at a time."""
    places = iter(range(count))

    async def caller() -> None:
        for place in places:
            await one(place)

    begun = time.thread_time()
    await asyncio.gather(*(caller() for _ in range(UNDER_WAY)))
    return (time.thread_time() - begun) / count


@contextmanager
def timed_inside() -> Iterator[dict[str, float]]:
    """Let a clock run in all that is named in INSIDE. None of it waits: a coroutine among them ends where it begins."""
    seconds = dict.fromkeys(INSIDE, 0.0)

    def timed(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begun = time.thread_time()
            try:
                return work(*arguments)
            finally:
                seconds[name] += time.thread_time() - begun

        async def wait(*arguments: Any) -> Any:
            begun = time.thread_time()
            try:
                return await work(*arguments)
            finally:
                seconds[name] += time.thread_time() - begun

        return wait if inspect.iscoroutinefunction(work) else call

    with ExitStack() as restored:
        for name, places in INSIDE.items():
            for owner, attribute in places:
                work = getattr(owner, attribute)
                restored.callback(setattr, owner, attribute, work)
                setattr(owner, attribute, timed(name, work))
        yield seconds


# --- report -----------------------------------------------------------------------------------------------------------


def report(found: Figures, options: argparse.Namespace) -> tuple[str, Verdict]:
    lines = [(f"**{name}**" if name == "all" else name, what, figures(found[name])) for name, what in ROWS.items()]
    beside = [loop + thread for loop, thread in zip(found["all"], found["batch"], strict=True)]
    lines.append(("**all and batch**", f"beside the engine; the target is {TARGET:.0f}", f"**{figures(beside)}**"))
    rule = f"a `/predict` of {options.model} beside the engine, {UNDER_WAY} under way: at most {TARGET:.0f} µs"
    verdict = Verdict(rule, f"{figures(beside)} µs", statistics.median(beside) <= TARGET)
    return "\n\n".join([f"- {conditions(options)}", table(("stage", "what", "µs"), lines)]), verdict


def figures(values: list[float]) -> str:
    return f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"


def conditions(options: argparse.Namespace) -> str:
    counts = f"{options.rounds} rounds of {options.requests} requests a stage"
    return (
        f"{options.model}, {processor()}, {processors()} processors; {describe()}; {counts}; medians (least–greatest)"
    )


if __name__ == "__main__":
    main()
