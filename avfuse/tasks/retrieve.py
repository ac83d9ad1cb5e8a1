"""What is like what? `python -m avfuse.tasks.retrieve`: neighbours by frozen features (paper Fig. 3)."""

from ..command import begin, read
from ..training.settings import checked
from .options import RetrieveConfig

if __name__ == "__main__":
    begin("avfuse.tasks.retrieve", checked(read(RetrieveConfig)), explained=())

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from ..data.class_folders import with_classes
from ..data.clips import Clip, ClipDataset, MultiWindowDataset
from ..data.find import Found
from ..encoder import AVEncoder
from ..files import printable, write_rows
from ..inputs import InputSettings
from ..mae import unfused
from ..training.features import FEATURES, pool, pool_windows, windows_of
from ..training.judge import JudgedTask, to_columns, to_rows
from ..training.loop import evaluation_batches, program
from ..training.neighbours import AT_ONCE, chance_at, neighbours, of_both, recall_at, related, rows_there
from ..training.pictures import BLUE, middle_frame, rgb, save, show_sound
from ..training.run_folder import has_trained_on_all, read_sides, run_before
from ..training.starts import first_encoder
from ..training.task import Task

QUERIES, SHOWN = 3, 5  # in the picture: clips, and neighbours of each
INPUTS = ("image", "audio", "image_present", "audio_present")


# --- metric -------------------------------------------------------------------------------------------------


def recalls(features: dict[str, Tensor], ks: Sequence[int]) -> dict[str, float]:
    """Recall by label, k and feature, each with its chance; nothing where there are no labels.

    Raises:
        ValueError: there are not as many others.
    """
    check_k(ks, len(features["image"]))
    nearest, there, metrics = neighbours(features, max(ks)), rows_there(features), {}
    for name in [name for name in features if name.startswith("label_")]:
        same, label = related(features[name]), name.removeprefix("label_")
        for k in ks:
            for feature, indices in nearest.items():
                hits = of_both(same, there[feature])
                metrics[f"{label}_recall@{k}_{feature}"] = recall_at(indices, hits, k)
            metrics[f"{label}_recall@{k}_chance"] = chance_at(same, k)
    return metrics


def cross_recalls(image: Tensor, audio: Tensor, ks: Sequence[int]) -> dict[str, float]:
    """Share of the images whose own sound is among the k nearest of all sounds, and the reverse, by cosine of
    features (N, D), with its chance; a sound as near as the own one goes before it, as does one that is NaN.
    """
    metrics, clips = {}, len(image)
    image, audio = normalize(image.double(), dim=1), normalize(audio.double(), dim=1)
    for way, queries, keys in ("image_to_audio", image, audio), ("audio_to_image", audio, image):
        ranks = []
        for part in torch.arange(clips).split(AT_ONCE):
            cosines = queries[part] @ keys.T
            ranks.append((~(cosines < cosines.gather(1, part[:, None]))).sum(1))
        for k in [k for k in ks if k <= clips]:
            metrics[f"{way}_recall@{k}"] = (torch.cat(ranks) <= k).double().mean().item()
            metrics[f"pair_chance@{k}"] = k / clips
    return metrics


def apart(encoder: AVEncoder, image: Tensor, audio: Tensor, **present: Tensor) -> dict[str, Tensor]:
    """Pooled tokens (B, D) that know of one modality alone, "image_alone" and "audio_alone", as their means
    over windows: those before the first fused layer, which a contrastive term trains; where layer 0 is fused,
    those of the encoder given image or sound alone.
    """
    total = 0
    for pixels, sound in zip(image.unbind(1), audio.unbind(1), strict=True):
        if encoder.fusion_layers[:1] == (0,):
            seen = encoder(pixels, None, image_present=present.get("image_present"))
            heard = encoder(None, sound, audio_present=present.get("audio_present"))
            alone = pool(seen)["image"], pool(heard)["audio"]
        else:
            alone = unfused(encoder, encoder(pixels, sound, **present, return_layers=True))
        total = total + torch.stack([*alone]).float() / image.shape[1]
    return dict(image_alone=total[0], audio_alone=total[1])


def check_k(ks: Sequence[int], clips: int) -> None:
    if not ks or not all(1 <= k < clips for k in ks):
        raise ValueError(f"--k must be in 1..{clips - 1} with {clips} test clips, got {ks}")


# --- task ---------------------------------------------------------------------------------------------------


