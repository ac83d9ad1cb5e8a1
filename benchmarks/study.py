"""Does early, dense fusion help? The paper's Table 4 in small, on freshly drawn Sounding Shapes.

To name the colour of the object that sounds takes both modalities: sound tells its shape, only
the picture tells what colour that shape has. Rows differ in how, and in which layers, image and audio meet.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import measure
import numpy as np
import torch
from matplotlib.figure import Figure
from measure import ROOT
from pages import CellOptions, Page, by_seed, processes
from plots import BLUE, GREY, ORANGE
from scipy.stats import t as student
from tables import origin
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from tqdm import tqdm

from avfuse import AVMAE, AVEncoder, InputSettings
from avfuse.choices import SceneKind
from avfuse.data.sounding_shapes.synthesis import COLOURS, SHAPES, draw, play, sample_scene
from avfuse.data.transforms import Spectrogram
from avfuse.files import aside
from avfuse.presets import SMALL_INPUTS
from avfuse.vit import plain_vit

DIM, DEPTH, HEADS, PATCH = 64, 4, 2, 16
FEATURES = ("image", "audio", "fusion")
VERDICT = (  # of `difference`
    "*yes* where its 95 % interval over seeds (Welch's t) lies above zero, *no, the reverse* where it lies "
    "below, else *within the spread*; what other clips than these would change is not in it"
)
STORED = ("image", "audio", "shape", "colour", "shown")  # of a scene


class Row(NamedTuple):
    """How image and audio meet."""

    label: str
    interactions: str
    layers: tuple[int, ...] | str = "all"
    features: tuple[str, ...] = FEATURES  # that are classified; the logits are averaged
    pair_bias: str | bool = False  # this and the next are of the second page, synchrony.py
    time_peak: float = 0.0


ROWS = {
    "dense": Row("dense, early (all layers)", "dense"),
    "dense-mid": Row("dense, mid (upper half)", "dense", (2, 3)),
    "dense-late": Row("dense, late (last layer)", "dense", (3,)),
    "factorized": Row("factorized, early", "factorized"),
    "token": Row("token, early", "token"),
    "bilinear": Row("bilinear, early", "bilinear"),
    "joint": Row("joint attention, early", "joint", features=("image", "audio")),
    "cross": Row("cross-attention, early", "cross", features=("image", "audio")),
    "none": Row("no fusion (logits averaged)", "none", "none", ("image", "audio")),
    "image": Row("image alone", "none", "none", ("image",)),
    "audio": Row("audio alone", "none", "none", ("audio",)),
}
RowName = Literal[*ROWS]
STARTS = {"scratch": "from scratch", "pretrained": "after pretraining"}
CLAIMS = (  # which row is said to be better than which
    ("earlier is better: all layers over the upper half", "dense", "dense-mid"),
    ("earlier is better: upper half over the last layer", "dense-mid", "dense-late"),
    ("earlier is better: all layers over the last layer", "dense", "dense-late"),
    ("late fusion over averaged logits", "dense-late", "none"),
    ("dense over token", "dense", "token"),
    ("dense over factorized", "dense", "factorized"),
    ("bilinear over additive pairs", "bilinear", "dense"),
    ("dense over joint attention", "dense", "joint"),
    ("dense over cross-attention", "dense", "cross"),
)
KEYS = ("row", "start", "seed")  # of a cell
ALONE = ("image", "audio")  # controls, from scratch only


@dataclass(frozen=True)
class Options(CellOptions):
    """Trains every way to fuse on Sounding Shapes, and says how well each binds sound and picture.

    One cell is one row, from scratch or after masked pretraining on the same scenes, with one seed. Cells
    that the result file holds are not trained again: the same command goes on where it was stopped, and
    --rows, --starts and --seeds choose which cells to do now. After each cell the file, the page
    benchmarks/study.md and the plot docs/study.png are written anew.

    All rows share scenes, learning rates and number of steps; nothing is tuned for one of them. Models
    are 64 wide and 4 layers deep, with 36 + 32 tokens. They name `shape` and `colour` together (two sets of
    heads); what counts is `colour`. The image alone can do no better than 1 / objects, the sound alone than
    1 / colours. Image tokens also learn to name which kinds of object (shape and colour) are shown, whether
    they sound or not: to see takes longer than to fuse, and this study is not about seeing.
    """

    rows: tuple[RowName, ...] = tuple(ROWS)
    """Which ways to fuse."""
    starts: tuple[Literal[*STARTS], ...] = tuple(STARTS)
    """From fresh weights, or after pretraining."""
    steps: int = 1000
    """Training steps of a cell."""
    pretraining_steps: int = 500
    """Steps of masked autoencoding before them, in a pretrained cell."""
    batch_size: int = 64
    lr: float = 2e-3
    """Of AdamW, which trains embeddings, norms, biases and heads. Both rates rise for a fifteenth of the
    steps, stay, and fall to 0 over the second half."""
    muon_lr: float = 0.03
    """Of Muon, which trains the matrices of all blocks."""
    shown_weight: float = 1.0
    """Of the loss of naming what the image shows, a sum over its 36 kinds."""
    objects: int = 3
    """In a scene; one of them sounds."""
    train: int = 16_000
    """Scenes to train on; drawn once and kept under data/."""
    test: int = 2_000
    """Scenes to judge on."""


def main(options: Options) -> None:
    if not options.report:
        # From scratch first, and one seed after the other: stopped early, rows can be compared.
        wanted = itertools.product(options.starts, options.seeds, options.rows)
        cells = [(row, start, seed) for start, seed, row in wanted if start == "scratch" or row not in ALONE]
        scenes_of(options).draw(options.workers)
        PAGE.train(options, cells, train_cell, dim=DIM, depth=DEPTH)
    PAGE.show()


# --- cells --------------------------------------------------------------------------------------------------


def train_cell(options: Options, cell: tuple[str, str, int]) -> dict:
    """One row from one start with one seed: its accuracies on the test scenes, and on the way there."""
    row, start, seed = cell
    began = time.perf_counter()
    train, test = scenes_of(options).splits()
    torch.manual_seed(seed)
    encoder = make_encoder(ROWS[row])
    if start == "pretrained":
        mae = AVMAE(encoder, decoder_dim=64, decoder_depth=2, decoder_heads=2)
        steps = options.pretraining_steps
        list(fit(mae, lambda batch: mae(batch["image"], batch["audio"]).loss, train, steps, options, steps))
    model = Namer(encoder, ROWS[row].features)
    loss = partial(model.loss, shown_weight=options.shown_weight)
    curve = []
    for step in fit(model, loss, train, options.steps, options, pause=max(1, options.steps // 5)):
        curve.append([step, *accuracies(model, test)])
    colour, shape = curve[-1][1:]
    seconds = round(time.perf_counter() - began)
    return dict(row=row, start=start, seed=seed, colour=colour, shape=shape, curve=curve, seconds=seconds)


def make_encoder(
    row, inputs: InputSettings = SMALL_INPUTS, dim: int = DIM, depth: int = DEPTH, **options
) -> AVEncoder:
    """The interactions and layers of a row; `options` of the encoder."""
    sizes = dict(patch_size=PATCH, embed_dim=dim, depth=depth, num_heads=HEADS)
    return AVEncoder(
        plain_vit(3, inputs.image_shape, **sizes),
        plain_vit(1, (inputs.mel_bins, inputs.frames), **sizes),
        interactions=row.interactions,
        fusion_layers=row.layers,
        inputs=inputs,
        **(dict(fusion_tokens=8, attn_ratio=1.0) | options),
    )


class Namer(nn.Module):
    """Names shape and colour of what sounds from mean-pooled tokens: a linear head for each feature, logits
    averaged. Names the kinds of object shown from image tokens: somewhere in the image, a kind is seen.
    """

    def __init__(self, encoder: AVEncoder, features: tuple[str, ...]):
        super().__init__()
        self.encoder, self.features, classes = encoder, features, len(SHAPES) + len(COLOURS)
        self.heads = nn.ModuleDict({name: nn.Linear(encoder.embed_dim, classes) for name in features})
        kinds = len(SHAPES) * len(COLOURS)
        self.kinds = nn.Linear(encoder.embed_dim, kinds) if "image" in features else None

    def forward(self, image: Tensor, audio: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Logits of the shapes (B, 6), of the colours (B, 6) and of the kinds shown (B, 36)"""
        tokens = {
            name: x.flatten(1, -2)
            for name, x in self.encoder(image, audio)._asdict().items()
            if x is not None
        }
        logits = [self.heads[name](tokens[name].mean(1)) for name in self.features]
        shape, colour = torch.stack(logits).mean(0).split([len(SHAPES), len(COLOURS)], dim=1)
        shown = None
        if self.kinds is not None:  # soft maximum over the tokens, 0 where no token has an opinion
            shown = self.kinds(tokens["image"]).logsumexp(1) - math.log(tokens["image"].shape[1])
        return shape, colour, shown

    def loss(self, batch: dict[str, Tensor], shown_weight: float) -> Tensor:
        shape, colour, shown = self(batch["image"], batch["audio"])
        loss = cross_entropy(shape, batch["shape"]) + cross_entropy(colour, batch["colour"])
        if shown is not None:
            kinds = binary_cross_entropy_with_logits(shown, batch["shown"], reduction="sum")
            loss = loss + shown_weight * kinds / len(shown)
        return loss


