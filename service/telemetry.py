"""What the service tells of itself: log lines and Prometheus metrics. Knows nothing of what it counts."""

import logging
import os
import sys
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
    """One line an event, on stderr: JSON, or for people the message and its fields."""
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False  # no line has them; half its cost
    handler = _Handler(sys.stderr)
    if style == "json" or (style == "auto" and not sys.stderr.isatty()):
        handler.setFormatter(_JsonFormatter())
    else:
        handler.setFormatter(_TextFormatter("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S"))
    root = logging.getLogger()
    root.setLevel(level.upper())
    root.handlers = [other for other in root.handlers if not isinstance(other, _Handler)] + [handler]
    logging.getLogger("uvicorn.access").disabled = True  # our own line says more


class _Handler(logging.StreamHandler[TextIO]):
    """Ours, so that configuring again replaces it and leaves others alone."""


_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}  # the last: uvicorn's


def _extra(record: logging.LogRecord) -> dict[str, Any]:
    """What was said beside the message."""
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


class _JsonFormatter(logging.Formatter):
    """`{"at": …, "level": "INFO", "logger": "safelight", "event": "request", "method": "POST", …}`"""

    def format(self, record: logging.LogRecord) -> str:
        line = {"at": self.formatTime(record), "level": record.levelname, "logger": record.name}
        line |= {"event": record.getMessage()} | _extra(record)
        if record.exc_info:
            line["exc_info"] = self.formatException(record.exc_info)
        return to_json(line, fallback=str, inf_nan_mode="strings").decode()


class _TextFormatter(logging.Formatter):
    """`12:00:01 INFO    request method=POST path=/predict …`"""

    def format(self, record: logging.LogRecord) -> str:
        line, *trace = super().format(record).split("\n")
        fields = (f"{key}={_printable(str(value))}" for key, value in _extra(record).items())
        return "\n".join([" ".join([line, *fields]), *trace])


def _printable(value: str) -> str:
    """What a client sent must not begin a line of its own."""
    return value if value.isprintable() else repr(value)
