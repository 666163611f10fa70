import asyncio
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from service.errors import (
    DeadlineExceeded,
    ModelNotFound,
    NothingActive,
    NotReady,
    VersionActive,
    VersionNotFound,
    VersionRefused,
)
from service.inference.registry import Registry
from tests.registries import run
from tests.tiny import Greys, Pair, flip_a_bit, grey, make_bundle, reseal
from training.bundle import store
from training.bundle.manifest import GOLDEN, MODULE
from training.bundle.store import BundleRef, NameInvalid


async def ask(registry: Registry, level: int, model: str | None = None, version: str | None = None) -> str:
    """Ask for one grey picture's label, and which version said so."""
    predictor = await registry.predictor(registry.entry(model, version))
    answered = await predictor.predict([grey(level)], 1, asyncio.get_running_loop().time() + 10)
    (answer,) = answered.outcomes
    assert not isinstance(answer, Exception)
    return f"{answer.best['label']} by {predictor.manifest.model}@{predictor.manifest.version}"


def states(registry: Registry) -> dict[str, str]:
    return {str(entry.ref): entry.state for line in registry.lines.values() for entry in line.entries.values()}


def damage(artifacts: Path, *refs: BundleRef) -> None:
    for ref in refs:
        flip_a_bit(ref.path(artifacts) / MODULE)


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, object]]:
    """The log lines of one kind, each as the model and versions that it names."""
    names = ("model", "version", "wanted", "active")
    found = [vars(record) for record in caplog.records if record.getMessage() == event]
    return [{name: line[name] for name in names if name in line} for line in found]


