"""VGG-SS: pictures of VGGSound's test clips with sound, and boxes around what sounds (Chen et al. 2021).

A folder holds frames/<id>_<start>.jpg, audio/<id>_<start>.wav, and vggss.json as published: 5,158 clips.
"""

import json
from pathlib import Path

from ...files import inside
from ..container import ClipError
from ..listing import check_video
from ..scenes import Boxes, Scenes
from .boxed_pictures import read_pictures

FILE = "vggss.json"


def is_vggss(root: Path) -> bool:
    """Whether a folder has this layout."""
    return (root / FILE).is_file() and all((root / name).is_dir() for name in ("frames", "audio"))


def read_vggss(
    root: str | Path, split: str = "test", *, test_share: float = 1.0, negatives: bool = False
) -> Scenes:
    """The annotated pictures; arguments as for `read_pictures`. Entries of vggss.json that are wrong are
    missing, and of the test split.
    """
    root = Path(root)
    truths, wrong = _read_truths(inside(root, FILE))

    def boxes_of(name: str) -> Boxes:
        if name not in truths:
            raise ClipError(root / FILE, f"has no boxes of {name}")
        return truths[name]

    found = read_pictures(root, "vggss", truths, boxes_of, split, test_share=test_share, negatives=negatives)
    if split == "test":
        found.expected += len(wrong)
        found.missing += wrong
    return found


def _read_truths(path: Path) -> tuple[dict[str, Boxes], list[ClipError]]:
    """Boxes by the names of their pictures, and an error for each entry that is wrong."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(f"{path} must be a list of pictures with boxes")
    truths, wrong = {}, []
    for number, entry in enumerate(entries):
        try:
            name, boxes = check_video(entry["file"]), _parse_boxes(entry["bbox"])
            if name in truths:
                raise ValueError(f"{name} has an entry before")
            truths[name] = boxes
        except (KeyError, TypeError, ValueError) as error:
            wrong.append(ClipError(path, f"entry {number}: {error!r}"))
    return truths, wrong


def _parse_boxes(boxes: list[list[float]]) -> Boxes:
    """Boxes in shares of the picture, cut off where they leave it: published ones go down to -2.9e16. What is
    left of two pictures has no area; they count as pictures with a box, of which no answer is right.
    """
    for box in boxes:
        if len(box) != 4 or not all(type(place) in (int, float) and place == place for place in box):
            raise ValueError(f"{box!r} is no box")
    if not boxes:
        raise ValueError("there is no box")
    inside = tuple(tuple(min(max(place, 0), 1) for place in box) for box in boxes)
    return Boxes(inside, canvas=1, annotators=1)
