"""Which pixels make the sound, and what they show: `python -m avfuse.tasks.segment` (paper App. A.2)."""

from ..command import begin, read
from ..training.settings import checked
from .options import SegmentConfig

if __name__ == "__main__":
    begin("avfuse.tasks.segment", checked(read(SegmentConfig)), explained=())

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.patches import Patch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, interpolate

from ..checks import check_choice
from ..data.clips import check_one_frame
from ..data.find import Found
from ..data.scenes import as_found
from ..data.sets import avsbench
from ..data.sets.folders import SPLITS
from ..data.sounding_shapes.truths import ShapeMasks
from ..encoder import AVEncoder
from ..inputs import InputSettings
from ..pretrained import Pretrained
from ..training.conditions import CONDITIONS
from ..training.judge import to_columns, to_rows
from ..training.loop import program
from ..training.pictures import figure_grid, save
from ..training.starts import first_encoder
from .model import named
from .scenes import SIZE, TAUGHT_BY, SceneModel, SceneTask, model_inputs, outline, show_map, show_scene

BETA_SQUARED = 0.3  # of the F score: precision counts for more than recall
LEAST = 0.01  # IoU that is worth a word
THRESHOLDS = {"avsbench": 255, "deepavfusion": 256}  # of the F curve, from 0 to 1
SILENCE = 3.0  # logit from which the background starts: most pixels are silent
FRAME = {"avsbench": "whole", "deepavfusion": "central"}  # what the protocols show of a picture
METRICS = {
    ("binary", "avsbench"): (
        "mean IoU of sounding pixels at 0.5 (of silent ones where nothing sounds); maximum of the mean F "
        "curve, beta^2 = 0.3, 255 thresholds; video_f_score as its test program has it, mean over videos of "
        "the maximum of each, 0 where nothing sounds"
    ),
    ("binary", "deepavfusion"): (
        "mean IoU of sounding and of silent pixels at 0.5, averaged; mean of the maximum F of each picture, "
        "beta^2 = 0.3, 256 thresholds; without pictures in which nothing sounds"
    ),
    ("semantic", "avsbench"): (
        "IoU and F (beta^2 = 0.3) of a class averaged over the pictures that have it in truth or prediction, "
        "mean over {classes} classes with background"
    ),
}


# --- model --------------------------------------------------------------------------------------------------


