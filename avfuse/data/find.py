"""A folder as clips to train on and clips to measure on, whichever data set it holds.

    found = find_data(folder)
    found.train, found.test, found.coverage

A folder with a manifest (`python -m avfuse.data check`) is read from that alone.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

from ..checks import check_choice
from ..choices import DataSet, Demo
from ..files import address, printable, some
from ..progress import progress_bar
from . import manifest, sounding_shapes
from .clips import MEMORY
from .container import ClipError, Streams
from .hold_out import Sides, hold_out
from .listing import SOUNDS, SUFFIXES, Listing
from .manifest import Manifest
from .sets import audioset, folders, music, vggsound
from .table import Clip, ClipTable
from .workers import WorkerFailure, WorkerPool

DEMOS: dict[Demo, tuple[Path, dict]] = {  # their folders, and their settings
    "binding": (Path("data/sounding-shapes"), dict(scene="binding")),
    "many": (Path("data/sounding-shapes-2048"), dict(scene="binding", train=2048)),  # 256 teach no binding
    "solos": (Path("data/sounding-shapes-solos"), dict(scene="binding", objects=1, train=2048)),
    "synchrony": (Path("data/synchrony"), dict(scene="synchrony", train=2048, test=512, size=64)),
}
DATA_SETS = get_args(DataSet)
READERS = {
    "vggsound": vggsound.read,
    "audioset": audioset.read,
    "music": partial(music.read, list_=music.LIST),
    "music21": partial(music.read, list_=music.LIST_21),
    "sounding-shapes": sounding_shapes.read,
    "folder": folders.read,
}
LISTS = {  # by which data sets are recognised
    vggsound.LIST: "vggsound",
    audioset.CLASS_LIST: "audioset",
    music.TRAIN: "music",
    music.LIST: "music",
    music.LIST_21: "music21",
}
FROM = {"sounding-shapes": "manifest.jsonl", "folder": "the names of folders"}  # where there is no list


class Found(NamedTuple):
    """The clips of a data set, and what was found when looking for them."""

    train: Sequence[Clip]
    test: Sequence[Clip]
    test_name: str  # what to call the latter
    unreadable: list[ClipError]
    looked_at: int  # files
    classes: dict[str, tuple[str, ...]]  # the names of the values of each label
    coverage: dict[str, tuple[int, int]] = {}  # "train", "test": clips used, and that there should be
    held_out: bool = False  # whether the clips to test on are out of those to train on, see `hold_out`


def probe(clip: Clip) -> Streams | ClipError:
    """What a clip holds, by its header."""
    try:
        with clip.open() as reader:
            return reader.streams
    except ClipError as error:
        return error


def by_name(clip: Clip) -> Streams:
    """What a clip may hold, by its name: it is not opened."""
    return Streams(clip.path.name.lower().endswith(SUFFIXES), True, 0.0, 0.0)


def find_data(
    folder: str | Path | None,
    say: Callable[[str], object] = print,
    *,
    demo: Demo = "binding",
    data_set: str = "auto",
    train_split: str = "",
    missing: str = "drop",
    test_share: float = 0.0,
    seed: int = 0,
    before: Sides | None = None,
    progress: bool = True,
    workers: int = 8,
    timeout: float = 60.0,
    look: Callable[[Clip], Streams | ClipError] = probe,
) -> Found:
    """The clips of a data set to train on and to test on: by its manifest if it has one, else by its files.

    Splits whose names end in "train" are to train on, "test" or "eval" to test on. Without either of these,
    a share of the clips is held out, or, with `test_share=0`, the training clips are measured on.

    Args:
        folder: VGGSound, AudioSet, MUSIC, Sounding Shapes, shards of these, or any videos, which train/ and
            test/ inside the folder part into the splits; or the address of a folder that has a manifest; None
            is the demo, which is built if need be.
        say: what is found is told through it, line by line.
        demo: which one, if there is no folder.
        data_set: how the folder is laid out, one of `DATA_SETS`: its manifest is then ignored. "auto" tells
            by its files, and uses the manifest.
        train_split: the one split to train on where there are several, such as "balanced_train" of AudioSet.
        missing: what becomes of clips without sound or without pictures, "drop" or "keep".
        test_share: share of the clips to hold out where no split is to test on, see `hold_out`.
        seed: of the draw of these.
        before: the sides on which a run had its clips, where they stay when clips are held out.
        progress: show a progress bar.
        workers: processes that open the files, which may crash or hang them; 0 opens them in this process.
        timeout: seconds after which a file that is still being opened is given up as unreadable.
        look: tells what a clip holds of which no manifest does: `probe` opens it, `by_name` does not.

    Raises:
        ValueError: an argument is none of its choices, there is no such split, or the folder is not laid out
            as its data set should be, or is one of videos and holds no clip to use.
    """
    check_choice("missing", missing, ("drop", "keep"))
    check_choice("data_set", data_set, DATA_SETS)
    root = build_demo(demo, progress) if folder is None else Path(folder)
    is_checked = data_set == "auto" and manifest.has_manifest(root)
    data_set = recognise(root) if data_set == "auto" else data_set
    listing = Manifest("", root) if is_checked else READERS[data_set](root)
    sides = _sides(root, listing.expected, train_split)
    options = dict(missing=missing, progress=progress, workers=workers, timeout=timeout, look=look)
    scans = scan(listing, sides, **options)
    if data_set == "folder" and not is_checked:
        _check_folder(listing, scans)
    is_here = is_checked and not address(root)
    if is_here and (stale := _stale(root, listing, data_set, scans)):  # no reason to refuse a run its clips
        say(f"WARNING: {printable(stale)}, which is used as it is: {printable(_cure(root, scans))}")
    tables, held_out = {side: scanned.clips for side, scanned in scans.items()}, ""
    if test_share and "test" not in tables:
        known = before.of(tables["train"], root) if before else []
        held_out = before.said if any(known) else f"held-out clips (a share of {test_share:g}, seed {seed})"
        tables |= _hold_out(root, tables["train"], test_share, seed, known, say)
    of_sides = [f"{side}: " * (len(scans) > 1) + scanned.summary() for side, scanned in scans.items()]
    where = manifest.FILE if is_checked else _list(root, data_set)
    for line in [*listing.summary(), *of_sides, *_origins(root, listing, sides, data_set, where)]:
        say(printable(line))
    return _found(listing, sides, scans, tables, held_out)


def _found(
    listing: Listing, sides: dict[str, str], scans: dict, tables: dict[str, ClipTable], held_out: str
) -> Found:
    """The clips of each side, and how many of those that there should be; `held_out` says by what, if any."""
    test_name = f"clips of {listing.test_list}" if listing.test_list else "held-out clips"
    coverage = {}
    for side, scanned in scans.items():
        there_should_be = sum(listing.expected[split] for split in sides if sides[split] == side)
        coverage[side] = len(scanned.clips), there_should_be or scanned.looked_at
    if is_held_out := "test" in tables.keys() - scans.keys():
        there, expected = coverage["train"]
        held = len(tables["test"])
        coverage = dict(train=(there - held, expected - held), test=(held, held))
        test_name = held_out
    return Found(
        train=tables["train"],
        test=tables.get("test", tables["train"]),
        test_name=test_name if "test" in tables else "training clips",
        unreadable=listing.unlisted + [error for scanned in scans.values() for error in scanned.unreadable],
        looked_at=len(listing.unlisted) + sum(scanned.looked_at for scanned in scans.values()),
        classes=tables["train"].classes,
        coverage={"test": coverage["train"]} | coverage,
        held_out=is_held_out,
    )


def build_demo(demo: Demo, progress: bool) -> Path:
    """The folder of a demo's data, which are built if they are not."""
    check_choice("demo", demo, tuple(DEMOS))
    folder, settings = DEMOS[demo]
    return sounding_shapes.generate(folder, progress=progress, **settings)


