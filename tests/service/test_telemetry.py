import json
import logging

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
