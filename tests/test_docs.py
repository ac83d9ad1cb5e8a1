"""The documentation holds: its Python runs, on tiny models, and it explains the messages of the code."""

import ast
import functools
import importlib.util
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from videos import write_video

import avfuse
from avfuse import AVMAE
from avfuse.__main__ import COMMANDS
from avfuse.tasks.classifier import Classifier
from avfuse.tasks.localize import Localizer

ROOT = Path(__file__).parents[1]
FOLDERS = ROOT, ROOT / "docs", ROOT / "benchmarks", ROOT / "kernels"
WITH_PYTHON = [page for folder in FOLDERS for page in folder.glob("*.md") if "```python" in page.read_text()]
# ```python, below a comment where it cannot always be run: <!-- not run: why --> or <!-- needs: modules -->
BLOCK = re.compile(r"(?:<!-- (not run|needs): (.+?) -->\n)?```python\n(.*?)^```$", re.M | re.S)
SHAPES = re.compile(r"print\(.*\)  # (\(\d.*\))$", re.M)  # what the comment says is printed


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """The folder in which pages are read: a video, and runs as the commands leave them."""
    folder = tmp_path_factory.mktemp("workspace")
    encoder, of_frames = avfuse.create_encoder("micro"), avfuse.create_encoder("micro", frames=8)
    for run, model in {
        "classify": Classifier(encoder, classes=3, class_names=("dog", "harp", "rain")),
        "demo": AVMAE(encoder),
        "synchrony-localize": Localizer(of_frames),
    }.items():
        model.save_pretrained(folder / "runs" / run / "model")
    write_video(folder / "VIDEO.mp4", 4)
    return folder


@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_python_of_a_page_runs(page, workspace, tmp_path, monkeypatch, capsys):
    """From top to bottom, as one program: later blocks go on from earlier ones."""
    monkeypatch.chdir(shutil.copytree(workspace, tmp_path / "here"))
    text, names, lacking = page.read_text(), {}, set()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python"), "a block is not closed"
    for block in blocks:
        mark, reason, code = block.groups()
        modules = reason.split() if mark == "needs" else []
        missing = {name for name in modules if not importlib.util.find_spec(name)}
        lacking |= missing
        if mark == "not run" or missing:
            continue
        line = text[: block.start(3)].count("\n")
        exec(compile("\n" * line + code, str(page), "exec"), names)
        printed = capsys.readouterr().out.replace("torch.Size([", "(").replace("])", ")")
        for shapes in SHAPES.findall(code):
            assert shapes in printed.splitlines(), f"block at line {line}"
    if lacking:
        pytest.skip(f"ran but for blocks that need {', '.join(sorted(lacking))}")


COMMAND = re.compile(r"(?:^|&& )(?:accelerate launch -m |python -m )?avfuse([ .][^#\n]*?)(?= &&| *#|$)", re.M)


def commands() -> list[str]:
    """Those that stand in blocks of their own, as one would type them after `avfuse`. Those of
    results.md a shell has to read, which it does in a test of their own.
    """
    pages = [page for folder in FOLDERS for page in folder.glob("*.md") if page.name != "results.md"]
    texts = [page.read_text().replace("\\\n", "") for page in pages]
    blocks = [block for text in texts for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]
    return sorted({command for kind, block in blocks if not kind for command in COMMAND.findall(block)})


