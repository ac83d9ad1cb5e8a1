"""What segmentation and localization share: annotated pictures, a model of places and sound, and figures."""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn.functional import interpolate

from ..data import sounding_shapes
from ..data.find import build_demo
from ..data.scenes import SceneDataset, as_found, middle_moments
from ..data.sets.folders import SPLITS
from ..data.sounding_shapes.truths import SHAPE_CLASSES, ShapeMasks, sounding_shapes_scenes
from ..inputs import InputSettings, middles
from ..training.judge import JudgedTask
from ..training.pictures import FRAMES, draw_steps, figure_grid, in_a_row, rgb, save, show_sound
from ..vit import audio_times, split_prefix
from .model import TaskModel

TAUGHT_BY = ("both", "image")
SIZE = 224  # pixels, in both directions, at which the protocols compare


# --- model --------------------------------------------------------------------------------------------------


class SceneModel(TaskModel):
    """A model that compares each place of a picture with the sound. Among its `settings` are the `modalities`
    that it is taught by: "both", or "image" of the control, which hears no sound that it is given.
    """

    def read(self, image: Tensor, audio: Tensor, audio_present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Images (B, 3, height, width), spectrograms (B, 1, mel, time) and which of the latter are there (B,)
        bool, None = all -> image patch tokens (B, I, D), and the mean of the audio patch tokens (B, D). Of
        several frames, (B, T, 3, height, width), they are (B, T, I, D) and (B, T, D), a mean for each frame.
        """
        encoder = self.encoder
        if self.settings["modalities"] == "image":
            audio_present = torch.zeros(len(audio), dtype=torch.bool, device=audio.device)
        tokens = encoder(image, audio, audio_present=audio_present)
        places = split_prefix(encoder.image, tokens.image)[1]
        sound = split_prefix(encoder.audio, tokens.audio)[1]
        return places, sound.mean(1) if encoder.frames == 1 else self.around(sound, places.shape[1])

    def around(self, sound: Tensor, frames: int) -> Tensor:
        """Audio tokens (B, A, D) -> (B, T, D), the mean of those in each frame's part of the window, or else
        of the nearest. One mean for all frames would not tell which of them sounds; that of the only frame is
        the paper's, of all tokens.
        """
        inputs = self.encoder.inputs
        shown, part = middles(frames, inputs.audio_seconds), inputs.audio_seconds / frames
        apart = (audio_times(inputs, self.encoder.audio.patch_embed) - shown[:, None]).abs()
        reach = apart.amin(1, keepdim=True).clamp(min=part / 2) + 1e-3 * part  # times are rounded
        near = (apart <= reach).to(sound)
        return torch.einsum("ta,bad->btd", near / near.sum(1, keepdim=True), sound)

    def predicted(self, image: Tensor | None, audio: Tensor | None) -> dict[str, Tensor]:
        """{"map": (height, width)}: how likely each pixel of the image is part of what sounds, 0 to 1. Of T
        frames it is (T, height, width), and "moments" (T,) tells the highest of each: when it is most likely.
        """
        is_control = self.settings["modalities"] == "image"  # which hears nothing, whatever stands there
        if is_control and audio is None and image is not None:
            audio = image.new_zeros(1, *self.encoder.input_shapes["audio"])
        self.check_both(image, audio)
        map_ = resized(self.sounding(self(image, audio).float()), image.shape[-2:])[0].cpu()
        return dict(map=map_) if map_.ndim == 2 else dict(map=map_, moments=map_.amax((1, 2)))

    def sounding(self, logits: Tensor) -> Tensor:
        """Outputs of the model -> probabilities (B, rows, columns) of being part of what sounds."""
        return logits.sigmoid()

    def on_grid(self, values: Tensor) -> Tensor:
        """(B, ..., I) -> (B, ..., rows, columns)"""
        return values.unflatten(-1, self.encoder.image.patch_embed.grid_size)


def resized(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(..., rows, columns) -> (..., height, width), bilinear"""
    flat = maps.flatten(0, -3)[:, None].float()
    return interpolate(flat, size=size, mode="bilinear")[:, 0].unflatten(0, maps.shape[:-2])


# --- task ---------------------------------------------------------------------------------------------------


class SceneTask(JudgedTask):
    """A task whose clips are annotated pictures. A subclass gives `shape_truth` (what is true of Sounding
    Shapes), `find_annotated(root, config, say)` (what is found in a folder of other pictures, or a ValueError
    if these are none of its own) and `truth` (the item of a batch with the truth of each pixel).
    """

    shape_truth: type
    truth: str
    frame = "whole"  # what the protocol shows of a picture

    @classmethod
    def find(cls, config, say):
        """Sounding Shapes, which is built first where no folder is given, or what else the task knows."""
        root = config.data or build_demo(config.demo, progress=not config.quiet)
        if sounding_shapes.is_built(root):
            train, test = (sounding_shapes_scenes(root, split, cls.shape_truth) for split in SPLITS)
            return as_found(train, middle_moments(test), "held-out clips", say, shape=SHAPE_CLASSES)
        if config.data_set == "sounding-shapes":
            raise ValueError(f"--data {root} is not Sounding Shapes, which --data-set asks for")
        return cls.find_annotated(root, config, say)

    def kind(self, clip):
        """Of Sounding Shapes, the shapes that sound."""
        truth = clip.moments[0].truth
        return truth.classes if isinstance(truth, ShapeMasks) else super().kind(clip)

    @property
    def heading(self) -> str:
        """Of a table: what its numbers are of, and beside what to hold them."""
        given = self.config.modalities
        return "image alone" if given == "image" else "image and sound (control: --modalities image)"

    def dataset(self, clips, *, train):
        size, frame = (None, "whole") if train else (SIZE, self.frame)
        settings = self.model.encoder.inputs
        return SceneDataset(clips, settings, train=train, seed=self.config.seed, size=size, frame=frame)

    def inputs(self, batch):
        """What the model is called with, and pictures show: silence for the control; the truth; and how many
        clips there are: 0 where the batch holds a blank.
        """
        inputs = {name: batch[name] for name in ("image", "audio", self.truth)}
        if self.config.modalities == "image":
            inputs["audio"] = torch.zeros_like(batch["audio"])
        return inputs | dict(clips=torch.tensor(len(batch["index"])))


def model_inputs(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: inputs[name] for name in ("image", "audio", "audio_present") if name in inputs}


# --- pictures -----------------------------------------------------------------------------------------------


def show_scene(
    axes: np.ndarray, inputs: dict[str, Tensor], row: int, truth: Tensor, settings: InputSettings
) -> np.ndarray:
    """The frame in the first column, with the outline of what sounds, grey in those that follow, and the
    sound in the last. Returns the frame (height, width, 3).
    """
    frame = rgb(inputs["image"][row].cpu(), settings).numpy()
    show_map(axes[0], frame, frame)
    outline(axes[0], truth)
    for axis in axes[1:-1]:
        show_map(axis, frame.mean(-1), frame, cmap="gray", vmin=0, vmax=1.3)
    show_sound(axes[-1], inputs["audio"][row, 0])
    return frame


def draw_map(image: Tensor, map_: Tensor, settings: InputSettings, path: Path) -> None:
    """A frame (3, height, width) as a model reads it, and a map (height, width) laid over it. Of T frames the
    two stand below each other, and below them how high each map is at its highest.
    """
    shown = 1 if image.ndim == 3 else min(FRAMES, len(image))
    if image.ndim == 3:
        figure, grid = figure_grid(1, ("frame", "what sounds"), ())
    else:
        figure, grid = figure_grid(3, ("frames, what sounds, and when",), (), shown)
        draw_steps(grid[2, 0], map_.amax((1, 2)), settings.audio_seconds, highest=1)
        map_ = in_a_row(map_)
    frame, (first, second) = rgb(image, settings).numpy(), grid.flat[:2]
    show_map(first, frame, frame, shown)
    show_map(second, frame.mean(-1), frame, shown, cmap="gray", vmin=0, vmax=1.3)
    show_map(second, map_, frame, shown, cmap="inferno", alpha=0.6, vmin=0, vmax=1)
    save(figure, path)


def show_map(axis: Axes, pixels: np.ndarray | Tensor, frame: np.ndarray, frames: int = 1, **options) -> None:
    """Pixels laid over the whole of a frame, or of several in a row, which keep their shape, and are
    SIZE x SIZE in coordinates.
    """
    height, width = frame.shape[:2]
    extent, aspect = (0, frames * SIZE, SIZE, 0), frames * height / width
    axis.imshow(np.asarray(pixels), extent=extent, aspect=aspect, **options)


def outline(axis: Axes, truth: Tensor) -> None:
    """The edge of what sounds, drawn over a frame."""
    edges = ((truth > 0).numpy(), (0.5,))
    axis.contour(*edges, colors="k", linewidths=2.5)
    axis.contour(*edges, colors="w", linewidths=1)
