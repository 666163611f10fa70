"""The command line: dispatch and tables only. What the commands do stands in `runs`, `published` and the store."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from training import SafelightError
from training.bundle.manifest import BundleError

app = typer.Typer(
    help="Train and serve small image classifiers on your own machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
models_app = typer.Typer(help="List, show, activate and verify the models under artifacts/.", no_args_is_help=True)
app.add_typer(models_app, name="models")
dataset_app = typer.Typer(help="Check pictures before training on them.", no_args_is_help=True)
app.add_typer(dataset_app, name="dataset")

out = Console(markup=False, emoji=False)  # what is shown are names of files and classes
err = Console(stderr=True)

Artifacts = Annotated[Path, typer.Option(envvar="SAFELIGHT_ARTIFACTS", help="Where models live.")]
Data = Annotated[Path | None, typer.Option(envvar="SAFELIGHT_DATA", help="Folder with MNIST and CIFAR-10.")]
DeviceName = Annotated[str | None, typer.Option(envvar="SAFELIGHT_DEVICE", help="auto, cuda, cuda:1, mps or cpu.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Strict = Annotated[bool, typer.Option(help="Fail on a picture that can't be read, instead of skipping it.")]
Download = Annotated[bool, typer.Option(help="Fetch MNIST or CIFAR-10 into the data folder where it is missing.")]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL[@VERSION]", help="Without a version: the active one.")]

ARTIFACTS = Path("artifacts")


@app.command()
def train(
    recipe: Annotated[str | None, typer.Argument(help="A name from `safelight recipes`; not with --resume.")] = None,
    *,
    dataset: Annotated[str | None, typer.Option(help="mnist, cifar10, or a folder or zip of class folders.")] = None,
    name: Annotated[str | None, typer.Option(help="The model's name.  [default: the recipe's]")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same weights on the same machine.  [default: 0]")
    ] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder.  [default: runs/NAME-TIME]")] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="The run of the recipe's teacher.  [default: it is trained first]")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    publish: Annotated[bool, typer.Option(help="Export and publish at the end.")] = True,
    activate: Annotated[bool, typer.Option(help="Let the new version answer even where another is active.")] = False,
    strict: Strict = False,
    download: Download = False,
    data: Data = None,
    artifacts: Artifacts = ARTIFACTS,
    device: DeviceName = None,
    as_json: AsJson = False,
) -> None:
    """Train a model and publish it as a new version.

    Ctrl-C leaves a checkpoint and says how to go on; going on ends with the weights of a run that was never stopped.

    Examples:

        safelight train mnist

        safelight train cifar10 --set epochs=3 --seed 1

        safelight train cifar10 --dataset pets.zip --name pets
    """
    from training import runs
    from training.bundle.store import check_model_name
    from training.datasets import find_source
    from training.ranks import started_together
    from training.recipes import override
    from training.recipes import recipe as find_recipe

    if (recipe is None) == (resume is None):
        raise typer.BadParameter("name a recipe, or a run to --resume; one of the two")
    if resume is not None:
        if any(value is not None for value in (dataset, name, settings, seed, run, teacher)) or strict:
            raise typer.BadParameter("what a run trains is settled: --resume goes with none of the options that say it")
        folder = resume
    else:
        chosen = override(find_recipe(recipe or ""), settings or [])
        if name is None and dataset not in (None, chosen.dataset):
            raise typer.BadParameter(f"another data set makes another model than {chosen.name}: give it a --name")
        model = name or chosen.name
        check_model_name(model)
        if run is None and started_together():
            raise typer.BadParameter("processes that train together must be told their --run: a folder for all of them")
        folder = run or Path("runs") / f"{model}-{datetime.now():%Y%m%d-%H%M%S}"
        source = find_source(dataset or chosen.dataset)
        plan = {"model": model, "recipe": chosen, "seed": seed or 0, "dataset": source, "strict": strict}
        plan |= {"teacher": teacher.absolute()} if teacher else {}
        runs.create(folder, runs.Plan.model_validate(plan))
    options = runs.Options(artifacts=artifacts, data=data, device=device, download=download, activate=activate)
    _execute(folder, options, resume=resume is not None, publish=publish, as_json=as_json)


@app.command()
def finetune(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL[@VERSION]", help="The base to start from; not with --resume.")
    ] = None,
    *,
    dataset: Annotated[
        str | None, typer.Option(help="A zip, tar or folder of class folders, or mnist or cifar10.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of mnist or cifar10, this many pictures.")] = None,
    name: Annotated[str | None, typer.Option(help="The new model's name.  [default: the base's]")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of the tuning.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same weights on the same machine.  [default: 0]")
    ] = None,
    promote: Annotated[str | None, typer.Option(help="if_better, always or never.  [default: if_better]")] = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder.  [default: runs/NAME-TIME]")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    data: Data = None,
    artifacts: Artifacts = ARTIFACTS,
    device: DeviceName = None,
    guest: Annotated[bool, typer.Option("--guest", help="Run at the lowest priority.")] = False,
    memory_bytes: Annotated[int | None, typer.Option(min=1, help="Take no more memory than this.")] = None,
    deadline_seconds: Annotated[float | None, typer.Option(min=0, help="Stop after this time.")] = None,
    stop_at_eof: Annotated[
        bool, typer.Option("--stop-at-eof", help="Stop when standard input ends, as when a parent process dies.")
    ] = False,
    holdable: Annotated[bool, typer.Option("--holdable", help="Wait in place from SIGTSTP to SIGCONT.")] = False,
    as_json: AsJson = False,
) -> None:
    """Make a published model better, or a new one from it, with pictures of your own.

    The new version is tested on pictures that it wasn't trained on, against the version that answers now, and becomes
    the active one only if it is better.

    Examples:

        safelight finetune cifar10 --dataset pets.zip --name pets

        safelight finetune mnist --dataset our-digits/ --promote never
    """
    from training import finetune as finetuning
    from training import guest as guests
    from training.bundle.tuning import Tuning
    from training.datasets import find_source
    from training.task import Plan

    if guest:
        guests.step_back()
    if (model is None) == (resume is None):
        raise typer.BadParameter("name a model, or a run to --resume; one of the two")
    if promote not in (None, "if_better", "always", "never"):
        raise typer.BadParameter(f"--promote is if_better, always or never, not {promote}")
    if resume is not None:
        folder = resume
    else:
        if dataset is None:
            raise typer.BadParameter("say what to learn from with --dataset")
        base = _ref(artifacts, model or "")
        plan = Plan.model_validate(
            {
                "model": base.model,
                "version": base.version,
                "dataset": find_source(dataset),
                "limit": limit,
                "name": name or base.model,
                "tuning": Tuning.from_words(settings or []),
                "seed": seed or 0,
                "promote": promote or "if_better",
            }
        )
        folder = run or Path("runs") / f"{plan.name}-{datetime.now():%Y%m%d-%H%M%S}"
        finetuning.create(folder, plan)
    options = finetuning.Options(artifacts, data, device, deadline_seconds, holdable, memory_bytes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if stop_at_eof:
        guests.stop_at_eof()
    _finetune(folder, options, as_json)


def _finetune(folder: Path, options: Any, as_json: bool) -> None:
    from training import finetune as finetuning
    from training import loop, tune

    try:
        with _events(as_json) as emit:
            result = finetuning.execute(folder, options, emit)
    except (loop.Interrupted, KeyboardInterrupt):
        _say(f"stopped. Go on with:\n  {_go_on('finetune', folder, options)}")
        raise typer.Exit(130) from None
    except (loop.Diverged, tune.DeadlinePassed, MemoryError, RuntimeError, SystemError) as error:
        _say(f"[red]error:[/red] {escape(finetuning.failure(error).message)}")
        raise typer.Exit(3) from None
    _say(escape(result["summary"]))
    ref = f"{result['model']}@{result['version']}"
    _say(f"published [b]{ref}[/b]{' (active)' if result['promoted'] else ''}")
    if not result["promoted"]:
        _say(f"let it answer all the same with:\n  safelight models activate {ref}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="The folder of a finished run.")],
    *,
    activate: Annotated[bool, typer.Option(help="Let the new version answer even where another is active.")] = False,
    data: Data = None,
    artifacts: Artifacts = ARTIFACTS,
    device: DeviceName = None,
    as_json: AsJson = False,
) -> None:
    """Measure a finished run on its test set and publish it as a new version.

    `train` does this by itself; this is for a run that was made with --no-publish.
    """
    from training import runs

    runs.require_finished(run)
    options = runs.Options(artifacts=artifacts, data=data, device=device, activate=activate)
    _execute(run, options, resume=True, publish=True, as_json=as_json)


@contextmanager
def _events(as_json: bool) -> Iterator[Callable[[Any], None]]:
    """Shown to people on stderr; to programs, where they ask for it, a line of JSON each on stdout."""
    from training.display import Display

    with Display(err) as display:

        def emit(event: Any) -> None:
            display(event)
            if as_json:
                print(event.model_dump_json(), flush=True)

        yield emit


def _execute(folder: Path, options: Any, *, resume: bool, publish: bool, as_json: bool) -> None:
    from training import loop, ranks, runs

    # Beside the loop, which finishes its step first, both signals stop at once; what is unfinished is cleaned up.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _events(as_json) as emit:
            published = runs.execute(folder, options, emit, resume=resume, publish=publish)
    except loop.Interrupted as stop:
        _say(f"{stop}; a checkpoint is kept. Go on with:\n  {_go_on('train', folder, options, publish)}")
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        _say(f"stopped. Go on with:\n  {_go_on('train', folder, options, publish)}")
        raise typer.Exit(130) from None
    except loop.Diverged as error:
        _say(f"[red]error:[/red] {escape(str(error))}")
        raise typer.Exit(3) from None
    if not ranks.is_first():
        os._exit(0)  # nothing is left to do, and torch aborted one process of 40 as that took itself down
    if published is None:
        _say(f"trained; publish it with:\n  safelight export {escape(str(folder))}")
        return
    metrics = published.metrics
    _say(
        f"published [b]{published.ref}[/b]{' (active)' if published.is_active else ''}: {metrics.accuracy:.2%} of "
        f"{metrics.n} test images, ECE {metrics.ece:.2%}"
    )
    if not published.is_active:
        _say(f"let it answer with:\n  safelight models activate {published.ref}")


@app.command()
def evaluate(
    model: ModelArgument,
    *,
    dataset: Annotated[str | None, typer.Option(help="Another data set than the one it was trained on.")] = None,
    tta: Annotated[bool, typer.Option(help="Measure test-time augmentation too, as a separate figure.")] = False,
    strict: Strict = False,
    download: Download = False,
    data: Data = None,
    artifacts: Artifacts = ARTIFACTS,
    device: DeviceName = None,
    as_json: AsJson = False,
) -> None:
    """Measure a published model on a test set: the very module that is served, one view a picture.

    Prints accuracy, per-class recall, macro-F1, NLL, ECE before and after calibration, and the confusion matrix.
    """
    from training import published

    result = published.evaluate(
        _ref(artifacts, model),
        artifacts,
        dataset=dataset,
        data=data,
        device=device,
        tta=tta,
        strict=strict,
        download=download,
    )
    if result.note:
        _say(f"[yellow]note:[/yellow] {escape(result.note)}")
    metrics = result.metrics
    if as_json:
        print(json.dumps(metrics.model_dump() | {"confusion": result.confusion}))
        return
    table = Table(title=f"{result.ref} on {metrics.n} test images")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("accuracy, single view", f"{metrics.accuracy:.2%}")
    if metrics.accuracy_tta is not None:
        table.add_row("accuracy, test-time augmentation", f"{metrics.accuracy_tta:.2%}")
    table.add_row("macro-F1", f"{metrics.macro_f1:.4f}")
    table.add_row("NLL (before calibration)", f"{metrics.nll:.4f} ({metrics.nll_uncalibrated:.4f})")
    table.add_row("ECE (before calibration)", f"{metrics.ece:.2%} ({metrics.ece_uncalibrated:.2%})", end_section=True)
    for label, recall in metrics.per_class_recall.items():
        table.add_row(f"recall of {label}", f"{recall:.2%}")
    out.print(table)
    out.print(_confusion_table(list(metrics.per_class_recall), result.confusion))


def _confusion_table(classes: list[str], counts: list[list[int]]) -> Table:
    table = Table("true \\ predicted", *classes, title="confusion")
    for label, row in zip(classes, counts, strict=True):
        table.add_row(label, *(str(count) if count else "" for count in row))
    return table


@app.command()
def predict(
    files: Annotated[list[Path], typer.Argument(help="Pictures: PNG, JPEG, WebP, GIF, BMP or TIFF.")],
    *,
    model: Annotated[str, typer.Option("--model", "-m", metavar="MODEL[@VERSION]")] = "mnist",
    top_k: Annotated[int, typer.Option(min=1, help="How many classes to show for each picture.")] = 3,
    artifacts: Artifacts = ARTIFACTS,
    device: DeviceName = None,
    as_json: AsJson = False,
) -> None:
    """Classify picture files, without a server. Exits with 1 if any of them can't be read."""
    from training import published

    results = published.predict(_ref(artifacts, model), artifacts, files, top_k=top_k, device=device)
    if as_json:
        print(json.dumps([published.as_json(result) for result in results], indent=1))
    else:
        table = Table("picture", "label", "probability", "next", "in distribution")
        for result in results:
            table.add_row(str(result.path), *published.as_row(result))
        out.print(table)
    if any(result.error for result in results):
        raise typer.Exit(1)