def untrained(found: Found, config: RetrieveConfig, say: Callable[[str], object]) -> Found:
    """The data without the test clips that the run behind the encoder has trained on, unless these are to
    stay, which is told.
    """
    if found.test is found.train:
        found = found._replace(test_name="clips")  # on which nothing is trained here
    run = run_before(config)
    if run is None or config.data is None:
        return found
    before, test = read_sides(run), found.test
    if before is not None:
        sides = zip(test, before.of(test, config.data), strict=True)
        test = [clip for clip, side in sides if side != "train"]
    if found.test is found.train and has_trained_on_all(run, config.data):
        test = []
    if len(test) == len(found.test):
        return found
    trained = f"{len(found.test) - len(test)} of {len(found.test)} clips, on which {run} was trained"
    if not test or config.seen == "keep":
        say(printable(f"WARNING: recall is better than it is, with {trained}"))
        return found
    say(printable(f"left out, but for --seen keep: {trained}"))
    coverage = found.coverage | dict(test=(len(test), len(test)))
    return found._replace(test=test, test_name=before.said, coverage=coverage)


class Retrieval(JudgedTask):
    """Test clips by their neighbours, in the eyes of an encoder as it is."""

    name = "retrieve"

    def __init__(self, config: RetrieveConfig, found: Found):
        super().__init__(config, found)
        others = len(found.test) - 1
        self.ks = [k for k in (1, 5, 10) if k <= others] if config.k is None else config.k
        check_k(self.ks, len(found.test))
        self.model = first_encoder(config)
        self.protocol = (
            "mean-pooled tokens compared by cosine; neighbours among the other test clips; sum = the three "
            "cosines added; recall@k = share of the queries with a clip of their label (one of several: in "
            f"common) among the k nearest; {windows_of(self.model.inputs, config.windows, 'pooled tokens')}"
        )

    @staticmethod
    def find(config, say):
        """The data with its labels; without, if not all clips lie in folders that name classes. Clips that
        the run behind the encoder has trained on are left out.
        """
        found = untrained(Task.find(config, say), config, say)
        try:
            return with_classes(found, config.data, say=say)
        except ValueError as error:
            say(printable(f"neighbours without recall, as there are no classes: {error}"))
            return found

    def begin(self, say):
        """The encoder alone is there to begin with."""

    def dataset(self, clips, *, train):
        if train:
            return ClipDataset(clips, self.model.inputs, train=True, seed=self.config.seed)
        return MultiWindowDataset(clips, self.model.inputs, windows=self.config.windows)

    def inputs(self, batch):
        return {name: batch[name] for name in INPUTS}

    def judge(self, model, inputs, batch):
        """Pooled tokens of each clip, zeros where it lacks the modality, and its labels."""
        features = pool_windows(model, **inputs)
        if model.dims["image"] == model.dims["audio"]:
            features |= apart(model, **inputs) | dict(paired=batch["image_present"] & batch["audio_present"])
        labels = {name: batch[name] for name in batch if name.startswith(("label_", "index"))}
        return to_rows(features | labels)

    def summarize(self, rows):
        columns = to_columns(rows)
        ks = [k for k in self.ks if k < len(rows)]  # some clips may have been lost
        metrics = dict(clips=len(rows)) | (recalls(columns, ks) if ks else {})
        if "paired" in columns:
            pairs = [columns[name][columns["paired"]] for name in ("image_alone", "audio_alone")]
            metrics |= cross_recalls(*pairs, self.ks)
        return metrics

    def tables(self, metrics):
        names = (*FEATURES, "sum", "chance")
        ends = [name.removesuffix("_chance") for name in metrics if name.endswith("_chance")]
        rows = [(end.replace("_", " "), *(metrics[f"{end}_{name}"] for name in names)) for end in ends]
        ways = ("image_to_audio_recall", "audio_to_image_recall", "pair_chance")
        pairs = [name.rpartition("@")[2] for name in metrics if name.startswith("pair_chance@")]
        crossed = [(f"own, recall@{k}", *(metrics[f"{way}@{k}"] for way in ways)) for k in pairs]
        tables = [("", *names), *rows], [("", "image to audio", "audio to image", "chance"), *crossed]
        return [table for table in tables if len(table) > 1]

    def doubt(self, metrics):
        ends = [name.removesuffix("_sum") for name in metrics if name.endswith("_sum")]
        useless = [name for name in ends if metrics[f"{name}_sum"] <= metrics[f"{name}_chance"] < 1]
        return f"no better than chance: {', '.join(useless)}" if useless else ""

    def save(self, folder, model):
        """The encoder stays where it came from."""

    def show(self, run, model, step, rows):
        """A file with the neighbours of all clips; and a picture of queries, the first of each label or else
        of all, and their nearest clips by each feature.
        """
        if len(rows) < 2:
            return
        features = to_columns(rows)
        indices = features["index"].tolist()
        paths = [(clip := run.found.test[index]).source or str(clip.path) for index in indices]
        of_all = neighbours(features, min(max(self.ks), len(rows) - 1))
        write_rows(run.config.run / "neighbours.jsonl", named_neighbours(paths, of_all, rows_there(features)))
        name = next((name for name in features if name.startswith("label_")), None)
        label = name and name.removeprefix("label_")
        same = torch.zeros(len(rows), len(rows)).bool() if name is None else related(features[name])
        queries = torch.arange(len(rows)) if name is None else same.long().argmax(1).unique()
        queries = queries[:QUERIES]
        nearest = neighbours(features, min(SHOWN, len(rows) - 1), queries)
        shown = torch.cat([queries[:, None], *nearest.values()], dim=1).unique().tolist()
        items = {}
        for batch in evaluation_batches(run, [indices[row] for row in shown]):
            middle = batch["image"].shape[1] // 2
            pixels = zip(batch["image"][:, middle], batch["audio"][:, middle], strict=True)
            items |= dict(zip(batch["index"].tolist(), pixels, strict=True))
        items = {row: items.get(indices[row]) for row in shown}
        titles = {row: self.title(run.found.test[indices[row]], label) for row in queries.tolist()}
        path = run.config.run / "pictures" / f"neighbours-{step:06d}.png"
        draw_neighbours(path, titles, nearest, same, items, label, model.inputs)

    def title(self, clip: Clip, label: str | None) -> str:
        if label is None:
            return printable(clip.path.name)
        numbers, names = clip.labels[label], self.found.classes[label]
        kinds = (names[n] for n in (numbers if isinstance(numbers, tuple) else (numbers,)))
        return printable(f"{label}: {', '.join(kinds)}")


