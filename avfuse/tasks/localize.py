"""Where does the sound come from? `python -m avfuse.tasks.localize` (paper App. A.2)."""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate, normalize

from ..checks import check_count
from ..data import sounding_shapes
from ..data.find import DEMO, Found
from ..data.scenes import SceneDataset, as_found, middle_moments
from ..data.sets.flickr_soundnet import is_flickr_soundnet, read_flickr_soundnet
from ..data.sounding_shapes.truths import ShapeBoxes, sounding_shapes_scenes
from ..encoder import AVEncoder
from ..training.judge import JudgedTask, TaskConfig, starting_encoder
from ..training.loop import program
from ..training.pictures import rgb, save, show_sound
from ..vit import presence_mask, split_prefix

SIZE = 224  # pixels at which the protocol compares
THRESHOLDS = 21  # from 0 to 1, of the curve under which the area is
SUCCESS = 0.5  # a picture counts as localized at this consensus IoU


@dataclass(kw_only=True)
class LocalizeConfig(TaskConfig):
    """Localize sound sources: a map of cosines between the sound and each place of the picture.

    Without arguments it trains on Sounding Shapes, the embedded data set, in which one of three objects
    sounds. With --data it takes Flickr-SoundNet (folders frames, audio, Annotations). --modalities image
    trains the control, which never hears the sound: what is above it, the sound has told.

    `ciou` and `auc` follow the protocol of Flickr-SoundNet, see `consensus_iou`. It calls half of every
    picture sounding, which no box of Sounding Shapes comes near: there, look at `pointing`, the share of
    pictures whose highest point lies in a box, which a guess among the three objects brings to a third.
    Those that begin with `attention` are of the map that needs no labels: where the fusion tokens look.

    Known limit: from the 256 clips of the demo the tiny model learns where objects are, but not which of them
    sounds. It fits them better than the control does, and stays at the control on held-out ones. From 2,048
    clips and the encoder of a segmenter it does learn it: docs/tasks.md.
    """

    data: Path | None = None
    """Flickr-SoundNet or Sounding Shapes. Default: the latter, built once."""
    run: Annotated[Path, tyro.conf.arg(name="run-dir")] = Path("runs/localize")
    """Run folder: config, metrics, checkpoints, pictures, results.json, report, final model."""
    modalities: Literal["both", "image"] = "both"
    """What the model gets: "image" is the control, to which every sound is silence."""
    test_share: float = 0.5
    """Share of the pictures of Flickr-SoundNet to test on; the names decide which."""
    dim: int = 128
    """Width of the space in which sound and places are compared."""

    epochs: int = 32
    """Passes over the clips; the paper's are 30."""
    warmup_epochs: int = 3
    """Epochs of linear warm-up before the cosine decay; the paper names none."""
    batch_size: int = 8
    """Clips per step; the paper's are 128."""
    base_lr: float = 1.6e-2
    """Learning rate per 256 clips: lr = base_lr * batch / 256. The paper's is 1e-4 for its batch of 128,
    which is 2e-4 here; a tiny model on a small set wants a larger one."""
    checkpoint_every: int = 320
    """Steps between checkpoints; there always is one at the end."""

    def __post_init__(self):
        super().__post_init__()
        check_count("dim", self.dim)
        if not 0 < self.test_share < 1:
            raise ValueError(f"--test-share must be between 0 and 1, got {self.test_share}")


# --- data ---------------------------------------------------------------------------------------------------


def find_scenes(folder: Path | None, say=print, *, test_share: float = 0.5, **_) -> Found:
    """Flickr-SoundNet, or Sounding Shapes, which is built first where no folder is given.

    Raises:
        ValueError: the folder is neither.
    """
    root = sounding_shapes.generate(DEMO) if folder is None else folder
    if sounding_shapes.is_built(root):
        train, test = (sounding_shapes_scenes(root, split, ShapeBoxes) for split in ("train", "test"))
        return as_found(train, middle_moments(test), "held-out clips", say)
    if is_flickr_soundnet(root):
        train, test = (
            read_flickr_soundnet(root, split, test_share=test_share) for split in ("train", "test")
        )
        return as_found(train, test, f"pictures, {test_share:g} of Flickr-SoundNet", say)
    raise ValueError(
        f"--data {root} is neither Sounding Shapes nor Flickr-SoundNet (frames, audio, Annotations)"
    )


# --- model --------------------------------------------------------------------------------------------------


