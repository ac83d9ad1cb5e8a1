"""Clips whose frames are annotated: a picture, the sound around it, and where that comes from.

A data set's own file lists its clips as `Scene`s; `SceneDataset` reads them all. Names in annotations are of
unknown origin: `inside` keeps them in the data folder, and a file that is not what it should be is a
`ClipError`, never a guess.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..checks import check_choice, check_count
from ..files import inside, printable
from ..inputs import InputSettings
from .clips import Clip, ClipDataset, check_one_frame
from .container import MAX_PIXELS, ClipError
from .decode import EPSILON, ClipReader
from .find import Found
from .transforms import cropped_image, random_gain, random_view

FRAMES = ("whole", "central")


# --- what is known of a clip --------------------------------------------------------------------------------


class View(NamedTuple):
    """The part of a picture that is shown, squeezed into the shape of the image."""

    height: float  # of the picture, in pixels, as everything else
    width: float
    crop: tuple[float, float, float, float]  # top, left, height, width
    mirrored: bool = False


class Truth(Protocol):
    """Where the sound comes from in one picture."""

    def read(self, view: View, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """What is true of each pixel of a view of this height and width.

        Returns:
            sounding `shape` float32 in 0..1, how sure it is that the sound comes from there; classes `shape`
            int64, 0 = background, which is 1 where something sounds that nobody has named.

        Raises:
            ClipError: the annotation cannot be read, or belongs to another picture.
        """


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A picture of a clip that is annotated."""

    truth: Truth
    seconds: float | None = None  # from the start of the sound; None: the middle
    picture: Path | None = None  # an image file; None: the frame that the clip shows then


@dataclass(frozen=True, kw_only=True)
class Scene(Clip):
    """A clip with annotated moments; `path` is what it is called by, and the video if there is one."""

    sound: Path
    moments: tuple[Moment, ...]
    frames: tuple[Moment, ...] = ()  # those of all frames of the video, where all are annotated

    def open(self) -> ClipReader:
        return ClipReader(self.sound)

    def frame_at(self, seconds: float) -> Moment:
        """The one of `frames` that a reader gives at a time: before the first and after the last, these."""
        return min(self.frames, key=lambda frame: abs(frame.seconds - seconds - EPSILON))


@dataclass
class Scenes:
    """A split of an annotated data set: what is there, and what should be."""

    scenes: list[Scene] = field(default_factory=list)
    missing: list[ClipError] = field(default_factory=list)  # a reason for every file that cannot be used
    expected: int = 0  # moments that the annotations name

    @contextmanager
    def noting_missing(self) -> Iterator[None]:
        """Leave off at a `ClipError`, which becomes one of `missing`."""
        try:
            yield
        except ClipError as error:
            self.missing.append(error)

    @property
    def found(self) -> int:
        return sum(len(scene.moments) for scene in self.scenes)

    def summary(self) -> str:
        """For people: '4 of 5 annotated pictures: 1 missing, such as frames/3.jpg (does not exist)'."""
        text = f"{self.found} of {self.expected} annotated pictures in {len(self.scenes)} clips"
        if self.missing:
            first = self.missing[0]
            text += f"; {len(self.missing)} files missing or refused, such as {first.path} ({first.reason})"
        return text


