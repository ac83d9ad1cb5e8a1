"""A data set by its lists and by what is there, before anything is opened; and what its readers share.

Lists are untrusted. A row names a clip only if the walk through the data folder has met that very file, so no
row can name another; rows that are wrong are kept by name, and never stand in for each other.
"""

import csv
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TypeVar

from ..files import leads_out, printable, some
from .container import ClipError
from .table import Clip

SUFFIXES = tuple(
    ".mp4 .m4v .mov .mkv .webm .avi .flv .ts .mts .m2ts .mpg .mpeg .vob .wmv .asf .ogv .3gp .3g2".split()
)
SOUNDS = tuple(".wav .flac .mp3 .m4a .aac .ogg .oga .opus .wma .mka".split())
VIDEO = re.compile(r"[\w-]{1,64}")  # its name, which becomes a part of a path
# Of the first column of a list, above its first row.
HEADINGS = frozenset("index id yid ytid vid video video_id youtube_id path file filename".split())
Row = TypeVar("Row", bound=tuple)  # begins with what no two rows have in common


@dataclass
class Listing:
    """A data set by its lists and by what is there: nothing has been opened yet.

    Splits have the names that the data set gives them; those to train on end in "train".
    """

    name: str
    root: Path
    classes: dict[str, tuple[str, ...]] = field(default_factory=dict)  # label name -> names of its classes
    found: dict[str, list[Clip]] = field(default_factory=dict)
    expected: Counter = field(default_factory=Counter)  # split -> clips that the lists name
    missing: dict[str, list[str]] = field(default_factory=dict)  # split -> what of that is not there
    wrong: list[str] = field(default_factory=list)  # rows that name no clip, and why
    notes: list[str] = field(default_factory=list)
    links: list[Path] = field(default_factory=list)  # to folders, or out of this one, which are not followed
    unlisted: list[ClipError] = field(default_factory=list)  # folders that cannot be listed
    extra: int = 0  # videos that no row names
    test_list: str = ""  # the file that names the clips to test on, where a data set has several such
    passed_over: Counter = field(default_factory=Counter)  # suffix -> files that are not looked at

    def expect(self, split: str, name: str, labels: dict, paths: Iterable[Path | None]) -> None:
        """Count what a list names, and take its files, those that are not None; with none it is missing, and
        counts as one clip.
        """
        clips = [Clip(path, labels) for path in paths if path is not None]
        self.expected[split] += max(1, len(clips))
        self.found.setdefault(split, []).extend(clips)
        if not clips:
            self.missing.setdefault(split, []).append(name)

    def count_extra(self, videos: Sequence[str]) -> None:
        """Videos that no row names; and a hint, where most rows miss files that are there by other names."""
        self.extra = len(videos)
        missing = [name for names in self.missing.values() for name in names]
        if 2 * len(missing) <= sum(self.expected.values()):
            return
        sample = missing[:: 1 + len(missing) // 20]
        ids = [re.sub(r"(_[0-9]+)+$", "", PurePosixPath(name).stem) for name in sample]
        alike = [next((video for video in videos if id_ in video), None) for id_ in ids]
        pairs = [pair for pair in zip(sample, alike, strict=True) if pair[1]]
        if 2 * len(pairs) > len(sample):
            name, video = map(printable, pairs[0])
            self.notes.append(
                f"most clips have other names than the lists give them: {name} is not there, but {video} is;"
                f" rename them, or look at the layout in the documentation of this data set"
            )

    def clips(self) -> Iterator[tuple[str, Clip | ClipError]]:
        """Every clip with its split; an error for one that is known to be unreadable."""
        return ((split, clip) for split, clips in self.found.items() for clip in clips)

    def count_missing(self) -> dict[str, int]:
        """Split -> how many clips are not there."""
        return {split: len(names) for split, names in self.missing.items()}

    def coverage(self) -> str:
        """'VGGSound: train 9 of 10 clips found (90.0%), test 5 of 5 clips found (100.0%)'."""
        shares, missing = [], self.count_missing()
        for split, count in self.expected.items():
            found = count - missing.get(split, 0)
            shares.append(f"{split} {found} of {count} clips found ({found / max(1, count):.1%})")
        return f"{self.name}: {', '.join(shares) or 'no clips'}"

    def summary(self) -> list[str]:
        """For people, a line each: coverage, then what is amiss."""
        lines = [self.coverage(), *self.notes]
        for what, names, _ in self.amiss():
            lines.append(f"{len(names)} {what}: {some(names, separator='; ')}")
        if self.extra:
            lines.append(f"{self.extra} videos are in no list, and not used")
        return lines + self.others()

    def others(self) -> list[str]:
        """For people: 'passed over by suffix: 16 .mpg, 2 .txt'; no line if nothing was."""
        order = sorted(self.passed_over.items(), key=lambda item: (-item[1], item[0]))
        counts = [f"{count} {suffix or 'without one'}" for suffix, count in order]
        return [f"passed over by suffix: {some(counts, most=20)}"] if counts else []

    def amiss(self) -> list[tuple[str, Sequence, str]]:
        """What is amiss with lists and folders: what it is, the names, and what to do about it."""
        amiss = (
            ("wrong rows in the lists, not used", self.wrong, "correct them, or fetch the list again"),
            (
                "links to folders or out of the data folder, not followed",
                self.links,
                "copy what they lead to into the folder, or mount it there",
            ),
            (
                "folders that cannot be listed",
                self.unlisted,
                "allow reading them, and repeat this command",
            ),
        )
        return [row for row in amiss if row[1]]


def rows(listing: Listing, path: Path, parse: Callable[[list[str]], Row]) -> Iterator[Row]:
    """The rows of a CSV file as `parse` makes them of their fields, each row once. Lines that are no rows,
    and those of which `parse` says so by a ValueError, become `listing.wrong`; so do repeated ones.
    """
    if leads_out(path, listing.root):
        raise ValueError(f"{path} leads out of the data folder {listing.root}: it is not read")
    if path.exists() and not path.is_file():  # reading from a pipe would wait for ever
        raise ValueError(f"{path} is not a file")
    before, is_first = {}, True
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):  # parsed one by one: an open quote costs one row
                if not line.strip() or line.startswith("#"):
                    continue
                try:
                    (fields,) = csv.reader([line], skipinitialspace=True, strict=True)
                    fields = [field.strip() for field in fields]
                    is_heading, is_first = is_first and fields[0].lower() in HEADINGS, False
                    if is_heading:  # maybe below a comment
                        continue
                    row = parse(fields)
                    if before.setdefault(row[0], number) != number:
                        raise ValueError(f"names the same clip as line {before[row[0]]}")
                except (csv.Error, ValueError) as error:
                    listing.wrong.append(f"{path.name}, line {number}: {error}")
                    continue
                yield row
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def check_fields(fields: list[str], count: int) -> None:
    if len(fields) != count:
        raise ValueError(f"{len(fields)} fields, not {count}")


