"""Where does meaning emerge? The paper's Fig. 3 in small: neighbours by image, audio and fusion tokens.

Masked autoencoders learn from scenes without labels. On the way, held-out scenes are asked for their nearest
neighbour by the mean of their tokens: does it show the same colour, sound of the same shape, or both?
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import measure
import study
import synchrony
import torch
from matplotlib.figure import Figure
from pages import CellOptions, Page, by_seed
from plots import BLUE, GREEN, GREY, ORANGE
from study import FEATURES, VERDICT, Scenes, difference, mean_cell, over_scenes
from tables import origin
from torch import Tensor

from avfuse import AVMAE, AVEncoder
from avfuse.choices import DecodeFrom
from avfuse.data.sounding_shapes.synthesis import OBJECTS, SHAPES
from avfuse.encoder import pool
from avfuse.presets import SMALL_INPUTS
from avfuse.training.neighbours import nearest_neighbour_probes

LABELS = {"shape": "shape heard", "colour": "colour of what sounds", "both": "both"}
KEYS = ("row", "seed")  # of a cell


class Row(NamedTuple):
    """What a masked autoencoder is given, and what its decoders see."""

    label: str
    decode_from: DecodeFrom = "fusion"
    objects: int = 1
    image_mask_ratio: float = 0.75
    audio_mask_ratio: float = 0.8
    fusion_tokens: int = 8
    norm_target: bool = True
    frames: int = 1  # several: scenes of synchrony, and a bias of time


ROWS = {  # the most telling first
    "patches": Row("one object, decoders see patches (the paper's)", "patches"),
    "fusion": Row("one object, decoders see fusion tokens alone"),
    "patches-3": Row("three objects, decoders see patches", "patches", objects=3),
    "fusion-3": Row("three objects, fusion tokens alone", objects=3),
    "patches-hidden": Row("one object, patches, 90 % hidden", "patches", 1, 0.9, 0.9),
    "fusion-hidden": Row("one object, fusion tokens alone, 90 % hidden", "fusion", 1, 0.9, 0.9),
    "fusion-shown": Row("one object, fusion tokens alone, 50 % hidden", "fusion", 1, 0.5, 0.5),
    "fusion-raw": Row("one object, fusion tokens alone, targets not normalised", norm_target=False),
    "fusion-2": Row("one object, 2 fusion tokens alone", fusion_tokens=2),
    "video": Row("four objects in synchrony, 8 frames, patches", "patches", OBJECTS["synchrony"], frames=8),
}
RowName = Literal[*ROWS]


@dataclass(frozen=True)
class Options(CellOptions):
    """Pretrains masked autoencoders on Sounding Shapes, and says what their tokens know of held-out scenes.

    One cell is one row with one seed. Cells that the result file holds are not trained again: the same
    command goes on where it was stopped. After each cell the file, the page benchmarks/emergence.md and the
    plot docs/emergence.png are written anew.

    All rows share learning rates and number of steps. Models and optimizers are those of study.py (dense
    fusion in all layers), of several frames those of synchrony.py with a bias of time; decoders are 64 wide
    and 2 layers deep. Sound tells the shape of what sounds and nothing of its colour. Where one object is
    shown, the picture tells both in principle; where there are several, it takes the sound to know whose
    colour is meant.
    """

    rows: tuple[RowName, ...] = tuple(ROWS)
    """Which rows to do."""
    steps: int = 1500
    """Of pretraining."""
    batch_size: int = 64
    lr: float = study.Options.lr
    """Of AdamW."""
    muon_lr: float = study.Options.muon_lr
    """Of Muon, which trains the matrices of all blocks; not of several frames, where AdamW trains all."""
    train: int = 6_000
    """Scenes to train on, without labels; drawn once and kept under data/."""
    test: int = 1_000
    """Scenes to judge on."""


def main(options: Options) -> None:
    if not options.report:
        cells = [(row, seed) for seed in options.seeds for row in options.rows]
        for row in options.rows:
            scenes_of(options, ROWS[row]).draw(options.workers)
        PAGE.train(options, cells, train_cell)
    PAGE.show()


# --- cells --------------------------------------------------------------------------------------------------


def train_cell(options: Options, cell: tuple[RowName, int]) -> dict:
    """The nearest neighbours of one row with one seed: before, on the way and after."""
    name, seed = cell
    row = ROWS[name]
    train, test = scenes_of(options, row).splits()
    torch.manual_seed(seed)
    names = "decode_from", "image_mask_ratio", "audio_mask_ratio", "norm_target"
    of_row = {option: getattr(row, option) for option in names}
    mae = AVMAE(make_encoder(row), decoder_dim=64, decoder_depth=2, decoder_heads=2, **of_row)

    def loss(batch):
        return mae(batch["image"], batch["audio"]).loss

    optimizers = synchrony.adamw if row.frames > 1 else study.make_optimizers
    curve = [dict(step=0, **accuracies(mae.encoder, test))]
    for step in study.fit(mae, loss, train, options.steps, options, max(1, options.steps // 6), optimizers):
        curve.append(dict(step=step, **accuracies(mae.encoder, test)))
    return dict(row=name, seed=seed, curve=curve)


def make_encoder(row: Row) -> AVEncoder:
    if row.frames > 1:
        return synchrony.make_encoder(synchrony.ROWS["dense-time"], row.frames, row.fusion_tokens)
    return study.make_encoder(study.ROWS["dense"], fusion_tokens=row.fusion_tokens)


def scenes_of(options: Options, row: Row) -> Scenes:
    if row.frames > 1:
        return synchrony.scenes_of(options, row.frames)
    return Scenes("study", row.objects, options.train, options.test, SMALL_INPUTS)


def accuracies(encoder: AVEncoder, scenes: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Label -> feature -> share of the scenes whose nearest neighbour has the same label."""

    def means(batch):
        return torch.stack([*pool(encoder(batch["image"], batch["audio"])).values()], 1)

    columns = dict(zip(FEATURES, over_scenes(encoder, scenes, means).unbind(1), strict=True))
    both = scenes["colour"] * len(SHAPES) + scenes["shape"]
    labels = dict(shape=scenes["shape"], colour=scenes["colour"], both=both)
    found = {}
    for label, values in labels.items():
        probe = nearest_neighbour_probes(columns | {f"label_{label}": values})[label]
        found[label] = {name: probed["accuracy"] for name, probed in probe.items()}
        found[label] |= dict(chance=probe["image"]["chance"])
    return found


