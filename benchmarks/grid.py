"""What matters in early fusion? The paper's Tables 4, 6 and 7 in small, by the project's own programs.

A cell pretrains one encoder on Sounding Shapes and hands it to three tasks: a linear probe, the separation of
what a picture shows, and the segmentation of what sounds.
"""

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Literal, NamedTuple

import measure
import torch
from measure import ROOT
from pages import CellOptions, Page, by_seed
from study import DEPTH, DIM, VERDICT, difference, make_encoder, mean_cell
from tables import MISSING, origin

from avfuse.data import sounding_shapes
from avfuse.tasks.classify import Classification
from avfuse.tasks.options import SegmentConfig, SeparateConfig, linear_probe
from avfuse.tasks.segment import Segmentation
from avfuse.tasks.separate import Separation
from avfuse.train import Pretraining
from avfuse.training.loop import program
from avfuse.training.recipes import TrainConfig
from avfuse.training.settings import LoopConfig
from avfuse.training.task import Task
from avfuse.weights import load_audio_weights, load_image_weights

METRICS = dict(linear="linear accuracy", sdr="separation SDR, dB", miou="segmentation mIoU")
KEYS = ("row", "seed")  # of a cell


class Row(NamedTuple):
    """How an encoder fuses, and what it began with."""

    label: str
    interactions: str = "dense"
    layers: tuple[int, ...] | str = "all"
    fusion_tokens: int = 16
    aggregation_tokens: int = 8
    unimodal: bool = True  # whether image and audio transformer were autoencoders of their own before
    contrastive: bool = False


ROWS = {  # the most telling first
    "none": Row("no fusion", "none", "none"),
    "all": Row("all layers, 16 fusion tokens"),
    "late-contrastive": Row("last layer, with the contrastive term", layers=(3,), contrastive=True),
    "scratch": Row("all layers, no uni-modal pretraining", unimodal=False),
    "one": Row("last layer", layers=(3,)),
    "none-scratch": Row("no fusion, no uni-modal pretraining", "none", "none", unimodal=False),
    "half": Row("upper half", layers=(2, 3)),
    "tokens-1": Row("1 fusion token", fusion_tokens=1),
    "tokens-8": Row("8 fusion tokens", fusion_tokens=8),
    "tokens-32": Row("32 fusion tokens", fusion_tokens=32),
    "aggregation-8": Row("factorized, 8 aggregation tokens", "factorized"),
    "aggregation-4": Row("factorized, 4 aggregation tokens", "factorized", aggregation_tokens=4),
    "aggregation-16": Row("factorized, 16 aggregation tokens", "factorized", aggregation_tokens=16),
}
RowName = Literal[*ROWS]
CLAIMS = (  # which row is said to be better than which
    ("fusion in all layers over none", "all", "none"),
    ("all layers over the upper half", "all", "half"),
    ("upper half over the last layer", "half", "one"),
    ("last layer over none", "one", "none"),
    ("uni-modal pretraining over none, fused", "all", "scratch"),
    ("uni-modal pretraining over none, not fused", "none", "none-scratch"),
    ("early fusion over late fusion with the contrastive term", "all", "late-contrastive"),
    ("late fusion with the contrastive term over without", "late-contrastive", "one"),
    ("16 fusion tokens over 1", "all", "tokens-1"),
    ("16 fusion tokens over 8", "all", "tokens-8"),
    ("16 fusion tokens over 32", "all", "tokens-32"),
    ("8 aggregation tokens over 4", "aggregation-8", "aggregation-4"),
    ("8 aggregation tokens over 16", "aggregation-8", "aggregation-16"),
)


