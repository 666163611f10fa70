"""python -m service: settings → socket → uvicorn. A start that can't succeed ends with one sentence and exit code 2."""

import argparse
import asyncio
import errno
import gc
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.supervisors import Multiprocess

from service.jobs.store import open_store
from service.settings import PREFIX, Settings, SettingsInvalid
from training import SafelightError

# uvloop takes one new connection from a socket each time around its loop. With much to do in between, those that are
# left wait for half a minute while others are answered; so the loops get so many copies of it, all workers' together.
LISTENERS = 32


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    for name in ("host", "port", "workers"):
        if getattr(options, name) is not None:
            os.environ[PREFIX + name.upper()] = str(getattr(options, name))  # worker processes read the environment
    try:
        settings = Settings.read()
        _check_artifacts(settings.artifacts)
        if options.check:
            return _check(settings)
        open_store(settings.state, settings.database_url).close()
        return _serve(settings)
    except SafelightError as error:
        print(f"safelight: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("safelight serve", description="Serve the models under artifacts/ over HTTP.")
    parser.epilog = "Everything else is set by SAFELIGHT_* variables: docs/settings.md lists them."
    parser.add_argument("--host", help="address to listen on (SAFELIGHT_HOST)")
    parser.add_argument("--port", help="port to listen on, 0 for any free one (SAFELIGHT_PORT)")
    parser.add_argument("--workers", help="processes (SAFELIGHT_WORKERS)")
    parser.add_argument("--check", action="store_true", help="verify settings and every model, then exit")
    return parser


def _check_artifacts(artifacts: Path) -> None:
    try:
        os.listdir(artifacts)
    except OSError as error:
        reason = f"the artifacts folder {artifacts} can't be read: {error.strerror}"
        raise SettingsInvalid(f"{reason}; set SAFELIGHT_ARTIFACTS to the folder that holds the models") from error


def _check_device(wanted: str) -> None:
    if wanted not in ("auto", "cpu"):  # those are everywhere; to look for others takes torch, and two seconds
        from training.devices import choose_device

        choose_device(wanted)


def _serve(settings: Settings) -> int:
    config = uvicorn.Config(
        "service.app:create_app",
        factory=True,
        http="service.api.door:Door",
        workers=settings.workers,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.deadline_seconds) + 5,
        timeout_worker_healthcheck=30,  # a worker imports torch first: on a busy machine that takes more than 5 s
    )
    with _listen(settings.host, settings.port) as listener:
        _check_device(settings.device)
        for number in (signal.SIGINT, signal.SIGTERM):  # uvicorn hands the signal on to these, once it is done
            signal.signal(number, lambda *_: sys.exit(0))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        url = f"http://{host}:{listener.getsockname()[1]}"
        if settings.workers == 1:
            gc.disable()  # until it serves: looking through all that is imported, again and again, takes half a second
            _AnnouncingServer(config, url, settings).run(sockets=_copies(listener, LISTENERS))
            return 0
        with tempfile.TemporaryDirectory(prefix="safelight-metrics-") as folder:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder  # where workers put their metrics together
            _run_workers(config, listener, url, settings)
    return 0


def _run_workers(config: uvicorn.Config, listener: socket.socket, url: str, settings: Settings) -> None:
    supervisor = _Workers(config, _copies(listener, max(1, LISTENERS // config.workers)), url, settings)
    supervisor.run()
    if any(one.exitcode not in (0, -signal.SIGTERM) for one in supervisor.processes):
        raise SafelightError("a worker process couldn't start; the log above has the reason")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (socket.gaierror, UnicodeError) as error:  # both end in the reason
        reason = f"can't listen on SAFELIGHT_HOST={host}: {error.args[-1]}"
        raise SettingsInvalid(f"{reason}; set it to an address of this machine") from error
    try:
        listener = socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        name = "HOST" if error.errno == errno.EADDRNOTAVAIL else "PORT"
        reason = f"can't listen on {host}:{port}: {os.strerror(error.errno or 0)}"
        raise SettingsInvalid(f"{reason}; set SAFELIGHT_{name} to another") from error
    listener.set_inheritable(True)
    return listener


def _copies(listener: socket.socket, count: int) -> list[socket.socket]:
    return [listener, *(listener.dup() for _ in range(count - 1))]


class _AnnouncingServer(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, url: str, settings: Settings) -> None:
        super().__init__(config)
        self._url, self._settings = url, settings

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            loaded = self.lifespan.state["registry"].loaded.items()
            _announce(self._url, self._settings, [f"{ref}: {predictor.engine.chosen}" for ref, predictor in loaded])


class _Workers(Multiprocess):
    """uvicorn's supervisor, which also says when the first worker answers, and clears up after those that die."""

    def __init__(self, config: uvicorn.Config, listeners: list[socket.socket], url: str, settings: Settings) -> None:
        super().__init__(config, listeners)
        self._url, self._settings = url, settings
        self.announced = False

    def keep_subprocess_alive(self) -> None:
        if self.announced:
            before = {process.pid for process in self.processes}
            super().keep_subprocess_alive()
            for pid in before - {process.pid for process in self.processes}:
                mark_process_dead(pid)  # type: ignore[no-untyped-call]  # what it had pending is pending no more
        elif any(process.exitcode for process in self.processes):
            self.should_exit.set()  # one that fails before any has answered: the next would fail the same way
        elif self.processes[0].is_ready():
            self.announced = True
            _announce(self._url, self._settings, ["each chooses its engines"])


def _announce(url: str, settings: Settings, engines: list[str]) -> None:
    """Where it is, and what was derived from the machine; /info has more of that."""
    print(f"Safelight answers at {url}, its documentation at {url}/docs. Try:")
    print(f"  curl -F file=@docs/samples/digit.png '{url}/predict?model=mnist'")
    counts = _count(settings.workers, "worker"), _count(settings.threads_each, "thread")
    print(", ".join([*counts, *engines]), flush=True)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _check(settings: Settings) -> int:
    """Load every model as a server would, and say what came of it."""
    import torch

    from service.app import engine_limits
    from service.inference.registry import Registry

    async def states() -> list[tuple[str, str]]:
        limits = engine_limits(settings)
        torch.set_num_threads(limits.threads)
        registry = Registry(settings.artifacts, limits, settings.default_model)
        await registry.scan()
        found = [entry for line in registry.lines.values() for entry in line.entries.values()]
        await registry.close()
        return [*registry.unreadable.items(), *((str(entry.ref), entry.reason or "good") for entry in found)]

    found = asyncio.run(states())
    if not found:
        raise SafelightError(f"there is no model in {settings.artifacts}; safelight train makes one")
    for name, state in found:
        print(f"{name}: {state}")
    return 0 if all(state == "good" for _, state in found) else 1


if __name__ == "__main__":
    sys.exit(main())