@app.command()
def module(
    model: ModelArgument,
    *,
    output: Annotated[Path, typer.Option(help="The file to write.")],
    precision: Annotated[str, typer.Option(help="What it computes in: float32 or bfloat16.")] = "float32",
    artifacts: Artifacts = ARTIFACTS,
) -> None:
    """Write a published model as one TorchScript file, for another server than this one.

    It takes uint8 pictures [N, C, H, W] in batches of any size and gives float32 logits; torch alone can load it.
    Processors with AMX are faster in bfloat16, others in float32.

    Example:

        safelight module cifar10@3 --precision bfloat16 --output cifar10.ts
    """
    from training import published

    if precision not in published.DTYPES:
        raise typer.BadParameter(f"it is {' or '.join(published.DTYPES)}, not {precision}", param_hint="--precision")
    ref = _ref(artifacts, model)
    agreement = published.write_module(ref, artifacts, output, precision)
    _say(
        f"wrote {escape(str(output))}: {ref} in {precision}; on the golden samples no probability differs by more than "
        f"{agreement.probability_difference:.1e}, and {agreement.argmax_differences} best classes"
    )


@app.command()
def recipes(as_json: AsJson = False) -> None:
    """List the recipes, with the size and the cost of their networks and the accuracy to expect."""
    from training.networks import cost
    from training.recipes import RECIPES

    costs = {recipe.name: cost(recipe) for recipe in RECIPES.values()}
    if as_json:
        rows = [
            recipe.model_dump(mode="json") | {"parameters": costs[recipe.name][0], "macs": costs[recipe.name][1]}
            for recipe in RECIPES.values()
        ]
        print(json.dumps(rows, indent=1))
        return
    table = Table(Column("recipe", no_wrap=True), "what", "parameters", "MACs", "epochs", "expected accuracy")
    for recipe in RECIPES.values():
        parameters, macs = costs[recipe.name]
        expected = "" if recipe.expected_accuracy is None else f"{recipe.expected_accuracy:.1%}"
        table.add_row(
            recipe.name, recipe.summary, f"{parameters:,}", f"{macs / 1e6:.1f} M", f"{recipe.epochs:g}", expected
        )
    out.print(table)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def serve(context: typer.Context) -> None:
    """Start the HTTP service, with settings from SAFELIGHT_* variables; `safelight serve --help` says more."""
    # Another program takes over: this package imports nothing of the service.
    os.execv(sys.executable, [sys.executable, "-m", "service", *context.args])


