"""Does fusion hear when it sees? The study's second page: several frames, and pairs that know about time.

In scenes of synchrony all objects look and sound alike but for their colours, and each becomes large and
small at moments of its own; the sound follows one of them. To name its colour takes the sound and several
frames.
"""

from dataclasses import dataclass, replace
from typing import Literal

import measure
import study
import torch
from matplotlib.figure import Figure
from pages import CellOptions, Page, by_seed
from plots import BLUE, GREEN, GREY, ORANGE
from study import VERDICT, Row, Scenes, difference, draw_seeds, fit, mean_cell, over_scenes
from tables import origin
from torch.nn.functional import cross_entropy

from avfuse import AVEncoder, InputSettings
from avfuse.data.sounding_shapes.synthesis import COLOURS, OBJECTS
from avfuse.tasks.classifier import Classifier
from avfuse.training.starts import TIME_PEAK

DIM, DEPTH = 48, 2
INPUTS = InputSettings(image_size=48, mel_bins=64, hop=375)  # 9 tokens a frame, 32 of sound: 4 x 8 of 0.375 s


ROWS = {
    "dense-time": Row("dense with a bias of time", "dense", pair_bias="time", time_peak=TIME_PEAK),
    "dense-time-zero": Row("dense with a bias of time that begins at zero", "dense", pair_bias="time"),
    "bilinear-time": Row(
        "bilinear pairs with a bias of time", "bilinear", pair_bias="time", time_peak=TIME_PEAK
    ),
    "dense": Row("dense", "dense"),
    "bilinear": Row("bilinear pairs", "bilinear"),
    "factorized": Row("factorized", "factorized"),
    "token": Row("token", "token"),
    "joint": Row("joint attention", "joint", features=("image", "audio")),
    "cross": Row("cross-attention in every layer", "cross", features=("image", "audio")),
    "none": Row("no fusion (logits averaged)", "none", features=("image", "audio")),
}
RowName = Literal[*ROWS]
KEYS = ("row", "frames", "fusion_tokens", "seed")  # of a cell
WITHOUT_TOKENS = ("joint", "cross", "none")  # one cell, whatever the number of fusion tokens


@dataclass(frozen=True)
class Options(CellOptions):
    """Trains ways to fuse on scenes of synchrony, and says how well each names the colour of what sounds.

    One cell is one row with so many frames, fusion tokens and one seed. Cells that the result file holds are
    not trained again: the same command goes on where it was stopped. After each cell the file, the page
    benchmarks/synchrony.md and the plot docs/synchrony.png are written anew.

    All rows share scenes, learning rates and number of steps; nothing is tuned for one of them, but that the
    bias of time begins with a peak at what happens together, as in training; a row tells how it does without.
    Models are 48 wide and 2 layers deep, with 9 tokens a frame and 32 of sound. The pictures alone can do no
    better than 1 / 4, the objects shown, and the sound alone than 1 / 6, the colours; one frame is from the
    middle, where all objects rest, so it is at the chance of the pictures, too. Unlike in study.py, models
    are asked for nothing but the colour of what sounds, and AdamW trains all of them.
    """

    rows: tuple[RowName, ...] = tuple(ROWS)
    """Which ways to fuse."""
    frames: tuple[int, ...] = (8, 1)
    """Of a clip of 3 s."""
    fusion_tokens: tuple[int, ...] = (4, 2, 16)
    """F; with one frame only the first."""
    steps: int = 1500
    """Training steps of a cell."""
    batch_size: int = 32
    lr: float = 3e-3
    """It rises for a fifteenth of the steps, stays, and falls to 0 over the second half."""
    train: int = 6_000
    """Scenes to train on; drawn once and kept under data/."""
    test: int = 1_000
    """Scenes to judge on."""


def main(options: Options) -> None:
    if not options.report:
        one = [(row, 1, options.fusion_tokens[0], seed) for seed in options.seeds for row in options.rows]
        several = [
            (row, frames, F, seed)
            for seed in options.seeds
            for F in options.fusion_tokens
            for frames in options.frames
            for row in options.rows
            if frames > 1 and (row not in WITHOUT_TOKENS or F == options.fusion_tokens[0])
        ]
        cells = sorted(several + (one if 1 in options.frames else []), key=lambda cell: cell[-1])
        for frames in options.frames:
            scenes_of(options, frames).draw(options.workers)
        PAGE.train(options, cells, train_cell, dim=DIM, depth=DEPTH)
    PAGE.show()


# --- cells --------------------------------------------------------------------------------------------------


Cell = tuple[RowName, int, int, int]  # row, frames, fusion tokens, seed


def train_cell(options: Options, cell: Cell) -> dict:
    """Accuracy on the test scenes, and on the way there."""
    row, frames, F, seed = cell
    train, test = scenes_of(options, frames).splits()
    torch.manual_seed(seed)
    model = Classifier(make_encoder(ROWS[row], frames, F), len(COLOURS), features=ROWS[row].features)

    def loss(batch):
        return cross_entropy(model(batch["image"], batch["audio"]).logits, batch["colour"])

    curve, pause = [], max(1, options.steps // 5)
    for step in fit(model, loss, train, options.steps, options, pause, adamw):
        curve.append([step, accuracy(model, test)])
    return dict(zip(KEYS, cell, strict=True)) | dict(colour=curve[-1][1], curve=curve)


def adamw(model: Classifier, options: Options) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01)]


