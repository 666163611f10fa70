"""Write the parts of the documentation that the code knows better: `make docs`. A test fails when they are out of step.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the functions below are the names.
"""

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import typer
from pydantic import BaseModel

from service.api import problems
from service.app import create_app
from service.settings import PREFIX, Settings
from training import archives, events, intake, layout
from training.__main__ import app as command_line
from training.bundle import store
from training.bundle.tuning import Tuning
from training.recipes import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def settings() -> str:
    """Every setting with its default."""
    rows = []
    for name, field in Settings.model_fields.items():
        default = "" if field.default is None else f"`{field.default}`"
        rows.append((f"`{PREFIX}{name.upper()}`", default, field.description or ""))
    return table(("variable", "default", "what"), rows)


def tuning() -> str:
    """Every setting of fine-tuning."""
    rows = [
        (f"`{name}`", "" if field.default is None else f"`{json.dumps(field.default)}`", field.description or "")
        for name, field in Tuning.model_fields.items()
    ]
    return table(("setting", "default", "what"), rows)


def recipe() -> str:
    """Every setting of a recipe."""
    rows = []
    for name, field in Recipe.model_fields.items():
        default = "" if field.is_required() or field.default is None else f"`{_plain(field.default)}`"
        rows.append((f"`{name}`", default, field.description or ""))
    return table(("setting", "default", "what"), rows)


def _plain(value: object) -> str:
    return value.model_dump_json() if isinstance(value, BaseModel) else json.dumps(value)


def errors() -> str:
    """Every code that a problem can carry."""
    kinds = [*problems.PROBLEMS.values(), problems.INVALID_PARAMETER, *problems.HTTP.values(), problems.INTERNAL]
    rows = [(f"`{kind.code}`", str(kind.status), kind.title) for kind in sorted(kinds, key=lambda kind: kind.status)]
    return table(("code", "status", "what"), rows)


def refusals() -> str:
    """Every reason to refuse a data set, with the first sentence of its documentation."""
    modules = (layout, archives, intake)
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    refused = [kind for kind in kinds if issubclass(kind, layout.DatasetError) and kind is not layout.DatasetError]
    rows = [(f"`{events.code_of(kind('x'))}`", (kind.__doc__ or "").split("\n")[0]) for kind in refused]
    rows.append(("`dataset_error`", "A built-in data set whose files aren't in SAFELIGHT_DATA."))
    rows.append(("`out_of_memory`", "Checking it needs more than SAFELIGHT_DATASET_MEMORY_BYTES."))
    return table(("reason", "what"), sorted(rows))


def routes() -> str:
    """Every call, as the OpenAPI document has it."""
    paths = create_app(Settings()).openapi()["paths"]
    rows = [
        (f"`{method.upper()} {path}`", call["description"].split("\n")[0])
        for path, methods in paths.items()
        for method, call in methods.items()
    ]
    return table(("call", "what"), rows)


def commands() -> str:
    """Every command with its help."""
    root = typer.main.get_command(command_line)
    rows = []
    for name, command in sorted(walk(root, "safelight")):
        rows.append((f"`{name}`", (command.help or "").split("\n")[0]))
    return table(("command", "what"), rows)


def walk(command: typer.core.TyperGroup, name: str) -> Iterable[tuple[str, typer.core.TyperCommand]]:
    for child_name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from walk(child, f"{name} {child_name}")
        else:
            yield f"{name} {child_name}", child


def results() -> str:
    """The shipped models, from their manifests."""
    artifacts = ROOT / "artifacts"
    rows = []
    for model in store.models(artifacts):
        version = store.active(artifacts, model)
        manifest = store.read_manifest(artifacts, store.BundleRef(model, version or "1"))
        metrics, training = manifest.metrics, manifest.training
        size = sum(facts.bytes for facts in manifest.files.values()) / 1e6
        rows.append(
            (
                f"`{model}`",
                f"{metrics.accuracy:.2%}",
                f"{metrics.accuracy_tta:.2%}" if metrics.accuracy_tta else "",
                f"{metrics.ece:.2%}",
                f"{manifest.network.parameters / 1e6:.2f} M",
                f"{manifest.network.macs / 1e6:.0f} M",
                f"{size:.1f} MB",
                f"{training.epochs:g} epochs, {training.seconds / 60:.1f} min",
            )
        )
    head = ("model", "accuracy", "with shifted views", "ECE", "parameters", "MACs", "bundle", "training")
    return table(head, rows)


GENERATED: dict[str, Callable[[], str]] = {
    "settings": settings,
    "recipe": recipe,
    "errors": errors,
    "refusals": refusals,
    "routes": routes,
    "commands": commands,
    "results": results,
    "tuning": tuning,
}


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def regenerate(text: str) -> str:
    """A page with each generated part made anew."""

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n{GENERATED[match[2]]()}\n{match[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", replace, text, flags=re.S)


def main() -> None:
    for page in PAGES:
        text = page.read_text()
        if (new := regenerate(text)) != text:
            page.write_text(new)
            print(f"wrote {page.relative_to(ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    main()
