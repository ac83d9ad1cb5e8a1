"""Where does the sound come from? `python -m avfuse.tasks.localize` (paper App. A.2)."""

from ..command import begin, read
from ..training.settings import checked
from .options import LocalizeConfig

if __name__ == "__main__":
    begin("avfuse.tasks.localize", checked(read(LocalizeConfig)), explained=())

from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize

from ..checks import check_choice
from ..data.clips import check_one_frame
from ..data.find import Found
from ..data.scenes import as_found
from ..data.sets.boxed_pictures import test_list
from ..data.sets.flickr_soundnet import is_flickr_soundnet, read_flickr_soundnet
from ..data.sets.folders import SPLITS
from ..data.sets.vggss import is_vggss, read_vggss
from ..data.sounding_shapes.truths import ShapeBoxes
from ..encoder import AVEncoder
from ..pretrained import Pretrained
from ..training.conditions import CONDITIONS
from ..training.judge import to_columns, to_rows
from ..training.loop import program
from ..training.pictures import FRAMES, draw_moments, draw_steps, figure_grid, in_a_row, rgb, save, show_sound
from ..training.starts import first_encoder
from .scenes import (
    SIZE,
    TAUGHT_BY,
    SceneModel,
    SceneTask,
    model_inputs,
    outline,
    resized,
    show_map,
    show_scene,
)

STRIPS = 3  # clips of several frames in a picture
THRESHOLDS = 21  # from 0 to 1, of the curve under which the area is
SUCCESS = 0.5  # a picture counts as localized at this consensus IoU
CURVE, F_SCORES = 200, 10  # SLAVC's thresholds of confidence: about so many
PROTOCOLS = {
    "flickr-soundnet": (
        "Flickr-SoundNet: whole picture squeezed to 224 x 224, threshold at the median of the map, consensus "
        "min(boxes / 2, 1) of the annotators (VGG-SS: the boxes; Sounding Shapes: the box of the sounding "
        "object), ciou = share of pictures with cIoU >= 0.5, auc over 21 thresholds"
    )
}
PROTOCOLS["slavc"] = PROTOCOLS["flickr-soundnet"] + (
    "; SLAVC: these of the pictures with a box, whose ciou is LocAcc; ap and max_f1 of these and of pictures "
    "with the sound of another clip, at cIoU >= 0.5 and by the mean of the highest quarter of the map"
)
BASELINES = {"whole_": "the whole picture", "centre_": "the centre"}  # answers to every picture


# --- model --------------------------------------------------------------------------------------------------