def make_optimizers(model: nn.Module, options: Options) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, as its authors advise, and AdamW for all else. In batches of
    32, dense fusion begins to bind after 1,000 steps with Muon, after 1,750 with AdamW alone.
    """
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "blocks." in name else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=options.muon_lr, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=options.lr, betas=(0.9, 0.95), weight_decay=0.01),
    ]


def fit(
    model, loss_of, scenes, steps: int, options: Options, pause: int, optimizers=make_optimizers
) -> Iterator[int]:
    """Trains on random batches, and yields the step after every `pause` of them and after the last."""
    optimizers = optimizers(model, options)
    rate = partial(warmup_stable_decay, total=steps)
    rates = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    model.train()
    for step in range(1, steps + 1):
        index = torch.randint(len(scenes["image"]), (options.batch_size,))
        batch = prepared(scenes, index)
        flipped = torch.rand(len(index)).view(-1, *[1] * (batch["image"].ndim - 1)) < 0.5
        batch["image"] = torch.where(flipped, batch["image"].flip(-1), batch["image"])
        loss = loss_of(batch)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepped in (*optimizers, *rates):
            stepped.step()
        if step % pause == 0 or step == steps:
            yield step
            model.train()


def warmup_stable_decay(step: int, total: int) -> float:
    return min(1.0, (step + 1) / max(1, total // 15), 2 * (total - step) / total)


def accuracies(model: Namer, scenes: dict[str, Tensor]) -> tuple[float, float]:
    """Shares of the scenes whose colour, and whose shape, is named right."""

    def right(batch):
        shape, colour, _ = model(batch["image"], batch["audio"])
        return torch.stack([colour.argmax(1) == batch["colour"], shape.argmax(1) == batch["shape"]], 1)

    return tuple(over_scenes(model, scenes, right).double().mean(0).tolist())


@torch.no_grad()
def over_scenes(
    model: nn.Module, scenes: dict[str, Tensor], read: Callable[[dict], Tensor], size: int = 250
) -> Tensor:
    """What `read` makes of all scenes (scenes, ...), in batches of this size, while the model is judged."""
    model.eval()
    indices = torch.arange(len(scenes["image"])).split(size)
    return torch.cat([read(prepared(scenes, index)) for index in indices])


# --- scenes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """Scenes to train and to judge on, drawn once and kept under data/: image uint8 and audio float16 as a
    model takes them in, shape and colour of what sounds, and which kinds of object are shown.
    """

    name: str
    objects: int
    train: int
    test: int
    inputs: InputSettings
    scene: SceneKind = "binding"

    @property
    def path(self) -> Path:
        return ROOT / f"data/{self.name}-{self.objects}-{self.train}-{self.test}.npz"

    def draw(self, workers: int) -> None:
        """By so many processes, if they are not there."""
        if self.path.exists():
            return
        self.path.parent.mkdir(exist_ok=True)
        counts = enumerate((self.train, self.test))
        numbers = [(split, n) for split, count in counts for n in range(count)]
        with processes(workers) as pool:
            drawn = pool.map(self.one, numbers, chunksize=64)
            drawn = list(tqdm(drawn, desc="scenes", total=len(numbers)))
        arrays = dict(zip(STORED, map(np.stack, zip(*drawn, strict=True)), strict=True))
        with aside(self.path) as partial_path, open(partial_path, "wb") as file:
            np.savez(file, **arrays)

    def splits(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with np.load(self.path, allow_pickle=False) as file:
            tensors = {name: torch.from_numpy(file[name]) for name in file.files}
        splits = (slice(self.train), slice(self.train, None))
        return tuple({name: tensor[part] for name, tensor in tensors.items()} for part in splits)

    def one(self, number: tuple[int, int]):
        """One scene from its own seed, as it is stored."""
        inputs, seconds = self.inputs, self.inputs.audio_seconds
        rng = np.random.default_rng(np.random.SeedSequence((self.objects, *number)))
        scene = sample_scene(rng, scene=self.scene, objects=self.objects, seconds=seconds)
        frames, _ = draw(scene, np.array(inputs.frame_times), inputs.image_size)
        image = frames.transpose(0, 3, 1, 2)
        sound = play(scene, seconds, inputs.sample_rate, rng).sum(0) / 32768
        audio = Spectrogram(inputs)(torch.from_numpy(sound).float()).half().numpy()
        heard = scene.objects[scene.sounding[0]]
        shown = np.zeros((len(SHAPES), len(COLOURS)), bool)
        for thing in scene.objects:
            shown[SHAPES.index(thing.shape), COLOURS.index(thing.colour)] = True
        labels = SHAPES.index(heard.shape), COLOURS.index(heard.colour)
        return image[0] if inputs.image_frames == 1 else image, audio, *labels, shown.ravel()


def scenes_of(options: Options) -> Scenes:
    return Scenes("study", options.objects, options.train, options.test, SMALL_INPUTS)


def prepared(scenes: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """A batch of about zero mean and unit deviation."""
    image = (scenes["image"][index].float() / 255 - 0.45) / 0.25
    audio = (scenes["audio"][index].float() + 3) / 2.5
    labels = {name: scenes[name][index] for name in ("shape", "colour")}
    return dict(image=image, audio=audio, shown=scenes["shown"][index].float(), **labels)


# --- results ------------------------------------------------------------------------------------------------


def accuracies_by_cell(record: dict) -> dict[tuple[str, str], list[float]]:
    """Row and start -> colour accuracies by seed."""
    return by_seed(record["cells"], "colour", "row", "start")


def trained(accuracies: dict[tuple[str, str], list[float]]) -> list[str]:
    """The rows that have any accuracies."""
    return [name for name in ROWS if any((name, start) in accuracies for start in STARTS)]


def accuracy_table(record: dict) -> list[tuple]:
    """Accuracies of every row, and what pretraining changed."""
    rows, accuracies = [("", *STARTS.values(), "gain by pretraining")], accuracies_by_cell(record)
    for name in trained(accuracies):
        row, (scratch, pretrained) = ROWS[name], (accuracies.get((name, start)) for start in STARTS)
        rows.append((row.label, mean_cell(scratch), mean_cell(pretrained), difference(pretrained, scratch)))
    return rows


def claims_table(record: dict) -> list[tuple]:
    """The paper's claims, each as a difference of two rows."""
    rows, accuracies = [("claim", *STARTS.values())], accuracies_by_cell(record)
    there = {*trained(accuracies)}
    for claim, better, worse in CLAIMS:
        if not {better, worse} <= there:
            continue
        pairs = [(accuracies.get((better, start)), accuracies.get((worse, start))) for start in STARTS]
        rows.append((claim, *(difference(*pair) for pair in pairs)))
    return rows


