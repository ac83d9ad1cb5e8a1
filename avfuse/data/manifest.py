"""The manifest of a data folder: a line for each clip, written by `python -m avfuse.data check`.

Training reads it instead of opening every file; shards are listed in the same way. It is data of unknown
origin like any other: each line is checked, and no path in it leaves the folder.
"""

import json
import math
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache
from itertools import chain, islice
from pathlib import Path, PurePosixPath

from ..files import address, aside, is_regular, leads_out, printable
from .container import ClipError, Part, Streams
from .listing import Listing, is_run
from .remote import fetch_file
from .table import Clip, has_other_size

FILE = "avfuse-manifest.jsonl"
VERSION = 1


@dataclass(frozen=True)
class Header:
    """The first line: what the clips are of."""

    name: str = ""  # of the data set
    classes: dict = field(default_factory=dict)  # label name -> names of its classes
    expected: dict = field(default_factory=dict)  # split -> clips that its lists name
    missing: dict = field(default_factory=dict)  # split -> how many of these are not there
    test_list: str = ""  # the file that names the clips to test on, where a data set has several such
    manifest: int = VERSION

    def __post_init__(self):
        for each in fields(self):
            if not isinstance(getattr(self, each.name), each.type):
                raise TypeError(f"{each.name} is {getattr(self, each.name)!r}")
        for names in self.classes.values():
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise TypeError("classes are no lists of names")
        if not all(type(count) is int for count in (*self.expected.values(), *self.missing.values())):
            raise TypeError("expected or missing clips are no numbers")


@dataclass(frozen=True)
class Entry:
    """A clip, as it was when it was checked."""

    path: str  # relative to the folder of the manifest, with "/"; of a member of a shard: shard/member
    split: str
    labels: dict
    bytes: int
    modified: int  # nanoseconds since 1970, of the file or shard
    start: int = -1  # byte of the shard where it begins; -1: it is a file of its own
    source: str = ""  # of a member of a shard, its path in the folder that the shard was made of
    sha256: str = ""  # of its bytes; empty where not even these could be read
    error: str | None = None  # why it cannot be decoded
    video: bool = False
    audio: bool = False
    seconds: float = 0.0
    fps: float = 0.0
    width: int = 0  # pixels
    height: int = 0
    sample_rate: int = 0  # Hz
    key_frame_every: int = 0  # frames, where key frames are farthest apart
    peak: float = 0.0  # of its sound, mixed to mono: 1 is full scale
    loudest: float | None = None  # peak of its loudest channel; None: not known
    motion: float | None = None  # grey levels by which its pictures change; None: not known
    every_picture: bool = True  # whether all were decoded, or key frames only
    picture_end: float = 0.0  # seconds
    sound_end: float = 0.0
    goes_back: bool = False  # whether its times start again
    generation: int = 0  # of the reader that looked at it

    def __post_init__(self):
        for name, wanted in wanted_types(type(self)):
            value = getattr(self, name)
            if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
                raise ValueError(f"{name} is {value!r}")
        if not (math.isfinite(self.seconds) and 0 <= self.fps < math.inf and 0 <= self.bytes < 2**62):
            raise ValueError(f"seconds {self.seconds}, fps {self.fps}, bytes {self.bytes}")
        os.fsencode(self.path + self.source)  # or they are no paths
        if not re.fullmatch(r"[\w-]{0,64}", self.split):
            raise ValueError(f"split is {self.split!r}")
        path = PurePosixPath(self.path)
        for inner in (path, PurePosixPath(self.source)) if self.source else (path,):
            if inner.is_absolute() or ".." in inner.parts or not inner.parts or "\0" in str(inner):
                raise ValueError(f"path {str(inner)!r} leaves the data folder")
        if self.start >= 0 and (len(path.parts) < 2 or self.start > 2**62):
            raise ValueError(f"path {self.path!r} names no member of a shard")
        for name, label in self.labels.items():
            several = label if isinstance(label, (list, tuple)) else [label]
            if not all(type(number) is int and 0 <= number < 2**31 for number in several):
                raise ValueError(f"label {printable(name)} is {label!r}")

    def clip(self, root: Path) -> Clip:
        """The clip, for a manifest in the folder `root`."""
        path, part = root / self.path, None
        if self.start >= 0:
            part = Part(path.parent, self.start, self.bytes)
        if address(root):
            part = Part(path.parent if part else path, max(0, self.start), self.bytes, self.sha256)
        return Clip(
            path=path,
            labels={name: tuple(v) if isinstance(v, list) else v for name, v in self.labels.items()},
            streams=Streams(self.video, self.audio, float(self.seconds), float(self.fps)),
            part=part,
            size=self.bytes,
            root=root,
            source=self.source,
        )


@cache
def wanted_types(kind: type) -> list[tuple[str, type]]:
    """The fields of a dataclass, and what may stand in them: of a float, too, 4 for 4.0, as in JSON."""
    floats = (float, float | None)
    return [(each.name, each.type | int if each.type in floats else each.type) for each in fields(kind)]