@dataclass(frozen=True)
class Options(CellOptions):
    """Pretrains every row of the grid and judges it by three tasks on held-out Sounding Shapes.

    One cell is one row with one seed. Cells that the result file holds are not done again, and a cell that
    was interrupted goes on from its checkpoints under data/grid: the same command goes on where it was
    stopped. After each cell the file and the page benchmarks/grid.md are written anew. A GPU is used if there
    is one.

    All rows share clips, learning rates and numbers of epochs; nothing is tuned for one of them. Models are
    64 wide and 4 layers deep, with 36 + 32 tokens. Uni-modal pretraining is masked autoencoding of image and
    of audio without fusion, on the same clips, before the fused pretraining, as in the paper: those rows have
    seen the clips for longer.
    """

    rows: tuple[RowName, ...] = tuple(ROWS)
    """Which rows to do."""
    train: int = 256
    """Clips to train on: of three objects, and as many of one for separation."""
    test: int = 128
    """Clips to judge on, of either kind."""
    unimodal_epochs: int = 20
    pretraining_epochs: int = 20
    probe_epochs: int = 20
    separation_epochs: int = 10
    segmentation_epochs: int = 12
    contrastive: float = 0.1
    """Weight of the contrastive term; CAV-MAE's is 0.01, in runs of many more steps."""
    workers: int = 1

    @property
    def folder(self) -> Path:
        """Of the runs of these settings."""
        fixed = json.dumps(PAGE.fixed(self))
        return ROOT / "data/grid" / hashlib.sha256(fixed.encode()).hexdigest()[:8]

    def clips(self, objects: int) -> Path:
        """The data set of scenes of so many objects; built once."""
        root = ROOT / f"data/grid/shapes-{objects}-{self.train}-{self.test}"
        return sounding_shapes.generate(
            root, train=self.train, test=self.test, objects=objects, workers=self.workers
        )


def main(options: Options) -> None:
    if not options.report:
        cells = [(row, seed) for seed in options.seeds for row in options.rows]
        for objects in 3, 1:
            options.clips(objects)
        for seed in options.seeds if options.workers > 1 else ():  # which cells of one seed share
            unimodal(options, seed)
        PAGE.train(options, cells, train_cell, dim=DIM, depth=DEPTH)
    PAGE.show()


# --- cells --------------------------------------------------------------------------------------------------


def train_cell(options: Options, cell: tuple[RowName, int]) -> dict:
    """One row with one seed: what its encoder reaches in the tasks."""
    name, seed = cell
    row, folder = ROWS[name], options.folder / f"{name}-{seed}"
    began = time.perf_counter()
    torch.manual_seed(seed)
    encoder = encoder_of(row)
    if row.unimodal:
        for load in load_image_weights, load_audio_weights:
            load(encoder, unimodal(options, seed) / "model", say=lambda table: None)
    encoder.save_pretrained(folder / "start")
    contrastive = options.contrastive if row.contrastive else 0.0
    pretrained = folder / "pretraining"
    config = pretraining(
        options.pretraining_epochs, checkpoint=str(folder / "start"), contrastive=contrastive
    )
    carry_out(Pretraining, config, pretrained, options.clips(3), seed)

    probe, separate, segment = linear_probe(), SeparateConfig(), SegmentConfig()
    tasks = dict(
        linear=(Classification, probe, options.probe_epochs, 3, "accuracy"),
        sdr=(Separation, separate, options.separation_epochs, 1, "sdr"),
        miou=(Segmentation, segment, options.segmentation_epochs, 3, "miou"),
    )
    reached = {}
    for metric, (kind, config, epochs, objects, of) in tasks.items():
        config.checkpoint, config.epochs, config.warmup_epochs = str(pretrained), epochs, epochs // 10
        metrics = carry_out(kind, config, folder / metric, options.clips(objects), seed)
        reached[metric] = metrics[of]
        if kind is Separation:
            reached["mixture_sdr"] = metrics["mixture_sdr"]
        elif kind is Classification:
            reached["chance"] = metrics["chance"]
    return dict(zip(KEYS, cell, strict=True)) | reached | dict(seconds=round(time.perf_counter() - began))