def _hold_out(
    root: Path,
    clips: ClipTable,
    share: float,
    seed: int,
    known: list[str | None],
    say: Callable[[str], object],
) -> dict[str, ClipTable]:
    """Both sides of clips that no list and no folder parts, which is told; {} of a single recording."""
    base = folders.split_folders(root)["train"]
    train, test = hold_out(clips, base, share=share, seed=seed, sides=known)
    if not test:
        return {}
    drawn = f"--test-share {share:g}, by the names of recordings and --seed {seed}"
    if any(known):
        others = "" if all(known) else f", others: {drawn}"
        drawn = f"{sum(map(bool, known))} clips stay on the side that they had{others}"
    held = f"{len(test)} of {len(clips)} are held out, {len(test) / len(clips):.1%}"
    say(printable(f"{root} names no clips to test on: {held} ({drawn})"))
    return dict(train=train, test=test)


def _origins(root: Path, listing: Listing, sides: dict[str, str], data_set: str, where: str) -> Iterator[str]:
    """Where the splits of a data set come from, unless clips are held out, and its labels, if it has any."""
    parts = folders.split_folders(root).items() if data_set == "folder" else ()
    called = {split: f"{folder.name}/" for split, folder in parts if folder != root}  # not of shards
    by_side = {side: [called.get(s, s) for s in sides if sides[s] == side] for side in ("train", "test")}
    if by_side["test"]:
        train, test = (some(names, most=9) for names in by_side.values())
        yield f"splits: {train} to train on, {test} to test on, by {listing.test_list or where}"
    if listing.classes:
        labels = [f"{name} ({len(names)} classes)" for name, names in listing.classes.items()]
        yield f"labels: {some(labels, most=9)}, by {where}"