def named_neighbours(
    paths: Sequence[str], nearest: dict[str, Tensor], there: dict[str, Tensor]
) -> list[dict]:
    """A row for each clip: its path, and by feature the paths of its neighbours, nearest first. A clip that
    lacks the feature, see `rows_there`, has none, and is none.
    """
    rows = [dict(clip=path) for path in paths]
    for feature, indices in nearest.items():
        has = there[feature].flatten().tolist()
        for row, near in enumerate(indices.tolist()):
            rows[row][feature] = [paths[n] for n in near if has[row] and has[n] and n != row]
    return rows


# --- picture ------------------------------------------------------------------------------------------------


def draw_neighbours(
    path: Path,
    titles: dict[int, str],
    nearest: dict[str, Tensor],
    same: Tensor,
    items: dict[int, tuple[Tensor, Tensor] | None],
    label: str | None,
    settings: InputSettings,
) -> None:
    """Queries and their nearest clips by each feature; those of the query's label in blue frames.

    Args:
        titles: what the queries are, by their numbers.
        nearest: by feature, the numbers of their neighbours (Q, k), nearest first.
        same: (N, N) bool, which clips have the label in common.
        items: image and spectrogram of all these clips, or None if one cannot be read again.
        label: what it is called, None if there is none.
        settings: the transforms of the images.
    """
    rows, columns = len(titles) * len(nearest), 1 + len(next(iter(nearest.values()))[0])
    figure = Figure(figsize=(1.95 * columns, 1.02 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, 2 * columns, squeeze=False)
    for axis in grid.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    lines = iter(grid)
    for block, (query, title) in enumerate(titles.items()):
        for n, (feature, numbers) in enumerate(nearest.items()):
            line = next(lines)
            line[2].set_ylabel(feature, fontsize=10)
            if n == 0:
                show_clip(line[:2], items[query], settings, is_right=False)
                line[0].set_title(title, loc="left", fontsize=9, weight="bold").set_parse_math(False)
            for place, near in enumerate(numbers[block].tolist(), start=1):
                axes = line[2 * place : 2 * place + 2]
                show_clip(axes, items[near], settings, is_right=bool(same[query, near]))
    heading = "Nearest clips by each feature" + (f"; framed: the same {label}" if label else "")
    figure.suptitle(heading, x=0.01, ha="left", fontsize=11)
    save(figure, path)


def show_clip(axes, item: tuple[Tensor, Tensor] | None, settings: InputSettings, *, is_right: bool) -> None:
    """A frame and its spectrogram, framed if it is right."""
    if item is None:
        return
    image, audio = item
    axes[0].imshow(rgb(middle_frame(image), settings).numpy(), aspect="auto")
    show_sound(axes[1], audio[0])
    for axis in axes if is_right else ():
        axis.spines[:].set(visible=True, color=BLUE, linewidth=3.5)


main = partial(program, kind=Retrieval)
