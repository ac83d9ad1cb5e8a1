"""MUSIC: videos of people who play one of 11 instruments, `clips/<instrument>/<id>*.mp4` (MUSIC-21: of 21).

`anno/music_solo.csv` has a heading, and a row for each video: id, instrument and more. Every fifth video of
those that are there, by id, is one to test on: of the paper's 448, 90.

Published splits go before that: `anno/train.csv`, and `anno/test.csv` or else `anno/val.csv`, in the form of
Sound of Pixels (Zhao et al. 2018), `<folders>/<instrument>/<id>.mp3` and more. `anno/test_sep.csv` may list
the mixtures that are judged, two such files each (Tian et al. 2021; Chen et al. 2023).
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path, PurePosixPath

from ..listing import Listing, check_class, check_fields, check_video, rows, videos
from ..table import Clip

LIST, LIST_21 = Path("anno/music_solo.csv"), Path("anno/music21_solo.csv")
TRAIN, TESTS = Path("anno/train.csv"), (Path("anno/test.csv"), Path("anno/val.csv"))
MIXTURES = Path("anno/test_sep.csv")
TEST_EVERY = 5


def read(root: str | Path, *, list_: Path = LIST) -> Listing:
    """The clips that are there, labelled "class" by the sorted instruments of the lists; all clips of a video
    are in one split.
    """
    listing = Listing("MUSIC" if list_ == LIST else "MUSIC-21", Path(root))
    if (listing.root / TRAIN).exists():
        splits, listed = _read_published(listing)
    else:
        splits, listed = {}, dict(rows(listing, listing.root / list_, _parse))
    instruments = sorted(set(listed.values()))
    listing.classes = {"class": tuple(instruments)}
    numbers, there = {name: number for number, name in enumerate(instruments)}, videos(listing)
    clips, extra = defaultdict(list), []  # of each video, of none
    for inside, path in there.items():
        folder, _, name = inside.partition("/")
        video = _video_of(folder, name, listed)
        if video is None or not name.endswith(".mp4"):
            extra.append(inside)
        else:
            clips[video].append(path)
    for is_there in True, False:  # the split is one of what exists, and of what does not
        for number, video in enumerate(v for v in sorted(listed) if (v in clips) == is_there):
            split = splits.get(video, "train" if number % TEST_EVERY else "test")
            labels = {"class": numbers[listed[video]]}
            listing.expect(split, video, labels, clips[video] if is_there else [])
    listing.count_extra(extra)
    return listing


def read_mixtures(listing: Listing, clips: Sequence[Clip]) -> Iterator[tuple[Clip, Clip]]:
    """The mixtures of the list that can be made of the first clip of each video; what others lack is missing
    in the listing, whose split "test" counts them.
    """
    pairs = [pair for _, *pair in rows(listing, listing.root / MIXTURES, partial(_parse_mixture, count()))]
    named, first = {video: instrument for pair in pairs for video, instrument in pair}, {}
    for clip in clips:
        first.setdefault(_video_of(clip.path.parent.name, clip.path.name, named), clip)
    listing.expected["test"] = len(pairs) + len(listing.wrong)
    for pair in pairs:
        if lacking := [video for video, _ in pair if video not in first]:
            listing.missing.setdefault("test", []).append(lacking[0])
        else:
            yield tuple(first[video] for video, _ in pair)


def _read_published(listing: Listing) -> tuple[dict[str, str], dict[str, str]]:
    """Video -> split, and video -> instrument."""
    tests = [path for path in TESTS if (listing.root / path).exists()]
    if not tests:
        raise ValueError(f"{listing.root / TRAIN} says what to train on: put test.csv or val.csv beside it")
    splits, listed, listing.test_list = {}, {}, tests[0].name
    for split, path in ("test", tests[0]), ("train", TRAIN):
        for video, instrument in rows(listing, listing.root / path, _parse_published):
            if video in listed:  # what is tested on is not trained on
                listing.wrong.append(f"{path.name}: {video} is in {listing.test_list}, too")
                continue
            splits[video], listed[video] = split, instrument
    return splits, listed


def _video_of(folder: str, name: str, listed: Mapping[str, str]) -> str | None:
    """The longest of the listed videos with whose name that of a file begins, in the folder of its class."""
    beginnings = (name[:length] for length in range(len(name), 0, -1))
    return next((v for v in beginnings if listed.get(v, "").replace(" ", "_") == folder), None)


def _parse(fields: list[str]) -> tuple[str, str]:
    """Video, instrument."""
    if len(fields) < 2:
        raise ValueError(f"{len(fields)} fields, not 2 or more")
    return check_video(fields[0]), check_class(fields[1])


def _parse_published(fields: list[str]) -> tuple[str, str]:
    """The same of a path, of which only the end matters: no file is looked for by it."""
    *before, folder, name = "", "", *PurePosixPath(fields[0]).parts
    if ".." in before:
        raise ValueError(f"{fields[0]!r} leads upwards")
    return check_video(PurePosixPath(name).stem), check_class(folder).replace("_", " ")


def _parse_mixture(numbers: Iterator[int], fields: list[str]) -> tuple[int, tuple[str, str], tuple[str, str]]:
    """A number, as mixtures repeat, and video and instrument of both."""
    check_fields(fields, 2)
    return next(numbers), _parse_published(fields[:1]), _parse_published(fields[1:])
