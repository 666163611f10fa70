"""Who may import whom. Arrows point down; what isn't in the table isn't allowed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(path for package in ("service", "training") for path in (ROOT / package).rglob("*.py"))

# Of ours, what each part may import; the longest matching name counts. Its own part is always allowed.
ALLOWED = {
    "training.bundle": {"training"},
    "training.events": set(),
    "training.devices": {"training"},
    "training.recipes": {"training", "training.bundle"},
    "training.networks": {"training.recipes"},
    "training.augment": set(),
    "training.processors": set(),
    "training.ram": set(),
    "training.guest": {"training"},
    "training.hold": {"training", "training.events"},
    "training.duplicates": set(),
    "training.dataset_report": set(),
    "training.layout": {"training"},
    "training.archives": {"training", "training.layout"},
    "training.intake": {
        "training.builtin",  # only where a built-in set is asked for
        "training",
        "training.archives",
        "training.bundle",
        "training.dataset_report",
        "training.duplicates",
        "training.events",
        "training.layout",
        "training.processors",
    },
    "training.datasets": {"training.archives", "training.bundle", "training.layout", "training.processors"},
    "training.builtin": {"training", "training.bundle", "training.datasets"},
    "training.drawings": {"training.bundle"},
    "training.optimizers": {"training.recipes"},
    "training.costs": {"training.recipes"},
    "training.graph": set(),
    "training.gradient": {
        "training.costs",
        "training.devices",
        "training.graph",
        "training.networks",
        "training.recipes",
    },
    "training.ranks": set(),
    "training.lessons": {
        "training",
        "training.augment",
        "training.checkpoint",
        "training.datasets",
        "training.devices",
        "training.evaluate",
        "training.events",
        "training.networks",
        "training.recipes",
    },
    "training.insight": {"training.networks"},
    "training.board": {"training", "training.insight", "training.networks"},
    "training.calibrate": {"training.bundle"},
    "training.significance": set(),
    "training.gate": {"training.significance"},
    "training.evaluate": {"training.bundle", "training.calibrate"},
    "training.checkpoint": {"training", "training.bundle", "training.networks"},
    "training.loop": {
        "training",
        "training.augment",
        "training.board",  # only where the run is watched
        "training.checkpoint",
        "training.costs",
        "training.datasets",
        "training.devices",
        "training.drawings",
        "training.evaluate",
        "training.events",
        "training.gradient",
        "training.graph",
        "training.hold",
        "training.lessons",
        "training.networks",
        "training.optimizers",
        "training.ranks",
        "training.recipes",
    },
    "training": {"training"},
    "service.errors": {"training"},
    "service.telemetry": set(),
    "service.lifecycle": set(),
    "service.settings": {"training", "training.bundle", "training.processors"},
    "service.inference": {"service.errors", "service.telemetry", "training", "training.bundle", "training.processors"},
    "service.jobs": {
        "service.errors",
        "service.telemetry",
        "training",
        "training.bundle",
        "training.dataset_report",
        "training.events",
    },
    "service.api": {
        "service.errors",
        "service.telemetry",
        "service.lifecycle",
        "service.settings",
        "service.inference",
        "service.jobs",
        "training",
        "training.bundle",
        "training.dataset_report",
        "training.events",
    },
    "service.client": {"service.api", "service.jobs"},
    "service.app": {"service", "training", "training.devices", "training.ram"},
    "service.__main__": {"service", "training", "training.devices"},
}

THIRD_PARTY_ONLY_IN = {
    "fastapi": ("service/api/", "service/app.py"),
    "starlette": ("service/api/", "service/app.py"),
    "uvicorn": ("service/__main__.py", "service/api/door.py"),
    "torchvision": ("training/datasets.py",),
    "matplotlib": ("training/report.py", "training/insight.py"),
    "typer": ("training/__main__.py",),
    "sqlalchemy": ("service/jobs/tables.py", "service/jobs/store.py"),
    "openvino": ("service/inference/engine.py",),
}

NAMES_OF_NO_MODULE = {"utils", "common", "helpers", "core", "misc", "base"}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too; `from a import b` counts as a.b where that is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                child = ROOT / node.module.replace(".", "/") / alias.name
                is_module = child.with_suffix(".py").exists() or child.is_dir()
                found.add(f"{node.module}.{alias.name}" if is_module else node.module)
    return found


def part_of(module: str) -> str:
    """The entry of the table that speaks for a module."""
    candidates = [part for part in ALLOWED if module == part or module.startswith(f"{part}.")]
    return max(candidates, key=len) if candidates else module


def within(module: str, part: str) -> bool:
    # A bare package name allows its __init__ and, for the two entry points, all of the service.
    return module == part or (module.startswith(f"{part}.") and part != "training")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_what_stands_below_it(path: Path) -> None:
    part = part_of(name_of(path))
    allowed = ALLOWED.get(part, set())
    ours = {name for name in imports(path) if name.split(".")[0] in ("service", "training")}
    if part == "training":  # the upper half of training may import all of training
        forbidden = {name for name in ours if name.split(".")[0] != "training"}
    else:
        forbidden = {name for name in ours if not any(within(name, below) for below in allowed | {part})}
    assert not forbidden


@pytest.mark.parametrize(("package", "places"), THIRD_PARTY_ONLY_IN.items())
def test_a_library_is_known_in_its_place_only(package: str, places: tuple[str, ...]) -> None:
    users = [str(path.relative_to(ROOT)) for path in MODULES if any(i.split(".")[0] == package for i in imports(path))]
    assert users
    assert [user for user in users if not user.startswith(places)] == []


def test_torch_jit_is_known_in_two_places() -> None:
    users = {
        str(path.relative_to(ROOT)) for path in MODULES if "torch.jit." in path.read_text().replace("`torch.jit`", "")
    }
    assert users == {"training/export.py", "service/inference/engine.py"}


def test_no_module_is_a_drawer() -> None:
    assert not {path.stem for path in MODULES} & NAMES_OF_NO_MODULE


def test_the_application_loads_without_what_only_training_needs() -> None:
    """In a fresh process: serving needs no network definitions, data sets or plots."""
    program = "import service.app, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torchvision", "matplotlib", "tensorboard", "scipy", "typer", "rich"}
    ours = {"training.networks", "training.loop", "training.datasets", "training.export"}
    assert not set(loaded) & (heavy | ours)


def test_data_sets_are_checked_without_torch() -> None:
    """It would take two seconds to import before anything is said, and half a gigabyte."""
    program = "import training.intake, training.archives, training.__main__, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert not set(loaded) & {"torch", "scipy", "service"}


FIT_AND_EXPORT = """
import sys, tempfile, torch
from pathlib import Path
from training.export import write_module
from training.networks import ConvNet, macs
from training.probe import fit_head

network = ConvNet(channels=1, classes=2, widths=[4], stem_width=2, stem_kernel=3).eval()
macs(network, (1, 8, 8))
fit_head(torch.randn(8, 3), torch.arange(8) % 2, 2, penalty=1e-3)
with tempfile.TemporaryDirectory() as folder:
    write_module(Path(folder) / "model.ts", network, (1, 8, 8))
print(*sys.modules)
"""


def test_heads_are_fitted_and_networks_exported_without_torch_s_compiler() -> None:
    """It would take two seconds to import, of a job of sixteen."""
    program = [sys.executable, "-c", FIT_AND_EXPORT]
    loaded = subprocess.run(program, capture_output=True, text=True, check=True).stdout.split()
    assert "training.probe" in loaded
    assert "torch._dynamo" not in loaded


def test_importing_does_nothing(tmp_path: Path) -> None:
    """Every module can be imported in a clean process, and no file or thread comes of it."""
    names = [name_of(path) for path in MODULES if path.stem != "__main__"]
    program = (
        f"import importlib, os, threading\nfor name in {names}: importlib.import_module(name)\n"
        "assert threading.active_count() == 1, threading.enumerate()\nassert os.listdir() == [], os.listdir()"
    )
    environ = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home")}
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=work,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