# --- how a folder is laid out -------------------------------------------------------------------------------


def list_data(root: str | Path, data_set: str = "auto") -> Listing:
    """A data folder by its lists and file names, whatever its manifest says; nothing is opened."""
    root = Path(root)
    check_choice("data_set", data_set, DATA_SETS)
    return READERS[recognise(root) if data_set == "auto" else data_set](root)


def recognise(root: Path) -> str:
    """Which of `DATA_SETS` a folder is, by its files."""
    for path, name in LISTS.items():
        if (root / path).exists():
            return name
    return "sounding-shapes" if sounding_shapes.is_built(root) else "folder"


def _list(root: Path, data_set: str) -> str:
    """The file, or what stands for it, that gives a data set its splits and labels."""
    lists = (str(path) for path, name in LISTS.items() if name == data_set and (root / path).exists())
    return FROM.get(data_set) or next(lists, "its lists")


def _sides(root: Path, splits: Iterable[str], train_split: str) -> dict[str, str]:
    """Split -> "train" or "test", of those that are wanted."""
    splits = list(splits)
    named = some(splits, most=9) or "none"
    train = [split for split in splits if split.endswith("train")]
    if train_split:
        if train_split not in splits:
            raise ValueError(f"train_split must be one of {named}, got {train_split!r}")
        train = [train_split]
    if not train:
        raise ValueError(f"folder {printable(root)} has no clip to train on: its splits are {named}")
    return dict.fromkeys(train, "train") | {
        split: "test" for split in splits if split in ("test", "eval") and split not in train
    }


def _check_folder(listing: Listing, scans: dict[str, "Scan"]) -> None:
    """A plain folder has clips for each side, or else it is the wrong one."""
    for side, scanned in scans.items():
        if not scanned.clips:
            where = folders.split_folders(listing.root)[side] if len(scans) > 1 else listing.root
            is_empty = not (scanned.looked_at or listing.links or listing.unlisted)
            seen = f"no file ends in {', '.join(SUFFIXES)}" if is_empty else scanned.summary()
            reasons = "; ".join([seen, *listing.summary()[1:]])  # without the coverage
            raise ValueError(f"folder {where} has no clip to use: {reasons}")


def _stale(root: Path, listing: Manifest, data_set: str, scans: dict[str, "Scan"]) -> str:
    """What is not as the manifest has it; "" if that is not seen."""
    if data_set == "folder":
        parts = folders.split_folders(root)
        if "test" in parts and "test" not in listing.expected:
            return f"{manifest.FILE} was written when {parts['test'].name}/ was no split"
        more = listing.unknown(parts.values(), SUFFIXES + SOUNDS)
        if more:
            where = some([f"{count} in {folder}" for folder, count in more.items()])
            return f"{more.total()} files ({where}) are not in {manifest.FILE}"
    changed = _changed(root, scans.values())
    return f"{changed} has changed since {manifest.FILE} was written" if changed else ""


def _cure(root: Path, scans: dict[str, "Scan"]) -> str:
    """What to do about a manifest that is older than what it tells of."""
    if any(scanned.clips.shards is not None for scanned in scans.values()):
        return f"if they were only copied, touch {root / manifest.FILE}"
    return f"python -m avfuse.data check {root} brings it up to date"