class Localizer(nn.Module):
    """Cosines between the mean audio token and each image token, after a linear layer each (paper App. A.2).

    As a cosine is no logit, a learned scale and offset follow, which do not change the order of the places.

    Args:
        encoder: whose tokens are read; trained along.
        dim: width of the space of the cosines.
    """

    def __init__(self, encoder: AVEncoder, dim: int = 128):
        super().__init__()
        self.encoder = encoder
        self.image_head = nn.Linear(encoder.embed_dim, dim)
        self.audio_head = nn.Linear(encoder.embed_dim, dim)
        self.scale = nn.Parameter(torch.tensor(10.0))
        self.offset = nn.Parameter(torch.tensor(-3.0))  # most places are silent

    def forward(self, image: Tensor, audio: Tensor, audio_present: Tensor | None = None) -> Tensor:
        """Logits (B, rows, columns) of the patches, from images (B, 3, height, width), spectrograms
        (B, 1, mel, time), and which of the latter are there (B,) bool, None = all.
        """
        mask = presence_mask(self.encoder.audio, audio_present)
        tokens = self.encoder(image, audio, audio_mask=mask)
        places = normalize(self.image_head(split_prefix(self.encoder.image, tokens.image)[1]), dim=-1)
        sound = normalize(self.audio_head(split_prefix(self.encoder.audio, tokens.audio)[1].mean(1)), dim=-1)
        cosines = torch.einsum("bnd,bd->bn", places, sound)
        return (self.scale * cosines + self.offset).unflatten(1, self.encoder.image.patch_embed.grid_size)


@torch.no_grad()
def attention_map(
    encoder: AVEncoder, image: Tensor, audio: Tensor, audio_present: Tensor | None = None
) -> Tensor | None:
    """Where the fusion tokens look in the last fused layer, the mean over heads and tokens: (B, rows,
    columns). None if there is no fusion, or it does not tell.
    """
    if not encoder.fusion_layers or not hasattr(
        encoder.fusion_blocks[str(encoder.fusion_layers[-1])], "attention_weights"
    ):
        return None
    mask = presence_mask(encoder.audio, audio_present)
    weights = encoder.fusion_attention(image, audio, audio_mask=mask)[0]
    return weights.mean((1, 2)).unflatten(1, encoder.image.patch_embed.grid_size)


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
    """The headline: the share of pictures whose cIoU reaches a threshold."""
    return (ciou >= threshold).double().mean().item()


def success_area(ciou: Tensor) -> float:
    """AUC: area under the success rate over 21 thresholds from 0 to 1, by trapezoids."""
    rates = torch.tensor([success_rate(ciou, n / (THRESHOLDS - 1)) for n in range(THRESHOLDS)])
    return torch.trapezoid(rates, dx=1 / (THRESHOLDS - 1)).item()


def pointing(maps: Tensor, truth: Tensor) -> Tensor:
    """Whether the highest point of each map (B, H, W), the first of equals, is where truth > 0: (B,) bool"""
    return truth.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))[:, 0] > 0


def best_map(truth: Tensor) -> Tensor:
    """A map that no other beats: as high as the truth, and no two places of equal height, which would all be
    called sounding.
    """
    places = torch.arange(truth[0].numel(), device=truth.device, dtype=torch.float64)
    return truth.double() + places.view_as(truth[0]) / (10 * len(places))


def resized(maps: Tensor, size: int) -> Tensor:
    """(B, rows, columns) -> (B, size, size), bilinear"""
    return interpolate(maps[:, None].float(), size=(size, size), mode="bilinear")[:, 0]


# --- task ---------------------------------------------------------------------------------------------------


