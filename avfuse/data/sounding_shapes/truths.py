"""Where the sound of a Sounding Shapes clip comes from: its clips as scenes, by masks or by boxes."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..container import ClipError
from ..scenes import Moment, Scene, Scenes, View, check_file, check_size, consensus, nearest
from .read import read_manifest, read_masks
from .synthesis import SHAPES

SHAPE_CLASSES = ("background", *SHAPES)


@dataclass(frozen=True)
class ShapeMasks:
    """The masks of one frame of a Sounding Shapes clip; `classes` are those of its sounding objects."""

    path: Path
    frame: int
    classes: tuple[int, ...]

    def read(self, view: View, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        masks, _ = read_frame_masks(self.path, self.frame, len(self.classes))  # (S, H, W) bool
        labelled = (masks * np.reshape(self.classes, (-1, 1, 1))).max(0)  # no two masks share a pixel
        classes = nearest(labelled, view, shape, self.path)
        return (classes > 0).astype(np.float32), classes


class ShapeBoxes(ShapeMasks):
    """The boxes around those masks."""

    def read(self, view: View, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        masks, boxes = read_frame_masks(self.path, self.frame, len(self.classes))
        check_size(masks.shape[1:], view, self.path)
        sounding = consensus(boxes, masks.shape[1:], view, shape, annotators=1)
        return sounding, (sounding > 0).astype(np.int64)


def sounding_shapes_scenes(root: str | Path, split: str, truth: type[ShapeMasks]) -> Scenes:
    """The clips of a split with all their frames; classes are those of SHAPE_CLASSES."""
    root, found = Path(root), Scenes()
    for entry in read_manifest(root, split):
        frames = round(entry.seconds * entry.fps)
        found.expected += frames
        with found.noting_missing():
            path, masks = check_file(root, entry.file), check_file(root, entry.masks)
            classes = tuple(SHAPE_CLASSES.index(entry.objects[n]["shape"]) for n in entry.sounding)
            moments = tuple(
                Moment(truth=truth(masks, frame, classes), seconds=(frame + 0.5) / entry.fps)
                for frame in range(frames)
            )
            found.scenes.append(Scene(path=path, sound=path, moments=moments, frames=moments))
    return found


def read_frame_masks(path: Path, frame: int, objects: int) -> tuple[np.ndarray, np.ndarray]:
    """Masks (S, H, W) bool and boxes (S, 4) of one frame of a Sounding Shapes clip."""
    try:
        masks, boxes = read_masks(path)
        masks, boxes = masks[:, frame], boxes[:, frame].astype(int)
    except (OSError, ValueError, LookupError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ClipError(path, f"holds no masks that can be read: {error}") from error
    if masks.ndim != 3 or not masks.size or len(masks) != objects or boxes.shape != (objects, 4):
        raise ClipError(path, f"holds masks {masks.shape} and boxes {boxes.shape} of {objects} objects")
    return masks, boxes
