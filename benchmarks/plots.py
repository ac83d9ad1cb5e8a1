"""The plots in docs/ of what throughput.py and scaling.py measured, each with a digest of what it shows."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import ROOT
from PIL import Image
from scaling import LABELS
from throughput import MODES, PAPER, best_batch

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"  # told apart by colour-blind readers
COLOURS = {"dense": BLUE, "pair-keys": GREEN, "materialized": ORANGE}


def plots(results: dict) -> dict[Path, tuple[str, Callable[[], Figure]]]:
    """By path, a digest of what it shows and a function that draws it."""
    found = {}
    for name, draw in {"throughput": draw_throughput, "scaling": draw_scaling}.items():
        if record := results.get(f"{name}-cpu"):
            found[ROOT / f"docs/{name}.png"] = digest(record), partial(draw, record)
    return found


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
    figure = Figure(figsize=(10, 0.6 + 2.9 * len(modes)), layout="constrained")
    grid = figure.subplots(len(modes), 2, squeeze=False, sharey=True)
    for row_axes, mode in zip(grid, modes, strict=True):
        rows = {key: row for key, row in record[mode]["rows"].items() if best_batch(row) is not None}
        shown = list(reversed(rows))
        places = range(len(shown))
        colours = [BLUE if key in ("dense", "pair-bias") else GREY for key in shown]
        best = {key: rows[key]["batches"][best_batch(rows[key])] for key in shown}
        speeds = [best[key]["speed_over_none"] for key in shown]
        middle = [quantiles["median"] for quantiles in speeds]
        errors = [[q["median"] - q["q25"] for q in speeds], [q["q75"] - q["median"] for q in speeds]]
        without = rows["none"]["batches"]
        memories = [
            best[key]["memory_bytes"] / without[best_batch(rows[key])]["memory_bytes"] for key in shown
        ]
        for axis, values, error, of_paper, title in (
            (row_axes[0], middle, errors, 0, "speed"),
            (row_axes[1], memories, None, 1, "peak memory"),
        ):
            axis.barh(
                places,
                values,
                xerr=error,
                color=colours,
                height=0.62,
                error_kw=dict(ecolor="black", capsize=3),
            )
            for place, value in zip(places, values, strict=True):
                axis.text(
                    0.02, place, f"{value:.2f}", va="center", color="white", fontsize=9, fontweight="bold"
                )
            if mode == "inference":
                paper = {
                    place: PAPER[key][of_paper] / PAPER["none"][of_paper]
                    for place, key in enumerate(shown)
                    if key in PAPER
                }
                axis.plot(
                    paper.values(),
                    paper.keys(),
                    "D",
                    color=ORANGE,
                    ms=7,
                    mec="white",
                    label="the paper, on its GPU",
                )
            axis.axvline(1, color="black", lw=0.8, ls=":")
            axis.set(title=f"{MODES[mode]}: {title}", xlim=(0, None))
            axis.title.set_fontsize(10)
            axis.spines[["top", "right"]].set_visible(False)
        row_axes[0].set_yticks(places, [rows[key]["label"] for key in shown], fontsize=9)
        if mode == "inference":
            row_axes[1].legend(frameon=False, fontsize=9, loc="lower right")
    grid[-1][0].set_xlabel("clips per second over no fusion, CPU (more is better)")
    grid[-1][1].set_xlabel("bytes over no fusion, CPU (less is better)")
    return figure


def draw_scaling(record: dict) -> Figure:
    """Time and memory against tokens per modality, both logarithmic, forward and training."""
    modes = [mode for mode in ("forward", "training") if mode in record]
    figure = Figure(figsize=(10, 0.9 + 3.2 * len(modes)), layout="constrained")
    grid = figure.subplots(len(modes), 2, squeeze=False, sharex=True)
    for (time_axis, memory_axis), mode in zip(grid, modes, strict=True):
        for row, result in record[mode].items():
            points = {int(n): point for n, point in result["points"].items() if "seconds" in point}
            ms = [
                {name: 1e3 * value for name, value in point["seconds"].items()} for point in points.values()
            ]
            spread_of = [[q["median"] - q["q25"] for q in ms], [q["q75"] - q["median"] for q in ms]]
            mib = [point["memory_bytes"] / 2**20 for point in points.values()]
            slope = result.get("time_slope", {}).get("median")
            draw_line(time_axis, row, list(points), [q["median"] for q in ms], spread_of, slope)
            draw_line(memory_axis, row, list(points), mib, None, result.get("memory_slope"))
        limit = record["settings"]["memory_limit"]
        memory_axis.axhline(limit * 1024, color=GREY, lw=1, ls="--")
        memory_axis.annotate(
            f"limit of {limit:g} GiB",
            (record["settings"]["tokens"][0], limit * 1024),
            xytext=(0, -4),
            textcoords="offset points",
            va="top",
            color=GREY,
            fontsize=9,
        )
        for axis, what in ((time_axis, "time, milliseconds"), (memory_axis, "peak memory, MiB")):
            tokens = record["settings"]["tokens"]
            axis.set(xscale="log", yscale="log", title=mode, ylabel=what)
            axis.margins(0.11, 0.1)
            axis.title.set_fontsize(10)
            axis.set_xticks(tokens, [str(n) for n in tokens])
            axis.minorticks_off()
            axis.grid(color="#dddddd", lw=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in grid[-1]:
        axis.set_xlabel("image tokens, and as many audio tokens")
    lines, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(lines, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=10)
    return figure


def draw_line(axis: Axes, row: str, tokens: list, values: list, spread_of: list | None, slope: float | None):
    """One row in one panel, with its slope beside the last point."""
    marker = {"dense": "o", "pair-keys": "s", "materialized": "^"}[row]
    style = dict(color=COLOURS[row], marker=marker, ms=5, lw=1.5, capsize=2)
    axis.errorbar(tokens, values, spread_of, label=LABELS[row], **style)
    if slope is not None:
        where = dict(xytext=(18, -10), textcoords="offset points", ha="center", va="top", fontsize=9)
        axis.annotate(f"slope {slope:.2f}", (tokens[-1], values[-1]), color=COLOURS[row], **where)
