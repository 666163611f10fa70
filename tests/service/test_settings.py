import re
from pathlib import Path

import pytest

from service.settings import Settings, SettingsInvalid
from training.processors import processors

DOCS = Path(__file__).parents[2] / "docs" / "settings.md"


def read(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Settings:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Settings.read()


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read(monkeypatch, SAFELIGHT_PORT="9000", SAFELIGHT_ARTIFACTS="/models", SAFELIGHT_DEFAULT_MODEL="pets")
    assert (settings.port, settings.artifacts, settings.default_model) == (9000, Path("/models"), "pets")


def test_threads_are_the_processors_divided_by_the_workers_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch).threads_each == processors()
    assert read(monkeypatch, SAFELIGHT_WORKERS="2").threads_each == max(1, processors() // 2)
    assert read(monkeypatch, SAFELIGHT_WORKERS="64").threads_each == max(1, processors() // 64)
    assert read(monkeypatch, SAFELIGHT_THREADS="7").threads_each == 7


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("SAFELIGHT_PROT", "9000", "there is no setting SAFELIGHT_PROT; docs/settings.md lists those that exist"),
        ("SAFELIGHT_PORT", "many", "SAFELIGHT_PORT='many': Input should be a valid integer"),
        ("SAFELIGHT_PORT", "70000", "SAFELIGHT_PORT='70000': Input should be less than or equal to 65535"),
        ("SAFELIGHT_DEFAULT_MODEL", "../x", "SAFELIGHT_DEFAULT_MODEL='../x': String should match pattern"),
        ("SAFELIGHT_LOG_LEVEL", "loud", "SAFELIGHT_LOG_LEVEL='loud': Input should be 'debug', 'info', 'warning' or"),
        ("SAFELIGHT_DEADLINE_SECONDS", "inf", "SAFELIGHT_DEADLINE_SECONDS='inf': Input should be a finite number"),
        ("SAFELIGHT_DRAIN_SECONDS", "nan", "SAFELIGHT_DRAIN_SECONDS='nan': Input should be a finite number"),
        ("SAFELIGHT_QUEUE_SIZE", "10", "Value error, queue_size 10 can't hold one request of max_images 256"),
    ],
)
def test_an_unknown_or_wrong_setting_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    with pytest.raises(SettingsInvalid, match=re.escape(sentence)) as error:
        read(monkeypatch, **{name: value})
    assert "\n" not in str(error.value)


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Settings().port = 1