@models_app.command("list")
def list_models(artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False) -> None:
    """List every version of every model."""
    from training.bundle import store

    rows = []
    for name in store.models(artifacts):
        for ref in store.versions(artifacts, name):
            row: dict[str, Any] = {
                "model": name,
                "version": ref.version,
                "active": store.answering(artifacts, name) == ref,
            }
            try:
                manifest = store.read_manifest(artifacts, ref)
                row |= {"classes": len(manifest.classes), "accuracy": manifest.metrics.accuracy, "error": None}
            except BundleError as error:
                row |= {"classes": None, "accuracy": None, "error": str(error)}
            rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("model", "version", "active", "classes", "accuracy")
    for row in rows:
        facts = [row["error"], ""] if row["error"] else [str(row["classes"]), f"{row['accuracy']:.2%}"]
        table.add_row(row["model"], row["version"], "yes" if row["active"] else "", *facts)
    out.print(table)


@models_app.command()
def show(model: ModelArgument, artifacts: Artifacts = ARTIFACTS, as_json: AsJson = False) -> None:
    """Show one version: its model card, or with --json its manifest."""
    from rich.markdown import Markdown

    from training.bundle import store
    from training.report import CARD

    ref = _ref(artifacts, model)
    manifest = store.read_manifest(artifacts, ref)
    if as_json:
        print(manifest.model_dump_json(indent=1))
    else:
        out.print(Markdown((ref.path(artifacts) / "report" / CARD).read_text()))


