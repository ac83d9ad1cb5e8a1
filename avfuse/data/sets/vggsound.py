"""VGGSound: ten-second clips of 309 classes of sound, `clips/<class>/<id>_<start>_<start + 10>.mp4`, or
`<id>_<start>.mp4` in any folder of `clips`.

`annotations/vggsound.csv` has a row for each: id, start second, class, split. The official `train.csv` and
`test.csv` (`<id>_<start>.mp4`, class) leave 291 of them out; where they lie beside it, they say what is
trained and tested on, as in the literature.
"""

import re
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...files import some
from ..listing import Files, Listing, check_class, check_fields, check_video, rows

LIST = Path("annotations/vggsound.csv")
OFFICIAL = {split: Path(f"annotations/{split}.csv") for split in ("train", "test")}
CLASSES = 309
SECONDS = 10  # of a clip
IN_PATHS = str.maketrans(" (),", "____")  # how the name of a class becomes that of a folder


class Row(NamedTuple):
    """A clip of a list."""

    clip: tuple[str, int]  # id, start second
    label: str
    split: str

    @property
    def path(self) -> str:
        """Where the clip lies, by the layout of the data set."""
        (video, start), folder = self.clip, self.label.translate(IN_PATHS)
        return f"{folder}/{video}_{start:06d}_{start + SECONDS:06d}.mp4"


def read(root: str | Path) -> Listing:
    """The clips that are there, labelled "class" by the sorted classes of the lists."""
    listing = Listing("VGGSound", Path(root))
    listed = _read_lists(listing)
    classes = sorted({row.label for row in listed})
    if len(classes) != CLASSES:
        listing.notes.append(f"{LIST.name} names {len(classes)} classes; the published list has {CLASSES}")
    listing.classes = {"class": tuple(classes)}
    numbers, files = {label: number for number, label in enumerate(classes)}, Files(listing)
    for row in listed:
        video, start = row.clip
        file = files.take(row.path, f"{video}_{start:06d}_{start + SECONDS:06d}", f"{video}_{start:06d}")
        listing.expect(row.split, row.path, {"class": numbers[row.label]}, [file])
    files.count_extra()
    return listing


def _read_lists(listing: Listing) -> list[Row]:
    """The clips to train and to test on, and in `listing` which list says so."""
    listed = list(rows(listing, listing.root / LIST, _parse))
    listing.test_list = LIST.name
    for split, path in OFFICIAL.items():
        if not (listing.root / path).exists():
            continue
        official = list(rows(listing, listing.root / path, partial(_parse_official, split)))
        ours = {row.clip for row in listed if row.split == split}
        differing = sorted(ours ^ {row.clip for row in official})
        listing.notes.append(
            f"{split} clips are the {len(official)} of {path.name}; {LIST.name} has {len(ours)}, and"
            f" {len(differing)} differ: {some([f'{video}_{start:06d}' for video, start in differing])}"
        )
        # What one list tests on is not trained on because another is silent about it.
        taken = {row.clip for row in official}
        listed = [row for row in listed if row.split != split and row.clip not in taken] + official
        if split == "test":
            listing.test_list = path.name
    if listing.test_list == LIST.name:
        listing.notes.append(
            f"test clips are those of {LIST.name}; papers use the 15446 of test.csv: put it into annotations/"
        )
    return listed


def _parse(fields: list[str]) -> Row:
    check_fields(fields, 4)
    video, start, label, split = fields
    if split not in OFFICIAL:
        raise ValueError(f"{split!r} is no split")
    return Row((check_video(video), _seconds(start)), check_class(label), split)


def _parse_official(split: str, fields: list[str]) -> Row:
    check_fields(fields, 2)
    name, label = fields
    video, _, start = name.removesuffix(".mp4").rpartition("_")
    return Row((check_video(video), _seconds(start)), check_class(label), split)


def _seconds(start: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", start):
        raise ValueError(f"{start!r} is no start in seconds")
    return int(start)
