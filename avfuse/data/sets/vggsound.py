"""VGGSound: ten-second clips of 309 classes of sound, `clips/<class>/<id>_<start>_<start + 10>.mp4`.

`annotations/vggsound.csv` has a row for each: id, start second, class, split.
"""

import re
from pathlib import Path

from ..listing import Listing, check_class, check_fields, check_video, rows, videos

LIST = Path("annotations/vggsound.csv")
CLASSES = 309
SECONDS = 10  # of a clip
SPLITS = ("train", "test")
IN_PATHS = str.maketrans(" (),", "____")  # how the name of a class becomes that of a folder


def read(root: str | Path) -> Listing:
    """The clips that are there, labelled "class" by the sorted classes of the list."""
    listing = Listing("VGGSound", Path(root))
    listed = list(rows(listing, listing.root / LIST, _parse))
    classes = sorted({label for _, label, _ in listed})
    if len(classes) != CLASSES:
        listing.notes.append(f"{LIST.name} names {len(classes)} classes; the published list has {CLASSES}")
    listing.classes = {"class": tuple(classes)}
    numbers, there = {label: number for number, label in enumerate(classes)}, videos(listing)
    for path, label, split in listed:
        listing.expect(split, path, {"class": numbers[label]}, [there.get(path)])
    listing.extra = len(there.keys() - {path for path, _, _ in listed})
    return listing


def _parse(fields: list[str]) -> tuple[str, str, str]:
    """Path, class, split."""
    check_fields(fields, 4)
    video, start, label, split = fields
    if not re.fullmatch("[0-9]{1,6}", start):
        raise ValueError(f"{start!r} is no start in seconds")
    if split not in SPLITS:
        raise ValueError(f"{split!r} is no split")
    begin, folder = int(start), check_class(label).translate(IN_PATHS)
    return f"{folder}/{check_video(video)}_{begin:06d}_{begin + SECONDS:06d}.mp4", label, split