def _changed(root: Path, scans: Iterable["Scan"]) -> Path | None:
    """A list or a folder of clips that is newer than the manifest: one look at each, none at the clips.

    The folder `root` itself is left out, as the manifest is written to it.
    """
    folders = {Path(folder) for scanned in scans for folder in scanned.clips.folders}
    folders |= {above for folder in folders for above in folder.parents if root in above.parents}
    written = (root / manifest.FILE).stat().st_mtime_ns
    for path in [root / name for name in (*LISTS, *music.TESTS, *vggsound.OFFICIAL.values())] + sorted(
        folders - {root}
    ):
        try:
            if path.lstat().st_mtime_ns > written:
                return path
        except OSError:  # that it has gone is found out when its clips are read
            continue
    return None


# --- what the clips hold ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scan:
    """What the clips hold: those to use, and by name whatever is amiss with others."""

    clips: ClipTable
    kept: bool  # whether clips that lack a stream are among `clips`
    without_sound: list[Path] = field(default_factory=list)
    without_pictures: list[Path] = field(default_factory=list)
    unreadable: list[ClipError] = field(default_factory=list)  # each has a path and a reason

    def add(self, clip: Clip, streams: Streams | ClipError) -> None:
        """Sort in a clip, given what it holds."""
        if isinstance(streams, ClipError):
            self.unreadable.append(streams)
            return
        if not streams.audio:
            self.without_sound.append(clip.path)
        if not streams.video:
            self.without_pictures.append(clip.path)
        if self.kept or streams.audio and streams.video:
            self.clips.append(clip if clip.streams == streams else replace(clip, streams=streams))

    @property
    def looked_at(self) -> int:
        """How many files the scan has looked at."""
        dropped = set() if self.kept else {*self.without_sound, *self.without_pictures}
        return len(self.clips) + len(self.unreadable) + len(dropped)

    def summary(self) -> str:
        """For people: '3 clips; 1 without sound dropped: street/bikes.mp4'."""
        done = "kept" if self.kept else "dropped"
        broken = self.names([error.path for error in self.unreadable])
        parts = [f"{len(self.clips)} clip" + "s" * (len(self.clips) != 1)]
        for what, names in (
            (f"without sound {done}", self.names(self.without_sound)),
            (f"without pictures {done}", self.names(self.without_pictures)),
            (
                "unreadable",
                [f"{name} ({error.reason})" for name, error in zip(broken, self.unreadable, strict=True)],
            ),
        ):
            if names:
                parts.append(f"{len(names)} {what}: {some(names)}")
        return "; ".join(parts)

    def names(self, paths: list[Path]) -> list[str]:
        """Paths below the data folder: files in two of its folders may be called alike."""
        root = self.clips.root
        return [str(p.relative_to(root)) if root and p.is_relative_to(root) else p.name for p in paths]


def scan(
    listing: Listing,
    sides: dict[str, str],
    *,
    missing: str = "drop",
    progress: bool = True,
    workers: int = 8,
    timeout: float = 60.0,
    look: Callable[[Clip], Streams | ClipError] = probe,
) -> dict[str, Scan]:
    """Looks at what each clip holds, from its header, and sorts out those that cannot be used. Those of which
    it is known are not opened.

    Args:
        listing: the clips; they keep its order.
        sides: split -> the name under which its clips are returned; other splits are passed over.
        missing, progress, workers, timeout, look: as for `find_data`.
    """
    tables = {side: ClipTable(classes=listing.classes, root=listing.root) for side in sides.values()}
    scans = {side: Scan(table, kept=missing == "keep") for side, table in tables.items()}
    there = sum(listing.expected[split] - listing.count_missing().get(split, 0) for split in sides)

    def wanted() -> Iterator[tuple[str, Clip | ClipError]]:
        return ((split, clip) for split, clip in listing.clips() if split in sides)

    unknown = (clip for _, clip in wanted() if isinstance(clip, Clip) and clip.streams is None)
    with WorkerPool(look, workers, timeout=timeout, memory=MEMORY) as pool:
        probed = pool.map(unknown)
        for split, clip in progress_bar(wanted(), total=there, desc="Scanning", unit="clip", shown=progress):
            streams = clip.streams if isinstance(clip, Clip) else clip
            if streams is None:
                streams = next(probed)
            if isinstance(streams, WorkerFailure):
                streams = ClipError(clip.path, streams.reason)
            scans[sides[split]].add(clip, streams)
    return scans
