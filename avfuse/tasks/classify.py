"""What is it? `python -m avfuse.tasks.classify`: linear probe and fine-tuning (paper Table 3)."""

from ..command import begin
from ..training.settings import checked
from .options import ClassifyConfig, parse
from .options import linear_probe as linear_probe

if __name__ == "__main__":
    begin("avfuse.tasks.classify", checked(parse), explained=())

import math
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from timm.data.mixup import mixup_target
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid
from tqdm import tqdm

from ..data.class_folders import read_class_list, with_classes
from ..data.clips import ClipDataset, MultiWindowDataset
from ..data.find import Found
from ..files import check_target, printable
from ..training.conditions import ALWAYS
from ..training.features import windows_of
from ..training.judge import JudgedTask, to_columns, to_rows
from ..training.loop import program
from ..training.neighbours import interval, wilson
from ..training.pictures import BLUE, GREY, ORANGE, middle_frame, rgb, save, show_sound
from ..training.starts import first_encoder
from ..training.task import Task
from . import vggsounder
from .classifier import Classifier, presence

LIGHT = "#C9CED3"
SHOWN, LONGEST = 6, 60  # classes of a clip in the picture, and letters of a name
WRONG_TOGETHER = "wrong by both, right by {} alone"


# --- loss ---------------------------------------------------------------------------------------------------