def check_video(name: str) -> str:
    if not VIDEO.fullmatch(name):
        raise ValueError(f"{name!r} is no name of a video")
    return name


def check_class(name: str) -> str:
    """The name of a class, which becomes a part of a path."""
    if not name or not name.isprintable() or "/" in name or name.startswith("."):
        raise ValueError(f"{name!r} is no class")
    return name


def videos(listing: Listing) -> dict[str, Path]:
    """The videos in the folder `clips`, by their path inside it."""
    folder = listing.root / "clips"
    if leads_out(folder, listing.root):
        raise ValueError(f"{folder} leads out of the data folder {listing.root}: it is not followed")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not there: it should hold the clips of {listing.name}")
    paths, listing.links, listing.unlisted, listing.passed_over = walk(folder, root=listing.root)
    return {path.relative_to(folder).as_posix(): path for path in paths}


class Files:
    """The videos in the folder `clips` of a data set, for rows that name them."""

    def __init__(self, listing: Listing):
        self.listing, self.there, self.taken, self.refused = listing, videos(listing), set(), 0
        stems = Counter(path.stem for path in self.there.values())
        self.by_stem = {path.stem: path for path in self.there.values() if stems[path.stem] == 1}

    def take(self, path: str, *stems: str) -> Path | None:
        """The file at `path`, or else that of the first of `stems` which a single file anywhere has; None
        if there is neither, or a row before has it: two segments of a video would both match its bare id.
        """
        file = self.there.get(path) or next((self.by_stem[s] for s in stems if s in self.by_stem), None)
        if file in self.taken:
            self.refused += 1
            return None
        if file is not None:
            self.taken.add(file)
        return file

    def count_extra(self) -> None:
        """Tells the listing what no row has taken, and of rows that would take what another has."""
        if self.refused:
            said = f"{self.refused} rows would take the file of a row before, and count as missing"
            self.listing.notes.append(said)
        self.listing.count_extra([name for name, path in self.there.items() if path not in self.taken])


def is_run(names: Collection[str]) -> bool:
    """Whether a folder of these names is that of a run: what it left there, such as sounds, are no clips."""
    return "run.json" in names and not {"metrics.jsonl", ".lock"}.isdisjoint(names)


def walk(
    folder: Path, suffixes: tuple[str, ...] = SUFFIXES, root: Path | None = None
) -> tuple[list[Path], list[Path], list[ClipError], Counter]:
    """Videos in a folder and its sub-folders, links to folders or out of it, which are not followed, both
    sorted; folders that cannot be listed; and how many files have other suffixes, by suffix. Hidden files are
    passed over, as are those that `check` writes. Links to files may lead to anywhere in `root`, the data
    folder.
    """
    paths, links, unlisted, others = [], [], [], Counter()

    def on_error(error: OSError) -> None:
        unlisted.append(ClipError(Path(error.filename), f"cannot be listed: {error.strerror}"))

    for parent, folders, files in os.walk(folder, onerror=on_error):
        if is_run(files) and Path(parent) != Path(folder):
            folders[:], files = [], []
        folders[:] = [name for name in folders if not name.startswith(".")]
        files = [name for name in files if not name.startswith((".", "avfuse-"))]
        videos = [name for name in files if name.lower().endswith(suffixes)]
        others.update(Path(name).suffix.lower() for name in files if not name.lower().endswith(suffixes))
        links += [path for name in folders if (path := Path(parent, name)).is_symlink()]
        for path in (Path(parent, name) for name in videos):
            is_away = path.is_symlink() and leads_out(path, root or folder)
            (links if is_away else paths).append(path)
    return sorted(paths), sorted(links), unlisted, others
