import errno
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from service.app import create_app
from service.settings import Settings
from tests.tiny import GREYS, Greys, flip_a_bit, grey, make_bundle, reseal
from training.bundle import store
from training.bundle.manifest import CHECKPOINT, MANIFEST, MODULE
from training.bundle.store import BundleRef

PNG = {"Content-Type": "image/png"}


def summary(version: str, *, active: bool, settings: Settings, state: str = "loaded") -> dict[str, Any]:
    manifest = store.read_manifest(settings.artifacts, BundleRef("greys", version))
    return {
        "version": version,
        "state": state,
        "reason": None,
        "active": active,
        "created_at": "2026-01-01T00:00:00Z",
        "accuracy": 1.0,
        "weights_sha256": manifest.weights_sha256,
    }


def whole(*versions: dict[str, Any], active: str | None) -> dict[str, Any]:
    classes = list(GREYS) if active else []
    return {"name": "greys", "active": active, "default": True, "classes": classes, "versions": list(versions)}


def problem(body: dict[str, Any]) -> dict[str, Any]:
    del body["request_id"], body["type"]
    return body


def test_models_are_listed_with_their_versions(client: TestClient, settings: Settings) -> None:
    model = whole(summary("1", active=True, settings=settings), active="1")
    assert client.get("/models").json() == {"models": [model], "unreadable": {}}
    assert client.get("/models/greys").json() == model


def test_a_version_shows_its_manifest_and_report(client: TestClient, settings: Settings) -> None:
    manifest = json.loads((settings.artifacts / "greys" / "1" / MANIFEST).read_text())
    expected = summary("1", active=True, settings=settings)
    assert client.get("/models/greys/versions/1").json() == expected | {
        "manifest": manifest,
        "report": {"metrics": {}},
    }


def test_a_refused_version_is_listed_with_the_reason(settings: Settings) -> None:
    (settings.artifacts / "greys" / "1" / MODULE).unlink()
    with TestClient(create_app(settings)) as client:
        (model,) = client.get("/models").json()["models"]
        assert (model["active"], model["versions"][0]["state"]) == (None, "refused")
        assert model["versions"][0]["reason"] == "model.ts is missing"
        assert problem(client.get("/health/ready").json()) == {
            "title": "Not ready",
            "status": 503,
            "detail": "no model can answer: greys@1 was refused: model.ts is missing",
            "code": "not_ready",
        }
        assert problem(client.post("/predict", content=grey(1), headers=PNG).json()) == {
            "title": "The version failed its verification",
            "status": 409,
            "detail": "no version of greys can answer: greys@1 was refused: model.ts is missing; publish one that can",
            "code": "version_refused",
        }


