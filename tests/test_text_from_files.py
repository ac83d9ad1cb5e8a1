"""Text from files and names ends in a terminal, Markdown or HTML by one function each: whatever is in it, it
stays text, in one line.
"""

import dataclasses
import json
import re
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from models import make_encoder, make_vit
from safetensors.torch import load_file, save_file
from videos import write_video

import avfuse
from avfuse import AVEncoder, from_deepavfusion, load_encoder, load_image_weights
from avfuse.data import manifest
from avfuse.data.check import check
from avfuse.data.find import find_data
from avfuse.data.shards import shard
from avfuse.files import in_html, in_markdown, printable
from avfuse.model_card import model_card
from avfuse.train import Pretraining
from avfuse.training.loop import program
from avfuse.training.recipes import TrainConfig
from avfuse.training.report import write_report
from avfuse.training.run_folder import Quarantine, check_run
from avfuse.weight_files import read_pth

EVIL = "\x1b[2J\r\n# A\n![i](http://e.vil/a.png)[l](http://e.vil)<img src=x onerror=y>\"'&amp;|`c`*d*_e_$f$"
EVIL += "\u202eg\x9b1m"
MARK = "e.vil"


def assert_for_a_terminal(text: str, lines: int | None = None):
    assert all(line.isprintable() for line in text.split("\n")), text
    assert lines is None or text.count("\n") < lines


# --- the three functions ------------------------------------------------------------------------------------


def test_there_is_one_function_for_each():
    for path in Path(avfuse.__file__).parent.rglob("*.py"):
        text = path.read_text()
        if path.name != "files.py":
            assert not re.search(r"html\.escape|from html import|import html|&lt;|&amp;", text), path
            assert "isprintable" not in text.replace("name.isprintable()", ""), path  # a check


def test_for_a_terminal():
    assert printable(EVIL).isprintable() and MARK in printable(EVIL)
    assert printable(printable(EVIL)) == printable(EVIL)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.tags, self.text = [], ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_for_html():
    page = Tags()
    page.feed(f'<p title="{in_html(EVIL)}">{in_html(EVIL)}</p>')
    assert page.tags == [("p", {"title": printable(EVIL)})] and page.text == printable(EVIL)