# --- results ------------------------------------------------------------------------------------------------


def by_row(record: dict) -> dict[tuple[str, str, str], list[float]]:
    """Row, label and feature -> accuracies after pretraining, by seed."""
    judged = [
        cell | dict(label=label, feature=feature, accuracy=accuracy)
        for cell in record["cells"]
        for label in LABELS
        for feature, accuracy in cell["curve"][-1][label].items()
    ]
    return by_seed(judged, "accuracy", "row", "label", "feature")


def accuracy_table(record: dict) -> list[tuple]:
    """Accuracies of the neighbours by each kind of token."""
    found = by_row(record)
    rows = [("", "label", *FEATURES, "chance")]
    for name, row in ROWS.items():
        for label, said in LABELS.items():
            if (name, label, "image") in found:
                cells = [mean_cell(found[name, label, feature]) for feature in FEATURES]
                rows.append((row.label, said, *cells, f"{found[name, label, 'chance'][0]:.3f}"))
    return rows


def claims_table(record: dict) -> list[tuple]:
    """Whether fusion tokens lead, label by label."""
    found = by_row(record)
    rows = [("fusion tokens over the better of image and audio tokens", *LABELS.values())]
    for name, row in ROWS.items():
        if (name, "both", "image") in found:
            rows.append((row.label, *(difference(*fusion_and_best(found, name, label)) for label in LABELS)))
    return rows


def fusion_and_best(found: dict, row: str, label: str) -> tuple[list[float], list[float]]:
    """Accuracies by fusion tokens, and by those of the modality that is better on average."""
    alone = [found[row, label, name] for name in ("image", "audio")]
    return found[row, label, "fusion"], max(alone, key=sum)


def parts(record: dict) -> list:
    """What the page says."""
    settings = record["settings"]
    return [
        "![Accuracy of nearest neighbours against steps](../docs/emergence.png)",
        accuracy_table(record),
        f"Share of {settings['test']:,} held-out scenes whose nearest neighbour by the cosine of mean tokens "
        f"has the same label, after {settings['steps']:,} steps of pretraining on {settings['train']:,} "
        "scenes without labels; mean ± standard deviation over seeds.",
        f"Do fusion tokens lead? Difference of the means ± its standard error, {VERDICT}:",
        claims_table(record),
        origin(record),
    ]


def draw_plot(record: dict) -> Figure:
    """Accuracy against steps by each kind of token, every seed a line; a row of panels for each row."""
    names = [name for name in ROWS if any(cell["row"] == name for cell in record["cells"])]
    figure = Figure(figsize=(11, 2.4 * max(1, len(names))), layout="constrained")
    panels = figure.subplots(max(1, len(names)), len(LABELS), sharex=True, sharey=True, squeeze=False)
    colours = dict(zip(FEATURES, (BLUE, GREEN, ORANGE), strict=True))
    for axes, name in zip(panels, names, strict=False):
        for axis, (label, said) in zip(axes, LABELS.items(), strict=True):
            for cell in (cell for cell in record["cells"] if cell["row"] == name):
                steps = [at["step"] for at in cell["curve"]]
                for feature, colour in colours.items():
                    axis.plot(steps, [at[label][feature] for at in cell["curve"]], color=colour, lw=1.5)
            axis.axhline(cell["curve"][-1][label]["chance"], color=GREY, ls="--", lw=1)
            axis.set(ylim=(0, 1.02), title=said if name == names[0] else "")
        axes[0].set_ylabel(ROWS[name].label.replace(", ", ",\n"), fontsize=8)
    for axis in panels[-1]:
        axis.set_xlabel("steps")
    for feature, colour in colours.items():
        panels[0, -1].plot([], [], color=colour, label=f"{feature} tokens")
    panels[0, -1].legend(fontsize=8)
    return figure


PAGE = Page("emergence", KEYS, parts, draw_plot)

if __name__ == "__main__":
    measure.run(main, Options)
