"""The command line: what each command prints, for people and for programs, and what it exits with."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import typer

from tests.tiny import TINY, Greys, as_settings, grey, make_bundle, squares, write_class_folders, zipped
from tests.tiny import pictures as noise
from training import events, published, report
from training.__main__ import _go_on, app, main
from training.bundle import store
from training.bundle.manifest import MODULE, Manifest, Metrics
from training.bundle.store import BundleRef
from training.devices import available_devices
from training.recipes import RECIPES
from training.runs import Options

QUICK = TINY.model_copy(update={"epochs": 1})


@dataclass
class Done:
    """What a command printed and exited with."""

    code: int
    out: str
    err: str


Safelight = Callable[..., Done]


@pytest.fixture
def safelight(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, artifacts: Path
) -> Safelight:
    """Run a command in this process, in a folder where artifacts/ has greys@1."""
    monkeypatch.chdir(tmp_path)
    assert artifacts == tmp_path / "artifacts"

    def safelight(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["safelight", *map(str, words)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return Done(int(stopped.value.code or 0), *capsys.readouterr())

    return safelight


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_class_folders(tmp_path / "squares", squares())


def commands(group: object, *names: str) -> Iterator[tuple[str, ...]]:
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, *names, name)
    yield names


COMMANDS = sorted(commands(typer.main.get_command(app)))


# --- help -------------------------------------------------------------------------------------------------------------


def test_these_are_the_commands() -> None:
    assert COMMANDS == [
        (),
        ("dataset",),
        ("dataset", "check"),
        ("evaluate",),
        ("export",),
        ("finetune",),
        ("models",),
        ("models", "activate"),
        ("models", "list"),
        ("models", "show"),
        ("models", "verify"),
        ("module",),
        ("predict",),
        ("recipes",),
        ("serve",),
        ("train",),
    ]


@pytest.mark.parametrize("words", [words for words in COMMANDS if words != ("serve",)], ids=" ".join)
def test_every_command_has_help(safelight: Safelight, words: tuple[str, ...]) -> None:
    done = safelight(*words, "--help")
    assert (done.code, done.err) == (0, "")
    assert " ".join(["Usage: safelight", *words]) in done.out
    assert "--help" in done.out


@pytest.mark.parametrize("words", [(), ("models",), ("dataset",)], ids=" ".join)
def test_without_a_command_help_is_shown(safelight: Safelight, words: tuple[str, ...]) -> None:
    done = safelight(*words)
    assert done.code == 2
    assert "Usage: safelight" in done.out + done.err


@pytest.mark.parametrize("words", [("dance",), ("train", "mnist", "--seed", "one"), ("predict",), ("models", "show")])
def test_a_wrong_command_exits_with_2(safelight: Safelight, words: tuple[str, ...]) -> None:
    done = safelight(*words)
    assert (done.code, done.out) == (2, "")
    assert "Usage: safelight" in done.err


@pytest.mark.slow
def test_serve_hands_over_to_the_service() -> None:
    words = [sys.executable, "-m", "training", "serve", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("usage: safelight serve [-h] [--host HOST]")


# --- train, export ----------------------------------------------------------------------------------------------------


def test_training_ends_in_a_model_that_answers(safelight: Safelight, data: Path, artifacts: Path) -> None:
    done = safelight(
        "train", "mnist", *as_settings(QUICK), "--name", "tiny", "--dataset", data, "--seed", 3, "--run", "first"
    )
    manifest = store.read_manifest(artifacts, BundleRef("tiny", "1"))
    assert (done.code, done.out) == (0, "")
    assert re.sub(r"\d+ s$|bfloat16|float32", "…", done.err, flags=re.MULTILINE) == (
        "training tiny on squares, seed 3, 4 steps, cpu in …\n"
        f"epoch   1  {told(Path('first'))}  …\n"
        f"published tiny@1 (active): {manifest.metrics.accuracy:.2%} of 80 test images, "
        f"ECE {manifest.metrics.ece:.2%}\n"
    )
    assert manifest.recipe.settings == QUICK.model_dump(mode="json")


def told(run: Path) -> str:
    lines = (run / "events.jsonl").read_text().splitlines()
    (epoch,) = [event for event in map(events.parse, lines) if isinstance(event, events.Epoch)]
    shares = f"train {epoch.train_accuracy:.2%}  hold-out {epoch.holdout_accuracy:.2%}"
    return f"loss {epoch.train_loss:.4f}  {shares}"


def test_training_tells_programs_what_it_logs(safelight: Safelight, data: Path) -> None:
    done = safelight(
        "train", "mnist", *as_settings(QUICK), "--name", "tiny", "--dataset", data, "--run", "first", "--json"
    )
    assert done.code == 0
    said, logged = done.out.splitlines(), Path("first", "events.jsonl").read_text().splitlines()
    kinds = [events.parse(line).event for line in said]
    assert kinds == ["started", *["progress"] * 4, "epoch", "checkpointed", "published"]
    assert logged[:2] == said[:2]
    assert logged[-4:] == said[-4:]
    assert set(logged) <= set(said)


def test_a_run_has_a_folder_by_its_model_s_name_and_the_time(safelight: Safelight, data: Path) -> None:
    done = safelight(
        "train", "mnist", *as_settings(QUICK), "--name", "tiny", "--dataset", data, "--no-publish", "--device", "cpu"
    )
    (run,) = Path("runs").iterdir()
    assert re.fullmatch(r"tiny-\d{8}-\d{6}", run.name)
    assert done.err.endswith(f"trained; publish it with:\n  safelight export {run}\n")
    assert "\npublished tiny@1 (active): " in safelight("export", run).err


def test_a_second_version_says_how_to_let_it_answer(safelight: Safelight, data: Path) -> None:
    safelight("train", "mnist", *as_settings(QUICK), "--name", "tiny", "--dataset", data, "--run", "first")
    done = safelight("export", "first")
    assert "\npublished tiny@2: " in done.err
    assert done.err.endswith("let it answer with:\n  safelight models activate tiny@2\n")
    assert safelight("models", "activate", "tiny@2") == Done(0, "", "tiny@2 is active\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["imagenet"], f"no recipe is called 'imagenet'; there is {', '.join(RECIPES)}"),
        (
            ["mnist", "--set", "epoch=3"],
            f"recipe mnist has no setting 'epoch'; it has {', '.join(type(TINY).model_fields)}",
        ),
        (["mnist", "--set", "epochs=0"], "epochs=0: Input should be greater than 0"),
        (["mnist", "--set", "epochs"], "'epochs' isn't a setting; write key=value, for example epochs=3"),
        (["mnist"], "MNIST needs a data folder: set SAFELIGHT_DATA or pass --data, and --download to fetch it there"),
        (
            ["cifar10", "--data", "nowhere"],
            "no CIFAR-10: looked for nowhere/cifar10.zip and nowhere/cifar-10-batches-py (Dataset not found or "
            "corrupted. You can use download=True to download it); set SAFELIGHT_DATA or --data to the folder that "
            "has it, or add --download to fetch it",
        ),
        (
            ["mnist", "--dataset", "pets[/b].zip", "--name", "pets"],  # brackets are no markup
            "no data set '{here}/pets[/b].zip': it is neither mnist, cifar10, nor an existing folder or zip of class "
            "folders",
        ),
        (
            ["mnist", "--name", "Pets"],
            "'Pets' can't be a model's name: a name is 1 to 63 of a-z, 0-9, '.', '_' and '-', and starts with a "
            "letter or digit",
        ),
        (
            ["mnist", "--set", "network=vgg"],
            f"network vgg with {RECIPES['mnist'].arguments} can't be built: 'vgg'",
        ),
        (
            ["cifar10", "--set", "input.channels=1"],
            f"network convnet with {RECIPES['cifar10'].arguments} can't be built: stem_width is 24; patches have only "
            "8 directions to whiten along",
        ),
        (
            ["mlp-30", "--set", "smaller.share=0.5", "--set", "smaller.scale=0.75"],
            f"network perceptron with {RECIPES['mlp-30'].arguments} can't be built: mat1 and mat2 shapes cannot be "
            "multiplied (1x441 and 784x30)",
        ),
        (["mnist", "--device", "tpu"], "device 'tpu' isn't available here; there is {devices}, or auto"),
        (["--resume", "nowhere"], "nowhere holds no run: there is no run.json in it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_can_not_be_trained_is_told_in_one_line(safelight: Safelight, words: list[str], message: str) -> None:
    message = message.replace("{devices}", ", ".join(available_devices())).replace("{here}", os.getcwd())
    assert safelight("train", *words) == Done(1, "", f"error: {message}\n")


@pytest.mark.parametrize("words", [[], ["mnist", "--resume", "runs/first"]])
def test_a_run_is_begun_or_gone_on_with(safelight: Safelight, words: list[str]) -> None:
    done = safelight("train", *words)
    assert done.code == 2
    assert "name a recipe, or a run to --resume; one of the two" in done.err


@pytest.mark.parametrize("words", [["--set", "epochs=2"], ["--seed", "0"], ["--name", "pets"], ["--strict"]])
def test_what_a_run_trains_is_settled(safelight: Safelight, words: list[str]) -> None:
    done = safelight("train", "--resume", "runs/first", *words)
    assert (done.code, done.out) == (2, "")
    assert "what a run trains is settled" in done.err


def test_another_data_set_asks_for_another_name(safelight: Safelight, data: Path) -> None:
    done = safelight("train", "mnist", "--dataset", data)
    assert (done.code, done.out) == (2, "")
    assert "another data set makes another model than mnist" in done.err


def test_what_is_left_out_of_the_data_is_named(safelight: Safelight, data: Path) -> None:
    (data / "test" / "filled" / "bad.png").write_bytes(b"no picture")
    note = "note: 1 of the data set's files are left out: test/filled/bad.png: this is no image of a format that is"
    done = safelight("train", "mnist", *as_settings(QUICK), "--name", "tiny", "--dataset", data, "--run", "first")
    assert done.err.startswith(note)
    assert safelight("evaluate", "tiny", "--dataset", data).err.startswith(note)


def test_the_command_that_goes_on_has_what_the_run_does_not_remember(tmp_path: Path) -> None:
    here = Options(artifacts=Path("artifacts"))
    there = Options(artifacts=tmp_path, data=Path("my data"), device="cpu", activate=True)
    assert _go_on("train", Path("runs/a"), here) == "safelight train --resume runs/a"
    assert _go_on("train", Path("runs/a"), there, publish=False) == (
        f"safelight train --resume runs/a --data 'my data' --artifacts {tmp_path} --device cpu --activate --no-publish"
    )


def test_a_run_that_diverges_exits_with_3(safelight: Safelight, data: Path) -> None:
    words = ["--name", "tiny", "--dataset", data, "--run", "first", "--set", "optimizer.weight_decay=20"]
    done = safelight("train", "mnist", *as_settings(TINY), *words)
    assert done.code == 3
    assert re.search(
        r"\nerror: the loss is not finite at step \d+; the weights of step \d+ are kept\. "
        r"Lower the optimizer's learning rate\n$",
        done.err,
    )
    *_, last = Path("first", "events.jsonl").read_text().splitlines()
    failed = events.parse(last)
    assert isinstance(failed, events.Failed)
    assert (failed.code, failed.message) == ("diverged", done.err.splitlines()[-1].removeprefix("error: "))


def test_an_unfinished_run_is_not_exported(safelight: Safelight, data: Path) -> None:
    safelight(
        "train",
        "mnist",
        *as_settings(QUICK),
        "--name",
        "tiny",
        "--dataset",
        data,
        "--run",
        "first",
        "--set",
        "optimizer.weight_decay=1e30",
    )
    assert safelight("export", "first") == Done(
        1, "", "error: first stands at step 0 of 4; go on with it: safelight train --resume first\n"
    )


# --- evaluate ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny_run: Path) -> tuple[str, str, str]:
    """The words that measure tiny@1."""
    return "--dataset", str(tiny_run / "squares"), f"--artifacts={tiny_run / 'artifacts'}"


def test_a_model_is_measured_for_programs(safelight: Safelight, trained: tuple[str, ...], tiny_run: Path) -> None:
    done = safelight("evaluate", "tiny", "--json", *trained)
    manifest = store.read_manifest(tiny_run / "artifacts", BundleRef("tiny", "1"))
    assert (done.code, done.err) == (0, "")
    figures = json.loads(done.out)
    assert [sum(row) for row in figures.pop("confusion")] == [40, 40]
    found = Metrics.model_validate(figures)
    assert (found.n, found.accuracy) == (80, pytest.approx(manifest.metrics.accuracy))


def test_a_model_is_measured_for_people(safelight: Safelight, trained: tuple[str, ...]) -> None:
    done = safelight("evaluate", "tiny@1", *trained)
    assert (done.code, done.err) == (0, "")
    assert "tiny@1 on 80 test images" in done.out
    for figure in ("accuracy, single view", "macro-F1", "NLL (before calibration)", "recall of hollow"):
        assert figure in done.out
    assert "test-time" not in done.out


# --- module -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_model_s_module_is_written_for_another_server(
    safelight: Safelight, tiny: Path, tmp_path: Path, precision: str
) -> None:
    done = safelight("module", "tiny@1", "--precision", precision, "--output", tmp_path / "out.ts")
    assert (done.code, done.out) == (0, "")
    assert re.fullmatch(
        rf"wrote .*/out\.ts: tiny@1 in {precision}; on the golden samples no probability differs by more than "
        r"\d\.\de-\d\d, and [0-5] best classes\n",
        done.err,
    )
    written = torch.jit.load(tmp_path / "out.ts")
    assert {str(parameter.dtype) for parameter in written.parameters()} == {f"torch.{precision}"}
    own = torch.jit.load(tiny / "tiny" / "1" / MODULE)
    images = squares().test.images
    assert (written(images).softmax(1) - own(images).softmax(1)).abs().max() <= 0.05
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out.ts"]


def test_another_best_class_is_another_answer_unless_both_were_nearly_tied() -> None:
    chances = np.array([[0.6, 0.3, 0.1], [0.449, 0.448, 0.103], [0.44, 0.445, 0.115], [0.2, 0.2, 0.6]])
    others = chances[:, [1, 0, 2]]  # the first two change places
    assert published._other_answers(np.log(chances), np.log(others), temperature=1.0) == 1
    assert published._other_answers(np.log(chances), np.log(chances), temperature=1.0) == 0
    assert published._other_answers(np.log(chances), np.log(others), temperature=0.1) == 3  # far apart by then


@pytest.mark.usefixtures("tiny")
def test_a_module_that_is_too_far_from_float32_is_not_written(
    safelight: Safelight, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "MAX_PROBABILITY_DIFFERENCE", 0.0)
    done = safelight("module", "tiny", "--precision", "bfloat16", "--output", "out.ts")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: tiny@1 in bfloat16 differs from float32 in ")
    assert [path.name for path in Path().iterdir() if "out" in path.name] == []


@pytest.mark.usefixtures("tiny")
def test_a_precision_that_is_not_offered_is_wrong_usage(safelight: Safelight) -> None:
    done = safelight("module", "tiny", "--precision", "int4", "--output", "out.ts")
    assert (done.code, done.out) == (2, "")
    assert "it is float32 or bfloat16, not int4" in done.err


# --- predict ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """A shade of grey, no picture, and another shade."""
    for name, content in (("three[a].png", grey(3)), ("notes.txt", b"dear diary"), ("nine.png", grey(9))):
        (tmp_path / name).write_bytes(content)
    return ["three[a].png", "notes.txt", "nine.png"]


def test_answers_for_programs_with_a_bad_file_among_them(safelight: Safelight, pictures: list[str]) -> None:
    done = safelight("predict", *pictures, "--model", "greys", "--top-k", 2, "--json")
    assert (done.code, done.err) == (1, "")
    first, bad, last = json.loads(done.out)
    assert [answer["file"] for answer in (first, bad, last)] == pictures
    assert [answer["label"] for answer in (first, last)] == ["grey-3", "grey-9"]
    assert [len(answer["scores"]) for answer in (first, last)] == [2, 2]
    assert bad.keys() == {"file", "error"}


def test_answers_for_people_with_a_bad_file_among_them(safelight: Safelight, pictures: list[str]) -> None:
    done = safelight("predict", *pictures, "--model", "greys@1")
    assert (done.code, done.err) == (1, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.out.splitlines() if "│" in line]
    firsts = {row[0]: row[1] for row in rows if row[0]}
    assert firsts == {"three[a].png": "grey-3", "notes.txt": "", "nine.png": "grey-9"}


def test_good_files_exit_with_0(safelight: Safelight, pictures: list[str]) -> None:
    assert safelight("predict", pictures[0], "-m", "greys", "--top-k", 1).code == 0


@pytest.mark.parametrize("model", ["pets", "pets@", "mnist"])
def test_an_unknown_model_is_told_with_those_there_are(safelight: Safelight, pictures: list[str], model: str) -> None:
    name = model.rstrip("@")
    message = f"error: there is no model '{name}' in artifacts; there is greys\n"
    assert safelight("predict", *pictures, "--model", model) == Done(1, "", message)


def test_a_model_of_one_s_own_is_measured_on_data_that_is_named(safelight: Safelight, tiny_run: Path) -> None:
    done = safelight("evaluate", "tiny", f"--artifacts={tiny_run / 'artifacts'}")
    message = "error: tiny@1 was trained on 'squares', a folder or zip; say where it is with --dataset\n"
    assert done == Done(1, "", message)


def test_a_wrong_name_is_told(safelight: Safelight, pictures: list[str]) -> None:
    done = safelight("predict", *pictures, "--model", "../greys@1")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith("error: '../greys' can't be a model's name: a name is 1 to 63 of a-z")


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_for_programs(safelight: Safelight) -> None:
    done = safelight("recipes", "--json")
    rows = json.loads(done.out)
    assert [row["name"] for row in rows] == list(RECIPES)
    for row, recipe in zip(rows, RECIPES.values(), strict=True):
        assert row.pop("parameters") >= 7850  # of a linear model of MNIST
        assert row.pop("macs") >= 7840
        assert row == recipe.model_dump(mode="json")


def test_recipes_are_listed_for_people(safelight: Safelight) -> None:
    done = safelight("recipes")
    assert done.code == 0
    for recipe in RECIPES.values():
        assert recipe.name in done.out
        assert recipe.expected_accuracy is None or f"{recipe.expected_accuracy:.1%}" in done.out


# --- models -----------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_a_bad_one_says_why(safelight: Safelight, artifacts: Path) -> None:
    make_bundle(artifacts)
    make_bundle(artifacts, "broken", activate=False)
    (artifacts / "broken" / "1" / "manifest.json").write_text("{")
    done = safelight("models", "list", "--json")
    error = json.loads(done.out)[0].pop("error")
    facts = {"classes": 16, "accuracy": 1.0, "error": None}
    assert error.startswith("manifest.json: the file: Invalid JSON")
    assert json.loads(done.out) == [
        {"model": "broken", "version": "1", "active": True, "classes": None, "accuracy": None, "error": error},
        {"model": "greys", "version": "1", "active": False, **facts},
        {"model": "greys", "version": "2", "active": True, **facts},
    ]
    table = safelight("models", "list")
    assert (table.code, table.err) == (0, "")
    assert table.out.count("greys") == 2
    assert table.out.count("yes") == 2
    assert table.out.count("100.00%") == 2


def test_a_folder_without_models_lists_none(safelight: Safelight, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert safelight("models", "list", "--json", "--artifacts", "empty") == Done(0, "[]\n", "")


def test_no_folder_is_told_in_one_line(safelight: Safelight) -> None:
    done = safelight("models", "list", "--artifacts", "nowhere")
    assert done == Done(1, "", "error: [Errno 2] No such file or directory: 'nowhere'\n")


def test_the_artifacts_folder_may_come_from_the_environment(
    safelight: Safelight, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAFELIGHT_ARTIFACTS", str(tiny.rename(tiny.with_name("elsewhere"))))
    assert [row["model"] for row in json.loads(safelight("models", "list", "--json").out)] == ["greys", "tiny"]


def test_a_model_is_shown_to_programs_and_to_people(safelight: Safelight, tiny_run: Path) -> None:
    artifacts = tiny_run / "artifacts"
    manifest = store.read_manifest(artifacts, BundleRef("tiny", "1"))
    assert Manifest.parse(safelight("models", "show", "tiny", "--json", "--artifacts", artifacts).out) == manifest
    done = safelight("models", "show", "tiny", "--artifacts", artifacts)
    assert "Where not to trust it" in done.out
    assert report.model_card(manifest).split()[1] in done.out


@pytest.mark.parametrize("words", [["tiny@1"], ["tiny"], []])
def test_good_models_are_verified(safelight: Safelight, tiny_run: Path, words: list[str]) -> None:
    done = safelight("models", "verify", *words, "--artifacts", tiny_run / "artifacts")
    assert done == Done(0, "tiny@1: good\n", "")


def test_a_bad_version_is_found_among_good_ones_and_is_not_activated(safelight: Safelight, tiny_run: Path) -> None:
    artifacts = Path(shutil.copytree(tiny_run / "artifacts", "copies"))
    shutil.copytree(artifacts / "tiny", artifacts / "other")
    (artifacts / "other" / "1" / MODULE).unlink()
    problem = "manifest.json is of tiny@1 but lies in the folder of other@1"
    done = safelight("models", "verify", "--json", "--artifacts", artifacts)
    assert (done.code, json.loads(done.out)) == (
        1,
        [{"version": "other@1", "error": problem}, {"version": "tiny@1", "error": None}],
    )
    done = safelight("models", "verify", "--artifacts", artifacts)
    assert done == Done(1, f"other@1: {problem}\ntiny@1: good\n", "")
    done = safelight("models", "activate", "other@1", "--artifacts", artifacts)
    assert done == Done(1, "", f"error: {problem}\n")


def test_another_version_is_activated_and_rolled_back(safelight: Safelight, tiny: Path, data: Path) -> None:
    safelight(
        "train", "mnist", *as_settings(QUICK), "--name", "tiny", "--dataset", data, "--run", "first", "--activate"
    )
    assert store.active(tiny, "tiny") == "2"
    assert safelight("models", "activate", "tiny@1") == Done(0, "", "tiny@1 is active\n")
    assert store.active(tiny, "tiny") == "1"


def test_a_model_that_fails_its_golden_samples_is_not_activated(safelight: Safelight, artifacts: Path) -> None:
    ref = make_bundle(artifacts, module=Greys(2.0), activate=False)
    done = safelight("models", "activate", ref)
    assert done.code == 1
    assert done.err.startswith("error: no network 'convnet' can be built as the manifest says: ")
    assert store.active(artifacts, "greys") == "1"


# --- data sets --------------------------------------------------------------------------------------------------------


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A zip with a file too many."""
    path = tmp_path / "pets.zip"
    path.write_bytes(zipped(noise("grey-1", "dog") | {"dog/notes.txt": b"hello"}))
    return path


