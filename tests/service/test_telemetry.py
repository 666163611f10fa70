import json
import logging
import re
from datetime import datetime

import pytest

from service.telemetry import configure_logging, log_request, logger


@pytest.fixture(autouse=True)
def restore_logging() -> object:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = before


def test_json_lines_carry_the_event_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    logger.info("request", extra={"status": 200, "path": "/predict"})
    line = json.loads(capsys.readouterr().err)
    assert line.pop("at")
    assert line == {"level": "INFO", "logger": "safelight", "event": "request", "status": 200, "path": "/predict"}


def test_each_line_has_the_time_of_its_own_event(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "json")
    for created in (1000.25, 1000.75, 1001.5, 1000.0625):
        logger.handle(
            logging.makeLogRecord({"levelno": 20, "msg": "request", "created": created, "msecs": created % 1 * 1000})
        )
    seconds = [datetime.fromtimestamp(second).strftime("%Y-%m-%d %H:%M:%S") for second in (1000, 1000, 1001, 1000)]
    times = [json.loads(line)["at"] for line in capsys.readouterr().err.splitlines()]
    assert times == [f"{second},{ms}" for second, ms in zip(seconds, ("250", "750", "500", "062"), strict=True)]


def test_text_lines_are_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "text")
    logger.info("request", extra={"status": 200, "path": "/predict"})
    assert capsys.readouterr().err.endswith("INFO    request status=200 path=/predict\n")


def test_less_severe_lines_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("warning", "text")
    logger.info("request")
    logger.warning("refused")
    assert capsys.readouterr().err.count("\n") == 1


def test_what_a_client_sent_begins_no_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("info", "text")
    logger.info("request", extra={"path": "/x\n12:00:00 INFO    request status=200"})
    printed = capsys.readouterr().err
    assert printed.endswith("INFO    request path='/x\\n12:00:00 INFO    request status=200'\n")
    assert printed.count("\n") == 1


def test_a_request_s_line_is_what_a_record_of_it_would_be(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"status": 200, "path": "/predict\n", "ms": 1.5}
    for style in ("json", "text"):
        configure_logging("info", style)
        logger.info("request", extra=facts)
        log_request(logging.INFO, facts)
        log_request(logging.DEBUG, facts)
        record, line = (re.sub(r"\d\d:\d\d:\d\d(,\d+)?", "TIME", line) for line in capsys.readouterr().err.splitlines())
        assert record == line


def test_an_exception_s_trace_is_a_field_of_a_json_line_and_stands_below_one_for_people(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for style in ("json", "text"):
        configure_logging("info", style)
        try:
            raise ZeroDivisionError("secret")
        except ZeroDivisionError:
            logger.exception("unexpected error", extra={"path": "/predict"})
    json_line, line, *trace = capsys.readouterr().err.splitlines()
    assert json.loads(json_line)["exc_info"].splitlines() == trace
    assert line.endswith(" ERROR   unexpected error path=/predict")
    assert (trace[0], trace[-1]) == ("Traceback (most recent call last):", "ZeroDivisionError: secret")
