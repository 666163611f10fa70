"""What the service tells of itself: log lines and Prometheus metrics. Knows nothing of what it counts."""

import logging
import os
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, TextIO

from prometheus_client import REGISTRY as THIS_PROCESS
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary, generate_latest, multiprocess
from pydantic_core import to_json

logger = logging.getLogger("safelight")

REQUESTS = Counter("safelight_requests", "Requests answered.", ["route", "status"])
ERRORS = Counter("safelight_errors", "Errors by their code, those of single pictures included.", ["code"])
IMAGES = Counter("safelight_images", "Pictures answered.", ["model", "version"])
PENDING = Gauge(
    "safelight_pending_images",
    "Pictures admitted and not yet answered.",
    ["model", "version"],
    multiprocess_mode="livesum",
)
BATCH_SIZE = Histogram(
    "safelight_batch_size",
    "Pictures that the engine computed at once.",
    ["model", "version"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
)
STAGE_SECONDS = Histogram(
    "safelight_stage_seconds",
    "Time that an answered request spent in a stage: decode, queue, infer; total is all and what lies between.",
    ["stage", "model", "version"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
CACHE_SECONDS = Summary(
    "safelight_cache_seconds",
    "Time that looking for a picture in the cache took, by whether it was there.",
    ["outcome", "model", "version"],
)
FAILED_SECONDS = Summary(
    "safelight_failed_seconds", "Time that admitted requests took which got no answer.", ["model", "version"]
)
LAST_BATCH = Gauge(
    "safelight_last_batch_timestamp_seconds",
    "When the engine computed last, in seconds since 1970.",
    ["model", "version"],
    multiprocess_mode="max",
)
JOBS = Gauge("safelight_jobs", "Fine-tuning jobs by their state.", ["status"], multiprocess_mode="livemostrecent")
JOB_SECONDS = Histogram(
    "safelight_job_seconds",
    "Time that the processes of a job took, once it is over.",
    ["status"],
    buckets=(1, 2, 5, 10, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600),
)


def exposition() -> bytes:
    """All metrics as text; with several workers, those of all of them."""
    return generate_latest(_all_workers())


def figures(model: str, version: str) -> dict[str, float]:
    """What was counted of one version: sums and counts by name and, with a colon, their stage or outcome."""
    wanted = {"model": model, "version": version}
    found = {}
    for family in _all_workers().collect():
        for sample in family.samples:
            if wanted.items() <= sample.labels.items() and not sample.name.endswith("_bucket"):
                parts = [sample.labels[label] for label in ("stage", "outcome") if label in sample.labels]
                found[":".join([sample.name, *parts])] = sample.value
    return found


def _all_workers() -> CollectorRegistry:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return THIS_PROCESS
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def configure_logging(level: str, style: Literal["auto", "json", "text"]) -> None:
    """One line an event, on stderr: JSON, or for people the event and its facts."""
    as_json = style == "json" or (style == "auto" and not sys.stderr.isatty())
    handler = _Handler(sys.stderr, _json_line if as_json else _text_line)
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers = [other for other in root.handlers if not isinstance(other, _Handler)] + [handler]
    logging.getLogger("uvicorn.access").disabled = True  # our own line says more


def log_request(level: int, facts: dict[str, Any]) -> None:
    """Write what `logger.log(level, "request", extra=facts)` would, but past `logging`, which would take 20 µs more: a
    sixth of a request. Other handlers than ours don't see it."""
    if not logger.isEnabledFor(level):
        return
    for handler in logging.getLogger().handlers:
        if isinstance(handler, _Handler):
            try:
                handler.write(time.time(), logging.getLevelName(level), logger.name, "request", facts)
            except Exception:  # a line that can't be written, on a full disk say, mustn't cost the answer
                handler.handleError(logging.makeLogRecord({"msg": "request"}))


Line = Callable[[float, str, str, str, dict[str, Any]], str]  # of when, level, logger, event, facts


class _Handler(logging.Handler):
    """Ours, so that configuring again replaces it and leaves others alone."""

    def __init__(self, stream: TextIO, line: Line) -> None:
        super().__init__()
        self._stream = stream
        self._line = line

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.write(record.created, record.levelname, record.name, record.getMessage(), _facts(record))
        except Exception:  # as all of logging's handlers have it
            self.handleError(record)

    def write(self, when: float, level: str, name: str, event: str, facts: dict[str, Any]) -> None:
        self._stream.write(self._line(when, level, name, event, facts) + "\n")


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "color_message"}  # the last: uvicorn's


def _facts(record: logging.LogRecord) -> dict[str, Any]:
    """What was said beside the message, and the trace of an exception."""
    facts = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    if record.exc_info:
        facts["exc_info"] = logging.Formatter().formatException(record.exc_info)
    return facts


def _json_line(when: float, level: str, name: str, event: str, facts: dict[str, Any]) -> str:
    """`{"at": …, "level": "INFO", "logger": "safelight", "event": "request", "method": "POST", …}`"""
    at = f"{_to_the_second(int(when))},{int(when % 1 * 1000):03}"
    line = {"at": at, "level": level, "logger": name, "event": event} | facts
    return to_json(line, fallback=str, inf_nan_mode="strings").decode()


@lru_cache(1)  # there are many lines in a second
def _to_the_second(when: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _text_line(when: float, level: str, name: str, event: str, facts: dict[str, Any]) -> str:  # noqa: ARG001
    """`12:00:01 INFO    request method=POST path=/predict …`, and a trace below it"""
    at = time.strftime("%H:%M:%S", time.localtime(when))
    trace = [facts["exc_info"]] if "exc_info" in facts else []
    fields = (f"{key}={_printable(str(value))}" for key, value in facts.items() if key != "exc_info")
    return "\n".join([" ".join([f"{at} {level:7} {event}", *fields]), *trace])


def _printable(value: str) -> str:
    """What a client sent must not begin a line of its own."""
    return value if value.isprintable() else repr(value)