def test_a_checked_data_set_is_shown_as_a_table(safelight: Safelight, pets: Path) -> None:
    done = safelight("dataset", "check", pets, "--model", "greys")
    assert (done.code, done.err) == (0, "")
    table, *lines = done.out.partition("left out: ")
    assert re.findall(r"│ +(\S+) +│ +(\d+) +│ +│ +│ +(\S+) +│", table) == [
        ("dog", "10", "new"),
        ("grey-1", "10", "grey-1"),
    ]
    assert "".join(lines).splitlines()[:2] == [
        "left out: dog/notes.txt: this is no image of a format that is read here; send one of PNG, JPEG, WEBP, GIF, "
        "BMP, TIFF (not_an_image)",
        "1 files rejected, 0 duplicates and 0 near-duplicates left out",
    ]
    assert re.fullmatch("the data set is ds-[0-9a-f]{16}", done.out.splitlines()[-1])


def test_a_checked_data_set_is_written_and_printed_for_a_program(
    safelight: Safelight, pets: Path, tmp_path: Path
) -> None:
    done = safelight("dataset", "check", pets, "--into", "kept", "--name", "mine", "--json")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out) == json.loads((tmp_path / "kept" / "dataset.json").read_text())
    assert json.loads(done.out)["name"] == "mine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["one.zip"],
            {
                "code": "too_few_classes",
                "message": "only one class, 'cat'; a classifier needs at least 2, a folder each",
                "classes": 1,
                "limit": 2,
            },
        ),
        (["none.zip"], {"code": "os_error", "message": "[Errno 2] No such file or directory: 'none.zip'"}),
        (
            ["one.zip", "--model", "nope"],
            {"code": "safelight_error", "message": "there is no model 'nope' in artifacts; there is greys"},
        ),
    ],
    ids=["refused", "not-there", "no-model"],
)
def test_a_refused_data_set_exits_with_1_and_the_reason(
    safelight: Safelight, tmp_path: Path, words: list[str], said: dict[str, object]
) -> None:
    (tmp_path / "one.zip").write_bytes(zipped(noise("cat")))
    done = safelight("dataset", "check", *words, "--json")
    assert (done.code, json.loads(done.out), done.err) == (1, said, "")
    plain = safelight("dataset", "check", *words)
    assert (plain.code, plain.out, plain.err) == (1, "", f"error: {said['message']}\n")


def test_a_limit_is_for_built_in_sets(safelight: Safelight, pets: Path) -> None:
    done = safelight("dataset", "check", pets, "--limit", "20")
    message = "error: a limit is for mnist and cifar10; of your own pictures, pack as many as you want\n"
    assert (done.code, done.err) == (1, message)


# --- as a process -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "code", "err"),
    [
        (["models", "verify", "greys@2"], 1, ""),
        (["train", "imagenet"], 1, f"error: no recipe is called 'imagenet'; there is {', '.join(RECIPES)}\n"),
        (["predict", "none.png", "--model", "greys"], 1, ""),
        (["models", "list"], 0, ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_process_exits_with_the_same(artifacts: Path, words: list[str], code: int, err: str) -> None:
    process = subprocess.run(
        [sys.executable, "-m", "training", *words],
        env=os.environ | {"SAFELIGHT_ARTIFACTS": str(artifacts)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (process.returncode, process.stderr) == (code, err)
