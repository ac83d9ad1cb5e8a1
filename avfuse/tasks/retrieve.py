"""What is like what? `python -m avfuse.tasks.retrieve`: neighbours by frozen features (paper Fig. 3)."""

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from ..data.clips import Clip, ClipDataset, Failure
from ..encoder import AVEncoder
from ..files import printable, write_rows
from ..training.features import FEATURES, extract
from ..training.judge import TaskConfig, described, starting_encoder, write_results
from ..training.pictures import BLUE, rgb, save, show_sound
from ..training.report import write_report
from .classify import find_labelled

PROTOCOL = (
    "mean-pooled tokens compared by cosine; neighbours among the other test clips; sum = the three cosines "
    "added; recall@k = share of the queries with a clip of their label (one of several: in common) among the "
    "k nearest"
)
QUERIES, SHOWN = 3, 5  # in the picture: clips, and neighbours of each
AT_ONCE = 1024  # queries: of a large set, the cosines of all pairs would not fit into memory


@dataclass
class RetrieveConfig:
    """Nearest neighbours among the test clips by image, audio, fusion tokens and their sum (paper Fig. 3).

    It trains nothing, and runs in one process.

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
    seed: int = 0
    """Seed of fresh weights."""
    clip_timeout: float = 60.0
    """Seconds a worker may take over one clip before it is given up as unreadable."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 2
    """Processes that read clips."""


# --- metric -------------------------------------------------------------------------------------------------


def neighbours(features: dict[str, Tensor], k: int, queries: Tensor | None = None) -> dict[str, Tensor]:
    """The k clips nearest to each of the queries, (Q, k), nearest first: by the cosines of image, audio and
    fusion features (N, D), and by "sum", the three added. No clip finds itself. Queries (Q,) are indices of
    clips; None: all clips.
    """
    queries = torch.arange(len(features["image"])) if queries is None else queries
    unit = {name: normalize(features[name].double(), dim=1) for name in FEATURES}
    nearest = {name: [] for name in (*FEATURES, "sum")}
    for part in queries.split(AT_ONCE):
        cosines = {name: u[part] @ u.T for name, u in unit.items()}
        cosines["sum"] = sum(cosines.values())
        for name, cosine in cosines.items():
            cosine[range(len(part)), part] = -torch.inf
            nearest[name].append(cosine.topk(k, dim=1).indices)
    return {name: torch.cat(parts) for name, parts in nearest.items()}


def related(labels: Tensor) -> Tensor:
    """Which clips have the same label (N,), or one of their several classes (N, classes) in common: (N, N)
    bool.
    """
    if labels.ndim == 1:
        return labels[:, None] == labels
    return torch.cat([part @ labels.T > 0 for part in labels.split(AT_ONCE)])


def recall_at(nearest: Tensor, related: Tensor, k: int) -> float:
    """Share of the clips that are related (N, N) to one of the first k of their neighbours (N, k or more)."""
    return related.gather(1, nearest[:, :k]).any(1).double().mean().item()


def chance_at(related: Tensor, k: int) -> float:
    """What `recall_at` is expected to be if neighbours are drawn without looking."""
    others = len(related) - 1
    relatives = related.sum(1) - related.diagonal().long()
    missed = [math.comb(others - n, k) / math.comb(others, k) for n in range(int(relatives.max()) + 1)]
    return 1 - sum(missed[n] for n in relatives.tolist()) / len(related)


def recalls(features: dict[str, Tensor], ks: Sequence[int]) -> dict[str, float]:
    """Recall by label, k and feature, each with its chance.

    Raises:
        ValueError: there are not as many others.
    """
    check_k(ks, len(features["image"]))
    found, metrics = neighbours(features, max(ks)), {}
    for name in [name for name in features if name.startswith("label_")]:
        same, label = related(features[name]), name.removeprefix("label_")
        for k in ks:
            for feature, nearest in found.items():
                metrics[f"{label}_recall@{k}_{feature}"] = recall_at(nearest, same, k)
            metrics[f"{label}_recall@{k}_chance"] = chance_at(same, k)
    return metrics


def check_k(ks: Sequence[int], clips: int) -> None:
    if not ks or not all(1 <= k < clips for k in ks):
        raise ValueError(f"--k must be in 1..{clips - 1} with {clips} test clips, got {ks}")


# --- picture ------------------------------------------------------------------------------------------------


def draw_neighbours(
    path: Path, encoder: AVEncoder, clips: Sequence[Clip], features: dict[str, Tensor], classes: dict
) -> None:
    """Queries and their nearest clips by each feature; those of the query's (first) label in blue frames."""
    label, shown = next(iter(classes)), min(SHOWN, len(clips) - 1)
    dataset = ClipDataset([replace(clip, labels={}) for clip in clips], encoder.inputs, train=False)
    same = related(features[f"label_{label}"])
    firsts = same.long().argmax(1).unique()[:QUERIES]  # the first clips of labels
    found = neighbours(features, shown, firsts)
    figure = Figure(figsize=(1.95 * (shown + 1), 1.02 * len(firsts) * len(found) + 0.5), layout="constrained")
    grid = figure.subplots(
        len(firsts) * len(found), 2 * (shown + 1), squeeze=False, width_ratios=(1, 1) * (shown + 1)
    )
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for block, query in enumerate(firsts.tolist()):
        numbers = clips[query].labels[label]
        names = [classes[label][n] for n in (numbers if isinstance(numbers, tuple) else (numbers,))]
        for line, (feature, nearest) in enumerate(found.items()):
            row = grid[block * len(found) + line]
            if line == 0:
                show_clip(row[:2], dataset[query], encoder, None)
                row[0].set_title(f"{label}: {', '.join(names)}", loc="left", fontsize=9, weight="bold")
            for place, near in enumerate(nearest[block].tolist(), start=1):
                axes = row[2 * place : 2 * place + 2]
                show_clip(axes, dataset[near], encoder, bool(same[query, near]))
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
        ValueError: a setting is wrong, there are no labels, fewer clips than neighbours, or several
            processes.
    """
    folder = config.run
    if folder.exists() and (not folder.is_dir() or (folder / "checkpoints").exists()):
        raise ValueError(f"--run-dir {folder} is no folder, or that of a training run")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # they would all write the same files
        raise ValueError("retrieval runs in one process: start it without accelerate launch or torchrun")
    start = TaskConfig(checkpoint=config.checkpoint, seed=config.seed)
    torch.manual_seed(start.seed)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = starting_encoder(start).to(device)
    print(f"retrieve: encoder of {config.checkpoint}, on {device}")
    options = dict(workers=config.workers, timeout=config.clip_timeout)
    found = find_labelled(config.data, **options)
    check_k(config.k, len(found.test))
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
        found,
        task="retrieve",
        protocol=PROTOCOL,
        judged=len(features.clips),
        seed=config.seed,
        checkpoint=config.checkpoint,
        metrics=metrics,
    )
    row = dict(step=0, when="after", clips=found.test_name, judged=len(features.clips), metrics=metrics)
    write_rows(folder / "metrics.jsonl", [row])
    print(f"done: look at {write_report(folder)}")
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(RetrieveConfig, prog="python -m avfuse.tasks.retrieve"))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {printable(error)}")
