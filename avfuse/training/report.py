"""A run on one page: RUN/index.html, one file without scripts or links, for running and crashed runs too."""

import base64
import io
import json
import re
import time
from collections.abc import Iterable
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..files import in_html, read_rows, write_text
from .conditions import condition_table
from .looks import do_look, said_of
from .neighbours import interval
from .pictures import BLUE, GREY, ORANGE
from .run_folder import FILE, read_run

BINS = 250  # of a long curve; each keeps its lowest and highest value
MOMENTS, WIDTH = 8, 1100  # of a series of pictures; their pixels
NAMES, HEADER = 200, ("path", "reason", "when")  # of unreadable clips

TESTED = (
    "The same model, given something else than the sounds or the pictures of the clips; what is true of them "
    "stays. A number that does not fall tells that the model makes no use of what was taken from it."
)
INK, GREEN, PINK = "#010203", "#009E73", "#CC79A7"  # text and axes; two more colours of the palette
VARIABLES = {INK: "ink", BLUE: "image", ORANGE: "audio", GREEN: "fusion", PINK: "sum", GREY: "grey"}
FEATURES = dict(image=(BLUE, "o-"), audio=(ORANGE, "s--"), fusion=(GREEN, "^-."), sum=(PINK, "D:"))
COLUMNS = dict(  # of a step that are no loss of a task's own
    loss="Loss",
    image_loss="Image loss",
    audio_loss="Audio loss",
    lr="Learning rate",
    grad_norm="Gradient norm",
    throughput="Clips per second",
    waiting="Share of time waiting for data",
)
PICTURES = dict(  # the first to show; those of tasks are called what their files are
    reconstructions="Original, what the model sees, and what it makes of it",
    attention="Where fusion tokens look and listen, in the last fused layer, or the one most on what sounds",
)
CHART = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    **{f"axes.spines.{side}": False for side in ("top", "right")},
    **{f"{name}color": INK for name in ("text.", "xtick.", "ytick.", "axes.edge", "axes.label")},
}

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>$name</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1a1a1a; --grey: #707070; --line: #ddd;
  --image: #0072b2; --audio: #d55e00; --fusion: #009e73; --sum: #cc79a7 }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e4e4e4; --grey: #9a9a9a; --line: #3a3d41;
    --image: #56b4e9; --audio: #f08a3c; --fusion: #2bbf95; --sum: #dc9cc1 } }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.45 system-ui, sans-serif; overflow-wrap: anywhere }