def mean_cell(values: list[float] | None) -> str:
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation} (n={len(values)})"


def difference(first: list[float] | None, second: list[float] | None) -> str:
    """Difference of means ± its standard error, and whether its 95 % interval (Welch) leaves out zero."""
    if not first or not second:
        return ""
    by = statistics.mean(first) - statistics.mean(second)
    if min(len(first), len(second)) < 2:
        return f"{by:+.3f} (one seed)"
    squares = [(statistics.variance(values) / len(values), len(values) - 1) for values in (first, second)]
    square = sum(square for square, _ in squares)
    freedom = square**2 / sum(own**2 / count for own, count in squares) if square else 1
    error = math.sqrt(square)
    limit = student.ppf(0.975, freedom) * error  # of few seeds far above 2 errors
    verdict = "yes" if by > limit else "no, the reverse" if by < -limit else "within the spread"
    return f"{by:+.3f} ± {error:.3f}: {verdict}"


def parts(record: dict) -> list:
    """What the page says."""
    sound, image = 1 / len(COLOURS), 1 / record["settings"]["objects"]
    return [
        accuracy_table(record),
        f"Accuracy of the colour after {record['settings']['steps']:,} steps, mean ± standard deviation over "
        f"seeds. Chance is {sound:.3f} for the sound alone, {image:.3f} for the image alone. Gain: "
        f"difference of the means ± its standard error, {VERDICT}.",
        "The claims, judged in the same way:",
        claims_table(record),
        "![Accuracy by way to fuse](../docs/study.png)",
        origin(record),
    ]