def test_for_markdown():
    """By a parser of CommonMark with the tables and links of GitHub, where there is one."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    for line in (
        f"a {in_markdown(EVIL)}",
        f"| a | {in_markdown(EVIL)} |\n| - | - |\n| b | {in_markdown(EVIL)} |",
    ):
        page = Tags()
        page.feed(markdown.render(line))
        assert {tag for tag, _ in page.tags} <= {"p", "table", "thead", "tbody", "tr", "th", "td"}
        assert printable(EVIL) in page.text
        assert [tag for tag, _ in page.tags].count("th") in (0, 2)


# --- where text comes in ------------------------------------------------------------------------------------


def assert_plain_markdown(text: str):
    """Nothing of EVIL is left as it was; what the card itself says is no link and no picture either."""
    assert_for_a_terminal(text)
    for raw in ("![", "[l]", "](", "<img", "http://", "`c`", "*d*", "_e_", "$f$", "\x1b"):
        assert raw not in text.replace("\\" + raw, ""), raw


def test_a_model_card(tmp_path):
    facts = {
        name: {EVIL: EVIL, "nested": {EVIL: [EVIL, 1]}, "folder": EVIL}
        for name in ("recipe", "data", "metrics")
    }
    origins = {
        "image": dict(weights=EVIL, family=EVIL, licence=EVIL),
        "audio": dict.fromkeys(("weights", "family"), "a"),
    }
    origins["audio"]["licence"] = "mit"
    for licence in EVIL, f"unknown {EVIL}":
        card = str(model_card("AVEncoder", facts | dict(licence=licence), origins))
        head, body = card.split("\n---\n", 1)
        assert_for_a_terminal(head)
        assert_plain_markdown(body)
        assert card.count("\n---\n") == 1 and "\n# A\n" not in card
        assert [line.count(" | ") for line in body.splitlines() if line.startswith("| nested")] == [1, 1, 1]
    tables = [[[EVIL, EVIL], [EVIL, None]]]
    card = str(model_card("Classifier", dict(tables=tables), origins, classes=(EVIL, EVIL)))
    assert_plain_markdown(card.split("\n---\n", 1)[1])
    assert len([line for line in card.splitlines() if line.count(" | ") == 1 and "nested" not in line]) == 3
    encoder = make_encoder().float()
    encoder.image.origin, encoder.facts = origins["image"], facts
    encoder.save_pretrained(tmp_path)
    assert_plain_markdown((tmp_path / "README.md").read_text().split("\n---\n", 1)[1])
    said = []
    load_image_weights(make_encoder(), tmp_path, say=said.append)  # the licence is in the metadata
    assert MARK in said[0]
    assert_for_a_terminal(said[0], lines=8)


def test_names_of_tensors_and_files(tmp_path):
    make_encoder().float().save_pretrained(tmp_path / "a")
    path = tmp_path / "a" / "model.safetensors"
    whole = load_file(path)
    save_file(whole | {EVIL: torch.zeros(1)}, path)
    folder = tmp_path / re.sub("/", ":", EVIL)
    (tmp_path / "a").rename(folder)
    released = load_file(Path(__file__).parent / "golden" / "mae_factorized.safetensors")
    released = {n.removeprefix("weights/"): w for n, w in released.items() if n.startswith("weights/")}
    vit = make_vit(class_token=True)
    config = json.loads((folder / "config.json").read_text())
    evil_file = folder / f"{folder.name}.pth"
    evil_file.write_bytes(b"hello")
    calls = [
        lambda: AVEncoder.from_pretrained(folder),
        lambda: load_encoder(folder),
        lambda: load_encoder(evil_file),
        lambda: read_pth(evil_file),
        lambda: from_deepavfusion({EVIL: torch.zeros(1)}),
        lambda: from_deepavfusion(released | {EVIL: torch.zeros(1)}),
        lambda: from_deepavfusion(released | {EVIL: torch.zeros(1).expand(9)}),
        lambda: from_deepavfusion({EVIL: 3}),
        lambda: load_image_weights(vit, vit.state_dict() | {EVIL: torch.zeros(1)}),
        lambda: load_image_weights(vit, folder),
        lambda: load_image_weights(vit, folder / "nothing"),
    ]
    for key in "class", "model":

        def changed(key=key):
            changed = config | ({"class": EVIL} if key == "class" else {"model": config["model"] | {EVIL: 1}})
            (folder / "config.json").write_text(json.dumps(changed))
            AVEncoder.from_pretrained(folder)

        calls.append(changed)
    for number, call in enumerate(calls):
        with pytest.raises(ValueError) as refused:
            call()
        assert MARK in str(refused.value), number
        assert_for_a_terminal(str(refused.value), lines=1)
    said = []
    weights = {f"{EVIL}.{name}": w for name, w in vit.state_dict().items()}
    load_image_weights(vit, {"model": weights, EVIL: 3}, say=said.append)
    assert_for_a_terminal(said[0], lines=6)


@pytest.fixture
def videos(tmp_path):
    root = tmp_path / "videos"
    for split in "train", "test":
        write_video(root / split / "a.mp4")
    check(root, progress=False, workers=0)
    return root


def rewrite(root, change):
    header, *entries = (json.loads(line) for line in (root / manifest.FILE).read_text().splitlines())
    change(header, entries)
    lines = [json.dumps(row) for row in (header, *entries)]
    (root / manifest.FILE).write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "where", ["name", "class", "label", "path", "error", "key", "header key", "split", "expected"]
)
def test_a_manifest(videos, where, capsys):
    def change(header, entries):
        if where == "name":
            header["name"] = EVIL
        elif where == "class":
            header["classes"] = {EVIL: [EVIL]}
            for entry in entries:
                entry["labels"] = {EVIL: 5}
        elif where == "label":
            entries[0]["labels"] = {EVIL: EVIL}
        elif where == "path":
            entries[0]["path"] = f"train/{EVIL}"
            entries[0]["audio"] = False
        elif where == "error":
            entries[0]["error"] = EVIL
        elif where in ("key", "header key"):
            (entries[0] if where == "key" else header)[EVIL] = 1
        elif where == "split":
            entries[0]["split"] = EVIL
        else:
            header["expected"] = {EVIL: 1}

    rewrite(videos, change)
    said = []
    for use in (
        partial(find_data, videos, said.append, workers=0, progress=False),
        partial(shard, videos, videos.parent / "out", workers=0, progress=False),
    ):
        try:
            result = use()
            said += [result] if isinstance(result, str) else []
        except (ValueError, OSError) as error:
            said.append(str(error))
    assert any(MARK in text for text in said), said
    for text in said:
        assert_for_a_terminal(text)
    assert_for_a_terminal(capsys.readouterr().out)


@pytest.mark.usefixtures("undrawn")
def test_a_run_folder_and_what_lies_in_it(videos, tmp_path, capsys):
    """Its name, its data folder's, its clips', and what another wrote into its files."""
    name = re.sub("/", ":", EVIL)
    data = videos.rename(tmp_path / f"data {name}")
    (data / manifest.FILE).unlink()
    (data / "train" / "a.mp4").rename(data / "train" / f"{name}.mp4")
    (data / "train" / f"b {name}.mp4").write_bytes(b"no video")
    run = tmp_path / f"run {name}"
    config = TrainConfig(
        data=data, run=run, epochs=1, warmup_epochs=0, batch_size=1, workers=0, decoder_dim=32,
        decoder_depth=1, decoder_heads=2, measure_every=0, max_unreadable=0.9,
    )  # fmt: skip
    assert program(config, Pretraining) == 0
    assert program(config, Pretraining) == 0  # resumes
    out = capsys.readouterr()
    for line in out.out.split("\n"):
        assert line.isprintable(), line
    assert "done: look at" in out.out and MARK in out.out
    assert_plain_markdown((run / "model" / "README.md").read_text().split("\n---\n", 1)[1])
    settings = json.loads((run / "run.json").read_text())
    settings["settings"] |= {"seed": EVIL, EVIL: EVIL}
    settings["environment"] |= {EVIL: EVIL}
    (run / "run.json").write_text(json.dumps(settings))
    with (run / "metrics.jsonl").open("a") as rows:
        row = dict(step=1, when="after", clips=EVIL, metrics={EVIL: 1.0}, probes={EVIL: {}})
        rows.write(json.dumps(row) + "\n")
    (run / "pictures").mkdir(exist_ok=True)
    page = Tags()
    page.feed(write_report(run).read_text())
    assert not [tag for tag, attributes in page.tags if "onerror" in attributes]
    assert MARK in page.text and "\x1b" not in page.text and "\u202e" not in page.text
    for use in (
        lambda: check_run(config),
        lambda: check_run(dataclasses.replace(config, run=videos.parent / EVIL.replace("/", ":") / "a")),
    ):
        try:
            use()
        except ValueError as error:
            assert_for_a_terminal(str(error), lines=1)
    quarantine = Quarantine(run / "quarantine.jsonl", True, 9, 1.0)
    quarantine.add("scan", [avfuse.data.clips.Failure(0, Path(EVIL), EVIL)])
    out = capsys.readouterr().out
    assert MARK in out
    assert_for_a_terminal(out, lines=3)
    assert_for_a_terminal(quarantine.summary(), lines=1)
