"""The container files agree with the compose specification, with the settings and with each other. Builds no image."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.settings import PREFIX, Settings

ROOT = Path(__file__).parent.parent
COMPOSE_FILES = ["docker-compose.yml", "docker-compose.gpu.yml"]
INSTRUCTIONS = re.sub(r"\\\n", "", (ROOT / "Dockerfile").read_text())
STAGES = INSTRUCTIONS.split("FROM ")


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def check_schema(*files: Path) -> subprocess.CompletedProcess[str]:
    """By the official schema, which check-jsonschema carries."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    return subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False)


def seconds(duration: str) -> float:
    assert duration.endswith("s")
    return float(duration[:-1])


def copied() -> list[str]:
    """What the Dockerfile takes from this folder."""
    lines = re.findall(r"^COPY (?!--from)(.*)", INSTRUCTIONS, re.MULTILINE)
    return [source for line in lines for source in line.split()[:-1] if not source.startswith("--")]


# --- compose ----------------------------------------------------------------------------------------------------------


def test_compose_files_follow_the_specification() -> None:
    result = check_schema(*(ROOT / name for name in COMPOSE_FILES))
    assert result.returncode == 0, result.stdout


def test_a_misspelt_key_does_not_follow_the_specification(tmp_path: Path) -> None:
    wrong = tmp_path / "docker-compose.yml"
    wrong.write_text((ROOT / "docker-compose.yml").read_text().replace("stop_grace_period", "stop_grace_time"))
    result = check_schema(wrong)
    assert result.returncode == 1
    assert "stop_grace_time" in result.stdout


def test_port_is_the_default_port_and_open_to_this_machine_only() -> None:
    port = Settings.model_fields["port"].default
    ports = read("docker-compose.yml")["services"]["safelight"]["ports"]
    assert f"\nEXPOSE {port}\n" in INSTRUCTIONS
    assert ports == [f"127.0.0.1:${{SAFELIGHT_PORT:-{port}}}:{port}"]


def test_volumes_are_where_the_image_keeps_models_and_state() -> None:
    folders = dict(re.findall(r"SAFELIGHT_(ARTIFACTS|STATE)=(\S+)", INSTRUCTIONS))
    compose = read("docker-compose.yml")
    for service in compose["services"].values():
        mounts = [mount for mount in service["volumes"] if isinstance(mount, str)]
        assert mounts == [f"{name.lower()}:{folder}" for name, folder in folders.items()]
    assert list(compose["volumes"]) == [name.lower() for name in folders]
    assert all(f'"{folder}"' in INSTRUCTIONS.partition("VOLUME")[2] for folder in folders.values())


def test_a_stop_leaves_time_for_a_request_and_for_the_server_to_close() -> None:
    grace = seconds(read("docker-compose.yml")["services"]["safelight"]["stop_grace_period"])
    assert grace > Settings.model_fields["deadline_seconds"].default + 5


def test_plain_up_starts_the_service_alone_and_asks_for_no_variable() -> None:
    services = read("docker-compose.yml")["services"]
    assert [name for name, service in services.items() if "profiles" not in service] == ["safelight"]
    assert not re.search(r"^[^#]*\$\{\w+:?\?", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)


def test_gpu_override_changes_the_same_services_and_has_an_image_of_its_own() -> None:
    plain, gpu = (read(name)["services"] for name in COMPOSE_FILES)
    assert gpu.keys() == plain.keys()
    assert {service["image"] for service in gpu.values()}.isdisjoint(service["image"] for service in plain.values())


# --- Dockerfile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile", *COMPOSE_FILES])
def test_every_setting_that_is_named_exists(name: str) -> None:
    named = set(re.findall(rf"{PREFIX}([A-Z_]+)", (ROOT / name).read_text()))
    assert named <= {field.upper() for field in Settings.model_fields}


def test_what_the_dockerfile_copies_exists_and_nothing_else_is_sent_to_the_build() -> None:
    ignore = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert all((ROOT / source).exists() for source in copied())
    assert ignore[0] == "*"
    assert {line[1:] for line in ignore if line.startswith("!")} == {source.split("/")[0] for source in copied()}


def test_service_runs_as_a_numbered_user_and_is_checked_as_that_user() -> None:
    final = STAGES[-1]
    uid = re.search(r"useradd --uid (\d+)", final)
    assert uid
    assert f"COPY --chown={uid[1]}:{uid[1]} artifacts" in final
    assert final.index(f"USER {uid[1]}:{uid[1]}") < final.index("RUN python -m service --check") < final.index("CMD")


def test_dependencies_are_installed_before_our_source_is_copied() -> None:
    builder = STAGES[1]
    assert builder.rindex("pip install") < builder.index("COPY service")


@pytest.mark.slow
def test_wheel_has_every_file_of_both_packages(tmp_path: Path) -> None:
    """The image installs a wheel; `make setup` installs in place and would not notice a file that is left out."""
    for source in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / source, tmp_path)
    for package in ("service", "training"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=tmp_path, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        packed = set(wheel.namelist())
    for package in ("service", "training"):
        files = (path for path in (tmp_path / package).rglob("*") if path.is_file())
        assert {str(path.relative_to(tmp_path)) for path in files} <= packed


# --- make image -------------------------------------------------------------------------------------------------------


def make_image(path: Path, **engines: int) -> subprocess.CompletedProcess[str]:
    """Run it where only these engines are installed; `info` of each exits with the given status."""
    for name, status in engines.items():
        (path / name).write_text(f'#!/bin/sh\n[ "$1" != info ] || exit {status}\necho {name} "$@"\n')
        (path / name).chmod(0o755)
    for tool in ("make", "sed"):
        (path / tool).symlink_to(shutil.which(tool) or "")
    command = ["make", "--no-print-directory", "image", "TORCH_INDEX=https://wheels.example"]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PATH": str(path)}, capture_output=True, text=True, check=False
    )


def test_make_image_passes_over_an_engine_that_does_not_work(tmp_path: Path) -> None:
    result = make_image(tmp_path, docker=1, buildah=0)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("buildah build --build-arg TORCH_INDEX=https://wheels.example --tag safelight:")


def test_make_image_says_what_is_missing(tmp_path: Path) -> None:
    result = make_image(tmp_path, docker=1)
    assert result.returncode != 0
    assert "no docker (with its daemon running), podman or buildah works here" in result.stderr
