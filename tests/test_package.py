"""The package as users meet it: importable in each way it can be installed, with its parts kept apart."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import avfuse
from avfuse import features
from avfuse.training import features as training_features

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "avfuse").rglob("*.py"))
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))

# Run in a new interpreter, whose site-packages also holds a foreign package `kernels`. The dependencies'
# folder joins without its .pth files: one of them may lead to the avfuse that runs this test.
IMPORT_EVERYTHING = """
import site, sys
site_packages, home, dependencies = sys.argv[1:]
site.addsitedir(site_packages)
sys.path.append(dependencies)
sys.modules["triton"] = None  # importing it raises ImportError
import avfuse
assert avfuse.__file__.startswith(home), avfuse.__file__
assert not any(name.startswith("avfuse.kernels") for name in sys.modules), "imported before it is needed"
import avfuse.kernels.dummy
assert avfuse.kernels.dummy.OWNER == "avfuse"
import kernels
assert kernels.OWNER == "foreign"
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository with one more kernel in it."""
    root = tmp_path_factory.mktemp("checkout")
    for folder in ("avfuse", "kernels"):
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    (root / "kernels/dummy.py").write_text("OWNER = 'avfuse'\n")
    return root


@pytest.fixture(scope="module")
def wheels(checkout, tmp_path_factory) -> dict[str, zipfile.ZipFile]:
    """The wheel and the editable wheel of the checkout, made by the calls that pip makes."""
    pytest.importorskip("setuptools", minversion="77")
    wheels = {}
    for kind in ("wheel", "editable"):
        folder = tmp_path_factory.mktemp(kind)
        build = f"from setuptools import build_meta; build_meta.build_{kind}({str(folder)!r})"
        done = subprocess.run([sys.executable, "-c", build], cwd=checkout, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        wheels[kind] = zipfile.ZipFile(next(folder.glob("*.whl")))
    return wheels


@pytest.mark.parametrize("kind", ["checkout", "editable", "wheel"])
def test_imports_beside_a_foreign_kernels_package(kind, request, tmp_path):
    checkout = request.getfixturevalue("checkout")
    site_packages, elsewhere = tmp_path / "site-packages", tmp_path / "elsewhere"
    (site_packages / "kernels").mkdir(parents=True)
    (site_packages / "kernels/__init__.py").write_text("OWNER = 'foreign'\n")
    (site_packages / "kernels/dummy.py").write_text("OWNER = 'foreign'\n")
    elsewhere.mkdir()
    if kind != "checkout":
        request.getfixturevalue("wheels")[kind].extractall(site_packages)
    home = site_packages if kind == "wheel" else checkout  # where avfuse must come from
    done = subprocess.run(
        [sys.executable, "-S", "-c", IMPORT_EVERYTHING, site_packages, home, sysconfig.get_path("purelib")],
        cwd=checkout if kind == "checkout" else elsewhere,
        env={"PATH": ""},  # no PYTHONPATH: only the installation makes avfuse importable
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_wheel_holds_the_whole_package_and_nothing_else(wheels):
    inside = {name for name in wheels["wheel"].namelist() if ".dist-info/" not in name}
    sources = {str(path.relative_to(ROOT)) for path in SOURCES} | {"avfuse/py.typed"}
    kernels = {f"avfuse/{path.relative_to(ROOT)}" for path in KERNELS} | {"avfuse/kernels/README.md"}
    assert inside == sources | kernels | {"avfuse/kernels/dummy.py"}
    assert wheels["wheel"].getinfo(f"avfuse-{avfuse.__version__}.dist-info/licenses/LICENSE")


def test_the_source_distribution_makes_the_same_wheel(wheels, checkout, tmp_path):
    build = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

    def run(kind, folder):
        command = [sys.executable, "-c", build, kind, str(tmp_path)]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("build_sdist", checkout)
    shutil.unpack_archive(next(tmp_path.glob("*.tar.gz")), tmp_path, filter="data")
    run("build_wheel", tmp_path / f"avfuse-{avfuse.__version__}")
    again = zipfile.ZipFile(next(tmp_path.glob("*.whl")))
    contents = [{info.filename: info.CRC for info in wheel.infolist()} for wheel in (wheels["wheel"], again)]
    for files in contents:
        files.pop(f"avfuse-{avfuse.__version__}.dist-info/RECORD")  # lists the files in another order
    assert contents[0] == contents[1]


def test_the_version_to_cite_is_this_one():
    assert f"\nversion: {avfuse.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_wheel_brings_the_command(wheels):
    entries = wheels["wheel"].read(f"avfuse-{avfuse.__version__}.dist-info/entry_points.txt").decode()
    assert "[console_scripts]\navfuse = avfuse.__main__:main\n" in entries


DOCS = ("mkdocs-material", "mkdocstrings")
UNTESTED = {  # see setup.py
    "": (),
    "-oldest": ("gradio", "selenium", "mteb", "xformers", "peft", "torchao", "vggsounder", *DOCS),
    "-newest": ("gradio", "selenium", "mteb", "xformers", "torchaudio"),
}


def test_every_dependency_has_tested_versions_in_its_range(wheels):
    """Those of constraints-oldest.txt are the lower bounds."""
    metadata = wheels["wheel"].read(f"avfuse-{avfuse.__version__}.dist-info/METADATA").decode().splitlines()
    required = [Requirement(line.split(":", 1)[1]) for line in metadata if line.startswith("Requires-Dist:")]
    assert len(required) > 10
    for kind in "", "-oldest", "-newest":
        lines = (ROOT / f"constraints{kind}.txt").read_text().splitlines()
        tested = dict(line.split()[0].split("==") for line in lines if re.match("[^#]*==", line))
        for requirement in required:
            if requirement.name in UNTESTED[kind]:
                continue
            assert requirement.specifier.contains(tested[requirement.name]), str(requirement)
            if kind == "-oldest":
                (lowest,) = (limit.version for limit in requirement.specifier if limit.operator == ">=")
                assert f"{tested[requirement.name]}.".startswith(f"{lowest}."), str(requirement)


def imported_names(path: Path) -> set[str]:
    """Absolute names of the modules that a file imports, and of what it imports from modules."""
    folders = path.relative_to(ROOT).parent.parts
    package = ".".join(folders if folders[0] == "avfuse" else ("avfuse", *folders))
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def is_inside(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


def test_only_ops_import_kernels():
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "avfuse/ops"):
            assert not any(is_inside(name, "avfuse.kernels") for name in imported_names(path)), path


def test_kernels_import_nothing_of_avfuse():
    for path in KERNELS:
        for name in imported_names(path):
            assert is_inside(name, "avfuse.kernels") or not is_inside(name, "avfuse"), f"{path}: {name}"


def test_public_names_are_the_documented_ones():
    layers = {"DenseFusion", "FactorizedFusion", "TokenFusion", "AVEncoder", "AVMAE", "InputSettings"}
    functions = {"pair_attention", "pair_attention_weights", "create_encoder", "from_deepavfusion"}
    functions |= {"load_encoder", "load_image_weights", "load_audio_weights", "load", "read_clip", "export"}
    assert set(avfuse.__all__) == layers | functions
    assert all(hasattr(avfuse, name) for name in avfuse.__all__)


def test_names_that_have_moved_are_where_they_were():
    assert avfuse.pretrained.load_model is avfuse.loading.load_model
    assert avfuse.pretrained.load_encoder is avfuse.load_encoder
    assert features.read_features is training_features.read_features
