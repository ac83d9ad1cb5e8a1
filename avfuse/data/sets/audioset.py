"""AudioSet: ten-second clips, each of several of 527 classes, `clips/<id[:2]>/<id>_<start>_<end>.mp4`, or
`<id>` and what follows in any folder of `clips`, a `Y` before it or not.

`annotations/class_labels_indices.csv` numbers the classes; the lists of segments beside it have id, start and
end second, and the codes of a clip's classes.
"""

import math
from functools import partial
from pathlib import Path, PurePosixPath

from ..listing import Files, Listing, check_fields, check_video, rows

CLASS_LIST = Path("annotations/class_labels_indices.csv")
CLASSES = 527
SPLITS = ("unbalanced_train", "balanced_train", "eval")  # of which a folder may have some


def read(root: str | Path) -> Listing:
    """The clips that are there, labelled "class" by a tuple of numbers of classes."""
    listing = Listing("AudioSet", Path(root))
    codes, names = _read_classes(listing)
    if len(names) != CLASSES:
        listing.notes.append(f"{CLASS_LIST.name} has {len(names)} classes; the published one has {CLASSES}")
    listing.classes = {"class": names}
    lists = {split: listing.root / f"annotations/{split}_segments.csv" for split in SPLITS}
    lists = {split: path for split, path in lists.items() if path.exists()}
    if not lists:
        raise ValueError(f"{listing.root}/annotations holds none of {', '.join(SPLITS)} (_segments.csv)")
    files, listed = Files(listing), set()
    for split, path in lists.items():
        for clip, video, labels in rows(listing, path, partial(_parse, codes)):
            if clip in listed:  # in another list: a clip to evaluate on must not be one to train on
                listing.wrong.append(f"{path.name}: {clip} is in another list, too")
                continue
            listed.add(clip)
            name = PurePosixPath(clip).stem
            file = files.take(clip, name, f"Y{name}", video, f"Y{video}")
            listing.expect(split, clip, {"class": labels}, [file])
    files.count_extra()
    return listing


def _read_classes(listing: Listing) -> tuple[dict[str, int], tuple[str, ...]]:
    """Code -> number, and the names in the order of their numbers."""
    path = listing.root / CLASS_LIST
    numbered = {int(number): (code, name) for number, code, name in rows(listing, path, _parse_class)}
    if sorted(numbered) != list(range(len(numbered))) or not numbered:
        raise ValueError(f"{path}: its classes are not numbered 0 to {max(1, len(numbered)) - 1}")
    return (
        {code: number for number, (code, _) in numbered.items()},
        tuple(numbered[number][1] for number in range(len(numbered))),
    )


def _parse_class(fields: list[str]) -> tuple[str, str, str]:
    """Number, code, name."""
    check_fields(fields, 3)
    if not fields[0].isdecimal() or not fields[0].isascii():
        raise ValueError(f"{fields[0]!r} is no number of a class")
    return tuple(fields)


def _parse(codes: dict[str, int], fields: list[str]) -> tuple[str, str, tuple[int, ...]]:
    """Path, id, numbers of classes."""
    check_fields(fields, 4)
    video, start, end = check_video(fields[0]), _seconds(fields[1]), _seconds(fields[2])
    labels = fields[3].split(",")
    unknown = [code for code in labels if code not in codes]
    if unknown:
        raise ValueError(f"{', '.join(map(repr, unknown))} is no class")
    path = f"{video[:2]}/{video}_{start:06d}_{end:06d}.mp4"
    return path, video, tuple(sorted({codes[code] for code in labels}))


def _seconds(text: str) -> int:
    """Whole seconds of a time such as "30.000"."""
    seconds = float(text) if text.isascii() and "_" not in text else math.nan
    if not 0 <= seconds < 1e6:
        raise ValueError(f"{text!r} is no time in seconds")
    return int(seconds)
