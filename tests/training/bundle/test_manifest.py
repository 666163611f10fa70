"""The manifest: what it accepts, what it refuses, and that it needs no torch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from training.bundle import store
from training.bundle.manifest import CHECKPOINT, GOLDEN, MANIFEST, MODULE, InputSpec, Manifest, ManifestInvalid
from training.bundle.store import BundleRef


@pytest.fixture
def text(artifacts: Path) -> bytes:
    return (artifacts / "greys" / "1" / MANIFEST).read_bytes()


@pytest.fixture
def content(text: bytes) -> dict[str, Any]:
    return json.loads(text)


def test_a_manifest_survives_being_written_and_read(text: bytes) -> None:
    manifest = Manifest.parse(text)
    assert Manifest.parse(manifest.model_dump_json()) == manifest


def test_a_manifest_can_not_be_changed(text: bytes) -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Manifest.parse(text).version = "2"


def test_weights_are_named_by_the_checkpoint(artifacts: Path) -> None:
    manifest = store.read_manifest(artifacts, BundleRef("greys", "1"))
    assert manifest.weights_sha256 == store.file_facts(artifacts / "greys" / "1" / CHECKPOINT).sha256


def test_a_shape_is_channels_height_width() -> None:
    assert InputSpec(channels=3, height=20, width=30, fit="cover").shape == (3, 20, 30)


@pytest.mark.parametrize(
    ("path", "value", "where"),
    [
        ("format_version", 2, "format_version"),
        ("format", "pickle", "format"),
        ("model", "../greys", "model"),
        ("version", "0", "version"),
        ("created_at", "yesterday", "created_at"),
        ("classes", ["only"], "classes"),
        ("classes", ["twice", "twice"], "class names must differ"),
        ("input.channels", 2, r"input\.channels"),
        ("input.height", 0, r"input\.height"),
        ("input.width", 100_000, r"input\.width"),
        ("input.fit", "squeeze", r"input\.fit"),
        ("metrics.accuracy", 1.5, r"metrics\.accuracy"),
        ("metrics.nll", float("nan"), r"metrics\.nll"),
        ("calibration.temperature", 0, r"calibration\.temperature"),
        ("calibration.temperature", float("inf"), r"calibration\.temperature"),
        ("ood.score", "gut feeling", r"ood\.score"),
        ("training.dataset.sha256", "0" * 63, r"training\.dataset\.sha256"),
        ("surprise", 1, "surprise"),
    ],
)
def test_an_impossible_value_is_refused_and_named(
    content: dict[str, Any], path: str, value: object, where: str
) -> None:
    *parents, last = path.split(".")
    inner = content
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    with pytest.raises(ManifestInvalid, match=where):
        Manifest.parse(json.dumps(content))


@pytest.mark.parametrize("name", ["../model.ts", "/etc/passwd", "report/../../x", "a/b", ".hidden", "", "report/"])
def test_a_file_outside_the_bundle_is_refused(content: dict[str, Any], name: str) -> None:
    content["files"][name] = {"sha256": "0" * 64, "bytes": 1}
    with pytest.raises(ManifestInvalid, match="files"):
        Manifest.parse(json.dumps(content))


@pytest.mark.parametrize("name", [MODULE, CHECKPOINT, GOLDEN])
def test_a_manifest_must_list_what_every_bundle_has(content: dict[str, Any], name: str) -> None:
    del content["files"][name]
    with pytest.raises(ManifestInvalid, match=f"files must list {name}"):
        Manifest.parse(json.dumps(content))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0\0\0\0", '{"format_version": 1}'])
def test_what_is_no_manifest_is_refused(text: str) -> None:
    with pytest.raises(ManifestInvalid, match=r"^manifest\.json: "):
        Manifest.parse(text)


def test_a_half_written_manifest_is_refused(text: bytes) -> None:
    with pytest.raises(ManifestInvalid, match="the file: Invalid JSON"):
        Manifest.parse(text[: len(text) // 2])


def test_a_bundle_is_read_without_torch() -> None:
    modules = "answers, digits, golden, images, manifest, store"
    code = f"import sys; from training.bundle import {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
