"""How the parts of the package lean on each other: no circle of imports, and none that runs upwards.

Imports inside functions and behind TYPE_CHECKING count like any other.
"""

import ast
import importlib.util
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the ground up: what a room holds may import from its own room and from those before it. A name stands
# for a module, and for all that is in it if it is a folder.
ROOMS = {
    "kernels": "kernels",
    "ground": "checks choices command files lazy process progress rules weight_files",
    "ops": "ops",
    "parts": "inputs vit branch fusion folding graphs",
    "data": "data",
    "model": "predictor encoder mae presets model_card pretrained released loading weight_sources weights",
    "training": "training",
    "tasks": "tasks",
    "commands": "options train exporting features predict evaluation report demo __main__",
    "front door": "__init__",
}
LEVELS = {name: level for level, names in enumerate(ROOMS.values()) for name in names.split()}


def read_modules() -> dict[str, Path]:
    """The files of the package by the names of their modules."""
    paths = {path.relative_to(ROOT): path for path in (ROOT / "avfuse").rglob("*.py")}
    paths |= {Path("avfuse", path.relative_to(ROOT)): path for path in (ROOT / "kernels").rglob("*.py")}
    return {".".join(name.with_suffix("").parts).removesuffix(".__init__"): paths[name] for name in paths}


def imported(name: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the package that a module imports, wherever in the file it does so."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    targets = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:  # a module, or what a module holds
                inner = f"{source}.{alias.name}"
                targets.add(inner if inner in modules else source)
    return {target for target in targets if target in modules}


def level(name: str) -> int:
    return LEVELS[name.split(".")[1] if "." in name else "__init__"]


@pytest.fixture(scope="module")
def modules() -> dict[str, Path]:
    return read_modules()


@pytest.fixture(scope="module")
def imports(modules) -> dict[str, set[str]]:
    """What every module imports."""
    return {name: imported(name, path, modules) for name, path in modules.items()}


def test_every_module_has_a_room(modules):
    assert {name.split(".")[1] for name in modules if "." in name} == LEVELS.keys() - {"__init__"}


def test_imports_are_found_wherever_they_stand(imports):
    assert "avfuse.kernels.pair_attention" in imports["avfuse.ops.operators"]  # inside a function
    assert "avfuse.data.manifest" in imports["avfuse.data.find"]  # from . import manifest
    assert "avfuse.data.listing" in imports["avfuse.data.sets.music"]  # from ..listing import Listing
    assert "avfuse.training.loop" in imports["avfuse.train"]


def test_no_import_runs_in_a_circle(imports):
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        raise AssertionError("imports run in a circle: " + " <- ".join(error.args[1])) from None


def test_no_import_runs_upwards(imports):
    upward = [f"{name} -> {t}" for name, found in imports.items() for t in found if level(t) > level(name)]
    assert not upward, f"imports that run upwards: {upward}"


def test_imports_by_name_are_those_two_that_bring_what_was_elsewhere(modules):
    """`pretrained` makes models of subclasses above it, and says where two functions are now."""
    calls = [
        (name, node.args[0].value)
        for name, path in modules.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module"
        if isinstance(node.args[0], ast.Constant) and node.args[0].value.startswith("avfuse")
    ]
    assert sorted(calls) == [
        ("avfuse.pretrained", "avfuse.loading"),
        ("avfuse.pretrained", "avfuse.released"),
    ]


def test_import_avfuse_is_enough_for_every_name(modules):
    names = [name for name in modules if "." in name and ".kernels" not in name and "__main__" not in name]
    for package, _, name in (name.rpartition(".") for name in names):
        assert importlib.import_module(package).__getattr__(name).__name__ == f"{package}.{name}"
    code = "import avfuse; avfuse.tasks.classifier.Classifier; assert not hasattr(avfuse.tasks, 'nothing')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_no_function_is_longer_than_a_screen():
    """Kernels are not held to it: what they are called with takes twenty lines."""
    sources = [path for name, path in read_modules().items() if not name.startswith("avfuse.kernels")]
    functions = (
        (node.end_lineno - node.lineno + 1, path.name, node.name)
        for path in (*sources, *(ROOT / "benchmarks").glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert max(functions)[0] < 70
