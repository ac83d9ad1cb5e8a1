"""MUSIC: videos of people who play one of 11 instruments, `clips/<instrument>/<id>*.mp4` (MUSIC-21: of 21).

`anno/music_solo.csv` has a heading, and a row for each video: id, instrument and more. Every fifth video of
those that are there, by id, is one to test on: of the paper's 448, 90.
"""

from collections import defaultdict
from pathlib import Path

from ..listing import Listing, check_class, check_video, rows, videos

LIST, LIST_21 = Path("anno/music_solo.csv"), Path("anno/music21_solo.csv")
TEST_EVERY = 5


def read(root: str | Path, *, list_: Path = LIST) -> Listing:
    """The clips that are there, labelled "class" by the sorted instruments of the list; all clips of a video
    are in one split.
    """
    listing = Listing("MUSIC" if list_ == LIST else "MUSIC-21", Path(root))
    listed = dict(rows(listing, listing.root / list_, _parse))
    instruments = sorted(set(listed.values()))
    listing.classes = {"class": tuple(instruments)}
    numbers, there = {name: number for number, name in enumerate(instruments)}, videos(listing)
    clips, extra = defaultdict(list), []  # of each video, of none
    for inside, path in there.items():
        folder, _, name = inside.partition("/")
        beginnings = (name[:length] for length in range(len(name), 0, -1))
        video = next((v for v in beginnings if listed.get(v, "").replace(" ", "_") == folder), None)
        if video is None or not name.endswith(".mp4"):
            extra.append(inside)
        else:
            clips[video].append(path)
    for is_there in True, False:  # the split is one of what exists, and of what does not
        for number, video in enumerate(v for v in sorted(listed) if (v in clips) == is_there):
            split, labels = "train" if number % TEST_EVERY else "test", {"class": numbers[listed[video]]}
            listing.expect(split, video, labels, clips[video] if is_there else [])
    listing.count_extra(extra)
    return listing


def _parse(fields: list[str]) -> tuple[str, str]:
    """Video, instrument."""
    if len(fields) < 2:
        raise ValueError(f"{len(fields)} fields, not 2 or more")
    return check_video(fields[0]), check_class(fields[1])