@dataclass
class Manifest(Listing):
    """A data set as its manifest describes it; `root` is a folder or an address.

    A clip that the manifest calls broken is opened again only if its size has changed, as it may have been
    mended. Whether other clips have changed or gone shows when they are read, so that a run that is resumed
    has the clips that it began with.
    """

    def __post_init__(self):
        is_away = address(self.root) is not None
        self.copy, self.file = fetch_file(self.root / FILE, self.root) if is_away else (None, None)
        self.header = read_header(self.root, self.file)
        self.name, self.classes, self.expected = self.header.name, self.header.classes, self.header.expected
        self.test_list = self.header.test_list
        self.counts: Counter[str] = Counter()  # folder -> clips, once all have been read
        # One answer for both passes that `scan` makes side by side: a clip may be mended between them.
        self.is_mended = cache(has_other_size)

    def clips(self):
        exchanged: dict[Path, bool] = {}
        counts: Counter[str] = Counter()
        for entry in read_entries(self.root, self.file):
            counts[os.path.dirname(entry.path)] += 1
            clip, error = entry.clip(self.root), entry.error
            if error and clip.part is None and self.is_mended(clip.path, entry.bytes):
                clip, error = replace(clip, streams=None, size=None), None
            if clip.part is not None and not error:
                shard = clip.part.file
                if shard not in exchanged:
                    exchanged[shard] = describes_another(shard, entry)
                error = f"{shard.name} is not the shard that it was" if exchanged[shard] else None
            yield entry.split, ClipError(clip.path, error) if error else clip
        self.counts = counts

    def unknown(self, folders: Iterable[Path], suffixes: tuple[str, ...]) -> Counter:
        """Folder -> how many files with these suffixes it holds beyond those in the manifest; of these
        folders and all below. Names are looked at, and no file.
        """
        more: Counter[str] = Counter()
        for parent, below, files in chain.from_iterable(map(os.walk, folders)):
            below[:] = [] if is_run(files) else [name for name in below if not name.startswith(".")]
            files = [] if is_run(files) else files
            folder = os.path.relpath(parent, self.root)
            known = self.counts["" if folder == "." else Path(folder).as_posix()]
            videos = [Path(parent, name) for name in files if name.lower().endswith(suffixes)]
            if len(videos) > known:
                hidden = sum(
                    path.name.startswith((".", "avfuse-")) or leads_out(path, self.root) for path in videos
                )
                more[folder] = max(0, len(videos) - hidden - known)
        return +more

    def count_missing(self):
        return self.header.missing

    def coverage(self):
        return f"{super().coverage()}, as {FILE} has it"


def describes_another(shard: Path, entry: Entry) -> bool:
    """Whether a shard, where it describes its first clip, which `entry` is, tells of another: shards may have
    been exchanged. One that has gone or is damaged tells nothing.
    """
    try:
        with tarfile.open(shard, "r:") if is_regular(shard) else nullcontext(()) as members:
            for member in islice(members, 2):  # the clip and its description
                if member.name == f"{PurePosixPath(entry.path).stem}.json" and member.isreg():
                    return json.load(members.extractfile(member))["sha256"] != entry.sha256
    except (OSError, ValueError, EOFError, KeyError, TypeError, RecursionError, tarfile.TarError):
        pass
    return False


def read_header(root: Path, file: Path | None = None) -> Header:
    """The first line of the folder's manifest, of which `file` may be a copy."""
    if leads_out(root / FILE, root):
        raise ValueError(f"{printable(root / FILE)} leads out of the data folder: it is not read")
    with open(file or root / FILE, encoding="utf-8", errors="replace") as lines:
        try:
            header = Header(**json.loads(next(lines, "")))
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(
                f"{printable(root / FILE)} is no manifest ({printable(error)}): `check` writes a new one"
            ) from error
    if header.manifest != VERSION:
        raise ValueError(
            f"{printable(root / FILE)} is of version {header.manifest}, not {VERSION}: check again"
        )
    return header


def read_entries(root: Path, file: Path | None = None) -> Iterator[Entry]:
    """The clips of the folder's manifest, in order."""
    with open(file or root / FILE, encoding="utf-8", errors="replace") as lines:
        next(lines, None)
        for number, line in enumerate(lines, start=2):
            try:
                yield parse(line)
            except ValueError as error:
                raise ValueError(
                    f"{printable(root / FILE)}, line {number}: {printable(error)}: check the folder again"
                ) from error


def parse(line: str) -> Entry:
    """An entry from its line."""
    try:
        return Entry(**json.loads(line))
    except (TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"it is no entry ({printable(error)})") from error


def write(root: Path, header: Header, entries: Iterable[Entry]) -> Path:
    """Write the folder's manifest: the old one is there until the new one is whole."""
    with aside(root / FILE, synced=True) as partial, open(partial, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(header)) + "\n")
        for entry in entries:
            file.write(dump(entry) + "\n")
    return root / FILE


def dump(entry: Entry) -> str:
    return json.dumps({name: value for name, value in vars(entry).items() if name != "source" or value})


def has_manifest(root: Path) -> bool:
    """Whether a folder has one; an address must."""
    return address(root) is not None or (root / FILE).is_file()