class Segmenter(SceneModel, Pretrained):
    """Image tokens, each joined with the mean audio token, and three up-convolutions (paper App. A.2).

    Args:
        encoder: whose tokens are read; trained along.
        outputs: logits at each pixel, 1 for a mask.
        dim: width of the decoder after its first block.
        class_names: what the outputs are called, the background first; None = not told.
        modalities: "both", or "image" of the control, which hears no sound.

    Raises:
        ValueError: there are not as many names as outputs, or other modalities.
    """

    home = "avfuse.tasks.segment"
    former = {"predict": "last"}

    def __init__(
        self,
        encoder: AVEncoder,
        outputs: int = 1,
        dim: int = 64,
        *,
        class_names: Sequence[str] | None = None,
        modalities: str = "both",
    ):
        super().__init__()
        check_choice("modalities", modalities, TAUGHT_BY)
        check_one_frame(encoder.frames, "segmentation")
        self.encoder, self.class_names = encoder, named(class_names, outputs)
        self.settings = dict(outputs=outputs, dim=dim, class_names=self.class_names, modalities=modalities)
        self.join = nn.Linear(encoder.dims["image"] + encoder.dims["audio"], 2 * dim)
        self.decoder = nn.Sequential(
            up_convolution(2 * dim, dim), up_convolution(dim, dim), up_convolution(dim, dim // 2)
        )
        self.last = nn.Conv2d(dim // 2, outputs, kernel_size=1)
        nn.init.zeros_(self.last.bias)
        nn.init.constant_(self.last.bias[:1], SILENCE if outputs > 1 else -SILENCE)

    def forward(self, image: Tensor, audio: Tensor, audio_present: Tensor | None = None) -> Tensor:
        """Logits (B, outputs, height, width); arguments as for `SceneModel.read`."""
        places, sound = self.read(image, audio, audio_present)
        joined = self.join(torch.cat([places, sound[:, None].expand(-1, places.shape[1], -1)], dim=-1))
        joined = self.on_grid(joined.transpose(1, 2))
        logits = self.last(self.decoder(joined))  # 8 times as wide and high as the grid
        return interpolate(logits, size=image.shape[-2:], mode="bilinear")

    def _load_from_state_dict(self, state_dict, prefix, *args):
        before, now = f"{prefix}predict.", f"{prefix}last."  # in checkpoints of older runs, and today
        for name in [name for name in state_dict if name.startswith(before)]:
            state_dict[now + name.removeprefix(before)] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def sounding(self, logits):
        return logits[:, 0].sigmoid() if logits.shape[1] == 1 else 1 - logits.softmax(1)[:, 0]


def up_convolution(inputs: int, outputs: int) -> nn.Sequential:
    """Twice as wide and high: (B, inputs, H, W) -> (B, outputs, 2 H, 2 W)"""
    return nn.Sequential(
        nn.ConvTranspose2d(inputs, outputs, kernel_size=2, stride=2),
        nn.GroupNorm(1, outputs),
        nn.GELU(),
        nn.Conv2d(outputs, outputs, kernel_size=3, padding=1),
        nn.GELU(),
    )


# --- metrics ------------------------------------------------------------------------------------------------


def avsbench_iou(prob: Tensor, truth: Tensor) -> Tensor:
    """Protocol `avsbench` (Zhou et al.): IoU of what is above 0.5 with the sounding pixels. Where nothing
    sounds it is the share of pixels that are rightly called silent.

    Args:
        prob: (B, H, W) in 0..1.
        truth: (B, H, W) bool.

    Returns:
        (B,), of which the mean over all pictures is reported.
    """
    pred, truth = (prob > 0.5).flatten(1), truth.flatten(1)
    iou = (pred & truth).sum(1) / (pred | truth).sum(1).clamp(min=1)
    return torch.where(truth.any(1), iou, (~pred).double().mean(1).to(iou.dtype))


def both_iou(prob: Tensor, truth: Tensor) -> Tensor:
    """Protocol `deepavfusion` (its released program): IoU of the silent and of the sounding pixels. NaN is
    one that neither the truth nor the prediction has, and a picture in which nothing sounds.

    Arguments as for `avsbench_iou`.

    Returns:
        (B, 2), of which the mean over all pictures is taken, and that of both is reported.
    """
    iou, _, seen = class_scores((prob > 0.5).long(), truth.long(), 2)
    return iou.where(seen & truth.flatten(1).any(1, keepdim=True), torch.nan)


def f_curve(prob: Tensor, truth: Tensor, protocol: str) -> Tensor:
    """F = (1 + b) P R / (b P + R) with b = 0.3, of what is at or above each of the T thresholds of a protocol
    from 0 to 1; 0 where it is undefined, and NaN for a picture in which nothing sounds.

    `avsbench` averages these curves over the pictures in which something sounds, and reports the highest
    point of the mean; `deepavfusion` takes the highest point of each picture, and reports the mean of these.

    Arguments as for `avsbench_iou`; the result is (B, T) float64.
    """
    prob, truth, count = prob.flatten(1), truth.flatten(1), THRESHOLDS[protocol]
    thresholds = torch.linspace(0, 1, count, device=prob.device, dtype=prob.dtype)
    reached = torch.bucketize(prob, thresholds, right=True)  # how many thresholds a pixel is at or above
    at_least = [  # (B, T): pixels, and sounding pixels, at or above each
        counted_by(reached, weight.double(), count + 1).flip(1).cumsum(1).flip(1)[:, 1:]
        for weight in (torch.ones_like(truth), truth)
    ]
    called, right = at_least
    precision, recall = right / called.clamp(min=1), right / truth.sum(1, keepdim=True)
    f = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
    return torch.where(truth.any(1, keepdim=True), f.nan_to_num(0), torch.nan)


def counted_by(group: Tensor, weight: Tensor, groups: int) -> Tensor:
    """The sum of weights (B, N) in each group 0..groups - 1 (B, N): (B, groups)"""
    return weight.new_zeros(len(group), groups).scatter_add_(1, group, weight)


def highest_of_mean(curves: Tensor) -> float:
    """F of protocol `avsbench` from curves (N, T); 0 if nothing sounds anywhere."""
    curves = curves[~curves.isnan().any(1)]
    return curves.mean(0).max().item() if len(curves) else 0.0


def mean_over_videos(curves: Tensor, videos: Tensor) -> float:
    """F as AVSBench's test program has it, which takes the highest point of the mean curve of each batch, a
    video (N,) by number, and averages these; a video in which nothing sounds counts 0.
    """
    scores = [highest_of_mean(curves[videos == video]) for video in videos.unique()]
    return sum(scores) / len(scores)


def mean_of_highest(curves: Tensor) -> float:
    """F of protocol `deepavfusion` from curves (N, T); 0 if nothing sounds anywhere."""
    curves = curves[~curves.isnan().any(1)]
    return curves.max(1).values.mean().item() if len(curves) else 0.0


def mean_iou(iou: Tensor) -> float:
    """The mean over pictures (N,), or that of both kinds of pixels over pictures (N, 2), of what counts."""
    return iou.double().nanmean(0).nanmean().nan_to_num(0).item()


def class_scores(pred: Tensor, truth: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Protocol `avsbench` for AVSS (Zhou et al.): IoU and F (b = 0.3) of each class in each picture.

    Args:
        pred, truth: (B, H, W) long, in 0..classes - 1; 0 is the background, which is a class like others.

    Returns:
        IoU, F (0 where undefined) and whether the picture or the prediction has the class: (B, classes) each.
        `class_mean` makes one number of them.
    """
    both = (truth * classes + pred).flatten(1)
    pixels = counted_by(both, torch.ones_like(both, dtype=torch.float64), classes**2)
    pixels = pixels.unflatten(1, (classes, classes))  # (B, true class, predicted class)
    common, called, there = pixels.diagonal(dim1=1, dim2=2), pixels.sum(1), pixels.sum(2)
    union = called + there - common
    precision, recall = common / called, common / there
    f = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
    return common / union.clamp(min=1), f.nan_to_num(0), union > 0


def class_mean(scores: Tensor, seen: Tensor) -> float:
    """Scores (N, classes): the sum of each class over all pictures, divided by the number of pictures that
    have it; the mean of that over all classes, of which one that no picture has counts 0.
    """
    return (scores.sum(0) / seen.sum(0).clamp(min=1)).mean().item()


# --- task ---------------------------------------------------------------------------------------------------


class Segmentation(SceneTask):
    """Trains a `Segmenter` by cross-entropy at every pixel."""

    shape_truth, truth = ShapeMasks, "classes"
    conditions, headline = tuple(CONDITIONS), ("miou", "f_score", "miou_without_background")

    def __init__(self, config: SegmentConfig, found: Found):
        super().__init__(config, found)
        self.semantic, self.frame = config.target == "semantic", FRAME[config.protocol]
        (self.classes,) = found.classes.values()
        names = self.classes if self.semantic else None
        outputs = len(self.classes) if self.semantic else 1
        options = dict(class_names=names, modalities=config.modalities)
        self.model = Segmenter(first_encoder(config), outputs, config.dim, **options)
        control = " without sound (control)" if config.modalities == "image" else ""
        self.name = f"{config.target} segmentation{control}"
        first: dict[Path, int] = {}  # a picture's video, by the number of its first picture
        self.videos = {n: first.setdefault(scene.path, n) for n, scene in enumerate(found.test)}
        metrics = METRICS[config.target, config.protocol].format(classes=len(self.classes))
        self.protocol = f"{config.protocol}: {self.frame} picture, {SIZE} x {SIZE}, {metrics}"

    @staticmethod
    def find_annotated(root, config, say):
        if not avsbench.is_avsbench(root):
            raise ValueError(
                f"--data {root} is neither Sounding Shapes nor AVSBench (metadata.csv, label2idx.json)"
            )
        train, test = (avsbench.read_avsbench(root, split, config.subset) for split in SPLITS)
        classes = avsbench.read_classes(root)
        return as_found(train, test, f"pictures of AVSBench {config.subset} test", say, object=classes)

    def counts(self, inputs):
        return dict(mask_loss=int(inputs["clips"]) * inputs["classes"][0].numel())

    def losses(self, model, inputs):
        logits, classes = model(**model_inputs(inputs)), inputs["classes"]
        if self.semantic:
            return dict(mask_loss=cross_entropy(logits, classes))
        return dict(mask_loss=binary_cross_entropy_with_logits(logits[:, 0], (classes > 0).to(logits.dtype)))

    def predictions(self, model, inputs) -> Tensor:
        """Probabilities at the size of the protocol: (B, 224, 224) of sounding, or (B, classes, 224, 224)."""
        logits = interpolate(model(**model_inputs(inputs)).float(), size=(SIZE, SIZE), mode="bilinear")
        return logits.softmax(1) if self.semantic else logits[:, 0].sigmoid()

    def judge(self, model, inputs, batch):
        prob, classes = self.predictions(model, inputs), inputs["classes"]
        if self.semantic:
            iou, f, seen = class_scores(prob.argmax(1), classes, len(self.classes))
            columns = dict(iou=iou, f=f, seen=seen)
        else:
            protocol = self.config.protocol
            iou, truth = avsbench_iou if protocol == "avsbench" else both_iou, classes > 0
            columns = dict(iou=iou(prob, truth), f=f_curve(prob, truth, protocol))
            columns |= dict(everywhere=iou(torch.ones_like(prob), truth))
            columns |= dict(nowhere=iou(torch.zeros_like(prob), truth))
            columns |= dict(video=torch.tensor([self.videos.get(n, n) for n in batch["index"].tolist()]))
        return to_rows(columns)

    def summarize(self, rows):
        columns = to_columns(rows)
        if not self.semantic:
            is_official, curves = self.config.protocol == "avsbench", columns["f"]
            metrics = dict(
                miou=mean_iou(columns["iou"]),
                f_score=highest_of_mean(curves) if is_official else mean_of_highest(curves),
                miou_everywhere=mean_iou(columns["everywhere"]),  # of calling all sounding
                miou_nowhere=mean_iou(columns["nowhere"]),  # and silent
            )
            if is_official:
                metrics["video_f_score"] = mean_over_videos(curves, columns["video"])
            return metrics
        iou, f, seen = columns["iou"], columns["f"], columns["seen"]
        return dict(
            miou=class_mean(iou, seen),
            f_score=class_mean(f, seen),
            miou_without_background=class_mean(iou[:, 1:], seen[:, 1:]),
        )

    def tables(self, metrics):
        rows = [(self.heading, "mIoU", "F"), ("model", metrics["miou"], metrics["f_score"])]
        if self.semantic:
            rows += [("without background", metrics["miou_without_background"], None)]
        else:
            rows += [("all called sounding", metrics["miou_everywhere"], None)]
            rows += [("all called silent", metrics["miou_nowhere"], None)]
            if "video_f_score" in metrics:
                rows += [("mean over videos", None, metrics["video_f_score"])]
        return [rows]

    def doubt(self, metrics):
        if self.semantic:
            iou = metrics["miou_without_background"]
            return "" if iou > LEAST else f"mIoU {iou:.3f} without background: hardly any class is found"
        guesses = dict(sounding=metrics["miou_everywhere"], silent=metrics["miou_nowhere"])
        best, iou = max(guesses, key=guesses.get), metrics["miou"]
        said = f"mIoU {iou:.3f} is no better than to call all of a picture {best}, {guesses[best]:.3f}"
        return said if iou <= guesses[best] else ""

    def draw(self, folder, model, inputs, batch, step):
        prob = self.predictions(model, inputs).cpu()
        path, settings = folder / f"segmentation-{step:06d}.png", model.encoder.inputs
        if self.semantic:
            draw_classes(inputs, prob.argmax(1), self.classes, settings, path)
        else:
            draw_masks(inputs, prob, settings, path)


# --- pictures -----------------------------------------------------------------------------------------------

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")  # Okabe-Ito
MASK = "#E69F00"


def draw_masks(inputs: dict[str, Tensor], prob: Tensor, settings: InputSettings, path: Path) -> None:
    """Frames with the outline of what sounds, the probability that it does, the mask, and the sound."""
    figure, grid = figure_grid(len(prob), ("frame and truth", "probability", "mask"), ("sound",))
    for row, axes in enumerate(grid):
        truth = inputs["classes"][row].cpu()
        frame = show_scene(axes, inputs, row, truth, settings)
        show_map(axes[1], prob[row], frame, cmap="inferno", vmin=0, vmax=1)
        mask = (prob[row] > 0.5).float()
        show_map(axes[2], mask, frame, cmap=ListedColormap([MASK]), alpha=0.65 * mask)
        for axis in axes[1:3]:
            outline(axis, truth)
    save(figure, path)


def draw_classes(
    inputs: dict[str, Tensor], pred: Tensor, classes: Sequence[str], settings: InputSettings, path: Path
) -> None:
    """Frames, true classes and predicted ones over them, and the sound."""
    figure, grid = figure_grid(len(pred), ("frame", "truth", "prediction"), ("sound",))
    shown = set()
    for row, axes in enumerate(grid):
        truth = inputs["classes"][row].cpu()
        frame = show_scene(axes, inputs, row, truth, settings)
        for axis, labels in zip(axes[1:3], (truth, pred[row]), strict=True):
            for label in set(labels.unique().tolist()) - {0}:
                here = (labels == label).float()
                show_map(axis, here, frame, cmap=ListedColormap([colour(label)]), alpha=0.75 * here)
                shown.add(label)
        outline(axes[2], truth)
    keys = [Patch(color=colour(label), label=classes[label]) for label in sorted(shown)]
    figure.legend(handles=keys, loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    save(figure, path)


def colour(label: int) -> tuple[float, ...]:
    """Of a class, 1 or more: hues that colour-blind readers tell apart, darker each time they are used up."""
    shade, hue = divmod(label - 1, len(COLOURS))
    return tuple(level / (1 + shade / 2) for level in to_rgb(COLOURS[hue]))


main = partial(program, kind=Segmentation)