def accuracy(model: Classifier, scenes: dict) -> float:
    """Share of the scenes whose colour is named right."""

    def right(batch):
        return model(batch["image"], batch["audio"]).logits.argmax(1) == batch["colour"]

    return over_scenes(model, scenes, right).double().mean().item()


def make_encoder(row: Row, frames: int, fusion_tokens: int) -> AVEncoder:
    options = dict(fusion_tokens=fusion_tokens, pair_bias=row.pair_bias, time_peak=row.time_peak)
    inputs = replace(INPUTS, image_frames=frames)
    return study.make_encoder(row, inputs, dim=DIM, depth=DEPTH, **options)


def scenes_of(options: Options, frames: int) -> Scenes:
    inputs = replace(INPUTS, image_frames=frames)
    name = f"synchrony-{frames}"
    return Scenes(name, OBJECTS["synchrony"], options.train, options.test, inputs, "synchrony")


# --- results ------------------------------------------------------------------------------------------------


def by_cell(record: dict) -> dict[tuple[str, int, int], list[float]]:
    """Row, frames and fusion tokens -> colour accuracies by seed."""
    return by_seed(record["cells"], "colour", "row", "frames", "fusion_tokens")


def accuracy_table(record: dict) -> list[tuple]:
    """Accuracies of every row by frames and fusion tokens."""
    accuracies = by_cell(record)
    several = sorted({(T, F) for _, T, F in accuracies}, key=lambda key: (key[0] == 1, key))
    columns = [f"{T} frames, {F} fusion tokens" if T > 1 else f"one frame, {F}" for T, F in several]
    rows = [("", *columns)]
    for name, row in ROWS.items():
        cells = [mean_cell(accuracies.get((name, T, F))) for T, F in several]
        if any(cells):
            rows.append((row.label, *cells))
    return rows


def claims_table(record: dict) -> list[tuple]:
    """What is expected of a bias of time, each as a difference of two cells."""
    accuracies = by_cell(record)
    tokens, first = sorted({F for _, T, F in accuracies if T > 1}), Options.fusion_tokens[0]
    claims = [
        (f"a bias of time {over}, {F} fusion tokens", ("dense-time", 8, F), (other, 8, F))
        for over, other in (
            ("over none", "dense"),
            ("that begins with a peak over one from zero", "dense-time-zero"),
        )
        for F in tokens
    ]
    claims += [
        (f"dense with a bias of time over {ROWS[other].label}", ("dense-time", 8, first), (other, 8, first))
        for other in ("bilinear-time", "factorized", "token", "joint", "cross", "none")
    ]
    claims += [
        (f"8 frames over one, {ROWS[name].label}", (name, 8, first), (name, 1, first)) for name in ROWS
    ]
    told = ((claim, difference(*map(accuracies.get, pair))) for claim, *pair in claims)
    return [("claim", "difference of accuracies"), *((claim, by) for claim, by in told if by)]


def parts(record: dict) -> list:
    """What the page says."""
    settings = record["settings"]
    return [
        accuracy_table(record),
        f"Accuracy of the colour of what sounds after {settings['steps']:,} steps, mean ± standard deviation "
        "over seeds. Chance is 0.250 for the pictures alone, and for one frame with the sound; 0.167 for the "
        "sound alone.",
        f"What was expected: difference of the means ± its standard error, {VERDICT}:",
        claims_table(record),
        "![Accuracy by way to fuse, frames and fusion tokens](../docs/synchrony.png)",
        origin(record),
    ]


def draw_plot(record: dict) -> Figure:
    """Every seed a dot, the mean a bar; by number of frames and of fusion tokens."""
    accuracies = by_cell(record)
    kinds = sorted({(T, F) for _, T, F in accuracies}, key=lambda key: (key[0] == 1, key))
    names = [name for name in ROWS if any(key[0] == name for key in accuracies)]
    figure = Figure(figsize=(9, 1 + 0.7 * len(names)), layout="constrained")
    axis, labels = figure.subplots(), [ROWS[name].label for name in names]
    called = ["one frame" if T == 1 else f"{T} frames, {F} fusion tokens" for T, F in kinds]
    values = [[accuracies.get((name, T, F)) for name in names] for T, F in kinds]
    colours = [GREY if T == 1 else (BLUE, GREEN, ORANGE)[n % 3] for n, (T, F) in enumerate(kinds)]
    draw_seeds(axis, labels, dict(zip(called, values, strict=True)), *colours)
    axis.axvline(1 / OBJECTS["synchrony"], color=GREY, ls="--", lw=1)
    axis.text(1 / OBJECTS["synchrony"], -0.75, " chance of the pictures", color=GREY, fontsize=8)
    return figure


PAGE = Page("synchrony", KEYS, parts, draw_plot)

if __name__ == "__main__":
    measure.run(main, Options)
