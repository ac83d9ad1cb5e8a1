"""The plots in docs/ of what throughput.py and scaling.py measured, each with a digest of what it shows."""

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import scaling
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import ROOT
from PIL import Image
from throughput import MODES, PAPER, fastest

BLUE, ORANGE, GREEN, GREY = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#777777",
)  # which colour-blind readers tell apart
COLOURS = {"dense": BLUE, "pair-keys": GREEN, "materialized": ORANGE}


def plots(results: dict) -> dict[Path, tuple[str, Callable[[], Figure]]]:
    """By path, a digest of what it shows and a function that draws it."""
    drawings = {}
    for name, draw in {"throughput": draw_throughput, "scaling": draw_scaling}.items():
        if record := results.get(f"{name}-cpu"):
            drawings[ROOT / f"docs/{name}.png"] = digest(record), partial(draw, record)
    return drawings


def save(plots: dict[Path, tuple[str, Callable[[], Figure]]]) -> None:
    for path, (source, draw) in plots.items():
        draw().savefig(path, dpi=150, metadata={"Source": source})


def digest(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def drawn_from(path: Path) -> str | None:
    """The digest that a plot carries."""
    if not path.exists():
        return None
    with Image.open(path) as image:
        return image.text.get("Source")


def draw_throughput(record: dict) -> Figure:
    """Bars of speed and memory over no fusion, with quartiles, and diamonds where the paper reports them."""
    modes = [mode for mode in MODES if mode in record]
    heights = [0.6 + 0.23 * len(record[mode]["rows"]) for mode in modes]
    figure = Figure(figsize=(10, 0.6 + sum(heights)), layout="constrained")
    ratios = dict(height_ratios=heights)
    grid = figure.subplots(len(modes), 2, squeeze=False, sharey="row", gridspec_kw=ratios)
    for (speed_axis, memory_axis), mode in zip(grid, modes, strict=True):
        rows = record[mode]["rows"]
        best = {row: result for row in reversed(rows) if (result := fastest(rows, row))}
        speeds = {row: result["speed_over_none"] for row, result in best.items() if result["speed_over_none"]}
        medians = {row: speed["median"] for row, speed in speeds.items()}
        draw_bars(speed_axis, best, medians, whiskers(list(speeds.values())))
        draw_bars(memory_axis, best, {row: of["memory"] for row, of in best.items() if of["memory"]})
        speed_axis.set_yticks(range(len(best)), [rows[row]["label"] for row in best], fontsize=9)
        for column, (axis, what) in enumerate(((speed_axis, "speed"), (memory_axis, "peak memory"))):
            if mode == "inference":
                places = [place for place, row in enumerate(best) if row in PAPER]
                paper = [PAPER[row][column] / PAPER["none"][column] for row in best if row in PAPER]
                axis.plot(paper, places, "D", color=ORANGE, ms=7, mec="white", label="the paper, on its GPU")
            finish(axis, title=f"{MODES[mode]}: {what}", xlim=(0, None))
        if mode == "inference":
            memory_axis.legend(frameon=False, fontsize=9, loc="lower right")
    grid[-1][0].set_xlabel("clips per second over no fusion, CPU (more is better)")
    grid[-1][1].set_xlabel("bytes over no fusion, CPU (less is better)")
    return figure


def draw_bars(axis: Axes, rows: Iterable[str], values: dict[str, float], errors=None) -> None:
    """A bar for each row from below, with its value, where there is one, and a dotted line at 1."""
    colours = [BLUE if row in ("dense", "pair-bias", "dense-fused") else GREY for row in values]
    places = {place: values[row] for place, row in enumerate(rows) if row in values}
    caps = dict(ecolor="black", capsize=3)
    axis.barh(list(places), list(places.values()), xerr=errors, color=colours, height=0.62, error_kw=caps)
    for place, value in places.items():
        style = dict(va="center", color="white", fontsize=9, fontweight="bold")
        axis.text(0.02, place, f"{value:.2f}", **style)
    axis.axvline(1, color="black", lw=0.8, ls=":")


def draw_scaling(record: dict) -> Figure:
    """Time and memory against tokens per modality, both logarithmic, forward and training."""
    modes, tokens = [mode for mode in scaling.MODES if mode in record], record["settings"]["tokens"]
    figure = Figure(figsize=(10, 0.9 + 3.2 * len(modes)), layout="constrained")
    grid = figure.subplots(len(modes), 2, squeeze=False, sharex=True)
    for (time_axis, memory_axis), mode in zip(grid, modes, strict=True):
        for row, result in record[mode].items():
            points = {int(n): point for n, point in result["points"].items() if "seconds" in point}
            seconds = [point["seconds"] for point in points.values()]
            ms, errors = [1e3 * q["median"] for q in seconds], 1e3 * whiskers(seconds)
            mib = [point["memory_bytes"] / 2**20 for point in points.values()]
            slope = result.get("time_slope", {}).get("median")
            draw_line(time_axis, row, list(points), ms, errors, slope)
            draw_line(memory_axis, row, list(points), mib, None, result.get("memory_slope"))
        limit = record["settings"]["memory_limit"]
        memory_axis.axhline(limit * 1024, color=GREY, lw=1, ls="--")
        below = dict(xytext=(0, -4), textcoords="offset points", va="top", color=GREY, fontsize=9)
        memory_axis.annotate(f"limit of {limit:g} GiB", (tokens[0], limit * 1024), **below)
        for axis, what in ((time_axis, "time, milliseconds"), (memory_axis, "peak memory, MiB")):
            finish(axis, xscale="log", yscale="log", title=mode, ylabel=what)
            axis.margins(0.11, 0.1)
            axis.set_xticks(tokens, [str(n) for n in tokens])
            axis.minorticks_off()
            axis.grid(color="#dddddd", lw=0.6)
    for axis in grid[-1]:
        axis.set_xlabel("image tokens, and as many audio tokens")
    lines, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=10)
    return figure


def draw_line(axis: Axes, row: str, tokens: list, values: list, errors, slope: float | None) -> None:
    """One row in one panel, with its slope beside the last point."""
    marker = {"dense": "o", "pair-keys": "s", "materialized": "^"}[row]
    style = dict(color=COLOURS[row], marker=marker, ms=5, lw=1.5, capsize=2)
    axis.errorbar(tokens, values, errors, label=scaling.LABELS[row], **style)
    if slope is not None:
        where = dict(xytext=(18, -10), textcoords="offset points", ha="center", va="top", fontsize=9)
        axis.annotate(f"slope {slope:.2f}", (tokens[-1], values[-1]), color=COLOURS[row], **where)


def whiskers(values: list[dict]) -> np.ndarray:
    """From the medians down and up to the quartiles, (2, n)."""
    medians, low, high = (np.array([value[name] for value in values]) for name in ("median", "q25", "q75"))
    return np.stack([medians - low, high - medians])


def finish(axis: Axes, **settings) -> None:
    axis.set(**settings)
    axis.title.set_fontsize(10)
    axis.spines[["top", "right"]].set_visible(False)
