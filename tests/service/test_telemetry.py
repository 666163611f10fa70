import json
import logging
from datetime import datetime

import pytest

from service.telemetry import configure_logging, logger


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
