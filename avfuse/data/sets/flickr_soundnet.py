"""Flickr-SoundNet: pictures with sound, and boxes that people drew around what sounds (Senocak et al.).

A folder holds frames/<id>.jpg, audio/<id>.wav and Annotations/<id>.xml. No split comes with the annotations:
flickr_test.csv of SLAVC names the 250 that are tested on, or else a share of all is.
"""

from pathlib import Path
from xml.etree import ElementTree

from ..container import ClipError
from ..scenes import Boxes, Scenes, check_file
from .boxed_pictures import read_pictures

CANVAS = 256  # pixels: the pictures that people drew in were that wide and high
CORNERS = ("xmin", "ymin", "xmax", "ymax")
MAX_BYTES = 2**20  # of an annotation; real ones have about a thousand


def is_flickr_soundnet(root: Path) -> bool:
    """Whether a folder has this layout."""
    return all((root / name).is_dir() for name in ("frames", "audio", "Annotations"))


def read_flickr_soundnet(
    root: str | Path, split: str = "test", *, test_share: float = 1.0, negatives: bool = False
) -> Scenes:
    """The annotated pictures; arguments as for `read_pictures`."""
    root = Path(root)
    if not is_flickr_soundnet(root):
        raise ValueError(f"{root} must hold the folders frames, audio and Annotations")

    def boxes_of(name: str) -> Boxes:
        return Boxes(read_boxes(check_file(root, f"Annotations/{name}.xml")), CANVAS)

    found = (root / "Annotations").glob("*.xml")
    names = (path.stem for path in found if not path.name.startswith("."))  # as a Mac leaves beside files
    return read_pictures(root, "flickr", names, boxes_of, split, test_share=test_share, negatives=negatives)


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