@models_app.command()
def activate(model: Annotated[str, typer.Argument(metavar="MODEL@VERSION")], artifacts: Artifacts = ARTIFACTS) -> None:
    """Let a version answer requests that name none. It is verified first; a running service follows within a second."""
    from training import published
    from training.bundle import store

    ref = _ref(artifacts, model)
    published.verify(ref, artifacts)
    store.activate(artifacts, ref)
    _say(f"{ref} is active")


@models_app.command()
def verify(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL[@VERSION]]", help="All of them, if left out.")] = None,
    artifacts: Artifacts = ARTIFACTS,
    as_json: AsJson = False,
) -> None:
    """Check every digest and run the golden samples. Exits with 1 if any version fails."""
    from training import published
    from training.bundle import store

    refs = (
        [_ref(artifacts, model)]
        if model
        else [r for name in store.models(artifacts) for r in store.versions(artifacts, name)]
    )
    problems: dict[str, str | None] = {}
    for ref in refs:
        try:
            published.verify(ref, artifacts)
            problems[str(ref)] = None
        except BundleError as error:
            problems[str(ref)] = str(error)
    if as_json:
        print(json.dumps([{"version": ref, "error": problem} for ref, problem in problems.items()], indent=1))
    else:
        for name, problem in problems.items():
            out.print(f"{name}: {problem or 'good'}", highlight=False, soft_wrap=True)
    if any(problems.values()):
        raise typer.Exit(1)


