"""A folder as clips to train on and clips to measure on, whichever data set it holds.

    found = find_data(folder)
    found.train, found.test, found.coverage

A folder with a manifest (`python -m avfuse.data check`) is read from that alone.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from ..checks import check_choice
from ..files import printable
from . import manifest, sounding_shapes
from .clips import Scan, find_clips, scan_clips, walk
from .decode import ClipError
from .listing import Listing, describe_coverage
from .sets import audioset, music, vggsound
from .table import Clip, ClipTable

DEMO = Path("data/sounding-shapes")
DataSet = Literal["auto", "vggsound", "audioset", "music", "music21", "sounding-shapes", "folder"]
DATA_SETS = get_args(DataSet)
SPLITS = ("train", "test")
LISTS = {
    "vggsound": vggsound.LIST,
    "audioset": audioset.CLASS_LIST,
    "music": music.LIST,
    "music21": music.LIST_21,
}


class Found(NamedTuple):
    """The clips of a data set, and what was found when looking for them."""

    train: Sequence[Clip]
    test: Sequence[Clip]
    test_name: str  # what to call the latter
    unreadable: list[ClipError]
    looked_at: int  # files
    classes: dict[str, tuple[str, ...]]  # the names of the values of each label
    coverage: dict[
        str, tuple[int, int]
    ] = {}  # "train", "test": clips that can be used, and that there should be


def find_data(
    folder: str | Path | None,
    say: Callable[[str], object] = print,
    *,
    data_set: str = "auto",
    train_split: str = "",
    missing: str = "drop",
    progress: bool = True,
    workers: int = 8,
    timeout: float = 60.0,
) -> Found:
    """Looks through a data set, its manifest or else its files; None is the demo's, which is built first.

    Splits whose names end in "train" are trained on; "test" or "eval" is measured on, or the training clips
    where there is neither.

    Args:
        folder: VGGSound, AudioSet, MUSIC, Sounding Shapes, shards of these, or any videos, which train/ and
            test/ inside the folder part into the splits.
        say: what is found is told through it, line by line.
        data_set: how the folder is laid out, one of `DATA_SETS`, for which its manifest is passed over;
            "auto" tells by its files.
        train_split: the one split to train on where there are several, such as "balanced_train" of AudioSet.
        missing: what becomes of clips without sound or without pictures, "drop" or "keep".
        progress, workers, timeout: of the scan of a folder without a manifest, as for `find_clips`.

    Raises:
        ValueError: an argument is none of its choices, there is no such split, or the folder is not laid out
            as its data set should be, or holds no clip to use.
    """
    root = sounding_shapes.generate(DEMO) if folder is None else Path(folder)
    check_choice("missing", missing, ("drop", "keep"))
    check_choice("data_set", data_set, DATA_SETS)
    options = dict(missing=missing, progress=progress, workers=workers, timeout=timeout)
    if data_set == "auto" and manifest.has_manifest(root):
        header = manifest.read_header(root)
        name, classes, expected = header.name, header.classes, header.expected
        said = [f"{describe_coverage(name, expected, header.missing)}, as {manifest.FILE} has it"]
        sides = _sides(root, expected, train_split)
        scans = _read_manifest(root, sides, classes, kept=missing == "keep")
        changed = _changed(root, scans.values())
        if changed is not None:  # a run may go on with the clips that it began with: it is not refused
            said.append(
                f"WARNING: {printable(str(changed))} has changed since {manifest.FILE} was written, which is"
                f" used as it is: python -m avfuse.data check {printable(str(root))} brings it up to date"
            )
    elif (data_set if data_set != "auto" else recognise(root)) == "folder":
        folders = _folders(root)
        name, classes, expected, said = str(root), {}, {}, []
        sides = _sides(root, folders, train_split)
        scans = {sides[split]: find_clips(folder, **options) for split, folder in folders.items()}
    else:
        listing = list_data(root, data_set)
        name, classes, expected, said = listing.name, listing.classes, listing.expected, listing.summary()
        sides = _sides(root, expected, train_split)
        clips = {side: [] for side in SPLITS if side in sides.values()}
        for split, side in sides.items():
            clips[side] += listing.found.get(split, [])
        scans = {side: scan_clips(clips[side], **options) for side in clips}
    for line in said:
        say(line)
    for side, scan in scans.items():
        say(f"{side}: {scan.summary()}" if len(scans) > 1 else scan.summary())
    if len(scans) == 1:
        say("no clips to test on: what is measured are the training clips themselves")
    tables, coverage = {}, {}
    for side, scan in scans.items():
        tables[side] = _table(scan.clips, classes)
        there_should_be = sum(expected.get(split, 0) for split in sides if sides[split] == side)
        coverage[side] = len(tables[side]), there_should_be or scan.looked_at
    return Found(
        train=tables["train"],
        test=tables.get("test", tables["train"]),
        test_name="held-out clips" if "test" in tables else "training clips",
        unreadable=[error for scan in scans.values() for error in scan.unreadable],
        looked_at=sum(scan.looked_at for scan in scans.values()),
        classes={label: tuple(names) for label, names in classes.items()},
        coverage={"test": coverage["train"]} | coverage,
    )


def list_data(root: str | Path, data_set: str = "auto") -> Listing:
    """A data folder by its lists and file names, whatever its manifest says; nothing is opened.

    Raises:
        ValueError: `data_set` is none of `DATA_SETS`, or the folder is not laid out as that one should be.
    """
    root = Path(root)
    check_choice("data_set", data_set, DATA_SETS)
    data_set = recognise(root) if data_set == "auto" else data_set
    if data_set == "vggsound":
        return vggsound.read(root)
    if data_set == "audioset":
        return audioset.read(root)
    if data_set in ("music", "music21"):
        return music.read(root, list_=music.LIST if data_set == "music" else music.LIST_21)
    listing = Listing(sounding_shapes.NAME if data_set == "sounding-shapes" else root.name, root)
    if data_set == "sounding-shapes":
        listing.classes = sounding_shapes.CLASSES
        found = {split: sounding_shapes.clips(root, split) for split in SPLITS}
    else:
        found = {}
        for split, folder in _folders(root).items():
            paths, links, unlisted = walk(folder)
            found[split] = [Clip(path) for path in sorted(paths)]
            listing.links += links
            listing.unlisted += unlisted
    listing.found = {split: clips for split, clips in found.items() if clips}
    listing.expected = Counter({split: len(clips) for split, clips in listing.found.items()})
    return listing


def recognise(root: Path) -> str:
    """Which of `DATA_SETS` a folder is, by its files."""
    for name, path in LISTS.items():
        if (root / path).exists():
            return name
    return "sounding-shapes" if sounding_shapes.is_built(root) else "folder"


def _folders(root: Path) -> dict[str, Path]:
    """The folders of the splits in a plain folder of videos."""
    if not root.is_dir():
        raise ValueError(f"folder {root} " + ("is a file" if root.exists() else "does not exist"))
    inside = {split: root / split for split in SPLITS}
    return inside if all(folder.is_dir() for folder in inside.values()) else {"train": root}


def _sides(root: Path, splits: Iterable[str], train_split: str) -> dict[str, str]:
    """Split -> "train" or "test", of those that are wanted."""
    splits = list(splits)
    train = [split for split in splits if split.endswith("train")]
    if train_split:
        if train_split not in splits:
            raise ValueError(f"train_split must be one of {', '.join(splits)}, got {train_split!r}")
        train = [train_split]
    if not train:
        raise ValueError(
            f"folder {root} has no clip to train on: its splits are {', '.join(splits) or 'none'}"
        )
    return dict.fromkeys(train, "train") | {
        split: "test" for split in splits if split in ("test", "eval") and split not in train
    }


def _read_manifest(root: Path, sides: dict[str, str], classes: dict, *, kept: bool) -> dict[str, Scan]:
    """The scans that the manifest stands for. Clips that it knows to be broken are not opened again; one that
    has gone since is found out when it is read, so that the data stay those that the run began with.
    """
    scans = {
        side: Scan(ClipTable(classes=classes, root=root), [], [], [], kept=kept) for side in sides.values()
    }
    for entry in manifest.read_entries(root):
        if entry.split in sides:
            clip = entry.clip(root)
            scans[sides[entry.split]].add(
                clip, ClipError(clip.path, entry.error) if entry.error else clip.streams
            )
    return scans


def _changed(root: Path, scans: Iterable[Scan]) -> Path | None:
    """A list or a folder of clips that is newer than the manifest: one look at each, none at the clips.

    The folder `root` itself is left out, as the manifest is written to it.
    """
    folders = {Path(folder) for scan in scans for folder in scan.clips.folders}
    folders |= {above for folder in folders for above in folder.parents if root in above.parents}
    written = (root / manifest.FILE).stat().st_mtime_ns
    for path in [root / name for name in LISTS.values()] + sorted(folders - {root}):
        try:
            if path.lstat().st_mtime_ns > written:
                return path
        except OSError:  # that it has gone is found out when its clips are read
            continue
    return None


def _table(clips: list[Clip] | ClipTable, classes: dict) -> ClipTable:
    return clips if isinstance(clips, ClipTable) else ClipTable(clips, classes=classes)
