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
BESIDE = ("LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")  # what builds the package
RELEASE = ("CHANGELOG.md", "CITATION.cff", "SECURITY.md", "constraints.txt")  # what its source brings besides
BUILD = "import sys; from setuptools import build_meta; getattr(build_meta, sys.argv[1])(sys.argv[2])"

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
    (root / "tests").mkdir()
    for name in (*BESIDE, *RELEASE, "CONTRIBUTING.md", "tests/test_package.py"):
        shutil.copy(ROOT / name, root / name)
    (root / "kernels/dummy.py").write_text("OWNER = 'avfuse'\n")
    return root


def build(kind: str, checkout: Path, folder: Path) -> Path:
    """A wheel, an editable wheel or a source distribution, by the call that pip and build make."""
    pytest.importorskip("setuptools", minversion="77")
    command = [sys.executable, "-c", BUILD, f"build_{kind}", folder]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.tar.gz" if kind == "sdist" else "*.whl"))


@pytest.fixture(scope="module")
def source(checkout, tmp_path_factory) -> Path:
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    shutil.unpack_archive(build("sdist", checkout, folder), folder, filter="data")
    return folder / f"avfuse-{avfuse.__version__}"


@pytest.fixture(scope="module")
def wheels(checkout, source, tmp_path_factory) -> dict[str, zipfile.ZipFile]:
    """The wheel and the editable wheel of the checkout, and the wheel of its source distribution."""
    made = dict(wheel=("wheel", checkout), editable=("editable", checkout), source=("wheel", source))
    return {
        name: zipfile.ZipFile(build(kind, root, tmp_path_factory.mktemp(name)))
        for name, (kind, root) in made.items()
    }


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


def test_the_source_distribution_holds_the_sources_and_makes_the_same_wheel(wheels, source):
    files = (path.relative_to(source) for path in source.rglob("*") if path.is_file())
    inside = {str(path) for path in files if path.parts[0] not in ("avfuse.egg-info", "build")}
    sources = {str(path.relative_to(ROOT)) for path in SOURCES + KERNELS}
    about = {*BESIDE, *RELEASE, "PKG-INFO", "setup.cfg"}  # setuptools writes the last two
    assert inside == sources | {"avfuse/py.typed", "kernels/README.md", "kernels/dummy.py"} | about
    contents = [{i.filename: i.CRC for i in wheels[name].infolist()} for name in ("wheel", "source")]
    for files in contents:
        files.pop(f"avfuse-{avfuse.__version__}.dist-info/RECORD")  # lists the files in another order
    assert contents[0] == contents[1]


def test_the_ten_lines_of_the_readme_run_from_a_wheel(wheels, tmp_path):
    """Outside of the checkout, beside the dependencies alone."""
    ten_lines = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "avfuse.AVMAE(encoder)" in ten_lines
    wheels["wheel"].extractall(tmp_path)
    paths = f"import sys; sys.path += {[str(tmp_path), sysconfig.get_path('purelib')]}\n"
    where = f"assert avfuse.__file__.startswith({str(tmp_path)!r}), avfuse.__file__\n"
    command = [sys.executable, "-I", "-S", "-c", paths + ten_lines + where]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "torch.Size([2, 197, 192]) torch.Size([2, 97, 192]) torch.Size([2, 16, 192])\n"


def test_a_release_is_described():
    """By the version that avfuse has, which setup.py reads from it, too."""
    assert f"\nversion: {avfuse.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    latest = re.search(r"^## \[(.+?)\] - ", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert latest[1] == avfuse.__version__
    assert "Report a vulnerability" in (ROOT / "SECURITY.md").read_text()
    assert len(list((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))) >= 2
    assert "run: bash .ci/run\n" in (ROOT / ".github/workflows/ci.yml").read_text()


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