def test_options_of_commands_are_there(tmp_path, monkeypatch):
    """The folders that they name are, too."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "avfuse.command.begin", lambda _, parse, *__, **___: sys.exit(parse(args=sys.argv[1:], prog=""))
    )
    for name in "FOLDER", "OTHER", "vgg", "data/few", "data/sounding-shapes", "data/solos":
        Path(name).mkdir(parents=True)
    assert len(commands()) > 30
    for command in commands():
        name, *arguments = shlex.split(command)
        module = f"avfuse{name}" if name.startswith(".") else COMMANDS[name][0]
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_module(module, run_name="__main__")
        assert not isinstance(ended.value.code, int | str), command  # but the options


# --- troubleshooting ----------------------------------------------------------------------------------------

CODE = [path for folder in ("avfuse", "kernels") for path in (ROOT / folder).rglob("*.py")]
# What users meet; other kinds are caught and told in the words of these.
KINDS = {"ValueError", "OSError", "FileNotFoundError", "RuntimeError"}
KINDS |= {"ClipError", "CheckpointError", "RunError", "TooManyUnreadable"}
DIFFERS = "…"


@functools.cache
def nodes() -> list[tuple[Path, ast.AST]]:
    """All that the code is made of, and where it stands; of a text with something filled in, the whole."""
    found = [(path, node) for path in CODE for node in ast.walk(ast.parse(path.read_text()))]
    parts = {id(part) for _, node in found if isinstance(node, ast.JoinedStr) for part in node.values}
    return [(path, node) for path, node in found if id(node) not in parts]


@functools.cache
def constants() -> dict[str, str]:
    """Texts that a module gives a name, if only one does."""
    texts: dict[str, set[str]] = {}
    for path in CODE:
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.Assign([ast.Name(name)], ast.Constant(str(text))):
                    texts.setdefault(name, set()).add(text)
    return {name: text for name, (text, *others) in texts.items() if not others}


def wording(node: ast.AST) -> str:
    """A text of the code, with … for what is filled in."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(parts):
            return "".join(map(wording, parts))
        case ast.FormattedValue(ast.Name(name)) | ast.Name(name) if name in constants():
            return constants()[name]
        case ast.BinOp(left, ast.Add(), right):
            return wording(left) + wording(right)
        case ast.Call(ast.Name("printable"), [text]):
            return wording(text)
    return DIFFERS


def told(node: ast.AST) -> str:
    """The fault or the warning that users are told here; "" if there is none."""
    match node:
        case ast.Raise(ast.Call(kind, arguments)) if ast.unparse(kind) in KINDS:
            return wording(arguments[ast.unparse(kind) == "ClipError"])  # which has the path first
        case ast.Constant() | ast.JoinedStr() if wording(node).startswith("WARNING: "):
            return wording(node)
    return ""


def says_something(message: str) -> bool:
    """Not a frame around the words of others, such as `{name}: {error}`."""
    return len(re.sub(r"\W", "", message)) >= 8


def explained() -> list[str]:
    """The messages in the first columns of the page."""
    rows = re.findall(r"^\| (`.+`) \| ", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    return [message for row in rows for message in re.findall("`(.+?)`", row)]


def pattern(message: str) -> re.Pattern:
    return re.compile(".*".join(map(re.escape, message.split(DIFFERS))), re.S)


def test_every_message_that_is_explained_stands_in_the_code():
    texts = {text for _, node in nodes() if says_something(text := wording(node))}
    assert not [each for each in explained() if not any(map(pattern(each).fullmatch, texts))]


def test_every_message_of_the_code_is_explained():
    places = {
        told(node): f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, node in nodes()
        if says_something(told(node))
    }
    known = [pattern(each) for each in explained() if says_something(each)]
    missing = [f"{place}: {m}" for m, place in places.items() if not any(each.fullmatch(m) for each in known)]
    assert len(places) > 250 and not missing, "\n".join(missing)


# --- the site -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not importlib.util.find_spec("mkdocs"), reason="mkdocs is in the docs extra")
def test_the_site_is_strict(tmp_path):
    """It is built of this checkout but for what is broken here, and told for nothing else."""
    for name in "avfuse", "kernels", "benchmarks", "docs":
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for pattern in "*.md", "mkdocs.yml", "setup.py", "constraints*.txt", "LICENSE":
        for path in ROOT.glob(pattern):
            shutil.copy(path, tmp_path)
    with open(tmp_path / "docs/start.md", "a") as page:
        page.write(
            "[page](gone.md) [anchor](dense.md#gone) ![picture](gone.png)\n\n<script src='//cdn/x.js'/>\n"
        )
    with open(tmp_path / "avfuse/__init__.py", "a") as package:
        package.write("\n\ndef undocumented():\n    pass\n\n\n__all__ += ['undocumented']\n")
    (tmp_path / "docs/orphan.md").write_text("# Orphan")
    command = [sys.executable, "-m", "mkdocs", "build", "-f", tmp_path / "mkdocs.yml"]
    built = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"NO_COLOR": "1"})
    warnings = built.stderr.split("WARNING -  ")[1:]
    assert built.returncode == 1
    for fault in "gone.md", "#gone", "gone.png", "cdn", "undocumented", "orphan":
        (warning,) = (each for each in warnings if fault in each)
        warnings.remove(warning)
    assert not warnings
