"""What is like what? `python -m avfuse.tasks.retrieve`: neighbours by frozen features (paper Fig. 3)."""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from ..data.clips import Clip, ClipDataset, Failure, printable
from ..encoder import AVEncoder
from ..features import FEATURES, extract
from ..pictures import BLUE, rgb, save, show_sound
from ..report import write_report
from ..run_folder import replace_text
from .classify import find_labelled
from .task import TaskConfig, described, starting_encoder, write_results

PROTOCOL = (
    "mean-pooled tokens compared by cosine; neighbours among the other test clips; sum = the three cosines "
    "added; recall@k = share of the queries with a clip of their label among the k nearest"
)
QUERIES, SHOWN = 3, 5  # in the picture: clips, and neighbours of each


@dataclass
class RetrieveConfig:
    """Nearest neighbours among the test clips by image, audio, fusion tokens and their sum (paper Fig. 3).

    Nothing is trained.

    Without arguments it takes the encoder of runs/demo, if `python -m avfuse.train` has left one there, and
    the embedded data set, Sounding Shapes.
    """

    checkpoint: str = field(default_factory=lambda: TaskConfig().checkpoint)
    """Whose encoder: a run folder, a saved model, a name on the Hugging Face hub, a released DeepAVFusion
    file, or "none" for fresh weights."""
    data: Path | None = None
    """Sounding Shapes, or a folder of videos whose sub-folders name the classes. Default: Sounding Shapes,
    built once."""
    run: Annotated[Path, tyro.conf.arg(name="run-dir")] = Path("runs/retrieve")
    """Folder for results.json, the picture and index.html; what it has of these is replaced."""
    k: tuple[int, ...] = (1, 5, 10)
    """How many neighbours recall looks at."""
    batch_size: int = 32
    """Clips that are encoded at once; changes speed and memory, not the results."""
    clip_timeout: float = 60.0
    """Seconds a worker may take over one clip before it is given up as unreadable."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 2
    """Processes that read clips."""


# --- metric -------------------------------------------------------------------------------------------------


def similarities(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """Cosines (N, N) of image, audio and fusion features (N, D), and "sum", the three added; -inf on the
    diagonal, so that no clip finds itself.
    """
    unit = {name: normalize(features[name].double(), dim=1) for name in FEATURES}
    cosines = {name: u @ u.T for name, u in unit.items()}
    return {
        n: c.clone().fill_diagonal_(-torch.inf) for n, c in (cosines | {"sum": sum(cosines.values())}).items()
    }


def recall_at(similarity: Tensor, labels: Tensor, k: int) -> float:
    """Share of the clips with one of their label (N,) among the k others nearest to them.

    Raises:
        ValueError: there are no k others.
    """
    if not 1 <= k < len(labels):
        raise ValueError(f"k must be in 1..{len(labels) - 1} with {len(labels)} clips, got {k}")
    nearest = similarity.topk(k, dim=1).indices
    return (labels[nearest] == labels[:, None]).any(1).double().mean().item()


def chance_at(labels: Tensor, k: int) -> float:
    """What `recall_at` is expected to be if neighbours are drawn without looking."""
    others = len(labels) - 1
    counts = labels.unique(return_counts=True)[1].tolist()
    missed = sum(c * math.comb(others - (c - 1), k) / math.comb(others, k) for c in counts)
    return 1 - missed / len(labels)


def recalls(features: dict[str, Tensor], ks: Sequence[int]) -> dict[str, float]:
    """Recall by label, k and feature, each with its chance."""
    ranked, metrics = similarities(features), {}
    for name in [name for name in features if name.startswith("label_")]:
        labels, label = features[name], name.removeprefix("label_")
        for k in ks:
            for feature, similarity in ranked.items():
                metrics[f"{label}_recall@{k}_{feature}"] = recall_at(similarity, labels, k)
            metrics[f"{label}_recall@{k}_chance"] = chance_at(labels, k)
    return metrics


# --- picture ------------------------------------------------------------------------------------------------


def draw_neighbours(
    path: Path, encoder: AVEncoder, clips: Sequence[Clip], features: dict[str, Tensor], classes: dict
) -> None:
    """Queries and their nearest clips by each feature; those of the query's (first) label in blue frames."""
    dataset, label = ClipDataset(clips, encoder.inputs, train=False), next(iter(classes))
    labels, ranked = features[f"label_{label}"], similarities(features)
    firsts = [(labels == n).nonzero()[0].item() for n in labels.unique().tolist()][:QUERIES]
    shown = min(SHOWN, len(clips) - 1)
    figure = Figure(
        figsize=(1.95 * (shown + 1), 1.02 * len(firsts) * len(ranked) + 0.5), layout="constrained"
    )
    grid = figure.subplots(
        len(firsts) * len(ranked), 2 * (shown + 1), squeeze=False, width_ratios=(1, 1) * (shown + 1)
    )
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for block, query in enumerate(firsts):
        for line, (feature, similarity) in enumerate(ranked.items()):
            row = grid[block * len(ranked) + line]
            if line == 0:
                show_clip(row[:2], dataset[query], encoder, None)
                row[0].set_title(
                    f"{label}: {classes[label][labels[query]]}", loc="left", fontsize=9, weight="bold"
                )
            for place, near in enumerate(similarity[query].topk(shown).indices.tolist(), start=1):
                axes = row[2 * place : 2 * place + 2]
                show_clip(axes, dataset[near], encoder, bool(labels[near] == labels[query]))
            row[2].set_ylabel(feature, fontsize=10)
    figure.suptitle(
        f"Nearest clips by each feature; framed: the same {label}", x=0.01, ha="left", fontsize=11
    )
    save(figure, path)