@dataset_app.command("check")
def check_dataset(
    path: Annotated[str, typer.Argument(help="A zip, tar or folder of class folders; or mnist, cifar10.")],
    *,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL[@VERSION]", help="The model that the pictures are meant for.")
    ] = None,
    into: Annotated[Path | None, typer.Option(help="Write data.zip and dataset.json into this new folder.")] = None,
    name: Annotated[str | None, typer.Option(help="What to call it.  [default: the file's name]")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Of mnist or cifar10, so many training pictures.")] = None,
    data: Data = None,
    artifacts: Artifacts = ARTIFACTS,
    guest: Annotated[bool, typer.Option("--guest", help="Run at the lowest priority.")] = False,
    memory_bytes: Annotated[int | None, typer.Option(min=2**26, help="Allocate no more than this.")] = None,
    stop_at_eof: Annotated[bool, typer.Option("--stop-at-eof", help="Stop when stdin ends.")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a data set: decode every picture, find duplicates and contradictions, report. Exits with 1 if refused."""
    from training import guest as conduct
    from training import intake

    if guest:
        conduct.step_back()
    if memory_bytes:
        conduct.limit_memory(memory_bytes)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is unfinished is cleaned up
    if stop_at_eof:
        conduct.stop_at_eof()
    try:
        base = intake.Base.read(artifacts, _ref(artifacts, model)) if model else None
        with intake.opened(path, data, limit) as archive:
            report = intake.check(archive, name or Path(os.path.abspath(path)).stem, base=base, into=into)
    except (SafelightError, OSError, MemoryError) as error:
        if not as_json:
            raise
        print(json.dumps(_refusal(error)))
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    if as_json:
        print(report.model_dump_json())
    else:
        _show_report(report)


def _refusal(error: Exception) -> dict[str, Any]:
    """The last word of a check that failed, for the program that started it."""
    from training.events import code_of, is_disk_full

    if isinstance(error, SafelightError):
        return {"code": code_of(error), "message": str(error)} | error.facts
    if isinstance(error, MemoryError):
        return {"code": "out_of_memory", "message": "checking this data set needs more memory than it may have"}
    return {"code": "disk_full" if is_disk_full(error) else "os_error", "message": str(error)}


def _show_report(report: Any) -> None:
    table = Table("class", "images", "train", "test", "in the model", title=f"{report.name}: {report.images} images")
    known = report.base.known if report.base else {}
    for row in report.classes:
        cells = ("" if count is None else str(count) for count in (row.images, row.train, row.test))
        table.add_row(row.name, *cells, known.get(row.name, "new" if report.base else ""))
    out.print(table)
    for rejection in report.rejected.first[:10]:
        _tell(f"left out: {rejection.file}: {rejection.detail} ({rejection.code})")
    for copy in (*report.duplicates.first[:5], *report.near_duplicates.first[:5]):
        _tell(f"left out: {copy.file} is {copy.of} again")
    left_out = (report.rejected.count, report.duplicates.count, report.near_duplicates.count)
    _tell("{} files rejected, {} duplicates and {} near-duplicates left out".format(*left_out))
    for note in report.notes:
        _tell(f"note: {note}")
    _tell(f"the data set is {report.id}")


def _tell(line: str) -> None:
    out.print(line, highlight=False, soft_wrap=True)


def _go_on(command: str, folder: Path, options: Any, publish: bool = True) -> str:
    """The command that goes on with a run, with the options that it doesn't remember by itself."""
    words = ["safelight", command, "--resume", str(folder)]
    words += ["--data", str(options.data)] if options.data else []
    words += ["--artifacts", str(options.artifacts)] if options.artifacts != ARTIFACTS else []
    words += ["--device", options.device] if options.device else []
    words += ["--activate"] if getattr(options, "activate", False) else []
    words += [] if publish else ["--no-publish"]
    return escape(shlex.join(words))


def _say(text: str) -> None:
    """Tell the person something. Lines aren't broken, so that a command in them can be copied."""
    err.print(text, highlight=False, soft_wrap=True)


def _ref(artifacts: Path, text: str) -> Any:
    """`model@version`, or `model` for the version that answers."""
    from training.bundle import store

    name, _, version = text.partition("@")
    if version:
        return store.BundleRef(name, version)
    if ref := store.answering(artifacts, name):
        return ref
    known = ", ".join(store.models(artifacts)) if artifacts.is_dir() else ""
    raise SafelightError(f"there is no model {name!r} in {artifacts}; there is {known or 'none'}")


def main() -> None:
    try:
        app(prog_name="safelight")
    except (SafelightError, OSError) as error:
        _say(f"[red]error:[/red] {escape(str(error))}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