def draw_plot(record: dict) -> Figure:
    """Every seed a dot, the mean a bar; from scratch and pretrained."""
    accuracies = accuracies_by_cell(record)
    names = trained(accuracies)
    figure = Figure(figsize=(9, 4), layout="constrained")
    kinds = {STARTS[start]: [accuracies.get((name, start)) for name in names] for start in STARTS}
    draw_seeds(figure.subplots(), [ROWS[name].label for name in names], kinds)
    draw_chances(figure.axes[0], record["settings"]["objects"])
    return figure


def draw_chances(axis, objects: int) -> None:
    """Lines where the sound alone ends, and the image alone, of scenes of so many objects."""
    for chance, what, side in ((1 / len(COLOURS), "sound", "right"), (1 / objects, "image", "left")):
        axis.axvline(chance, color=GREY, ls="--", lw=1)
        axis.text(chance, -0.7, f" chance, {what} ", color=GREY, fontsize=8, ha=side)


def draw_seeds(axis, labels: list[str], kinds: dict[str, list[list[float] | None]], *colours: str) -> None:
    """For each label, from the top down, a bar of each kind: the mean, and a mark for each of its seeds."""
    height = 0.8 / max(1, len(kinds))
    for n, (kind, values) in enumerate(kinds.items()):
        style = dict(color=(colours or (BLUE, ORANGE))[n], marker="os"[n % 2])
        axis.plot([], [], ms=5, ls="", label=kind, **style)
        for place, seeds in enumerate(values):
            if seeds:
                at = place + (n - (len(kinds) - 1) / 2) * height
                axis.barh(at, statistics.mean(seeds), 0.9 * height, color=style["color"], alpha=0.35)
                axis.plot(seeds, [at] * len(seeds), ms=5, ls="", **style)
    axis.set(xlim=(0, 1), ylim=(len(labels) - 0.4, -1), xlabel="accuracy of the colour of what sounds")
    axis.set_yticks(range(len(labels)), labels)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower right")


PAGE = Page("study", KEYS, parts, draw_plot)

if __name__ == "__main__":
    measure.run(main, Options)