class Localizer(SceneModel, Pretrained):
    """Cosines between the mean audio token and each image token, after a linear layer each (paper App. A.2).

    As a cosine is no logit, a learned scale and offset follow, which do not change the order of the places.
    Each of several frames is compared with the mean of the audio tokens around its time, so that the maps
    tell when as well as where.

    Args:
        encoder: whose tokens are read; trained along.
        dim: width of the space of the cosines.
        modalities: "both", or "image" of the control, which hears no sound.

    Raises:
        ValueError: other modalities.
    """

    home = "avfuse.tasks.localize"

    def __init__(self, encoder: AVEncoder, dim: int = 128, *, modalities: str = "both"):
        super().__init__()
        check_choice("modalities", modalities, TAUGHT_BY)
        self.encoder, self.settings = encoder, dict(dim=dim, modalities=modalities)
        self.image_head = nn.Linear(encoder.dims["image"], dim)
        self.audio_head = nn.Linear(encoder.dims["audio"], dim)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.offset = nn.Parameter(torch.tensor(-3.0))  # most places are silent

    def forward(self, image: Tensor, audio: Tensor, audio_present: Tensor | None = None) -> Tensor:
        """Logits (B, rows, columns) of the patches, of several frames (B, T, rows, columns); arguments as for
        `SceneModel.read`.
        """
        places, sound = self.read(image, audio, audio_present)
        places, sound = normalize(self.image_head(places), dim=-1), normalize(self.audio_head(sound), dim=-1)
        return self.on_grid(self.scale * torch.einsum("...nd,...d->...n", places, sound) + self.offset)

    @torch.no_grad()
    def look(
        self, image: Tensor, audio: Tensor, audio_present: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The same logits and, out of the same pass, where the fusion tokens look in the last fused layer,
        the mean over heads and tokens: of one shape both. The latter is None if there is no fusion, or it
        does not tell.
        """
        encoder, seen = self.encoder, []
        if not encoder.shows_attention:
            return self(image, audio, audio_present), None
        last = encoder.block(encoder.fusion_layers[-1])

        def remember(block, args, kwargs):
            seen.extend(block.attention_weights(*args, **kwargs))

        hook = last.register_forward_pre_hook(remember, with_kwargs=True)
        try:
            logits = self(image, audio, audio_present)
        finally:
            hook.remove()
        return logits, seen[0].mean((1, 2)).view_as(logits)


# --- metrics ------------------------------------------------------------------------------------------------


def consensus_iou(maps: Tensor, truth: Tensor) -> Tensor:
    """cIoU of Flickr-SoundNet (Senocak et al.; threshold of Mo and Morgado): half of every picture is called
    sounding.

    pred is where a map is at or above its median (the upper one: of n values the one with n // 2 below it;
    scaling the map to 0..1 first, as it is done elsewhere, moves nothing across it). Of a truth g, which is
    min(boxes / 2, 1) at each pixel, the score is sum(pred g) / (sum g + sum pred [g = 0]); 0 without any box.

    Args:
        maps: (B, H, W), higher where the sound is thought to come from.
        truth: (B, H, W) in 0..1, of the same size.

    Returns:
        (B,)
    """
    maps, truth = maps.flatten(1), truth.flatten(1).double()
    median = maps.sort(1).values[:, maps.shape[1] // 2, None]
    pred = (maps >= median).double()
    union = truth.sum(1) + (pred * (truth == 0)).sum(1)
    return (pred * truth).sum(1) / union


def success_rate(ciou: Tensor, threshold: float = SUCCESS) -> float:
    """The headline: the share of pictures whose cIoU reaches a threshold. It is SLAVC's LocAcc, too, whose
    program prints the share above the threshold beside: this one is how its AP and earlier papers count.
    """
    return (ciou >= threshold).double().mean().item()


def success_area(ciou: Tensor) -> float:
    """AUC: area under the success rate over 21 thresholds from 0 to 1, by trapezoids."""
    rates = torch.tensor([success_rate(ciou, n / (THRESHOLDS - 1)) for n in range(THRESHOLDS)])
    return torch.trapezoid(rates, dx=1 / (THRESHOLDS - 1)).item()


def pointing(maps: Tensor, truth: Tensor) -> Tensor:
    """Whether the highest point of each map (B, H, W), the first of equals, is where truth > 0: (B,) bool. A
    map that is not finite has none.
    """
    maps = maps.flatten(1)
    is_hit = truth.flatten(1).gather(1, maps.argmax(1, keepdim=True))[:, 0] > 0
    return is_hit & maps.isfinite().all(1)


def best_map(truth: Tensor) -> Tensor:
    """A map that no other beats: as high as the truth, and no two places of equal height, which would all be
    called sounding.
    """
    places = torch.arange(truth[0].numel(), device=truth.device, dtype=torch.float64)
    return truth.double() + places.view_as(truth[0]) / (10 * len(places))


def judge_baselines(truth: Tensor) -> dict[str, Tensor]:
    """What two answers score that look at nothing. The whole picture: every place sounds, and which is the
    highest is left to chance. The centre, the baseline of Arandjelovic and Zisserman (Objects that Sound,
    ECCV 2018): the nearer to it, the higher a place is, and cIoU calls the nearer half sounding, a disc.

    Args:
        truth: (B, H, W) in 0..1.
    """
    rows, columns = (torch.linspace(-1, 1, size, device=truth.device) for size in truth.shape[1:])
    centre = -(rows[:, None] ** 2 + columns**2)[None]
    return dict(
        whole_ciou=consensus_iou(torch.zeros_like(centre), truth),
        whole_pointing=(truth > 0).double().mean((1, 2)),
        centre_ciou=consensus_iou(centre, truth),
        centre_pointing=pointing(centre.expand_as(truth), truth),
    )


def confidence(maps: Tensor) -> Tensor:
    """SLAVC: how sure maps (B, H, W) are that anything sounds, the mean of their highest quarter: (B,)"""
    return maps.flatten(1).topk(-(-maps[0].numel() // 4)).values.mean(1)


def precision_and_recall(
    found: Tensor, confidence: Tensor, boxed: Tensor, thresholds: Tensor
) -> tuple[Tensor, Tensor]:
    """SLAVC (Mo and Morgado, NeurIPS 2022), at each threshold of confidence: the share of the pictures at or
    above it whose source is found; and of these sources and the `boxed` pictures below it the share that is
    found, so that one looked for in the wrong place costs precision alone. Either is 1 where it is 0 / 0.

    Args:
        found, confidence, boxed: (N,), whether cIoU reaches 0.5, how sure the map is, and whether there is a
            box: others have the sound of another clip.
        thresholds: (T,)

    Returns:
        (T,) each
    """
    called = confidence >= thresholds[:, None]
    right, missed = (called & boxed & found).sum(1), (~called & boxed).sum(1)
    return tuple((right.double() / total).nan_to_num(1) for total in (called.sum(1), right + missed))


def average_precision(found: Tensor, confidence: Tensor, boxed: Tensor) -> float:
    """AP of SLAVC: the best precision from each of about 200 thresholds downwards, the second highest
    confidence first, weighted by the recall that the next one adds. Arguments as above.
    """
    thresholds = confidence.sort().values[:-1].flip(0)[:: max(1, len(confidence) // CURVE)]
    precision, recall = precision_and_recall(found, confidence, boxed, thresholds)
    best = precision.flip(0).cummax(0).values.flip(0)
    return (best[:-1] * recall.diff()).sum().item()


def max_f1(found: Tensor, confidence: Tensor, boxed: Tensor) -> float:
    """max-F1 of SLAVC: the highest of about 10 thresholds, each tenth confidence from the lowest on."""
    thresholds = confidence.sort().values[:: max(1, len(confidence) // F_SCORES)]
    precision, recall = precision_and_recall(found, confidence, boxed, thresholds)
    return (2 * precision * recall / (precision + recall)).nan_to_num(0).max().item()


# --- task ---------------------------------------------------------------------------------------------------


class Localization(SceneTask):
    """Trains a `Localizer` by binary cross-entropy per pixel. Each of several frames is judged at its own
    time; metrics are means over all frames of all clips.
    """

    name, shape_truth, truth = "localization", ShapeBoxes, "sounding"
    conditions, headline = tuple(CONDITIONS), ("pointing", "ciou", "auc")

    def __init__(self, config: LocalizeConfig, found: Found):
        super().__init__(config, found)
        self.model = Localizer(first_encoder(config), config.dim, modalities=config.modalities)
        self.protocol, frames = PROTOCOLS[config.protocol], self.model.encoder.frames
        if config.protocol == "slavc":
            self.headline += ("ap", "max_f1")
            if not any(getattr(scene.moments[0].truth, "boxes", ()) for scene in found.test):
                raise ValueError(
                    "--protocol slavc takes boxes of Flickr-SoundNet or VGG-SS: give their --data"
                )
        if not all(scene.frames for scene in (*found.train, *found.test)):
            check_one_frame(frames, "Flickr-SoundNet and VGG-SS, of which single pictures are annotated")
        if frames > 1:
            self.protocol += f"; {frames} frames of each clip, each at its own time"
        if config.modalities == "image":
            self.name = "localization without sound (control)"

    @staticmethod
    def find_annotated(root, config, say):
        if is_vggss(root):
            name, kind, read_pictures = "VGG-SS", "vggss", read_vggss
        elif is_flickr_soundnet(root):
            name, kind, read_pictures = "Flickr-SoundNet", "flickr", read_flickr_soundnet
        else:
            raise ValueError(
                f"--data {root} is neither Sounding Shapes nor Flickr-SoundNet (frames, audio, Annotations) "
                "nor VGG-SS (frames, audio, vggss.json)"
            )
        options = dict(test_share=config.test_share, negatives=config.protocol == "slavc")
        train, test = (read_pictures(root, split, **options) for split in SPLITS)
        share = path.name if (path := test_list(root, kind)) else f"{config.test_share:g}"
        found = as_found(train, test, f"pictures, {share} of {name}", say)
        return found if config.epochs else found._replace(train=found.test)  # none are trained on

    def counts(self, inputs):
        return dict(map_loss=int(inputs["clips"]) * inputs["sounding"][0].numel())

    def losses(self, model, inputs):
        maps = resized(model(**model_inputs(inputs)), inputs["sounding"].shape[-2:])
        return dict(map_loss=binary_cross_entropy_with_logits(maps, inputs["sounding"].to(maps.dtype)))

    def judge(self, model, inputs, batch):
        """Of each clip, what is true of its picture, (), or of its frames, (T,)."""
        lead, truth = inputs["sounding"].shape[:-2], inputs["sounding"].flatten(0, -3)
        columns = dict(best=consensus_iou(best_map(truth), truth), area=(truth > 0).double().mean((1, 2)))
        columns |= judge_baselines(truth)
        if self.config.protocol == "slavc":
            boxes = [self.found.test[n].moments[0].truth.boxes for n in batch["index"].tolist()]
            columns["boxed"] = torch.tensor([len(of) > 0 for of in boxes], device=truth.device)
        for prefix, maps in self.maps(model, inputs).items():
            maps = resized(maps, (SIZE, SIZE)).flatten(0, -3)
            columns[f"{prefix}ciou"] = consensus_iou(maps, truth)
            columns[f"{prefix}pointing"] = pointing(maps, truth)
            if "boxed" in columns:
                columns[f"{prefix}confidence"] = confidence(maps)
        return to_rows({name: column.unflatten(0, lead) for name, column in columns.items()})

    def maps(self, model, inputs) -> dict[str, Tensor]:
        """What is scored, (B, rows, columns) or (B, T, rows, columns) each, by the prefix of its metrics."""
        maps = zip(("", "attention_"), model.look(**model_inputs(inputs)), strict=True)
        return {prefix: shown for prefix, shown in maps if shown is not None}

    def summarize(self, rows):
        columns, metrics = to_columns(rows), {}
        if (boxed := columns.get("boxed")) is not None:
            for prefix in "", "attention_":
                if f"{prefix}confidence" in columns:
                    found = columns[f"{prefix}ciou"] >= SUCCESS, columns[f"{prefix}confidence"], boxed
                    metrics[f"{prefix}ap"] = average_precision(*found)
                    metrics[f"{prefix}max_f1"] = max_f1(*found)
            columns = {name: column[boxed] for name, column in columns.items()}
        for prefix in ("", "attention_", *BASELINES):
            if f"{prefix}ciou" in columns:
                ciou = columns[f"{prefix}ciou"].double()
                metrics[f"{prefix}pointing"] = columns[f"{prefix}pointing"].double().mean().item()
                metrics[f"{prefix}ciou"] = success_rate(ciou)
                metrics[f"{prefix}auc"] = success_area(ciou)
        return metrics | dict(
            pointing_chance=columns["area"].mean().item(),  # of a place drawn at random
            best_possible_auc=success_area(columns["best"].double()),
        )

    def tables(self, metrics):
        answers = {
            title: {name: metrics.get(f"{prefix}{name}") for name in self.headline}
            for prefix, title in (TITLES | BASELINES).items()
            if f"{prefix}ciou" in metrics
        }
        answers["a random place"] = dict(pointing=metrics["pointing_chance"])
        answers["best possible"] = dict(auc=metrics["best_possible_auc"])
        rows = [(title, *map(of.get, self.headline)) for title, of in answers.items()]
        return [[(self.heading, *self.headline), *rows]]

    def doubt(self, metrics):
        hits, chance = metrics["pointing"], metrics["pointing_chance"]
        return f"pointing {hits:.3f} is no better than a random place, {chance:.3f}" if hits <= chance else ""

    def draw(self, folder, model, inputs, batch, step):
        drawn = draw_maps if model.encoder.frames == 1 else draw_strips
        drawn(inputs, self.maps(model, inputs), model.encoder, folder / f"localization-{step:06d}.png")


# --- pictures -----------------------------------------------------------------------------------------------

TITLES = {"": "cosine map", "attention_": "fusion attention"}
CURVES = {"": "how likely its highest place sounds", "attention_": "its share at each time; 1: an even one"}


def draw_maps(inputs: dict[str, Tensor], maps: dict[str, Tensor], encoder: AVEncoder, path: Path) -> None:
    """Frames with the outline of what sounds, each map over its frame, and the sound; a cross marks the
    highest point of a map, white on the source and red beside it.
    """
    titles = ("frame", *map(TITLES.get, maps))
    figure, grid = figure_grid(len(inputs["image"]), titles, ("sound",))
    over = [resized(shown, (SIZE, SIZE)).cpu() for shown in maps.values()]
    for row, axes in enumerate(grid):
        truth = inputs["sounding"][row].cpu()
        frame = show_scene(axes, inputs, row, truth, encoder.inputs)
        for axis, shown in zip(axes[1:-1], over, strict=True):
            lay_over(axis, shown[row], truth, frame)
    save(figure, path)


def draw_strips(inputs: dict[str, Tensor], maps: dict[str, Tensor], encoder: AVEncoder, path: Path) -> None:
    """The same of several frames in a row, and below each map a curve over time: which moment binds."""
    titles = ["frames", *(kind[prefix] for prefix in maps for kind in (TITLES, CURVES)), "sound"]
    clips, settings = min(STRIPS, len(inputs["image"])), encoder.inputs
    in_row = min(FRAMES, inputs["image"].shape[1])
    figure, grid = figure_grid(clips * len(titles), ("",), (), in_row)
    figure.set_figheight(1.15 * figure.get_figheight())  # so that titles do not make strips narrower
    for axis, title in zip(grid.flat, titles * clips, strict=True):
        axis.set_title(title, fontsize=10)
    for clip, (first, *axes, last) in enumerate(grid.reshape(clips, -1)):
        frame = rgb(inputs["image"][clip].cpu(), settings).numpy()
        truth = in_a_row(inputs["sounding"][clip].cpu())
        show_map(first, frame, frame, in_row)
        outline(first, truth)
        for (prefix, shown), axis, curve in zip(maps.items(), axes[::2], axes[1::2], strict=True):
            show_map(axis, frame.mean(-1), frame, in_row, cmap="gray", vmin=0, vmax=1.3)
            lay_over(axis, in_a_row(resized(shown[clip], (SIZE, SIZE))).cpu(), truth, frame)
            if prefix == "attention_":
                draw_moments(curve, encoder, shown[clip].sum((1, 2)))
            else:
                draw_steps(curve, shown[clip].sigmoid().amax((1, 2)), settings.audio_seconds, highest=1)
        show_sound(last, inputs["audio"][clip, 0])
    save(figure, path)


def lay_over(axis: Axes, map_: Tensor, truth: Tensor, frame: np.ndarray) -> None:
    """A map over its frame, (SIZE, SIZE), or the maps of several in a row, with the outline of what sounds
    and a cross at the highest point of each.
    """
    show_map(axis, map_, frame, map_.shape[1] // SIZE, cmap="inferno", alpha=0.65)
    outline(axis, truth)
    for n, (shown, there) in enumerate(zip(map_.split(SIZE, 1), truth.split(SIZE, 1), strict=True)):
        y, x = divmod(int(shown.flatten().argmax()), SIZE)
        colour = "w" if there[y, x] > 0 else "r"
        axis.plot(n * SIZE + x + 0.5, y + 0.5, "x", ms=9, mew=2.5, color=colour)


main = partial(program, kind=Localization)
