"""Flickr-SoundNet: pictures with sound, and boxes that people drew around what sounds (Senocak et al.).

A folder holds frames/<id>.jpg, audio/<id>.wav and Annotations/<id>.xml. The published test set has 250 of
them; no split to train on comes with the annotations, so one is made here.
"""

import hashlib
from pathlib import Path
from xml.etree import ElementTree

from ...checks import check_choice
from ..decode import ClipError
from ..scenes import Boxes, Moment, Scene, Scenes, check_file

SPLITS = ("train", "test")
CANVAS = 256  # pixels: the pictures that people drew in were that wide and high
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MAX_BYTES = 2**20  # of an annotation; real ones have about a thousand


def is_flickr_soundnet(root: Path) -> bool:
    """Whether a folder has this layout."""
    return all((root / name).is_dir() for name in ("frames", "audio", "Annotations"))


def read_flickr_soundnet(root: str | Path, split: str = "test", *, test_share: float = 1.0) -> Scenes:
    """The annotated pictures, in the order of their names, each with the sound around the middle of its file.

    Args:
        root: the data folder.
        split: "train" or "test".
        test_share: how many of the pictures are to test on. A hash of its name decides for each, so that it
            stays where it is when others come or go.
    """
    root = Path(root)
    check_choice("split", split, SPLITS)
    if not 0 <= test_share <= 1:
        raise ValueError(f"test_share must be in 0..1, got {test_share}")
    if not is_flickr_soundnet(root):
        raise ValueError(f"{root} must hold the folders frames, audio and Annotations")
    found = Scenes()
    for annotation in sorted((root / "Annotations").glob("*.xml")):
        name = annotation.stem
        if (_share_of(name) < test_share) != (split == "test"):
            continue
        found.expected += 1
        with found.noting_missing():
            boxes = read_boxes(check_file(root, f"Annotations/{annotation.name}"))
            picture = check_file(root, f"frames/{name}.jpg")
            sound = check_file(root, f"audio/{name}.wav")
            moment = Moment(truth=Boxes(boxes, CANVAS), picture=picture)
            found.scenes.append(Scene(path=picture, sound=sound, moments=(moment,)))
    return found


def read_boxes(path: Path) -> tuple[tuple[int, int, int, int], ...]:
    """The boxes (x0, y0, x1, y1) in an annotation, those of all people, in pixels; what of them lies outside
    the picture is cut off.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ClipError(path, f"has more than {MAX_BYTES} bytes")
        parser = ElementTree.XMLParser(target=_WithoutDocumentType())
        parser.feed(content)
        boxes = tuple(_corners(box) for box in parser.close().iter("bbox"))
    except (OSError, ElementTree.ParseError, ValueError, LookupError) as error:
        raise ClipError(path, f"is no annotation that can be read: {error}") from error
    if not any(x0 < x1 and y0 < y1 for x0, y0, x1, y1 in boxes):
        raise ClipError(path, "has no box in the picture")
    return boxes


class _WithoutDocumentType(ElementTree.TreeBuilder):
    """Refuses <!DOCTYPE ...>, in any encoding: it may hold entities that grow without bound."""

    def doctype(self, name, pubid, system):
        raise ValueError("it declares a document type")


def _corners(box: ElementTree.Element) -> tuple[int, int, int, int]:
    """From xmin, ymin, xmax and ymax, or the four numbers after the first child where they are not named."""
    numbers = [box.findtext(name) for name in CORNERS]
    if None in numbers:
        numbers = [child.text for child in box][1:]
    x0, y0, x1, y1 = (min(max(int(number or ""), 0), CANVAS) for number in numbers)
    return x0, y0, x1, y1


def _share_of(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48