def encoder_of(row: Row) -> torch.nn.Module:
    counts = dict(fusion_tokens=row.fusion_tokens)
    counts |= {f"{name}_aggregation_tokens": row.aggregation_tokens for name in ("image", "audio")}
    return make_encoder(row, **counts)


def unimodal(options: Options, seed: int) -> Path:
    """The run of an image and an audio autoencoder: without fusion, neither knows of the other."""
    folder = options.folder / f"unimodal-{seed}"
    if not (folder / "results.json").exists():
        torch.manual_seed(seed)
        encoder_of(ROWS["none-scratch"]).save_pretrained(options.folder / f"unimodal-start-{seed}")
        start = str(options.folder / f"unimodal-start-{seed}")
        config = pretraining(options.unimodal_epochs, checkpoint=start)
        carry_out(Pretraining, config, folder, options.clips(3), seed)
    return folder


def pretraining(epochs: int, **settings) -> TrainConfig:
    decoders = dict(decoder_dim=64, decoder_depth=2, decoder_heads=2)
    lengths = dict(epochs=epochs, warmup_epochs=epochs // 10, batch_size=32, measure_every=0, probe_clips=32)
    return TrainConfig(**decoders, **lengths, **settings)


def carry_out(kind: type[Task], config: LoopConfig, run: Path, data: Path, seed: int) -> dict:
    """The metrics at the end of a run, which goes on where it was stopped; what it says is in its log."""
    if not (run / "results.json").exists():
        config.run, config.data, config.seed = run, data, seed
        config.workers, config.threads, config.min_steps, config.quiet = 0, 1, 0, True
        run.parent.mkdir(parents=True, exist_ok=True)
        with open(run.with_suffix(".log"), "a") as log, contextlib.redirect_stdout(log):
            failed = program(config, kind)
        if failed:
            raise RuntimeError(f"{run}: {failed}")
    return json.loads((run / "results.json").read_text())["metrics"]


# --- results ------------------------------------------------------------------------------------------------


def by_row(record: dict) -> list[dict[tuple[str], list[float]]]:
    """Of each metric, row -> values by seed."""
    return [by_seed(record["cells"], metric, "row") for metric in METRICS]


def results_table(record: dict) -> list[tuple]:
    """What every row reached; a row that has not been run says so."""
    rows, values = [("", *METRICS.values())], by_row(record)
    for name, row in ROWS.items():
        rows.append((row.label, *(mean_cell(of.get((name,))) or MISSING for of in values)))
    return rows


def claims_table(record: dict) -> list[tuple]:
    """The paper's claims, each as a difference of two rows."""
    rows, values = [("claim", *METRICS.values())], by_row(record)
    for claim, *pair in CLAIMS:
        rows.append((claim, *(difference(*(of.get((name,)) for name in pair)) or MISSING for of in values)))
    return rows


def parts(record: dict) -> list:
    """What the page says."""
    settings, cells = record["settings"], record["cells"]
    chance, mixture = (fmean(cell[name] for cell in cells) for name in ("chance", "mixture_sdr"))
    return [
        results_table(record),
        f"On {settings['test']} held-out clips, mean ± standard deviation over seeds. Linear accuracy is of "
        f"the shape that sounds, whose most frequent one gives {chance:.3f}; SDR is of clips of one object "
        f"mixed with another, and {mixture:.1f} dB of the mixture itself; mIoU is over the classes, "
        "background included.",
        f"The paper's claims: difference of the means ± its standard error, {VERDICT} (one seed has no "
        "verdict):",
        claims_table(record),
        f"{len(cells)} cells of {sum(cell['seconds'] for cell in cells) / len(cells) / 60:.1f} minutes each. "
        + origin(record),
    ]


PAGE = Page("grid", KEYS, parts, device="cuda" if torch.cuda.is_available() else "cpu")

if __name__ == "__main__":
    measure.run(main, Options)