def test_the_active_version_of_the_default_model_answers(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        assert await ask(registry, 3) == "grey-3 by greys@1"

    run(artifacts, test)


def test_only_active_versions_are_loaded_at_the_start_and_the_others_by_the_first_scan(artifacts: Path) -> None:
    make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        assert states(registry) == {"greys@1": "loaded", "greys@2": "unverified"}
        await registry.scan()
        assert states(registry) == {"greys@1": "loaded", "greys@2": "loaded"}

    run(artifacts, test)


def test_a_version_can_be_asked_by_number_without_being_active(artifacts: Path) -> None:
    make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        assert await ask(registry, 5, "greys", "2") == "grey-5 by greys@2"

    run(artifacts, test)


def test_a_folder_that_is_copied_in_is_picked_up_without_a_restart(artifacts: Path, tmp_path: Path) -> None:
    make_bundle(tmp_path / "elsewhere", "pets")

    async def test(registry: Registry) -> None:
        with pytest.raises(ModelNotFound, match="there is no model 'pets'; there is greys"):
            registry.entry("pets", None)
        shutil.copytree(tmp_path / "elsewhere" / "pets", artifacts / "pets")
        for _ in range(200):
            await asyncio.sleep(0.05)
            if "pets" in registry.lines and registry.lines["pets"].active:
                break
        assert await ask(registry, 7, "pets") == "grey-7 by pets@1"

    run(artifacts, test, rescan_seconds=0.05)


def test_a_copy_that_was_seen_half_done_is_looked_at_again(artifacts: Path, tmp_path: Path) -> None:
    ref = make_bundle(tmp_path / "elsewhere", "pets", activate=False)
    source, target = ref.path(tmp_path / "elsewhere"), ref.path(artifacts)

    async def test(registry: Registry) -> None:
        target.mkdir(parents=True)
        shutil.copy(source / "manifest.json", target)
        await registry.scan()
        assert registry.lines["pets"].entries["1"].reason == "checkpoint.safetensors is missing"
        shutil.copytree(source, target, dirs_exist_ok=True)
        await registry.scan()
        assert await ask(registry, 1, "pets") == "grey-1 by pets@1"

    run(artifacts, test)


def test_a_bad_version_is_listed_with_the_reason_and_takes_no_good_one_down(artifacts: Path) -> None:
    damage(artifacts, make_bundle(artifacts, activate=False))

    async def test(registry: Registry) -> None:
        await registry.scan()
        assert states(registry) == {"greys@1": "loaded", "greys@2": "refused"}
        with pytest.raises(VersionRefused, match=r"greys@2 was refused: model\.ts has sha256"):
            registry.entry("greys", "2")
        with pytest.raises(VersionRefused, match=r"greys@2 was refused: model\.ts has sha256"):
            await registry.activate("greys", "2")
        assert await ask(registry, 2) == "grey-2 by greys@1"

    run(artifacts, test)


def test_when_the_pointer_names_a_bad_version_the_last_good_one_goes_on(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        ref = make_bundle(artifacts)
        damage(artifacts, ref)
        await registry.scan()
        assert store.active(artifacts, "greys") == "2"
        assert await ask(registry, 2) == "grey-2 by greys@1"

    run(artifacts, test)


def test_a_model_whose_only_version_is_bad_says_why(artifacts: Path) -> None:
    damage(artifacts, BundleRef("greys", "1"))

    async def test(registry: Registry) -> None:
        with pytest.raises(VersionRefused, match=r"no version of greys can answer: greys@1 was refused: model\.ts has"):
            registry.entry(None, None)

    run(artifacts, test)


def test_a_model_without_a_pointer_is_answered_by_its_oldest_version(tmp_path: Path) -> None:
    make_bundle(tmp_path, activate=False)
    make_bundle(tmp_path, activate=False)

    async def test(registry: Registry) -> None:
        assert await ask(registry, 2) == "grey-2 by greys@1"
        await registry.scan()
        assert await ask(registry, 2) == "grey-2 by greys@1"

    run(tmp_path, test)


def test_activation_swaps_at_once_and_is_written_down(artifacts: Path) -> None:
    make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        await registry.activate("greys", "2")
        assert (await ask(registry, 4), store.active(artifacts, "greys")) == ("grey-4 by greys@2", "2")
        await registry.activate("greys", "1")
        assert (await ask(registry, 4), store.active(artifacts, "greys")) == ("grey-4 by greys@1", "1")

    run(artifacts, test)


def test_another_process_moving_the_pointer_is_followed(artifacts: Path) -> None:
    ref = make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        store.activate(artifacts, ref)
        await registry.scan()
        assert await ask(registry, 4) == "grey-4 by greys@2"

    run(artifacts, test)


def test_promotion_and_rollback_under_load_lose_no_request(artifacts: Path) -> None:
    make_bundle(artifacts, module=Greys(scale=2.0), activate=False)

    async def test(registry: Registry) -> None:
        done = asyncio.Event()
        seen: set[str] = set()

        async def load(level: int) -> None:
            while not done.is_set():
                label, _, version = (await ask(registry, level)).partition(" by ")
                assert label == f"grey-{level}"
                seen.add(version)

        clients = [asyncio.create_task(load(level)) for level in range(16)]
        for turn in range(20):
            await registry.activate("greys", "21"[turn % 2])
            await asyncio.sleep(0.02)
        done.set()
        await asyncio.gather(*clients)
        assert seen == {"greys@1", "greys@2"}

    run(artifacts, test)


def test_versions_that_were_used_longest_ago_are_unloaded_and_come_back_on_demand(artifacts: Path) -> None:
    for _ in range(3):
        make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        await registry.scan()
        await ask(registry, 1, "greys", "2")
        await ask(registry, 1, "greys", "3")
        assert states(registry) == {"greys@1": "loaded", "greys@2": "ready", "greys@3": "loaded", "greys@4": "ready"}
        assert await ask(registry, 1, "greys", "4") == "grey-1 by greys@4"

    run(artifacts, test, loaded_versions=1)


def test_deleting_needs_a_version_that_is_not_active(artifacts: Path) -> None:
    make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        with pytest.raises(VersionActive, match="greys@1 is active; let another version answer first"):
            await registry.delete("greys", "1")
        await registry.delete("greys", "2")
        assert (states(registry), os.path.exists(artifacts / "greys" / "2")) == ({"greys@1": "loaded"}, False)
        with pytest.raises(VersionNotFound, match="model greys has no version 2; it has 1"):
            await registry.delete("greys", "2")

    run(artifacts, test)


def test_a_folder_that_vanishes_is_forgotten(artifacts: Path) -> None:
    make_bundle(artifacts, "pets")

    async def test(registry: Registry) -> None:
        shutil.rmtree(artifacts / "pets")
        await registry.scan()
        assert states(registry) == {"greys@1": "loaded"}

    run(artifacts, test)


def test_names_that_point_outside_are_refused(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        with pytest.raises(NameInvalid, match="'../greys' can't be a model's name"):
            registry.entry("../greys", None)
        with pytest.raises(NameInvalid, match="'../1' can't be a version"):
            registry.entry("greys", "../1")

    run(artifacts, test)


def test_a_folder_that_cannot_be_written_keeps_the_old_version(artifacts: Path) -> None:
    make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        pointer = artifacts / "greys" / store.ACTIVE
        pointer.unlink()
        pointer.mkdir()  # no file can be renamed over a folder
        with pytest.raises(store.ArtifactsUnwritable, match="the artifacts folder can't be written: Is a directory"):
            await registry.activate("greys", "2")
        assert await ask(registry, 4) == "grey-4 by greys@1"

    run(artifacts, test)


# --- bad bundles and folders ------------------------------------------------------------------------------------------


def test_a_module_that_returns_what_no_module_should_is_refused_alone(artifacts: Path) -> None:
    ref = make_bundle(artifacts)
    torch.jit.script(Pair()).save(ref.path(artifacts) / MODULE)
    reseal(ref.path(artifacts))

    async def test(registry: Registry) -> None:
        await registry.scan()
        assert states(registry) == {"greys@1": "loaded", "greys@2": "refused"}
        reason = registry.lines["greys"].entries["2"].reason
        assert reason == "model.ts doesn't run: 'tuple' object has no attribute 'cpu'"
        assert await ask(registry, 2) == "grey-2 by greys@1"

    run(artifacts, test)


def test_a_verification_that_fails_in_an_unforeseen_way_is_a_refusal(artifacts: Path) -> None:
    ref = make_bundle(artifacts)
    halves = {"images": torch.zeros(256, 1, 8, 8), "logits": torch.zeros(256, 16)}
    save_file({name: tensor.bfloat16() for name, tensor in halves.items()}, ref.path(artifacts) / GOLDEN)
    reseal(ref.path(artifacts))

    async def test(registry: Registry) -> None:
        assert states(registry) == {"greys@1": "loaded", "greys@2": "refused"}
        assert await ask(registry, 2) == "grey-2 by greys@1"

    run(artifacts, test)


def test_a_dangling_link_in_a_version_does_not_matter(artifacts: Path) -> None:
    (artifacts / "greys" / "1" / "notes").symlink_to("nowhere")

    async def test(registry: Registry) -> None:
        await registry.scan()
        assert await ask(registry, 2) == "grey-2 by greys@1"

    run(artifacts, test)


def test_a_model_whose_folder_cannot_be_listed_goes_on_from_memory_and_disturbs_no_other(
    artifacts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_bundle(artifacts, "pets")

    async def test(registry: Registry) -> None:
        (artifacts / "pets" / "2").symlink_to("2")  # a link to itself: not even its kind can be told
        make_bundle(artifacts, "zebras")
        await registry.scan()
        await registry.scan()
        assert list(registry.unreadable) == ["pets"]
        assert "Too many levels of symbolic links" in registry.unreadable["pets"]
        for model in ("greys", "pets", "zebras"):
            assert await ask(registry, 2, model) == f"grey-2 by {model}@1"

    run(artifacts, test)
    assert events(caplog, "model can't be read") == [{"model": "pets"}]


def test_a_pointer_that_is_a_folder_is_no_pointer(artifacts: Path) -> None:
    make_bundle(artifacts, activate=False)
    (artifacts / "greys" / store.ACTIVE).unlink()
    (artifacts / "greys" / store.ACTIVE).mkdir()

    async def test(registry: Registry) -> None:
        await registry.scan()
        assert await ask(registry, 2) == "grey-2 by greys@1"

    run(artifacts, test)


def test_the_watcher_outlives_a_folder_that_goes_away_and_an_error_of_our_own(
    artifacts: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def until(seen: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not seen():
                await asyncio.sleep(0.01)

    async def test(registry: Registry) -> None:
        artifacts.rename(tmp_path / "away")
        await until(lambda: "artifacts can't be read" in caplog.messages)
        assert await ask(registry, 2) == "grey-2 by greys@1"
        (tmp_path / "away").rename(artifacts)
        registry.unreadable = None  # type: ignore[assignment]
        await until(lambda: "scan failed" in caplog.messages)
        registry.unreadable = {}
        make_bundle(artifacts, "pets")
        await until(lambda: "pets" in registry.lines and registry.lines["pets"].active == "1")

    run(artifacts, test, rescan_seconds=0.02)


# --- who answers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "bad", "pointer", "answers"),
    [
        (3, "2", "2", "1"),  # the newest good one before it
        (4, "32", "3", "1"),
        (3, "1", "1", "2"),  # none before it: the oldest good one
        (3, "12", "2", "3"),
        (2, "", "9", "2"),  # one that isn't there at all
    ],
)
def test_where_the_pointer_names_no_good_version_at_the_start_another_one_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, count: int, bad: str, pointer: str, answers: str
) -> None:
    for _ in range(count):
        make_bundle(tmp_path, activate=False)
    damage(tmp_path, *(BundleRef("greys", version) for version in bad))
    (tmp_path / "greys" / store.ACTIVE).write_text(f"{pointer}\n")

    async def test(registry: Registry) -> None:
        assert await ask(registry, 2) == f"grey-2 by greys@{answers}"
        await registry.scan()
        assert await ask(registry, 2) == f"grey-2 by greys@{answers}"

    run(tmp_path, test)
    assert events(caplog, "pointer not followed") == [{"model": "greys", "wanted": pointer, "active": answers}]


def test_a_pointer_is_followed_again_once_its_version_is_put_right(artifacts: Path, tmp_path: Path) -> None:
    ref = make_bundle(artifacts)
    shutil.copy(ref.path(artifacts) / MODULE, tmp_path / MODULE)
    damage(artifacts, ref)

    async def test(registry: Registry) -> None:
        assert await ask(registry, 2) == "grey-2 by greys@1"
        shutil.copy(tmp_path / MODULE, ref.path(artifacts) / MODULE)
        await registry.scan()
        assert await ask(registry, 2) == "grey-2 by greys@2"

    run(artifacts, test)


def test_a_promoted_version_is_loaded_before_it_answers_and_the_old_one_answers_meanwhile(artifacts: Path) -> None:
    ref = make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        store.activate(artifacts, ref)
        scan = asyncio.create_task(registry.scan())
        seen = []
        while not scan.done():
            entry = registry.entry("greys", None)
            assert entry.state == "loaded"
            seen.append(entry.ref.version)
            await asyncio.sleep(0)
        assert (seen[0], registry.lines["greys"].active) == ("1", "2")

    run(artifacts, test)


def test_a_version_that_was_damaged_while_it_was_unloaded_does_not_replace_the_active_one(artifacts: Path) -> None:
    two, _ = make_bundle(artifacts, activate=False), make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        await registry.scan()
        assert states(registry) == {"greys@1": "loaded", "greys@2": "ready", "greys@3": "loaded"}
        damage(artifacts, two)
        store.activate(artifacts, two)
        await registry.scan()
        assert states(registry) == {"greys@1": "loaded", "greys@2": "refused", "greys@3": "loaded"}
        assert await ask(registry, 2) == "grey-2 by greys@1"

    run(artifacts, test, loaded_versions=1)


def test_active_versions_stay_loaded_however_few_others_may(artifacts: Path) -> None:
    for _ in range(2):
        make_bundle(artifacts, "pets", activate=False)
    store.activate(artifacts, BundleRef("pets", "1"))

    async def test(registry: Registry) -> None:
        store.activate(artifacts, BundleRef("pets", "2"))
        await registry.scan()
        assert states(registry) == {"greys@1": "loaded", "pets@1": "loaded", "pets@2": "loaded"}

    run(artifacts, test, loaded_versions=1)


def test_a_load_goes_on_when_its_caller_stops_waiting(artifacts: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "safelight")
    make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        entry = registry.entry("greys", "2")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.001):
                await registry.predictor(entry)
        assert await ask(registry, 5, "greys", "2") == "grey-5 by greys@2"

    run(artifacts, test)
    assert events(caplog, "loaded") == [{"model": "greys", "version": version} for version in "12"]


def test_a_model_that_is_being_verified_says_so(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        make_bundle(artifacts, "pets")
        scan = asyncio.create_task(registry.scan())
        while "pets" not in registry.lines:
            await asyncio.sleep(0)
        with pytest.raises(NotReady, match="the versions of pets are still being verified; try again in a moment"):
            registry.entry("pets", None)
        await scan
        assert await ask(registry, 2, "pets") == "grey-2 by pets@1"

    run(artifacts, test)


# --- what another worker's job has published since the last scan ---


async def looked(registry: Registry) -> None:
    """The registry has had its first look, which comes by itself; the next would come in a quarter of an hour."""
    for _ in range(2):  # looks come one after the other: the second is behind it
        await registry.follow()


def test_a_new_model_and_a_new_version_are_found_as_soon_as_they_are_asked_for(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        await looked(registry)
        make_bundle(artifacts, "pets")
        entry = await registry.asked("pets", None)
        assert (str(entry.ref), entry.state) == ("pets@1", "loaded")
        make_bundle(artifacts, activate=False)
        assert str((await registry.asked("greys", "2")).ref) == "greys@2"
        make_bundle(artifacts, activate=False)
        await registry.activate("greys", "3")
        assert await ask(registry, 4) == "grey-4 by greys@3"

    run(artifacts, test)


def test_a_model_that_was_seen_before_its_gate_had_decided_answers_once_that_has(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        await looked(registry)
        store.hold_back(artifacts, "pets")
        ref = make_bundle(artifacts, "pets", activate=False)
        await registry.scan()
        with pytest.raises(NothingActive):
            await registry.asked("pets", None)
        store.activate(artifacts, ref)
        assert (await registry.asked("pets", None)).ref == ref

    run(artifacts, test)


def test_a_model_that_is_just_being_loaded_is_waited_for(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        await looked(registry)
        make_bundle(artifacts, "pets")
        scan = asyncio.create_task(registry.scan())
        while "pets" not in registry.lines:
            await asyncio.sleep(0)
        assert str((await registry.asked("pets", None)).ref) == "pets@1"
        await scan

    run(artifacts, test)


def test_of_many_that_ask_for_a_new_model_at_once_all_are_answered(
    artifacts: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "safelight")

    async def test(registry: Registry) -> None:
        await looked(registry)
        make_bundle(artifacts, "pets")
        entries = await asyncio.gather(*(registry.asked("pets", None) for _ in range(50)))
        assert {str(entry.ref) for entry in entries} == {"pets@1"}

    run(artifacts, test)
    assert events(caplog, "loaded") == [{"model": model, "version": "1"} for model in ("greys", "pets")]


def test_names_that_nobody_knows_are_not_worth_a_look_at_the_whole_folder(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        await looked(registry)
        make_bundle(artifacts, "pets")
        (artifacts / "empty").mkdir()
        for name in ("cats", "empty"):
            with pytest.raises(ModelNotFound, match=f"there is no model '{name}'; there is greys"):
                await registry.asked(name, None)
        with pytest.raises(VersionNotFound, match="model greys has no version 2; it has 1"):
            await registry.asked("greys", "2")
        with pytest.raises(NameInvalid):
            await registry.asked("../pets", None)
        assert list(registry.lines) == ["greys"]

    run(artifacts, test)


def test_who_asks_for_a_new_model_waits_for_it_until_the_deadline(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        await looked(registry)
        make_bundle(artifacts, "pets")
        with pytest.raises(DeadlineExceeded, match="the deadline passed in the load stage"):
            await registry.asked("pets", None, asyncio.get_running_loop().time())
        assert str((await registry.asked("pets", None)).ref) == "pets@1"

    run(artifacts, test)


def test_a_version_that_another_worker_has_just_promoted_is_not_deleted(artifacts: Path) -> None:
    ref = make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        await registry.scan()
        store.activate(artifacts, ref)
        with pytest.raises(VersionActive, match="greys@2 is active; let another version answer first"):
            await registry.delete("greys", "2")

    run(artifacts, test)


def test_a_version_that_another_worker_has_just_replaced_is_deleted(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        make_bundle(artifacts)
        await registry.delete("greys", "1")
        assert (states(registry), os.path.exists(artifacts / "greys" / "1")) == ({"greys@2": "loaded"}, False)
        assert await ask(registry, 3) == "grey-3 by greys@2"

    run(artifacts, test)


def test_a_version_that_another_worker_has_just_published_is_deleted(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        make_bundle(artifacts, activate=False)
        await registry.delete("greys", "2")
        assert (states(registry), os.path.exists(artifacts / "greys" / "2")) == ({"greys@1": "loaded"}, False)

    run(artifacts, test)


def test_the_active_version_answers_until_another_is_ready_in_its_place_when_its_folder_vanishes(
    artifacts: Path,
) -> None:
    for _ in range(3):
        make_bundle(artifacts)

    async def test(registry: Registry) -> None:
        await registry.scan()
        for version in ("2", "3"):  # now 1 is on disk only
            await ask(registry, 1, version=version)
        assert states(registry)["greys@1"] == "ready"
        for version in ("2", "3", "4"):
            shutil.rmtree(artifacts / "greys" / version)
        following = asyncio.create_task(registry.follow())
        answered = []
        while not following.done():
            answered.append(await ask(registry, 5))
        assert answered[0] == "grey-5 by greys@4"
        assert await ask(registry, 5) == "grey-5 by greys@1"
        assert states(registry) == {"greys@1": "loaded"}

    run(artifacts, test, loaded_versions=1)


def test_a_version_that_went_since_the_last_scan_can_be_neither_promoted_nor_deleted(artifacts: Path) -> None:
    make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        await registry.scan()
        shutil.rmtree(artifacts / "greys" / "2")
        with pytest.raises(VersionNotFound, match="^greys@2 has gone from the artifacts folder$"):
            await registry.activate("greys", "2")
        with pytest.raises(VersionNotFound, match="^model greys has no version 2; it has 1$"):
            await registry.delete("greys", "2")
        assert await ask(registry, 3) == "grey-3 by greys@1"

    run(artifacts, test)


def test_a_good_version_that_the_machine_fails_to_load_gets_another_chance(artifacts: Path, tmp_path: Path) -> None:
    for _ in range(2):
        make_bundle(artifacts, activate=False)
    folder = artifacts / "greys" / "2"

    async def test(registry: Registry) -> None:
        await registry.scan()
        await ask(registry, 1, version="3")
        assert states(registry)["greys@2"] == "ready"
        folder.rename(tmp_path / "away")  # as a share that is gone for a moment
        with pytest.raises(NotReady, match="^greys@2 can't be loaded now: .*No such file.*; try again in a moment$"):
            await ask(registry, 1, version="2")
        (tmp_path / "away").rename(folder)
        assert await ask(registry, 1, version="2") == "grey-1 by greys@2"

    run(artifacts, test, loaded_versions=1)


def test_a_version_that_was_replaced_while_a_request_waited_for_it_is_the_new_one(artifacts: Path) -> None:
    for _ in range(2):
        make_bundle(artifacts, activate=False)

    async def test(registry: Registry) -> None:
        await registry.scan()
        await ask(registry, 1, version="3")
        before = registry.entry("greys", "2")
        os.utime(artifacts / "greys" / "2" / MODULE)  # as if copied again
        await registry.follow()
        predictor = await registry.predictor(before)
        assert before.predictor is None
        assert registry.entry("greys", "2").predictor is predictor

    run(artifacts, test, loaded_versions=1)


def test_a_model_that_is_held_back_answers_only_by_number_until_a_version_is_activated(artifacts: Path) -> None:
    store.hold_back(artifacts, "pets")
    make_bundle(artifacts, "pets", activate=False)

    async def test(registry: Registry) -> None:
        await registry.scan()
        with pytest.raises(NothingActive) as refusal:
            registry.entry("pets", None)
        assert str(refusal.value) == (
            "no version of pets is active: none has passed its gate yet; name one (version=1), or let one answer: "
            "PUT /models/pets/active"
        )
        assert await ask(registry, 4, "pets", "1") == "grey-4 by pets@1"
        await registry.activate("pets", "1")
        assert await ask(registry, 4, "pets") == "grey-4 by pets@1"
        await registry.scan()
        assert await ask(registry, 4, "pets") == "grey-4 by pets@1"

    run(artifacts, test)


def test_a_model_that_is_held_back_while_it_answers_stops_answering(artifacts: Path) -> None:
    async def test(registry: Registry) -> None:
        store.hold_back(artifacts, "greys")
        await registry.scan()
        with pytest.raises(NothingActive):
            registry.entry("greys", None)
        store.activate(artifacts, BundleRef("greys", "1"))
        await registry.scan()
        assert await ask(registry, 4) == "grey-4 by greys@1"

    run(artifacts, test)


def test_the_default_model_answers_before_the_others_are_loaded_and_who_asks_for_one_of_those_waits(
    artifacts: Path,
) -> None:
    make_bundle(artifacts, "early")  # before the default one in the alphabet

    async def test(registry: Registry) -> None:
        assert states(registry) == {"early@1": "unverified", "greys@1": "loaded"}
        assert await ask(registry, 5) == "grey-5 by greys@1"
        assert await ask(registry, 3, model="early") == "grey-3 by early@1"

    run(artifacts, test)


def test_where_the_default_model_is_bad_the_next_one_is_loaded_before_it_begins(artifacts: Path) -> None:
    ref = make_bundle(artifacts, "other")
    flip_a_bit(artifacts / "greys" / "1" / "model.ts")

    async def test(registry: Registry) -> None:
        assert states(registry) == {"greys@1": "refused", str(ref): "loaded"}

    run(artifacts, test)
