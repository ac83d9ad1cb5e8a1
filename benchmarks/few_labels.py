"""Is pretraining worth it where labels are few? Masked autoencoding on many scenes, of which few have labels.

The study (study.py) pretrains on scenes whose labels never run out, where it has nothing to give. Here all
scenes serve pretraining, and 256 or 1,024 of them have labels.
"""

import itertools
from dataclasses import dataclass
from functools import partial
from typing import Literal

import measure
import study
import torch
from matplotlib.figure import Figure
from pages import Page, by_seed
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from study import (
    KEYS,
    STARTS,
    VERDICT,
    Namer,
    difference,
    draw_chances,
    draw_seeds,
    make_encoder,
    mean_cell,
    over_scenes,
)
from tables import origin
from torch import Tensor

from avfuse import AVMAE
from avfuse.encoder import pool

ROWS = {name: study.ROWS[name] for name in ("dense", "none")}
RowName = Literal[*ROWS]
WAYS = {"probe": "linear probe", "tuned": "fine-tuned"}
LABELS = ("shape", "colour")


@dataclass(frozen=True)
class Options(study.Options):
    """Trains with few labels, from scratch and after masked pretraining on many scenes without labels.

    One cell is one row, from fresh weights or after pretraining, with one seed; it is probed (the encoder
    frozen, a logistic regression of its pooled tokens) and fine-tuned with each number of labels. Cells that
    the result file holds are not trained again: the same command goes on where it was stopped. Models,
    scenes, learning rates and losses are those of study.py. `shape` is told by the sound alone, `colour`
    takes both.
    """

    rows: tuple[RowName, ...] = tuple(ROWS)
    """With fusion in all layers, and without."""
    labelled: tuple[int, ...] = (256, 1024)
    """Scenes that have labels, the same for all seeds."""
    pretraining_steps: int = 1500
    """Steps of masked autoencoding on all scenes."""
    steps: int = 300
    """Steps of fine-tuning."""
    train: int = 8_000
    """Scenes to pretrain on; drawn once and kept under data/."""


def main(options: Options) -> None:
    if not options.report:
        wanted = itertools.product(options.seeds, options.rows, options.starts)
        cells = [(row, start, seed) for seed, row, start in wanted]
        study.scenes_of(options).draw(options.workers)
        PAGE.train(options, cells, train_cell)
    PAGE.show()


def train_cell(options: Options, cell: tuple[str, str, int]) -> dict:
    """One row from one start with one seed: accuracies of probe and fine-tuning, by the number of labels."""
    row, start, seed = cell
    train, test = study.scenes_of(options).splits()
    torch.manual_seed(seed)
    encoder = make_encoder(ROWS[row])
    if start == "pretrained":
        mae = AVMAE(encoder, decoder_dim=64, decoder_depth=2, decoder_heads=2)
        steps = options.pretraining_steps
        list(study.fit(mae, lambda b: mae(b["image"], b["audio"]).loss, train, steps, options, steps))
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    seen = {name: tensor[: max(options.labelled)] for name, tensor in train.items()}
    of_train, of_test = (pooled(encoder, ROWS[row].features, scenes) for scenes in (seen, test))
    accuracies = []
    for labelled in options.labelled:
        few = {name: tensor[:labelled] for name, tensor in train.items()}
        for label in LABELS:
            probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
            probe.fit(of_train[:labelled], few[label])
            right = probe.score(of_test, test[label])
            accuracies.append(dict(way="probe", labelled=labelled, label=label, accuracy=right))
        encoder.load_state_dict(weights)
        model = Namer(encoder, ROWS[row].features)
        loss = partial(model.loss, shown_weight=options.shown_weight)
        list(study.fit(model, loss, few, options.steps, options, options.steps))
        for label, right in zip(("colour", "shape"), study.accuracies(model, test), strict=True):
            accuracies.append(dict(way="tuned", labelled=labelled, label=label, accuracy=right))
    return dict(row=row, start=start, seed=seed, accuracies=accuracies)


def pooled(encoder, features: tuple[str, ...], scenes: dict[str, Tensor]) -> Tensor:
    """Mean-pooled tokens of each kind, side by side: (scenes, features x width)."""

    def read(batch):
        means = pool(encoder(batch["image"], batch["audio"]))
        return torch.cat([means[name] for name in features], 1)

    return over_scenes(encoder, scenes, read, 256)


# --- results ------------------------------------------------------------------------------------------------


def by_cell(record: dict, label: str) -> dict[tuple[str, str, str, int], list[float]]:
    """Row, start, way and number of labels -> accuracies by seed."""
    judged = [cell | one for cell in record["cells"] for one in cell["accuracies"] if one["label"] == label]
    return by_seed(judged, "accuracy", "row", "start", "way", "labelled")


def table(record: dict, label: str) -> list[tuple]:
    """Accuracies of one label, and what pretraining changed."""
    found = by_cell(record, label)
    rows = [(label, "labels", *STARTS.values(), "gain by pretraining")]
    for row, way, labelled in itertools.product(ROWS, WAYS, record["settings"]["labelled"]):
        scratch, pretrained = (found.get((row, start, way, labelled)) for start in STARTS)
        if scratch or pretrained:
            named = f"{ROWS[row].label}, {WAYS[way]}", f"{labelled:,}"
            told = mean_cell(scratch), mean_cell(pretrained), difference(pretrained, scratch)
            rows.append((*named, *told))
    return rows


def parts(record: dict) -> list:
    """What the page says."""
    settings = record["settings"]
    return [
        *(table(record, label) for label in LABELS),
        f"Accuracy on {settings['test']:,} scenes, mean ± standard deviation over seeds, after "
        f"{settings['pretraining_steps']:,} steps of pretraining on {settings['train']:,} scenes without "
        f"labels and {settings['steps']} of fine-tuning. A probe from scratch is one of random weights. "
        f"Gain: difference of the means ± its standard error, {VERDICT}.",
        "![Accuracy with few labels](../docs/few-labels.png)",
        origin(record),
    ]


def draw_plot(record: dict) -> Figure:
    """Every seed a dot, the mean a bar; from scratch and pretrained; one panel a label."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    rows = list(itertools.product(ROWS, WAYS, record["settings"]["labelled"]))
    for axis, label in zip(figure.subplots(1, 2, sharey=True), LABELS, strict=True):
        found = by_cell(record, label)
        kinds = {STARTS[s]: [found.get((row, s, *way)) for row, *way in rows] for s in STARTS}
        named = [f"{ROWS[row].label}\n{WAYS[way]}, {labelled:,}" for row, way, labelled in rows]
        draw_seeds(axis, named, kinds)
        axis.set(xlim=(0, 1.02), xlabel=f"accuracy of the {label} of what sounds")
    draw_chances(axis, record["settings"]["objects"])  # of the colour
    figure.axes[0].get_legend().remove()  # the other's serves both, where no bar is behind it
    return figure


PAGE = Page("few_labels", KEYS, parts, draw_plot)

if __name__ == "__main__":
    measure.run(main, Options)