def until(seen: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what the watcher brings."""
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end
        time.sleep(0.02)


def no_number(folder: Path) -> None:
    torch.jit.script(Greys(scale=float("nan"))).save(folder / MODULE)
    reseal(folder)


def fewer_classes(folder: Path) -> None:
    reseal(folder, classes=GREYS[:10])


def pickle_for_weights(folder: Path) -> None:
    torch.save({"weights": 1}, folder / CHECKPOINT)
    reseal(folder)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (no_number, "the model answers the golden inputs with NaN or infinity"),
        (lambda folder: flip_a_bit(folder / CHECKPOINT), "checkpoint.safetensors has sha256 "),
        (lambda folder: (folder / MODULE).unlink(), "model.ts is missing"),
        (fewer_classes, "golden logits are float32 (256, 16); the manifest says float32 (256, 10)"),
        (pickle_for_weights, "checkpoint.safetensors isn't a safetensors file: "),
    ],
    ids=["NaN weights", "a flipped bit", "a missing file", "a wrong class count", "a pickle for a checkpoint"],
)
def test_a_bad_version_is_listed_and_refused_and_the_good_one_answers(
    settings: Settings, damage: Callable[[Path], None], reason: str
) -> None:
    ref = make_bundle(settings.artifacts)  # and active
    damage(ref.path(settings.artifacts))
    with TestClient(create_app(settings), raise_server_exceptions=False) as client:
        model = client.get("/models/greys").json()
        good, bad = model["versions"]
        assert (model["active"], good["state"], bad["state"]) == ("1", "loaded", "refused")
        assert bad["reason"].startswith(reason)
        refusal = {
            "title": "The version failed its verification",
            "status": 409,
            "detail": f"greys@2 was refused: {bad['reason']}; ask for another version",
            "code": "version_refused",
            "reason": bad["reason"],
        }
        asked = client.post("/predict?version=2", content=grey(1), headers=PNG)
        promoted = client.put("/models/greys/active", json={"version": "2"})
        assert (asked.status_code, problem(asked.json())) == (409, refusal)
        assert (promoted.status_code, problem(promoted.json())) == (409, refusal)
        assert client.get("/models/greys/versions/2").json()["reason"] == bad["reason"]
        assert client.get("/health/ready").json() == {"status": "ready"}
        answer = client.post("/predict", content=grey(1), headers=PNG).json()
        assert (answer["version"], answer["predictions"][0]["label"]) == ("1", "grey-1")


def test_a_folder_that_is_copied_in_is_served_without_a_restart(
    client: TestClient, settings: Settings, tmp_path: Path
) -> None:
    make_bundle(tmp_path / "elsewhere", "pets")
    assert client.post("/predict?model=pets", content=grey(1), headers=PNG).json()["code"] == "model_not_found"
    shutil.copytree(tmp_path / "elsewhere" / "pets", settings.artifacts / "pets")
    until(lambda: client.post("/predict?model=pets", content=grey(1), headers=PNG).status_code == 200)
    answer = client.post("/predict?model=pets", content=grey(1), headers=PNG).json()
    assert (answer["model"], answer["predictions"][0]["label"]) == ("pets", "grey-1")


@pytest.mark.parametrize(
    ("content", "report"), [("[]", None), ("3", None), ("{", None), ('{"nll": NaN}', {"nll": None})]
)
def test_a_strange_report_does_not_hide_its_version(
    client: TestClient, settings: Settings, content: str, report: object
) -> None:
    (settings.artifacts / "greys" / "1" / "report" / "metrics.json").write_text(content)
    reply = client.get("/models/greys/versions/1")
    assert (reply.status_code, reply.json()["report"]) == (200, report)


def test_promotion_and_rollback(client: TestClient, settings: Settings) -> None:
    make_bundle(settings.artifacts, activate=False)
    until(lambda: len(client.get("/models/greys").json()["versions"]) == 2)
    for version in ("2", "1"):
        reply = client.put("/models/greys/active", json={"version": version})
        assert (reply.status_code, reply.json()["active"]) == (200, version)
        assert client.post("/predict", content=grey(1), headers=PNG).json()["version"] == version
        assert store.active(settings.artifacts, "greys") == version


def test_promoting_what_is_not_there_or_cannot_be_one(client: TestClient) -> None:
    assert problem(client.put("/models/greys/active", json={"version": "9"}).json()) == {
        "title": "No such version",
        "status": 404,
        "detail": "model greys has no version 9; it has 1",
        "code": "version_not_found",
    }
    assert client.put("/models/dogs/active", json={"version": "1"}).json()["code"] == "model_not_found"
    assert client.put("/models/greys/active", json={"version": "../1"}).json()["code"] == "invalid_name"
    body = client.put("/models/greys/active", json={"v": "1"}).json()
    assert (body["code"], body["detail"]) == (
        "invalid_parameter",
        "body.version: Field required; body.v: Extra inputs are not permitted",
    )
    assert client.get("/models/greys").json()["active"] == "1"


def test_an_active_version_is_not_deleted_and_another_one_is(client: TestClient, settings: Settings) -> None:
    assert problem(client.delete("/models/greys/versions/1").json()) == {
        "title": "The version is active",
        "status": 409,
        "detail": "greys@1 is active; let another version answer first",
        "code": "version_active",
    }
    make_bundle(settings.artifacts)
    until(lambda: client.get("/models/greys").json()["active"] == "2")
    reply = client.delete("/models/greys/versions/1")
    assert (reply.status_code, reply.content) == (204, b"")
    assert not (settings.artifacts / "greys" / "1").exists()
    assert client.get("/models/greys/versions/1").json()["code"] == "version_not_found"


def test_a_model_whose_folder_cannot_be_read_is_listed_with_the_reason(client: TestClient, settings: Settings) -> None:
    folder = settings.artifacts / "pets"
    folder.mkdir()
    (folder / "1").symlink_to("1")  # a link to itself
    reason = f"[Errno {errno.ELOOP}] Too many levels of symbolic links: '{folder / '1'}'"
    for _ in range(200):
        if (found := client.get("/models").json())["unreadable"]:
            break
        time.sleep(0.02)
    assert (found["unreadable"], [model["name"] for model in found["models"]]) == ({"pets": reason}, ["greys"])
    reply = client.get("/models/pets")
    assert (reply.status_code, reply.json()["code"]) == (503, "not_ready")
    assert reply.json()["detail"] == f"model pets can't be read: {reason}"
    assert client.get("/health/ready").status_code == 200