class Localization(JudgedTask):
    """Trains a `Localizer` by binary cross-entropy per pixel."""

    name = "localization"
    protocol = (
        "Flickr-SoundNet: whole picture squeezed to 224 x 224, threshold at the median of the map, consensus "
        "min(boxes / 2, 1) of the annotators (Sounding Shapes: the box of the sounding object), ciou = share "
        "of pictures with cIoU >= 0.5, auc over 21 thresholds"
    )

    def __init__(self, config: LocalizeConfig, found: Found):
        super().__init__(config, found)
        self.options = dict(dim=config.dim)
        self.model = Localizer(starting_encoder(config), **self.options)
        if config.modalities == "image":
            self.name = "localization without sound (control)"

    def dataset(self, clips, *, train):
        size = None if train else SIZE
        return SceneDataset(
            clips, self.model.encoder.inputs, train=train, seed=self.config.seed, size=size, frame="whole"
        )

    def inputs(self, batch):
        return scene_inputs(self.model.encoder, batch, "sounding", self.config.modalities)

    def counts(self, inputs):
        return dict(map_loss=int(inputs["clips"]) * inputs["sounding"][0].numel())

    def losses(self, model, inputs):
        maps = resized(model(**model_inputs(inputs)), inputs["sounding"].shape[-1])
        return dict(map_loss=binary_cross_entropy_with_logits(maps, inputs["sounding"].to(maps.dtype)))

    def judge(self, model, inputs, batch):
        truth = inputs["sounding"]
        columns = dict(best=consensus_iou(best_map(truth), truth))
        for prefix, maps in self.maps(model, inputs).items():
            columns[f"{prefix}ciou"] = consensus_iou(maps, truth)
            columns[f"{prefix}pointing"] = pointing(maps, truth)
        values = [column.tolist() for column in columns.values()]
        return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]

    def maps(self, model, inputs) -> dict[str, Tensor]:
        """What is scored, (B, 224, 224) each, by the prefix of its metrics."""
        given = model_inputs(inputs)
        attention = attention_map(model.encoder, **given)
        maps = {"": model(**given)} | ({} if attention is None else {"attention_": attention})
        return {prefix: resized(map, SIZE) for prefix, map in maps.items()}

    def summarize(self, rows):
        metrics = {}
        for prefix in ("", "attention_"):
            if f"{prefix}ciou" in rows[0]:
                ciou = torch.tensor([row[f"{prefix}ciou"] for row in rows], dtype=torch.float64)
                hits = [row[f"{prefix}pointing"] for row in rows]
                metrics[f"{prefix}pointing"] = sum(hits) / len(hits)
                metrics[f"{prefix}ciou"] = success_rate(ciou)
                metrics[f"{prefix}auc"] = success_area(ciou)
        best = torch.tensor([row["best"] for row in rows], dtype=torch.float64)
        return metrics | dict(best_possible_auc=success_area(best))

    def draw(self, folder, model, inputs, batch, step):
        maps = self.maps(model, inputs)
        draw_maps(inputs, maps, model.encoder.inputs, folder / f"localization-{step:06d}.png")


def scene_inputs(encoder: AVEncoder, batch: dict, truth: str, modalities: str) -> dict[str, Tensor]:
    """What a model of scenes is called with, silence for the control ("image"); the truth of that name; and
    how many clips there are: 0 where the batch holds a blank.
    """
    inputs = {name: batch[name] for name in ("image", "audio", truth)}
    if modalities == "image":
        inputs["audio"] = torch.zeros_like(batch["audio"])
        inputs["audio_present"] = torch.zeros_like(batch["audio_present"])
    return inputs | dict(clips=torch.tensor(len(batch["index"])))


def model_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("image", "audio", "audio_present") if name in inputs}


# --- pictures -----------------------------------------------------------------------------------------------

TITLES = {"": "cosine map", "attention_": "fusion attention"}


def draw_maps(inputs: dict[str, Tensor], maps: dict[str, Tensor], settings, path: Path) -> None:
    """Frames with the outline of what sounds, each map over its frame, and the sound; a cross marks the
    highest point of a map, white on the source and red beside it.
    """
    truth = inputs["sounding"].cpu()
    figure = Figure(figsize=(3.6 + 1.75 * (1 + len(maps)), 1.75 * len(truth) + 0.3), layout="constrained")
    widths = (1, *(1 for _ in maps), 1.7)
    grid = figure.subplots(len(truth), len(widths), squeeze=False, width_ratios=widths)
    for row, axes in enumerate(grid):
        frame = rgb(inputs["image"][row].cpu(), settings).numpy()
        extent = (0, SIZE, SIZE, 0)
        for axis in axes:
            axis.axis("off")
        axes[0].imshow(frame, extent=extent)
        outline(axes[0], truth[row])
        for axis, shown in zip(axes[1:-1], maps.values(), strict=True):
            hot = shown[row].cpu()
            axis.imshow(frame.mean(-1), cmap="gray", vmin=0, vmax=1, extent=extent)
            axis.imshow(hot.numpy(), cmap="inferno", alpha=0.65, extent=extent)
            outline(axis, truth[row])
            y, x = divmod(int(hot.flatten().argmax()), SIZE)
            axis.plot(x + 0.5, y + 0.5, "x", ms=9, mew=2.5, color="w" if truth[row, y, x] > 0 else "r")
        show_sound(axes[-1], inputs["audio"][row, 0].cpu(), cmap="magma")
    for axis, title in zip(grid[0], ("frame", *map(TITLES.get, maps), "sound"), strict=True):
        axis.set_title(title, fontsize=10)
    save(figure, path)


def outline(axis, truth: Tensor) -> None:
    """The edge of what sounds, drawn over a frame."""
    edges = ((truth > 0).numpy(), (0.5,))
    axis.contour(*edges, colors="k", linewidths=2.5)
    axis.contour(*edges, colors="w", linewidths=1)


# --- program ------------------------------------------------------------------------------------------------


def main() -> int | str:
    try:
        config = tyro.cli(LocalizeConfig, prog="python -m avfuse.tasks.localize")
    except ValueError as error:
        return f"error: {error}"
    return program(config, Localization, find=partial(find_scenes, test_share=config.test_share))


if __name__ == "__main__":
    sys.exit(main())