def middle_moments(split: Scenes) -> Scenes:
    """Only the moment in the middle of every clip."""
    scenes = [replace(scene, moments=(scene.moments[len(scene.moments) // 2],)) for scene in split.scenes]
    return Scenes(scenes, split.missing, len(scenes) + len({error.path for error in split.missing}))


def moment_by_moment(scenes: Sequence[Scene]) -> list[Scene]:
    """Each annotated picture as a scene of its own, in order: what evaluation goes through."""
    return [replace(scene, moments=(moment,)) for scene in scenes for moment in scene.moments]


def as_found(train: Scenes, test: Scenes, test_name: str, say: Callable[[str], object], **classes) -> Found:
    """The splits of an annotated data set for the training loop, which counts what is missing as unreadable:
    more than --max-unreadable of it ends the run, rather than give results that compare with nobody's.

    Args:
        train, test: evaluation goes through the moments of `test` one by one.
        test_name: what to call the latter.
        say: what is found is told through it.
        classes: names of the values of each label.
    """
    for name, split in (("train", train), (test_name, test)):
        say(printable(f"{name}: {split.summary()}"))
    return Found(
        train=train.scenes,
        test=moment_by_moment(test.scenes),
        test_name=test_name,
        unreadable=train.missing + test.missing,
        looked_at=len(train.scenes) + test.found + len(train.missing) + len(test.missing),
        classes=classes,
        coverage=dict(train=(train.found, train.expected), test=(test.found, test.expected)),
    )


def check_file(root: Path, name: str) -> Path:
    """The file of this name in the data folder, or a ClipError: nothing outside it is opened."""
    try:
        path = inside(root, name)
        if not path.is_file():
            raise ClipError(root / name, "does not exist")
    except (ValueError, OSError, RuntimeError) as error:  # NUL characters, names too long, circles of links
        raise ClipError(root / name, f"is refused: {error}") from error
    return path


# --- kinds of annotation ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PngMask:
    """A grey or palette PNG whose pixel values are classes below `classes`; 0 is the background."""

    path: Path
    classes: int

    def read(self, view: View, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        with read_image(self.path, ("PNG",)) as image:
            if image.mode not in ("L", "P", "1"):
                raise ClipError(self.path, f"is no mask: its pixels are {image.mode}, not class numbers")
            mask = np.asarray(image).astype(np.int64)
        if mask.max() >= self.classes:
            raise ClipError(self.path, f"holds class {mask.max()}, while there are {self.classes}")
        classes = nearest(mask, view, shape, self.path)
        return (classes > 0).astype(np.float32), classes


@dataclass(frozen=True)
class Boxes:
    """Boxes (x0, y0, x1, y1) by several people, in a picture `canvas` pixels wide and high; `annotators` of
    them are enough to be sure.
    """

    boxes: tuple[tuple[float, float, float, float], ...]
    canvas: int = 256
    annotators: int = 2

    def read(self, view: View, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        canvas = (self.canvas, self.canvas)
        sounding = consensus(self.boxes, canvas, view, shape, annotators=self.annotators)
        return sounding, (sounding > 0).astype(np.int64)


def nearest(mask: np.ndarray, view: View, shape: tuple[int, int], path: Path) -> np.ndarray:
    """What a mask (H, W) holds at the centres of the pixels of a view of this shape."""
    check_size(mask.shape, view, path)
    top, left, height, width = view.crop
    rows, columns = (
        np.floor(start + (np.arange(count) + 0.5) * extent / count).astype(int).clip(0, size - 1)
        for start, extent, count, size in zip((top, left), (height, width), shape, mask.shape, strict=True)
    )
    shown = mask[rows][:, columns]
    return np.ascontiguousarray(shown[:, ::-1] if view.mirrored else shown)


def check_size(shape: tuple[int, int], view: View, path: Path) -> None:
    """Raises a ClipError unless a mask is as high and wide as its picture."""
    if shape != (view.height, view.width):
        raise ClipError(path, f"is {shape[::-1]} pixels, its picture {(view.width, view.height)}")


def consensus(
    boxes: Sequence[Sequence[float]],
    canvas: tuple[int, int],
    view: View,
    shape: tuple[int, int],
    *,
    annotators: int,
) -> np.ndarray:
    """How many people put a box around each pixel of a view, over `annotators` and at most 1.

    Corners are rounded down to pixels of the view, as the Flickr-SoundNet protocol does (int(224 x / 256)).
    """
    top, left, height, width = view.crop
    rows, columns = shape
    count = np.zeros(shape, np.float32)
    for x0, y0, x1, y1 in boxes:
        xs = [_cell((x * view.width / canvas[1] - left) * columns / width, columns) for x in (x0, x1)]
        ys = [_cell((y * view.height / canvas[0] - top) * rows / height, rows) for y in (y0, y1)]
        if view.mirrored:
            xs = [columns - xs[1], columns - xs[0]]
        count[ys[0] : ys[1], xs[0] : xs[1]] += 1
    return np.minimum(count / annotators, 1)


def _cell(place: float, size: int) -> int:
    return min(max(math.floor(place), 0), size)


# --- reading files ------------------------------------------------------------------------------------------


def read_image(path: Path, formats: tuple[str, ...] = ("JPEG", "PNG")) -> Image.Image:
    """An image file of one of these formats, and of no more pixels than a frame may have."""
    try:
        image = Image.open(path, formats=formats)
        if image.width * image.height > MAX_PIXELS:
            raise ClipError(path, f"is too large: {image.width} x {image.height} pixels")
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, zlib.error) as error:
        raise ClipError(path, f"is no image that can be read: {error}") from error
    return image


class SceneDataset(ClipDataset):
    """Scenes as one annotated picture and the sound around it, or as several frames and their sound: as
    `ClipDataset` has clips, and where the sound comes from.

    The one picture is that of a random moment of the scene in training, of its first in evaluation, see
    `moment_by_moment`. It is in the middle of the window of sound: where the file does not reach, that is
    silent before, and mirrored behind. Of several frames, the truth of each is that of its own time.

    An item has no `frames_shown`; it has, for the part of the frame that its image shows,
        sounding: (height, width) float32 in 0..1, how sure it is that the sound comes from there.
        classes: (height, width) long, 0 = background.
    and of T > 1 frames (T, height, width).

    Args:
        scenes: all with at least one moment.
        settings, train, seed: as for `ClipDataset`.
        size: height and width of the truth in pixels, for a protocol that says so (224); None: the image's.
        frame: what evaluation shows, the "whole" frame, squeezed, or its "central" part, the largest of the
            shape of the image.

    Raises:
        ValueError: no scenes, one without a moment, several frames of one of which only single pictures are
            annotated, or another argument that is wrong.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        settings: InputSettings,
        *,
        train: bool,
        seed: int = 0,
        size: int | None = None,
        frame: str = "whole",
    ):
        super().__init__(scenes, settings, train=train, seed=seed)
        check_choice("frame", frame, FRAMES)
        for scene in scenes:
            if not scene.moments:
                raise ValueError(f"scenes: {scene.path} has no annotated moment")
            if not scene.frames:
                check_one_frame(settings.image_frames, f"{scene.path}, an annotated picture")
        if size is not None:
            check_count("size", size)
        self.shape, self.frame = settings.image_shape if size is None else (size, size), frame

    def item(self, clip, reader, generator):
        settings, is_still = self.settings, self.settings.image_frames == 1
        choice = float(torch.rand((), generator=generator)) if self.train else 0.0 if is_still else 0.5
        if is_still:
            moment = clip.moments[int(choice * len(clip.moments))]
            seconds = reader.streams.seconds / 2 if moment.seconds is None else moment.seconds
            start = seconds - settings.audio_seconds / 2
            moments, pictures = [moment], self._picture(clip, moment, reader, seconds)
        else:
            start = choice * max(0.0, reader.streams.seconds - settings.audio_seconds)
            times = [start + time for time in settings.frame_times]
            moments, pictures = list(map(clip.frame_at, times)), reader.frames(times)
        waveform = torch.from_numpy(reader.audio(start, settings.audio_seconds, settings.sample_rate))
        if self.train:
            waveform = random_gain(waveform, generator)
        images, view = self._images(clip, pictures, generator)
        sounding, classes = zip(*(moment.truth.read(view, self.shape) for moment in moments), strict=True)
        return {
            "image": self._stacked(images),
            "audio": self.spectrogram(waveform),
            "image_present": torch.tensor(True),
            "audio_present": torch.tensor(True),
            "sounding": self._stacked(map(torch.from_numpy, sounding)),
            "classes": self._stacked(map(torch.from_numpy, classes)),
        }

    def blank(self):
        settings = self.settings
        shape = (settings.image_frames, *self.shape)
        return {
            "image": self._stacked(torch.zeros(settings.image_frames, 3, *settings.image_shape)),
            "audio": torch.zeros(1, settings.mel_bins, settings.frames),
            "image_present": torch.tensor(False),
            "audio_present": torch.tensor(False),
            "sounding": self._stacked(torch.zeros(shape)),
            "classes": self._stacked(torch.zeros(shape, dtype=torch.long)),
        }

    def _stacked(self, of_frames: Iterable[Tensor]) -> Tensor:
        """(T, ...), or that of the only frame."""
        stacked = torch.stack(tuple(of_frames))
        return stacked[0] if self.settings.image_frames == 1 else stacked

    def _picture(
        self, scene: Scene, moment: Moment, reader: ClipReader, seconds: float
    ) -> Iterator[np.ndarray]:
        """One picture (height, width, 3) uint8, read when it is asked for."""
        if moment.picture is not None:
            with read_image(moment.picture) as image:
                yield np.array(image.convert("RGB"))
        elif scene.path == scene.sound:
            yield reader.frame(seconds)
        else:
            with ClipReader(scene.path) as video:
                yield video.frame(seconds)

    def _images(
        self, scene: Scene, pictures: Iterable[np.ndarray], generator: torch.Generator
    ) -> tuple[list[Tensor], View]:
        """The pictures as the model sees them, and which part of them that is."""
        images, view = [], None
        for picture in pictures:
            view = view or self._view(*picture.shape[:2], generator)
            if picture.shape[:2] != (view.height, view.width):
                raise ClipError(scene.path, "changes the size of its pictures")
            shown = torch.from_numpy(picture).permute(2, 0, 1)
            images.append(cropped_image(shown, self.settings, view.crop, mirrored=view.mirrored))
        return images, view

    def _view(self, height: int, width: int, generator: torch.Generator) -> View:
        """The part of a picture of this size that the model sees."""
        if self.train:
            return View(height, width, *random_view(height, width, self.settings, generator))
        if self.frame == "whole":
            return View(height, width, (0, 0, height, width))
        rows, columns = self.settings.image_shape
        pixels = min(height / rows, width / columns)  # of the picture, for one of the image
        shown = max(1, round(rows * pixels)), max(1, round(columns * pixels))
        return View(height, width, ((height - shown[0]) // 2, (width - shown[1]) // 2, *shown))