h2 { margin: 2rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); font-size: 1.2rem }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); gap: 1rem }
figure { margin: 0 }
figcaption, footer { color: var(--grey); font-size: .9rem }
svg { width: 100%; height: auto }
table { display: block; overflow-x: auto; border-collapse: collapse; font-size: .9rem }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; min-width: 6rem }
.moments { display: flex; flex-wrap: wrap; gap: .3rem .7rem; margin: .5rem 0 1.5rem }
.moments label { white-space: nowrap }
.moments img { display: none; order: 1; width: 100% }
.moments input:checked + label + img { display: block }
</style>
</head>
<body>
<h1>$name</h1>
$sections
<footer>Written $time by python -m avfuse.report</footer>
</body>
</html>
""")


def write_report(run: Path) -> Path:
    """Writes run/index.html, and returns its path. What the folder lacks is left out, and what is damaged is
    said to be: the page serves a run that goes on, ended, or crashed.

    Raises:
        ValueError: `run` is not the folder of a run.
        OSError: the page cannot be written; the one from before is still there.
    """
    if not run.is_dir():
        raise ValueError(f"run {run} is not a folder")
    try:
        config = read_run(run)
    except (OSError, ValueError):
        config = {}
    if not config and not (run / "metrics.jsonl").is_file():
        raise ValueError(f"run {run} holds no run: no metrics.jsonl, and no {FILE} with settings")
    path = run / "index.html"
    write_text(path, page(run, config), errors="xmlcharrefreplace")  # a file name may hold what UTF-8 cannot
    return path


def page(run: Path, config: dict) -> str:
    metrics = run / "metrics.jsonl"
    rows = [row for row in read_objects(metrics) if isinstance(row.get("step"), int)]
    steps = [row for row in rows if "loss" in row]
    measures = [row for row in rows if "when" in row]
    sections = (
        section("Status", status, config, metrics, steps, measures),
        section("Curves", curves, steps, measures),
        section("Results", results, [row for row in measures if isinstance(row.get("metrics"), dict)]),
        section("Hearing and seeing, tested", tested, [row for row in measures if row.get("conditions")]),
        section("Protocol of the final results", protocol, run / "results.json"),
        section("Nearest-neighbour probe", probes, [row for row in measures if row.get("probes")]),
        section("Where fusion tokens look", looked, config, [row for row in measures if row.get("looks")]),
        section("Pictures over time", pictures, run / "pictures"),
        section("Clips that could not be read", quarantine, read_objects(run / "quarantine.jsonl")),
        section("Settings", lambda: table(config["settings"].items()) if config else ""),
        section("Environment", lambda: table(config.get("environment", {}).items())),
    )
    return PAGE.substitute(
        name=in_html(run.resolve().name), sections="\n".join(sections), time=clock(time.time())
    )


def section(title: str, write, *arguments) -> str:
    """A heading with what `write` returns below it; nothing if that is empty."""
    try:
        body = write(*arguments)
    except Exception as error:  # a damaged or foreign file must not end a run of weeks
        body = paragraph(f"Not shown: {type(error).__name__}: {error}")
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


# --- what the folder holds ----------------------------------------------------------------------------------


def read_objects(path: Path) -> list[dict]:
    """The rows of a JSON lines file, none if it cannot be read."""
    try:
        return read_rows(path)
    except OSError:
        return []


def column(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of a column where it is finite."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    return x[np.isfinite(y)], y[np.isfinite(y)]


def thin(x: np.ndarray, y: np.ndarray, bins: int = BINS) -> tuple[np.ndarray, np.ndarray]:
    """The ends of a curve, and the lowest and highest point of every bin; a short curve as it is."""
    if len(x) <= 2 * bins:
        return x, y
    keep = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), bins):
        keep |= {part[y[part].argmin()], part[y[part].argmax()]}
    return x[sorted(keep)], y[sorted(keep)]


def spread(items: list, most: int) -> list:
    """At most `most` of the items, evenly, with the first and the last."""
    indices = np.linspace(0, len(items) - 1, min(len(items), most))
    return [items[round(index)] for index in indices]


# --- sections -----------------------------------------------------------------------------------------------


def status(config: dict, metrics: Path, steps: list[dict], measures: list[dict]) -> str:
    """How far the run is, and what it is worth."""
    newest = steps[-1]["step"] if steps else 0  # a run that was extended has ended before
    ended = any(row["when"] == "after" and row["step"] >= newest for row in measures)
    text = "Finished" if ended else "Not finished (running or stopped)"
    epochs = config.get("settings", {}).get("epochs")
    if steps:
        step, epoch = steps[-1]["step"], steps[-1].get("epoch")
        text += f": step {step}"
        if epoch and epochs:  # where the newest epoch began tells how many steps each has
            began = next(row["step"] for row in steps if row.get("epoch") == epoch) - 1
            text += f" of {began // epoch * epochs}"
        if epoch is not None and epochs:
            text += f", epoch {epoch + 1} of {epochs}"
        text += f", written {clock(metrics.stat().st_mtime)}"
    lines = [text]
    for row in spread([row for row in measures if held_out(row)], 2):
        losses = held_out(row)
        *_, (loss, zero, share) = losses.values()  # of both, where there are two
        each = ", ".join(f"{name} {of[0]:.3f}" for name, of in losses.items() if name != "both")
        lines.append(
            f"{row.get('clips', 'held-out clips')} at step {row['step']}: loss {loss:.3f} "
            f"({each})" + ("" if share is None else f", {share:.2f} of predicting zero ({zero:.3f})")
        )
    broken = [row["step"] for row in steps if not np.isfinite(row["loss"])]
    if broken:
        lines.append(f"The loss is not finite in {len(broken)} steps, first in step {broken[0]}")
    return "".join(map(paragraph, lines))


def held_out(metrics: dict) -> dict[str, tuple[float, float, float | None]]:
    """The held-out losses of image, audio and both, with that of predicting zero, and the share of that; of
    what clips have.
    """
    there = [name for name in ("image", "audio") if f"held_out_{name}_loss" in metrics]
    pairs = {name: [metrics[f"held_out_{name}_{kind}"] for kind in ("loss", "zero")] for name in there}
    if len(pairs) == 2:
        pairs["both"] = [sum(values) for values in zip(*pairs.values(), strict=True)]
    return {name: (loss, zero, loss / zero if zero else None) for name, (loss, zero) in pairs.items()}


def curves(steps: list[dict], measures: list[dict]) -> str:
    timed = [row for row in steps if row.get("seconds") and "data_seconds" in row]
    for row in timed:
        row |= dict(throughput=row["clips"] / row["seconds"], waiting=row["data_seconds"] / row["seconds"])
    text = charts([curve(steps, measures, name) for name in COLUMNS])
    if timed:
        clips, seconds, waited = (
            sum(row[key] for row in timed) for key in ("clips", "seconds", "data_seconds")
        )
        text += paragraph(
            f"All steps: {clips / seconds:.1f} clips per second, {waited / seconds:.1%} waiting for data"
        )
    if len(steps) > 2 * BINS:
        text += paragraph("Faint: the range of neighbouring steps; line: their mean")
    return text


def curve(steps: list[dict], measures: list[dict], name: str) -> str:
    """A column by step: as it is if short, else range and mean of its bins. With its held-out values."""
    x, y = column(steps, name)
    if not len(x):
        return ""
    with matplotlib.rc_context(CHART):
        axis = new_axis()
        long, colour = len(x) > 2 * BINS, ORANGE if name == "audio_loss" else BLUE
        axis.plot(*thin(x, y), color=colour, lw=0.6 if long else 1.3, alpha=0.4 if long else 1)
        if long:
            means = ([part.mean() for part in np.array_split(values, BINS // 2)] for values in (x, y))
            axis.plot(*means, color=colour, lw=1.5)
        held_out = column(measures, f"held_out_{name}")
        axis.plot(*thin(*held_out, bins=50), "o", color=INK, ms=4, label="held out")
        for zero in column(measures, f"held_out_{name}".replace("loss", "zero"))[1][-1:]:
            axis.axhline(zero, color=GREY, ls="--", lw=1, label="predicting zero")
            axis.legend(frameon=False)
        if y.min() > 0 and y.max() > 30 * np.median(y):  # a spike would flatten all else
            axis.set_yscale("log")
        else:
            axis.set_ylim(bottom=0)
        return figure(axis, f"{COLUMNS[name]}: {y[-1]:.4g} at step {x[-1]:.0f}")


def results(measures: list[dict]) -> str:
    """The metrics of a task, at the first measure and the last."""
    if not measures:
        return ""
    first_and_last = spread(measures, 2)
    names = list(first_and_last[-1]["metrics"])
    cells = [[name, *(short(row["metrics"].get(name)) for row in first_and_last)] for name in names]
    steps = [f"step {row['step']}" for row in first_and_last]
    judged = first_and_last[-1].get("judged", "?")
    return paragraph(f"{judged} {first_and_last[-1].get('clips', 'clips')}") + table(cells, ["", *steps])


def tested(measures: list[dict]) -> str:
    """The metrics of the trained model beside those of the same model that hears or sees something else."""
    if not measures:
        return ""
    row = measures[-1]
    header, *cells = condition_table(row["metrics"] | dict(judged=row.get("judged")), row["conditions"])
    return paragraph(TESTED) + table((map(short, cell) for cell in cells), header)


def protocol(path: Path) -> str:
    """How the final results are defined, once there are some."""
    text = json.loads(path.read_text(encoding="utf-8")).get("protocol") if path.is_file() else None
    return paragraph(text) if text else ""


def short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def probes(measures: list[dict]) -> str:
    """The first and the last measure in numbers, all of them in curves."""
    lines, figures = [], []
    for label in dict.fromkeys(label for row in measures for label in row["probes"]):
        probed = [(row["step"], row["probes"][label]) for row in measures if label in row["probes"]]
        for step, features in spread(probed, 2):
            cells = (features.get(name) for name in FEATURES)
            cells = (accuracy_of(p) if p else "" for p in cells)
            lines.append([label, step, *cells, f"{chance(features):.3f}"])
        figures.append(probe_curve(label, spread(probed, 40)))
    return table(lines, ["label", "step", *FEATURES, "chance"]) + charts(figures)


def looked(config: dict, measures: list[dict]) -> str:
    """A sentence or two, of the last measure."""
    if not measures:
        return ""
    shares = measures[-1]["looks"]
    said = said_of(**shares)
    if not do_look(**shares) and config.get("settings", {}).get("preset") != "demo-long":
        said += " Those of the run in docs/training.md (avfuse train --preset demo-long) do."
    return paragraph(said)


def accuracy_of(probe: dict) -> str:
    """With its 95 % interval, which older runs do not have."""
    about = f"({interval(*probe['interval'])})" if "interval" in probe else f"± {probe['standard_error']:.3f}"
    return f"{probe['accuracy']:.3f} {about}"


def probe_curve(label: str, probed: list[tuple[int, dict]]) -> str:
    with matplotlib.rc_context(CHART):
        axis = new_axis()
        for name, (colour, style) in FEATURES.items():
            points = [(step, p["accuracy"], p["standard_error"]) for step, f in probed if (p := f.get(name))]
            if points:
                axis.errorbar(*np.transpose(points), fmt=style, color=colour, ms=4, lw=1.2, label=name)
        axis.axhline(chance(probed[-1][1]), color=GREY, ls="--", lw=1, label="chance")
        axis.set_ylim(0, 1)
        axis.legend(frameon=False, ncols=3, fontsize=8)
        return figure(axis, f"Accuracy ± standard error: {label}")


def chance(features: dict[str, dict]) -> float:
    return next(iter(features.values()))["chance"]


def pictures(folder: Path) -> str:
    """A row of moments to choose from for each kind of picture; at first the last one shows."""
    kinds, text = {kind: [] for kind in PICTURES}, ""
    for path in sorted(folder.glob("*-*.png")):
        kind, _, step = path.stem.rpartition("-")
        if step.isdecimal():
            kinds.setdefault(kind, []).append((int(step), path))
    for kind, moments in kinds.items():
        moments = spread(sorted(moments), MOMENTS)
        images = {step: uri for step, path in moments if (uri := embedded(path))}
        name = in_html(kind)
        items = (
            f'<input type="radio" name="{name}" id="{name}-{step}"{" checked" * (step == max(images))}>'
            f'<label for="{name}-{step}">step {step}</label><img alt="{name}, step {step}" src="{uri}">'
            for step, uri in images.items()
        )
        caption = paragraph(PICTURES.get(kind, kind.capitalize()))
        text += f'{caption}<div class="moments">{"".join(items)}</div>' if images else ""
    return text


def quarantine(rows: list[dict]) -> str:
    names = table(([row.get(key, "") for key in HEADER] for row in rows[:NAMES]), HEADER)
    more = f", {len(rows) - NAMES} more in quarantine.jsonl" if len(rows) > NAMES else ""
    return paragraph(f"{len(rows)} in all{more}") + names if rows else ""


# --- parts of a page ----------------------------------------------------------------------------------------


def new_axis() -> Axes:
    axis = Figure(figsize=(4.8, 2.7), layout="constrained").subplots()
    axis.set_xlabel("step")
    axis.grid(color=INK, alpha=0.12, lw=0.6)
    return axis


def figure(axis: Axes, caption: str) -> str:
    """A chart of inline SVG whose colours follow the page, light or dark. The caption may come from a file:
    it is no part of the chart, where matplotlib would read it as mathematics."""
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.hashsalt": ascii(caption)}):  # the charts of a page must not share ids
        axis.figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace("xlink:href", "href")
    svg = re.sub(r'(?<=<g) id="[^"]*"| xmlns(:\w+)?="[^"]*"| (width|height)="[\d.]+pt"', "", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour.lower(), f"var(--{variable})")
    return f"<figure><figcaption>{in_html(caption)}</figcaption>{svg}</figure>"


def charts(figures: list[str]) -> str:
    return f'<div class="charts">{"".join(figures)}</div>' if any(figures) else ""


def embedded(path: Path) -> str:
    """A picture as a data URI, made small; empty if the file is damaged."""
    file = io.BytesIO()
    try:
        with Image.open(path) as image:
            image = image.convert("RGB")
            image.thumbnail((WIDTH, 2 * WIDTH))
            image.save(file, "WEBP", quality=75)
    except (OSError, SyntaxError, ValueError):  # what Pillow raises for damaged files
        return ""
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"


def table(rows: Iterable, header: Iterable[str] = ()) -> str:
    """Each cell is escaped, and kept from turning its neighbours' direction: names come from files."""
    lines = "".join(f"<tr>{''.join(map(td, row))}</tr>" for row in rows)
    top = f"<tr>{''.join(f'<th>{in_html(name)}</th>' for name in header)}</tr>" if header else ""
    return f"<table>{top}{lines}</table>" if lines else ""


def td(value: object) -> str:
    return f"<td><bdi>{in_html(value if isinstance(value, str) else json.dumps(value))}</bdi></td>"


def clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def paragraph(text: str) -> str:
    return f"<p>{in_html(text)}</p>"
