"""Documentation that can't lie: its commands run, its answers are the real ones, its tables are the code's."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from PIL import Image

from docs import generate
from tests.tiny import Server, pictures, serving, until_all_are_verified, zipped
from training import __version__

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\((?!https?://)([^)#]+)")
CODE_PATH = re.compile(r"`((?:service|training|tests|docs|benchmarks|artifacts)/[\w./-]+\.\w+)`")

CURL = re.compile(r"^curl .+", re.M)

# A curl line of the README, and the answer that stands below it.
EXAMPLES = re.findall(r"```sh\n(curl [^\n]+)\n```\n\n```json\n(.*?)\n```", README, re.S)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """What `make serve` starts: the shipped models and default settings, but on copies, jobs only wait, and a busy
    machine may take a minute to load a model."""
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(ROOT / "artifacts", folder / "artifacts")
    with serving(folder / "artifacts", folder, concurrent_jobs="0", deadline_seconds="60") as server:
        until_all_are_verified(server)
        yield server


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda page: page.name)
def test_generated_parts_are_what_the_code_says(page: Path) -> None:
    text = page.read_text()
    assert generate.regenerate(text) == text, "out of step with the code: run `make docs`"


@pytest.mark.parametrize("page", generate.PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    missing += [path for path in CODE_PATH.findall(text) if "<" not in path and not (ROOT / path).exists()]
    assert missing == []


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for page in generate.PAGES:
        commands = re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)", page.read_text(), re.M)
        assert {name for pair in commands for name in pair if name} <= targets


def test_the_version_is_the_newest_in_the_changelog() -> None:
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert versions[0] == __version__


def test_there_are_examples_to_run() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize(("command", "answer"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_the_readmes_curl_lines_give_the_readmes_answers(command: str, answer: str, server: Server) -> None:
    arguments = shlex.split(command.replace("localhost:8000", server.url.removeprefix("http://")))
    printed = subprocess.run([*arguments, "-sS"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found: list[float] = []
    expected: list[float] = []
    assert without_numbers(json.loads(printed), found) == without_numbers(json.loads(answer), expected)
    assert found == pytest.approx(expected, abs=0.02)


# What a curl line is answered with here: no version 1, three pictures, no SAFELIGHT_DATA, and pets.zip sent before.
ANSWERS = {
    "DELETE": 404,
    "<base64": 400,
    "-F cat=": 422,
    "builtin": 422,
    "-F name=pets": 202,
    "dataset=@pets.zip": 201,
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """What the reader of a page has: the samples and some pictures of pets."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    files = pictures("cat", "dog")
    (tmp_path / "pets.zip").write_bytes(zipped(files))
    for name in ("cat/1.png", "cat/2.png", "dog/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(files[name.replace("/", "/0")])
    return tmp_path


@pytest.mark.parametrize("page", ["http.md", "getting-started.md"])
def test_the_curl_lines_of_the_docs_are_answered(page: str, server: Server, place: Path) -> None:
    commands = CURL.findall((ROOT / "docs" / page).read_text())
    expected = {command: next((code for mark, code in ANSWERS.items() if mark in command), 200) for command in commands}
    assert {command: status(command, server, place) for command in commands} == expected
    assert len(commands) >= 4


def test_the_curl_line_that_the_server_prints_is_answered(server: Server) -> None:
    assert server.process.stdout is not None
    assert status(server.process.stdout.readline().strip(), server) == 200


def status(command: str, server: Server, place: Path = ROOT) -> int:
    arguments = shlex.split(command.replace("localhost:8000", server.url.removeprefix("http://")), comments=True)
    quiet = ["-sS", "-o", "/dev/null", "-w", "%{http_code}"]
    return int(subprocess.run([*arguments, *quiet], cwd=place, capture_output=True, text=True, check=True).stdout)


def without_numbers(value: object, numbers: list[float]) -> object:
    """The answer with each fraction put aside: in int8, or on another processor, their digits differ."""
    if isinstance(value, dict):
        return {key: without_numbers(inner, numbers) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_numbers(inner, numbers) for inner in value]
    if isinstance(value, float):
        numbers.append(value)
        return "a number"
    return value


def test_the_python_example_runs(server: Server) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "http.md").read_text(), re.S)
    program = example.replace("http://127.0.0.1:8000", server.url)
    printed = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    label, probability = printed.split()
    assert (label, float(probability) > 0.9) == ("7", True)


def test_the_samples_are_the_ones_that_the_script_draws(tmp_path: Path) -> None:
    """And no data set's: drawn again, they are the same pictures."""
    script = (ROOT / "docs" / "samples" / "draw.py").read_text()
    (tmp_path / "draw.py").write_text(script)
    subprocess.run([sys.executable, tmp_path / "draw.py"], cwd=ROOT, env={"PYTHONPATH": str(ROOT)}, check=True)
    for name in ("digit.png", "ship.png"):
        drawn, kept = Image.open(tmp_path / name), Image.open(ROOT / "docs" / "samples" / name)
        assert (drawn.mode, drawn.size, drawn.tobytes()) == (kept.mode, kept.size, kept.tobytes())


def test_a_reader_of_the_api_page_finds_every_route(server: Server) -> None:
    paths = httpx.get(f"{server.url}/openapi.json").json()["paths"]
    page = (ROOT / "docs" / "http.md").read_text()
    assert [path for path in paths if path not in page] == []
