"""A contact sheet of Sounding Shapes: clips with the sounding object boxed, and the spectrograms beneath."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # without pyplot: needs no display
from matplotlib.patches import Rectangle

from ...files import inside
from .read import NAME, Entry, load_masks, read_frames, read_manifest, read_sound
from .synthesis import SHAPES, shape_from


def contact_sheet(root: str | Path, path: str | Path, clips: int = 12) -> Path:
    """Draw some clips, as many of each sounding shape as can be, into the picture file `path`.

    Each shows frames with the sounding objects boxed, and beneath them the spectrogram, with the pitch (that
    the height on screen asks for, in scenes of binding) as a dotted line.
    """
    entries = _of_each_shape(read_manifest(root, "train") or read_manifest(root, "test"))[:clips]
    if clips < 1 or not entries:
        raise ValueError(f"clips must be 1 or more and {root} must hold some, got clips={clips}")
    columns = min(3, len(entries))
    rows = math.ceil(len(entries) / columns)
    figure = Figure(figsize=(5.4 * columns, 0.5 + 2.9 * rows), layout="constrained")
    figure.suptitle(f"{NAME}: which object sounds, and what colour is it?", fontsize=15)
    cells = np.ravel(figure.subfigures(rows, columns, squeeze=False, hspace=0.03, wspace=0.02))
    for cell, entry in zip(cells, entries, strict=False):
        above, below = cell.subplots(2, 1)
        _show_frames(above, Path(root), entry)
        _show_spectrogram(below, Path(root), entry)
    figure.savefig(path, dpi=110)
    return Path(path)


def _of_each_shape(entries: list[Entry]) -> list[Entry]:
    """Reordered: the first clip of each shape, then the second of each, and so on."""
    seen = Counter()
    turns = []
    for entry in entries:
        turns.append((seen[entry.shape], SHAPES.index(entry.shape)))
        seen[entry.shape] += 1
    return [entries[n] for n in sorted(range(len(entries)), key=turns.__getitem__)]


def _show_frames(axes, root: Path, entry: Entry, count: int = 4) -> None:
    """`count` frames side by side, from the middles of equal spans, so that each stands above its sound."""
    frames = read_frames(inside(root, entry.file))
    _, boxes = load_masks(root, entry)
    shown = ((np.arange(count) + 0.5) * len(frames) / count).astype(int)
    gap = entry.size // 16
    strip = np.full((entry.size, count * (entry.size + gap) - gap, 3), 255, np.uint8)
    for place, t in enumerate(shown):
        left = place * (entry.size + gap)
        strip[:, left : left + entry.size] = frames[t]
        for x0, y0, x1, y1 in boxes[:, t] - 0.5:  # imshow puts the middle of a pixel at a whole number
            corner, width, height = (left + x0 - 2, y0 - 2), x1 - x0 + 4, y1 - y0 + 4
            axes.add_patch(Rectangle(corner, width, height, fill=False, color="white", linewidth=1.6))
    axes.imshow(strip)
    axes.set_title(f"{entry.colour} {entry.shape}", fontsize=12, fontweight="bold", pad=4)
    axes.set_axis_off()


def _show_spectrogram(axes, root: Path, entry: Entry) -> None:
    sound = read_sound(inside(root, entry.file))
    window = entry.sample_rate // 20
    hop = window // 5
    spans = np.lib.stride_tricks.sliding_window_view(np.pad(sound, window // 2), window)[::hop]
    power = abs(np.fft.rfft(spans * np.hanning(window), n=2 * window)).T ** 2
    level = 10 * np.log10(power[1:] / power.max() + 1e-7)
    times = np.arange(len(spans)) * hop / entry.sample_rate
    frequencies = np.fft.rfftfreq(2 * window, 1 / entry.sample_rate)[1:]
    axes.pcolormesh(times, frequencies, level, vmin=-60, vmax=0, cmap="magma", shading="nearest")
    for thing in (entry.objects[n] for n in entry.sounding):
        axes.plot(times, shape_from(thing).pitch(times), ":", color="white", alpha=0.7, linewidth=1)
    axes.set(yscale="log", ylim=(100, entry.sample_rate / 2), xlim=(0, entry.seconds))
    ticks = [hertz for hertz in (100, 300, 1000, 3000, 8000) if hertz <= entry.sample_rate / 2]
    axes.set_yticks(ticks, [f"{hertz / 1000:g}k" if hertz >= 1000 else str(hertz) for hertz in ticks])
    axes.minorticks_off()
    axes.tick_params(labelsize=7)
    axes.set_ylabel("Hz", fontsize=8, labelpad=1)
    axes.set_xlabel("seconds", fontsize=8, labelpad=1)
