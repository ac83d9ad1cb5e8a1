"""The page of a run says what the folder holds, and neither long, damaged nor hostile files spoil it."""

import base64
import io
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from avfuse.report import main
from avfuse.training.report import BINS, MOMENTS, WIDTH, spread, thin, write_report

SETTINGS = dict(model="tiny", epochs=6, fusion_layers=[1, 3], clip_grad=1.0, data=None)
ENVIRONMENT = dict(python="3.11.7", torch="2.11.0", device="cpu")


class Page(HTMLParser):
    """What a page holds; an end tag that does not fit its start tag is an error."""

    EMPTY = {"meta", "input", "img"}

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.open, self.tags, self.texts, self.rows = [], [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> in {self.getpos()}"

    def handle_data(self, text):
        if "style" not in self.open:
            self.texts.append(text)
        if "td" in self.open:
            self.rows[-1][-1] += text

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def attributes(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def training_row(step: int, **changes) -> dict:
    row = dict(step=step, epoch=(step - 1) // 2, clips=8, loss=3.0 / step, image_loss=1.0 / step)
    row |= dict(audio_loss=2.0 / step, lr=1e-3 * step, grad_norm=0.5 + step, seconds=0.5, data_seconds=0.125)
    return row | changes


def measure(step: int, when: str, loss: float, labels=("shape", "colour")) -> dict:
    probe = {
        name: dict(accuracy=0.1 * n + min(step, 50) / 100, standard_error=0.01 * n, chance=0.25)
        for n, name in enumerate(("image", "audio", "fusion", "sum"), 1)
    }
    losses = dict(held_out_image_loss=loss, held_out_audio_loss=2 * loss)
    zeros = dict(held_out_image_zero=1.0, held_out_audio_zero=0.5)
    return (
        dict(step=step, when=when, clips="held-out clips", probes=dict.fromkeys(labels, probe))
        | losses
        | zeros
    )


def write_rows(path: Path, rows: list[dict], end: str = "") -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)


def write_picture(path: Path, size=(1380, 700)) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", size, "red").save(path)


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a finished run of 12 steps."""
    run = tmp_path / "demo"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(dict(settings=SETTINGS, environment=ENVIRONMENT)))
    steps = [training_row(step) for step in range(1, 13)]
    measures = [measure(0, "before", 1.0), measure(6, "during", 0.8), measure(12, "after", 0.3)]
    write_rows(run / "metrics.jsonl", [measures[0], *steps[:6], measures[1], *steps[6:], measures[2]])
    write_rows(run / "quarantine.jsonl", [dict(when="scan", path="a/b.mp4", reason="no video stream")])
    for kind in ("reconstructions", "attention"):
        for step in (0, 6, 12):
            write_picture(run / "pictures" / f"{kind}-{step:06d}.png")
    return run


def curve_points(page: Page, colour: str) -> np.ndarray:
    """(points, 2) positions of the longest line of a colour; y grows downwards."""
    lines = [a["d"] for a in page.attributes("path") if f"stroke: var(--{colour})" in a.get("style", "")]
    longest = max(lines, key=len)
    return np.array(re.findall(r"[ML] (\S+) (\S+)", longest), dtype=float)


def test_what_no_clip_has_is_not_spoken_of(run):
    row = measure(12, "after", 0.3)
    write_rows(run / "metrics.jsonl", [{n: value for n, value in row.items() if "audio" not in n}])
    said = Page(write_report(run)).text
    assert "at step 12: loss 0.300 (image 0.300), 0.30 of predicting zero (1.000)" in said
    silent = dict(step=12, when="after", probes={}, held_out_audio_loss=0.1, held_out_audio_zero=0.0)
    write_rows(run / "metrics.jsonl", [silent])
    assert "at step 12: loss 0.100 (audio 0.100)" in Page(write_report(run)).text


def test_where_fusion_tokens_look_is_said_in_a_sentence(run):
    assert "look at what sounds" not in Page(write_report(run)).text
    rows = [measure(step, when, 1.0) for step, when in ((0, "before"), (12, "after"))]
    for row, look in zip(rows, (0.06, 0.24), strict=True):
        row["looks"] = dict(even=0.06, look_0=look, look_3=0.01)
    write_rows(run / "metrics.jsonl", rows)
    text = Page(write_report(run)).text
    assert "Fusion tokens look at what sounds: in layer 0, 24% of their attention to the picture lies" in text
    write_rows(run / "metrics.jsonl", rows[:1])
    text = Page(write_report(run)).text
    assert "Fusion tokens do not look at what sounds: in layer 0, 6%" in text and "demo-long) do." in text


def test_what_was_heard_and_seen_stands_beside_the_clips_own(run):
    rows = [dict(step=12, when="after", judged=9, metrics=dict(accuracy=0.875, clips=9))]
    rows[0]["conditions"] = dict(silence=dict(accuracy=0.25, judged=9), later=dict(accuracy=0.5, judged=8))
    write_rows(run / "metrics.jsonl", rows)
    text = Page(write_report(run)).text
    assert "Hearing and seeing, tested" in text
    assert "heard and seen accuracy judged its own 0.875 9 silence 0.25 9 later 0.5 8" in text
    rows[0].pop("conditions")  # of before
    write_rows(run / "metrics.jsonl", rows)
    text = Page(write_report(run)).text
    assert "Hearing" not in text and "0.875" in text


# --- one page, with everything on it ------------------------------------------------------------------------


def test_page_is_well_formed_and_needs_nothing_else(run):
    path = write_report(run)
    assert path == run / "index.html"
    page = Page(path)
    assert not re.search(r"(https?:)?//", re.sub('base64,[^"]*', "", page.source))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    for tag, attributes in page.tags:
        assert attributes.get("src", "data:").startswith("data:"), tag
        assert attributes.get("href", "#").startswith("#"), tag
    assert "xlink:" not in page.source  # nothing declares it
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    used = re.findall(r"url\(#(.+?)\)|href=\"#(.+?)\"", page.source)
    assert used and {a or b for a, b in used} <= set(ids)
    colours = set(re.findall(r"var\((--\w+)\)", page.source))
    assert {"--ink", "--image", "--audio", "--fusion", "--sum", "--grey"} <= colours
    assert all(f"{colour}:" in page.source for colour in colours)
    assert page.text.count("demo") == 2  # the title and the heading


def test_numbers_are_those_of_the_run(run):
    page = Page(write_report(run))
    assert "Finished: step 12 of 12, epoch 6 of 6" in page.text
    assert "at step 0: loss 3.000 (image 1.000, audio 2.000), 2.00 of predicting zero" in page.text
    assert "at step 12: loss 0.900 (image 0.300, audio 0.600), 0.60 of predicting zero" in page.text
    for caption in (
        "Image loss: 0.08333 at step 12",
        "Audio loss: 0.1667 at step 12",
        "Learning rate: 0.012 at step 12",
        "Gradient norm: 12.5 at step 12",
        "Clips per second: 16 at step 12",
        "Share of time waiting for data: 0.25 at step 12",
        "All steps: 16.0 clips per second, 25.0% waiting for data",
    ):
        assert caption in page.text
    assert (
        page.text.count("predicting zero") == 2 + 2 and page.text.count("held out") == 2
    )  # text and legends
    last = ["0.220 ± 0.010", "0.320 ± 0.020", "0.420 ± 0.030", "0.520 ± 0.040", "0.250"]
    assert ["shape", "12", *last] in page.rows and ["colour", "12", *last] in page.rows
    assert ["a/b.mp4", "no video stream", "scan"] in page.rows and "1 in all" in page.text
    for name, value in (SETTINGS | ENVIRONMENT).items():
        assert [name, value if isinstance(value, str) else json.dumps(value)] in page.rows


def test_curves_are_drawn_to_scale(run):
    x, y = curve_points(Page(write_report(run)), "audio").T  # 2 / step
    np.testing.assert_allclose((x - x[0]) / (x[-1] - x[0]), np.arange(12) / 11, atol=1e-4)
    expected = 2.0 / np.arange(1, 13)
    np.testing.assert_allclose((y - y[0]) / (y[-1] - y[0]), (expected - 2) / (expected[-1] - 2), atol=1e-4)
    assert y[-1] > y[0]  # a falling loss


def test_pictures_are_the_chosen_moments(run):
    for step in range(1, 40):
        write_picture(run / "pictures" / f"attention-{step:06d}.png", size=(20, 10 + step))
    write_picture(run / "pictures" / "attention-000100.png", size=(3000, 100))
    (run / "pictures" / "reconstructions-000012.png").write_bytes(b"\x89PNG\r\n\x1a\n half written")
    write_picture(run / "pictures" / "attention-final.png")
    page = Page(write_report(run))
    shown = page.attributes("img")
    steps = [int(a["alt"].split()[-1]) for a in shown if a["alt"].startswith("attention")]
    assert [a["alt"] for a in shown if a["alt"].startswith("recon")] == [
        "reconstructions, step 0",
        "reconstructions, step 6",
    ]
    assert len(steps) == MOMENTS and steps[0] == 0 and steps[-1] == 100 and steps == sorted(set(steps))
    for step, attributes in zip(steps[1:], shown[3:], strict=True):
        image = Image.open(io.BytesIO(base64.b64decode(attributes["src"].split(",")[1])))
        assert image.width <= WIDTH and (step in (6, 12, 100) or image.height == 10 + step)
    checked = [a["id"] for a in page.attributes("input") if "checked" in a]
    assert checked == ["reconstructions-6", "attention-100"]


# --- long runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2 * BINS, 2 * BINS + 1, 5003])
def test_thin_keeps_the_ends_and_the_extremes(count):
    x, y = np.arange(count), np.random.default_rng(count).standard_normal(count)
    some_x, some_y = thin(x, y)
    assert len(some_x) <= 2 * BINS + 2 and np.all(np.diff(some_x) > 0)
    assert np.array_equal(y[some_x], some_y)
    assert {0, count - 1, y.argmin(), y.argmax()} <= set(some_x)
    if count <= 2 * BINS:
        assert len(some_x) == count


@pytest.mark.parametrize(("count", "most"), [(0, 8), (1, 8), (8, 8), (9, 8), (100, 8), (3, 2)])
def test_spread_is_even_with_both_ends(count, most):
    chosen = spread(list(range(count)), most)
    assert len(chosen) == min(count, most)
    if chosen:
        gaps = np.diff(chosen)
        assert chosen[0] == 0 and chosen[-1] == count - 1 and (len(gaps) == 0 or np.ptp(gaps) <= 1)


def test_a_long_run_gives_a_small_page_that_shows_every_spike(run):
    steps, spike = 100_000, 70_123
    rows = [
        training_row(n, image_loss=1.0, loss=3.0, audio_loss=2.0, epoch=n // 140) for n in range(1, steps + 1)
    ]
    rows[spike - 1]["image_loss"] = 25.0
    write_rows(run / "metrics.jsonl", rows + [measure(n, "during", 1.0) for n in range(0, steps, 140)])
    write_rows(run / "quarantine.jsonl", [dict(path=f"{n}.mp4", reason="", when="") for n in range(20_000)])
    (run / "pictures").rename(run / "elsewhere")
    page = Page(write_report(run))
    assert len(page.source) < 1_000_000
    assert "20000 in all, 19800 more in quarantine.jsonl" in page.text
    x, y = curve_points(page, "image").T
    assert y.argmin() not in (0, len(y) - 1)
    np.testing.assert_allclose(
        (x[y.argmin()] - x[0]) / (x[-1] - x[0]), spike / steps, atol=1e-3
    )  # of 300 pixels


# --- unfinished, damaged, hostile ---------------------------------------------------------------------------


def test_a_run_in_progress(run):
    write_rows(
        run / "metrics.jsonl", [measure(0, "before", 1.0), *map(training_row, range(1, 8))], '{"step": 8, "lo'
    )
    (run / "quarantine.jsonl").unlink()
    page = Page(write_report(run))
    assert "Not finished (running or stopped): step 7 of 12, epoch 4 of 6" in page.text
    assert "Image loss: 0.1429 at step 7" in page.text and "could not be read" not in page.text
    assert "Not shown" not in page.text


def test_runs_whose_settings_are_in_config_json(run):
    """As that file was called before, and as a model's still is."""
    whole = Page(write_report(run))
    (run / "run.json").rename(run / "config.json")
    assert Page(write_report(run)).rows == whole.rows and ["epochs", "6"] in whole.rows
    (run / "config.json").write_text('{"library": "avfuse", "class": "AVMAE"}')
    assert "Settings" not in Page(write_report(run)).text


@pytest.mark.parametrize("left", ["run.json", "metrics.jsonl"])
def test_a_folder_with_hardly_anything(run, left):
    for path in run.iterdir():
        if path.name not in (left, "pictures"):
            path.unlink()
    (run / "pictures").rename(run / "elsewhere")
    page = Page(write_report(run))
    assert "Not shown" not in page.text
    assert ("Curves" in page.text) == (left == "metrics.jsonl")
    assert ("Settings" in page.text) == (left == "run.json")


def test_a_diverged_loss_is_said(run):
    rows = [training_row(1), training_row(2), training_row(3, loss=float("nan"), image_loss=float("nan"))]
    write_rows(run / "metrics.jsonl", rows)
    page = Page(write_report(run))
    assert "not finite in 1 steps, first in step 3" in page.text and "Image loss: 0.5 at step 2" in page.text


def test_foreign_rows_spoil_no_more_than_their_section(run):
    rows = [
        training_row(1, lr="fast"),
        5,
        None,
        dict(loss=1),
        dict(step="x", loss=1),
        measure(1, "during", 1.0),
    ]
    write_rows(run / "metrics.jsonl", rows)
    write_rows(run / "quarantine.jsonl", [[], dict(path=7)])
    (run / "run.json").write_text('{"settings": {"epochs": "many"}, "environment": 3}')
    page = Page(write_report(run))
    assert "Not shown: ValueError" in page.text  # the curves
    assert ["shape", "1", *page.rows[1][2:]] == page.rows[1] and ["epochs", "many"] in page.rows
    (run / "metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    (run / "run.json").write_text("[")
    assert ["7", "", ""] in Page(write_report(run)).rows


def test_names_from_files_are_text(run):
    names = [
        "<script>alert(1)</script>.mp4",
        '"><img src=x onerror=alert(1)>',
        "&lt;b&gt; ünï",
        "a$b",
        "tab\there",
    ]
    lost = os.fsdecode(b"\xff.mp4")  # no text at all
    write_rows(
        run / "quarantine.jsonl",
        [dict(when="scan", path=name, reason=f"<i>{name}") for name in [*names, lost]],
    )
    write_rows(
        run / "metrics.jsonl", [measure(n, "during", 1.0, labels=["<b>$\\frac{$", lost]) for n in (1, 2)]
    )
    (run / "run.json").write_text(json.dumps(dict(settings={"<u>": "</table><script>"})))
    hostile = run.rename(run.with_name("<b>$x & run"))
    page = Page(write_report(hostile))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "i", "b", "u"})
    assert [row[:2] for row in page.rows if row and row[-1] == "scan"][:-1] == [[n, f"<i>{n}"] for n in names]
    assert ["<u>", "</table><script>"] in page.rows and "<b>$x & run" in page.text
    assert "Accuracy ± standard error: <b>$\\frac{$" in page.text and "Not shown" not in page.text
    assert not any("onerror" in attributes for _, attributes in page.tags)


# --- which folders, and how it is written -------------------------------------------------------------------


def test_folders_that_hold_no_run_are_refused_and_left_alone(tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
    for name in "config.json", "run.json":
        (tmp_path / name).write_text('{"architectures": ["Other"]}')
    (tmp_path / "index.html").write_text("a page of somebody else")
    with pytest.raises(ValueError, match="holds no run"):
        write_report(tmp_path)
    assert (tmp_path / "index.html").read_text() == "a page of somebody else"


def test_a_page_is_whole_or_the_one_before(run, monkeypatch):
    before = write_report(run).read_bytes()
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_report(run)
    assert (run / "index.html").read_bytes() == before
    assert not list(run.glob(".index*"))


def test_command(run, tmp_path, capsys):
    main(run)
    assert capsys.readouterr().out.strip() == str(run / "index.html")
    command = [sys.executable, "-m", "avfuse.report", tmp_path / "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("error: run ") and "nowhere" in done.stderr