def mix(
    inputs: dict[str, Tensor], target: Tensor, classes: int, *, alpha: float, smoothing: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Mixup of whole clips: both modalities of a clip with the same partner, by the same weight.

    The partner is its mirror image in the batch, the weight is drawn from Beta(alpha, alpha) for each clip by
    torch's generator, which the loop seeds for every step. Clips that do not have the same modalities are
    left as they are.

    Args:
        inputs: what the classifier is called with.
        target: (B,) long, or (B, classes) float where a clip may have several classes.
        alpha: 0 = no mixing.
        smoothing: share of the target spread over all classes (of several: towards one half).

    Returns:
        Mixed inputs, and targets (B, classes).
    """
    options = dict(smoothing=smoothing, multi_label=target.ndim == 2)
    if not alpha:
        return inputs, mixup_target(target, classes, **options)
    weight = torch.distributions.Beta(alpha, alpha).sample((len(target), 1)).to(target.device)
    for name in "image_present", "audio_present":
        if name in inputs:
            weight = weight.where((inputs[name] == inputs[name].flip(0))[:, None], 1.0)
    mixed = dict(inputs)
    for name in {"image", "audio"} & inputs.keys():
        w = weight.reshape(-1, *[1] * (inputs[name].ndim - 1))
        mixed[name] = w * inputs[name] + (1 - w) * inputs[name].flip(0)
    return mixed, mixup_target(target, classes, lam=weight, **options)


# --- windows ------------------------------------------------------------------------------------------------


def average(logits: Tensor, what: str, *, several: bool) -> Tensor:
    """Logits (windows, ..., classes) as those of one: their mean, or what gives the mean of their
    "probabilities", by softmax, or by sigmoid where a clip may have several classes.
    """
    if what == "logits":
        return logits.mean(0)
    if several:
        return log_mean(logsigmoid(logits)) - log_mean(logsigmoid(-logits))
    return log_mean(logits.log_softmax(-1))


def log_mean(logs: Tensor) -> Tensor:
    return logs.logsumexp(0) - math.log(len(logs))


# --- metrics ------------------------------------------------------------------------------------------------


def accuracy(scores: Tensor, target: Tensor) -> float:
    """Share of clips that are right."""
    return is_right(scores, target).double().mean().item()


def is_right(scores: Tensor, target: Tensor) -> Tensor:
    """Whether the highest score (N, classes) of each clip is that of its class (N,): (N,) bool. A clip that
    nothing could be read of, whose scores are -inf, counts as wrong.
    """
    return (scores.argmax(1) == target) & scores.isfinite().all(1)


def confusion(scores: dict[str, Tensor], target: Tensor) -> dict[str, float]:
    """Modality confusion of VGGSounder (Zverev et al., ICCV 2025): the shares of all clips that are named
    wrong by both modalities together, and right by the image alone, by the audio alone, by each of them.

    Args:
        scores: "", "image_input" and "audio_input", (N, classes) as for `accuracy`.
        target: (N,)
    """
    both, image, audio = (is_right(scores[name], target) for name in ("", "image_input", "audio_input"))
    alone = dict(image=image, audio=audio, each=image & audio)
    return {f"confusion_{name}": (right & ~both).double().mean().item() for name, right in alone.items()}


def ranking_metrics(scores: Tensor, target: Tensor) -> dict[str, float | int | None]:
    """Mean average precision and area under the ROC curve, macro over classes, and d' = sqrt(2) times the
    normal quantile of the mean area (AudioSet).

    Classes without a positive clip are left out and counted; those without a negative one have no area, and
    are left out of it. What no class is left for is None, and so is an infinite d'.

    Args:
        scores: (N, classes) logits, of which only the order within a class counts; NaN is below all others.
        target: (N, classes), 1 where the clip has the class.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score  # takes seconds to import

    scores = scores.detach().double().nan_to_num(-1e300, 1e300, -1e300).numpy()  # it takes finite ones
    target = target.long().numpy()
    some = target.any(0)
    mixed = some & ~target.all(0)
    precision = mean_over(average_precision_score, scores, target, some)
    area = mean_over(roc_auc_score, scores, target, mixed)
    d_prime = None
    if area is not None and 0 < area < 1:
        d_prime = 2**0.5 * torch.special.ndtri(torch.tensor(area, dtype=torch.float64)).item()
    return dict(
        mAP=precision,
        AUC=area,
        d_prime=d_prime,
        classes_without_positives=int((~some).sum()),
        classes_without_negatives=int((some & ~mixed).sum()),
    )


def mean_over(metric, scores: np.ndarray, target: np.ndarray, chosen: np.ndarray) -> float | None:
    """The mean of a metric of scikit-learn over the chosen classes, one by one: all at once takes memory."""
    values = [metric(target[:, n], scores[:, n]) for n in chosen.nonzero()[0]]
    return float(np.mean(values)) if values else None


# --- data ---------------------------------------------------------------------------------------------------


def check_label(found: Found, label: str) -> str:
    """The label to learn, by default the first there is, which all clips must have."""
    if not found.classes:
        raise ValueError("--data has no labels")
    label = label or next(iter(found.classes))
    if label not in found.classes:
        raise ValueError(f"--label must be one of {', '.join(found.classes)}, got {label!r}")
    classes = len(found.classes[label])
    if classes < 2:
        names = ", ".join(found.classes[label])
        raise ValueError(f"--data has no two classes to tell apart: the label {label!r} is always {names!r}")
    for clip in chain(found.train, found.test):
        numbers = clip.labels.get(label, -1)
        if not all(0 <= n < classes for n in (numbers if isinstance(numbers, tuple) else (numbers,))):
            raise ValueError(f"--label {label}: {clip.path} has {numbers}, of {classes} classes in the list")
    return label


# --- task ---------------------------------------------------------------------------------------------------


class Classification(JudgedTask):
    """Clips as classes."""

    name = "classify"
    conditions, headline = ALWAYS, ("accuracy", "mAP")

    def __init__(self, config: ClassifyConfig, found: Found):
        super().__init__(config, found)
        self.label = check_label(found, config.label)
        self.classes = found.classes[self.label]
        first = found.train[0].labels[self.label]
        self.is_multi_label = isinstance(first, tuple)
        is_one_class = not self.is_multi_label and all(c.labels[self.label] == first for c in found.train)
        if config.epochs and is_one_class:
            raise ValueError(f"--data has clips to train on of no class but {self.classes[first]!r}")
        self.model = Classifier(
            first_encoder(config, config.drop_path),
            len(self.classes),
            features=config.features,
            batch_norm=config.batch_norm,
            frozen=config.probe,
            class_names=self.classes,
            several=self.is_multi_label,
            modalities=config.modalities,
        )
        how = "linear probe" if config.probe else "fine-tuning"
        norm = " with BatchNorm" if config.batch_norm else ""
        metric = "mAP, AUC, d', macro over classes" if self.is_multi_label else "top-1 accuracy"
        given = "image and audio" if config.modalities == "both" else f"the {config.modalities} alone"
        heads = [name for name in config.features if config.modalities in ("both", name) or name == "fusion"]
        windows = windows_of(self.model.encoder.inputs, config.test_windows, config.average)
        self.protocol = (
            f"{how}{norm}, {self.label} of {len(self.classes)} classes: {metric}; given {given}; logits "
            f"averaged over the heads ({', '.join(heads)}); {windows}"
        )
        self.columns = vggsounder.columns(self.classes, found.test) if config.export else []

    @staticmethod
    def find(config, say):
        if config.export is not None:
            check_target("--export", config.export)
        names = read_class_list(config.class_list) if config.class_list else None
        return with_classes(Task.find(config, say), config.data, names, say)

    def describe(self):
        how = "only the heads are trained" if self.config.probe else "all of it is trained"
        return f"{super().describe()}, {how}, to tell {self.label} ({len(self.classes)} classes)"

    def dataset(self, clips, *, train):
        settings, config = self.model.encoder.inputs, self.config
        if not train:
            return MultiWindowDataset(clips, settings, windows=config.test_windows)
        still = self.model.encoder.settings["pair_bias"] == "time"
        return ClipDataset(clips, settings, train=True, seed=config.seed, still=still)

    def inputs(self, batch):
        """What the classifier is called with, and "target". A blank has neither modality."""
        modalities = self.config.modalities
        given = ("image", "audio") if modalities == "both" else (modalities,)
        inputs = {name: batch[name] for name in given}
        for name in given:
            if not batch[f"{name}_present"].all():  # no mask: a faster path
                inputs[f"{name}_present"] = batch[f"{name}_present"]
        return inputs | dict(target=batch[f"label_{self.label}"])

    def counts(self, inputs):
        """Clips that a head can read."""
        return dict(class_loss=int(self.is_read(inputs).sum()))

    def is_read(self, inputs) -> Tensor:
        there = presence(*(inputs.get(n) for n in ("image", "audio", "image_present", "audio_present")))
        return torch.stack([there[name] for name in self.config.features]).any(0)

    def losses(self, model, inputs):
        config, read = self.config, self.is_read(inputs)
        inputs = dict(inputs)
        inputs, target = mix(
            inputs, inputs.pop("target"), len(self.classes), alpha=config.mixup, smoothing=config.smoothing
        )
        logits = model(inputs.pop("image", None), inputs.pop("audio", None), **inputs).logits
        if self.is_multi_label:
            losses = binary_cross_entropy_with_logits(logits, target, reduction="none").mean(1)
        else:
            losses = cross_entropy(logits, target, reduction="none")
        return dict(class_loss=(losses * read).sum() / read.sum().clamp(min=1))

    def judge(self, model, inputs, batch):
        """Logits of each clip by what they are from, averaged over its windows."""
        scores = {name: logits.float() for name, logits in self.scores(model, inputs).items()}
        return to_rows(dict(target=inputs["target"], index=batch["index"]) | scores)

    def judge_again(self, model, inputs, batch):
        """Without what a head or a modality alone would say."""
        given = [name for name in ("image", "audio") if name in inputs]
        logits = self.over_windows(model, inputs, given)[""].float()
        return to_rows({"target": inputs["target"], "": logits})

    def kind(self, clip):
        return clip.labels[self.label]

    def scores(self, model: Classifier, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Logits (B, classes): "", of all heads; of each head if there are several; and of all heads when
        only the picture, or only the sound, is given. -inf where there was nothing to read.
        """
        given = [name for name in ("image", "audio") if name in inputs]
        scores = {}
        for only in [given] + ([["image"], ["audio"]] if len(given) == 2 else []):
            if not {*only, "fusion"} & {*model.features}:
                continue
            output = self.over_windows(model, inputs, only)
            if only != given:
                scores[f"{only[0]}_input"] = output.pop("")
            else:
                scores |= output
        return scores

    def over_windows(self, model, inputs, only) -> dict[str, Tensor]:
        """The average over the windows, by head, of a classifier that is given only some modalities."""
        present = {f"{n}_present": inputs[f"{n}_present"] for n in only if f"{n}_present" in inputs}
        by_head: dict[str, list[Tensor]] = {}
        for window in range(inputs[only[0]].shape[1]):
            pixels = [inputs[n][:, window] if n in only else None for n in ("image", "audio")]
            output = model(*pixels, **present)
            heads = output.heads if len(output.heads) > 1 else {}
            for name, logits in {"": output.logits, **heads}.items():
                by_head.setdefault(name, []).append(logits)
        read = output.read | {"": torch.stack(list(output.read.values())).any(0)}
        scores = {}
        for name, logits in by_head.items():
            mean = average(torch.stack(logits).float(), self.config.average, several=self.is_multi_label)
            scores[f"{name}_head" if name else ""] = mean.masked_fill(~read[name][:, None], -torch.inf)
        return scores

    def summarize(self, rows):
        by_name = to_columns(rows)
        target = by_name.pop("target")
        by_name.pop("index", None)
        if self.is_multi_label:
            metrics = ranking_metrics(by_name.pop(""), target)
            of_others = {n: ranking_metrics(s, target) for n, s in by_name.items()}
            return metrics | {f"mAP_{name}": other["mAP"] for name, other in of_others.items()}
        metrics = {f"accuracy_{n}" if n else "accuracy": accuracy(s, target) for n, s in by_name.items()}
        hits = metrics["accuracy"]
        low, high = wilson(hits, len(target))
        if {"image_input", "audio_input"} <= by_name.keys():
            metrics |= confusion(by_name, target)
        chance = target.bincount().max().item() / len(target)
        return metrics | dict(
            standard_error=(hits * (1 - hits) / len(target)) ** 0.5,
            interval_low=low,
            interval_high=high,
            chance=chance,  # of always naming the most frequent class
            clips=len(target),
        )

    def tables(self, metrics):
        """All heads, each head alone, and what the picture or the sound alone would do."""
        kind = "mAP" if self.is_multi_label else "accuracy"
        said = {"head": "{} head", "input": "given the {} alone"}
        others = [name.split("_") for name in metrics if name.startswith(f"{kind}_")]
        alone = [(said[end].format(name), metrics[f"{kind}_{name}_{end}"]) for _, name, end in others]
        if self.is_multi_label:
            more = [metrics[name] for name in ("AUC", "d_prime")]
            rows = [("", kind, "AUC", "d'"), ("all heads", metrics[kind], *more)]
            return [[*rows, *((*row, None, None) for row in alone), ("chance", None, 0.5, 0.0)]]
        clips, ends = metrics["clips"], interval(metrics["interval_low"], metrics["interval_high"])
        right = f"{round(metrics[kind] * clips)} of {clips}"
        rows = [("", kind, "95 % interval", "right"), ("all heads", metrics[kind], ends, right)]
        alone.append(("most frequent class", metrics["chance"]))
        confused = {name: share for name, share in metrics.items() if name.startswith("confusion_")}
        alone += [(WRONG_TOGETHER.format(name.split("_")[1]), share) for name, share in confused.items()]
        return [[*rows, *((*row, None, None) for row in alone)]]

    def doubt(self, metrics):
        if self.is_multi_label:
            area = metrics["AUC"]
            is_useless = area is not None and area <= 0.5
            return f"no better than chance, an AUC of 0.5: {area:.3f}" if is_useless else ""
        low, high, chance = (metrics[name] for name in ("interval_low", "interval_high", "chance"))
        if low > chance:
            return ""
        frequent = f"naming the most frequent class, {chance:.3f}"
        accuracy = f"accuracy {metrics['accuracy']:.3f} (95 % interval {interval(low, high)})"
        return f"{accuracy} is not clearly better than {frequent}"

    def advice(self, metrics):
        """Where not even all right would be clearly better, training is not what is short."""
        if not self.is_multi_label and wilson(1.0, metrics["clips"])[0] <= metrics["chance"]:
            few = f"even {metrics['clips']} right of {metrics['clips']} clips would not be"
            return f"{few}: test on more (--test-share, or a folder test/)"
        return super().advice(metrics)

    def conclude(self, run, model, step, when, rows, changed=None):
        super().conclude(run, model, step, when, rows, changed)
        path = self.config.export
        if path is not None and when == "after" and rows:
            coverage = vggsounder.write(path, self.found.test, rows, self.columns)
            tqdm.write(printable(f"{path}: logits by image, by sound and by both of {coverage}"))

    def draw(self, folder, model, inputs, batch, step):
        scores = {name: s.float().cpu() for name, s in self.scores(model, inputs).items()}
        odds = {name: s.sigmoid() if self.is_multi_label else s.softmax(1) for name, s in scores.items()}
        draw_predictions(folder / f"predictions-{step:06d}.png", self, batch, odds)


def draw_predictions(path: Path, task: Classification, batch: dict, odds: dict[str, Tensor]) -> None:
    """Frames, spectrograms and the most probable classes, the right ones in blue; marks show what the picture
    or the sound alone would say.
    """
    clips, middle = len(batch["index"]), batch["image"].shape[1] // 2
    rows = -(-clips // 2)
    figure = Figure(figsize=(12, 1.7 * rows + 0.6), layout="constrained")
    grid = figure.subplots(rows, 6, squeeze=False, width_ratios=(1, 1.4, 1.5) * 2)
    for axis in grid.flat[3 * clips :]:
        axis.axis("off")
    for n in range(clips):
        frame, sound, bars = grid.flat[3 * n : 3 * n + 3]
        frame.imshow(rgb(middle_frame(batch["image"][n, middle]), task.model.encoder.inputs).numpy())
        show_sound(sound, batch["audio"][n, middle, 0])
        frame.axis("off")
        sound.axis("off")
        label = batch[f"label_{task.label}"][n]
        right = set(label.nonzero().flatten().tolist() if task.is_multi_label else [label.item()])
        draw_odds(bars, task.classes, right, {name: of_all[n] for name, of_all in odds.items()})
    entries = grid.flat[2].get_legend_handles_labels()
    figure.legend(*entries, loc="outside upper right", ncols=len(entries[1]), frameon=False, fontsize=9)
    figure.suptitle(
        f"What the classifier says of held-out clips: {task.label}", x=0.01, ha="left", fontsize=11
    )
    save(figure, path)


def draw_odds(axis, classes: Sequence[str], right: set[int], odds: dict[str, Tensor]) -> None:
    """Bars of the most probable classes, most probable first; bold blue ones are right."""
    both = odds[""]
    order = both.argsort(descending=True)[:SHOWN].tolist()
    places = range(len(order))
    colours = [BLUE if n in right else LIGHT for n in order]
    axis.barh(places, both[order].tolist(), color=colours, height=0.7, label="all heads (blue: right)")
    for name, mark, colour in (("image", "o", GREY), ("audio", "^", ORANGE)):
        if f"{name}_input" in odds:
            what = "picture" if name == "image" else "sound"
            values = odds[f"{name}_input"][order].tolist()
            axis.plot(values, places, mark, color=colour, ms=5, mew=0, ls="", label=f"given the {what} alone")
    axis.set(
        xlim=(0, 1),
        yticks=places,
        yticklabels=[shortened(printable(classes[n])) for n in order],
        xticks=(0, 0.5, 1),
    )
    axis.invert_yaxis()
    axis.tick_params(labelsize=8, length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    for n, text in zip(order, axis.get_yticklabels(), strict=True):
        text.set_parse_math(False)  # a name with $ is no formula
        if n in right:
            text.set(fontweight="bold", color=BLUE)


def shortened(name: str) -> str:
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"


main = partial(program, kind=Classification)
