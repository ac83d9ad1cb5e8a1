"""The documentation holds: its Python runs, on tiny models, and it explains the messages of the code."""

import ast
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
from videos import write_video

import avfuse
from avfuse import AVMAE
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


# --- troubleshooting ----------------------------------------------------------------------------------------

# What users meet; other kinds are caught and told in the words of these.
KINDS = {"ValueError", "OSError", "FileNotFoundError", "RuntimeError"}
KINDS |= {"ClipError", "CheckpointError", "RunError", "TooManyUnreadable"}
SOURCES = [
    (path, ast.parse(path.read_text()))
    for folder in (ROOT / "avfuse", ROOT / "kernels")
    for path in folder.rglob("*.py")
]
DIFFERS = "…"


def wording(node: ast.expr) -> str:
    """A text of the code, with … for what is filled in."""
    match node:
        case ast.Constant(str(text)):
            return text
        case ast.JoinedStr(parts):
            return "".join(map(wording, parts))
        case ast.BinOp(left, ast.Add(), right):
            return wording(left) + wording(right)
        case ast.Call(ast.Name("printable"), [text]):
            return wording(text)
    return DIFFERS


def says_something(message: str) -> bool:
    """Not a frame around the words of others, such as `{name}: {error}`."""
    return len(re.sub(r"\W", "", message)) >= 8


def raised() -> dict[str, str]:
    """The messages of the code, and where each is raised."""
    messages = {}
    for path, tree in SOURCES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(call := node.exc, ast.Call):
                if (kind := ast.unparse(call.func)) in KINDS:
                    place = f"{path.relative_to(ROOT)}:{node.lineno}"
                    messages[wording(call.args[kind == "ClipError"])] = place  # which has the path first
    return {message: place for message, place in messages.items() if says_something(message)}


def explained() -> list[str]:
    """The messages in the first columns of the page."""
    rows = re.findall(r"^\| (`.+`) \| ", (ROOT / "docs/troubleshooting.md").read_text(), re.M)
    return [message for row in rows for message in re.findall("`(.+?)`", row)]


def is_of(explained: str, message: str) -> bool:
    return bool(re.fullmatch(".*".join(map(re.escape, explained.split(DIFFERS))), message, re.S))


def test_every_message_that_is_explained_stands_in_the_code():
    texts = {wording(node) for _, tree in SOURCES for node in ast.walk(tree) if isinstance(node, ast.expr)}
    assert not [each for each in explained() if not any(is_of(each, text) for text in texts)]


def test_every_message_of_the_code_is_explained():
    messages, known = raised(), [each for each in explained() if says_something(each)]
    missing = [f"{place}: {m}" for m, place in messages.items() if not any(is_of(each, m) for each in known)]
    assert len(messages) > 250 and not missing, "\n".join(missing)
