"""AVSBench: videos of sounding things with masks, one picture a second (Zhou et al.).

A folder holds metadata.csv (uid, split, label, ...), label2idx.json, and for every video
<label>/<uid>/audio.wav, frames/<n>.jpg and labels_semantic/<n>.png, where label is v1s, v1m or v2.
"""

import csv
import json
from pathlib import Path

from ...checks import check_choice
from ..container import ClipError
from ..scenes import Moment, PngMask, Scene, Scenes, check_file

SUBSETS = {"S4": ("v1s",), "MS3": ("v1m",), "AVSS": ("v1s", "v1m", "v2")}
SPLITS = ("train", "val", "test")
PICTURES = {"v1s": 5, "v1m": 5, "v2": 10}  # a second each
COLUMNS = ("uid", "split", "label")
BACKGROUND = "background"


def is_avsbench(root: Path) -> bool:
    """Whether a folder has this layout."""
    return all((root / name).is_file() for name in ("metadata.csv", "label2idx.json"))


def read_classes(root: str | Path) -> tuple[str, ...]:
    """The names of the classes by pixel value, background first, from label2idx.json: 71 in AVSBench."""
    path = Path(root) / "label2idx.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(index, dict) or not all(type(number) is int for number in index.values()):
        raise ValueError(f"{path} must give each class a whole number")
    if sorted(index.values()) != list(range(1, len(index) + 1)) or index.get(BACKGROUND) != 1:
        raise ValueError(f"{path} must number the classes 1, 2, ... and call the first {BACKGROUND!r}")
    return tuple(sorted(index, key=index.get))


def read_avsbench(root: str | Path, split: str, subset: str = "S4") -> Scenes:
    """The clips of a split, in the order of metadata.csv.

    A picture is taken to be from the middle of its second. In training, clips of v1s have a mask for their
    first picture only. Whatever is named and not there is listed as missing; a clip without any of its
    pictures, or without sound, is left out. So is one with a row before, of whatever split: what is trained
    on is not tested on.

    Args:
        root: the data folder.
        split: "train", "val" or "test".
        subset: "S4" (single sources), "MS3" (several) or "AVSS" (all, with classes).
    """
    check_choice("subset", subset, tuple(SUBSETS))
    check_choice("split", split, SPLITS)
    root, found, seen = Path(root), Scenes(), set()
    classes = len(read_classes(root))
    for row in _rows(root / "metadata.csv"):
        folder = f"{row['label']}/{row['uid']}"
        is_first = folder not in seen
        seen.add(folder)
        if row["split"] != split or row["label"] not in SUBSETS[subset]:
            continue
        labelled = 1 if (split, row["label"]) == ("train", "v1s") else PICTURES[row["label"]]
        found.expected += labelled
        with found.noting_missing():
            if not is_first:
                raise ClipError(root / folder, "has a row before in metadata.csv")
            sound, moments = check_file(root, f"{folder}/audio.wav"), []
            for second in range(labelled):
                with found.noting_missing():
                    picture = check_file(root, f"{folder}/frames/{second}.jpg")
                    mask = check_file(root, f"{folder}/labels_semantic/{second}.png")
                    truth = PngMask(mask, classes)
                    moments.append(Moment(truth=truth, seconds=second + 0.5, picture=picture))
            if moments:
                found.scenes.append(Scene(path=sound, sound=sound, moments=tuple(moments)))
    return found


def _rows(path: Path) -> list[dict[str, str]]:
    """Lines of a CSV file by the names in its first line."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: {error}") from error
    for name in COLUMNS:
        if name not in (reader.fieldnames or ()):
            raise ValueError(f"{path} must have columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
    for number, row in enumerate(rows, start=2):
        if any(row[name] is None for name in COLUMNS):
            raise ValueError(f"{path}, line {number}: too few columns")
        if row["label"] not in PICTURES or row["split"] not in SPLITS:
            raise ValueError(f"{path}, line {number}: label {row['label']!r}, split {row['split']!r}")
    return rows