def show_clip(axes, item: dict[str, Tensor] | Failure, encoder: AVEncoder, is_right: bool | None) -> None:
    """A frame and its spectrogram, framed if it is right."""
    if isinstance(item, Failure):  # it could be read a moment ago
        return
    axes[0].imshow(rgb(item["image"], encoder.inputs).numpy(), aspect="auto")
    show_sound(axes[1], item["audio"][0], cmap="magma")
    for axis in axes if is_right else ():
        axis.spines[:].set(visible=True, color=BLUE, linewidth=3.5)


# --- command line -------------------------------------------------------------------------------------------


def main(config: RetrieveConfig) -> dict[str, float]:
    """The recalls, which also go into the run folder.

    Raises:
        ValueError: a setting is wrong, there are no labels, or fewer clips than neighbours.
    """
    folder = config.run
    if folder.exists() and (not folder.is_dir() or (folder / "checkpoints").exists()):
        raise ValueError(f"--run-dir {folder} is no folder, or that of a training run")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    start = TaskConfig(checkpoint=config.checkpoint)
    torch.manual_seed(start.seed)  # of fresh weights
    encoder = starting_encoder(start).to(device)
    print(f"retrieve: encoder of {config.checkpoint}, on {device}")
    options = dict(workers=config.workers, timeout=config.clip_timeout)
    found = find_labelled(config.data, **options)
    expected = len(found.test)
    features = extract(encoder, found.test, batch_size=config.batch_size, **options)
    for failure in features.failures:
        print(f"cannot read {printable(failure.path)}: {printable(failure.reason)}")
    metrics = recalls(features.tensors, config.k)
    print(f"{len(features.clips)} {found.test_name}: {described(metrics)}")

    pictures = folder / "pictures"
    draw_neighbours(
        pictures / "neighbours-000000.png", encoder.cpu(), features.clips, features.tensors, found.classes
    )
    write_results(
        folder / "results.json",
        encoder,
        metrics,
        task="retrieve",
        protocol=PROTOCOL,
        split=found.test_name,
        coverage=dict(judged=len(features.clips), expected=expected),
        seed=start.seed,
        checkpoint=config.checkpoint,
    )
    row = dict(step=0, when="after", clips=found.test_name, judged=len(features.clips), metrics=metrics)
    replace_text(folder / "metrics.jsonl", json.dumps(row) + "\n")
    print(f"done: look at {write_report(folder)}")
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(RetrieveConfig, prog="python -m avfuse.tasks.retrieve"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(error)}")
