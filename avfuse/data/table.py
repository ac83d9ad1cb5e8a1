"""A clip and what is known of it, and a table of clips that stays small by the million.

A list of a hundred thousand clips takes some 130 MB in every process that reads them; a table about 8 MB.
"""

import json
import os
import struct
import tarfile
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import address, leads_out, printable
from .container import ClipError, Part, Streams
from .decode import ClipReader
from .remote import open_part

KNOWN, VIDEO, AUDIO = 1, 2, 4  # flags of a clip's streams
RECORD = struct.Struct("<IqBddq")  # folder, end of its text, flags, seconds, frames per second, bytes


@dataclass(frozen=True)
class Clip:
    """A video, its labels by name, and what is known of it (None: not known).

    A label is the number of a class, or a tuple of such numbers where a clip may have several.
    """

    path: Path
    labels: dict[str, int | tuple[int, ...]] = field(default_factory=dict)
    streams: Streams | None = None
    part: Part | None = None  # where its bytes lie, if `path` is no file but names a member of an archive
    size: int | None = None  # bytes
    root: Path | None = None  # a folder that it must not lead out of
    source: str = ""  # of one in a shard, what it was called in the folder that the shard was made of

    def name(self, folder: Path) -> str:
        """Its path below a data folder, or below that which its shard was made of."""
        return self.source or os.path.relpath(self.path, folder)

    def open(self) -> ClipReader:
        """A reader of the clip; every data set reads its clips by this, so that each may come from shards.

        Raises:
            ClipError: it cannot be opened, or leads out of its data folder.
        """
        if self.root is not None and leads_out(self.part.file if self.part else self.path, self.root):
            raise ClipError(self.path, "leads out of the data folder")
        if self.part and self.root and address(self.root):
            return open_part(self.path, self.part, self.root)
        if self.part is not None:
            self.check_part(self.part)
        elif self.size is not None and has_other_size(self.path, self.size):
            cure = "check the folder again (python -m avfuse.data check)"
            raise ClipError(self.path, f"is another file than its manifest tells of: {cure}")
        return ClipReader(self.path, self.part)

    def check_part(self, part: Part) -> None:
        """Raises ClipError if before the bytes of the clip stands the header of another: shards that were
        exchanged must not give another clip.
        """
        if not part.file.is_file():
            return
        try:
            with open(part.file, "rb") as shard:
                shard.seek(part.start - tarfile.BLOCKSIZE)
                header = tarfile.TarInfo.frombuf(
                    shard.read(tarfile.BLOCKSIZE), tarfile.ENCODING, "surrogateescape"
                )
        except (OSError, ValueError, tarfile.TarError):
            return  # that it has gone or is damaged is for the reader to say
        if (header.name, header.size) != (self.path.name, part.size):
            raise ClipError(
                self.path, f"{part.file.name} holds another clip there: it is not the shard it was"
            )


def has_other_size(file: Path, size: int) -> bool:
    """Whether a file has another size than it had: what is known of it may be false. One that has gone has
    none.
    """
    try:
        return file.stat().st_size != size
    except (OSError, ValueError):
        return False


class ClipTable(Sequence[Clip]):
    """Clips as packed records: reads like a list of `Clip`, each made when needed. It pickles by value.

    Args:
        clips: to begin with; `append` adds more.
        classes: label name -> the names of its classes, which numbers of clips index.
        root: a folder that the clips must not lead out of; None is no such limit.

    Raises:
        ValueError: clips whose labels have different names, or that name a class there is not.
    """

    def __init__(
        self,
        clips: Iterable[Clip] = (),
        *,
        classes: Mapping[str, Sequence[str]] | None = None,
        root: Path | None = None,
    ):
        self.classes = {name: tuple(names) for name, names in (classes or {}).items()}
        self.root = root
        self._folders, self._files = _Strings(), _Strings()  # the latter are archives
        self._records = bytearray()
        self._texts = bytearray()  # of each clip its name, and what else it has: labels, start in an archive
        self._labels: dict[str, bool] = {}  # name -> whether each clip has a tuple of classes
        self._shards = array("i")  # numbers of archives, as far as the last clip that lies in one
        for clip in clips:
            self.append(clip)

    def append(self, clip: Clip) -> None:
        """Add a clip; its `root` is the table's."""
        if not len(self):
            self._labels = {name: isinstance(label, tuple) for name, label in clip.labels.items()}
        if clip.labels.keys() != self._labels.keys():
            check_labels(self[0], clip)
        for name, value in clip.labels.items():
            self._check(name, value, clip.path)
        folder, name = os.path.split(os.fspath(clip.path))
        more, size = [clip.labels[label] for label in self._labels], clip.size
        if clip.part is not None:
            self._shards.extend([-1] * (len(self) - len(self._shards)))
            self._shards.append(self._files.add(os.fspath(clip.part.file)))
            _, start, size, sha256 = clip.part
            more += [start, sha256, clip.source]
        self._texts += os.fsencode(name)
        if more:
            self._texts += b"\0" + json.dumps(more, separators=(",", ":")).encode()
        streams = clip.streams or Streams(False, False, 0.0, 0.0)
        flags = (clip.streams is not None and KNOWN) | VIDEO * streams.video | AUDIO * streams.audio
        place = self._folders.add(folder), len(self._texts)
        self._records += RECORD.pack(*place, flags, *streams[2:], -1 if size is None else size)

    def _check(self, name: str, value: int | tuple[int, ...], path: Path) -> None:
        label, clip = printable(name), printable(path)
        if isinstance(value, tuple) != self._labels[name]:
            raise ValueError(f"label {label} must be a number in every clip or a tuple in every clip: {clip}")
        count = len(self.classes.get(name, ()))
        for number in value if isinstance(value, tuple) else (value,):
            if count and not 0 <= number < count:
                raise ValueError(f"label {label} must be in 0..{count - 1}, got {number} for {clip}")

    def __len__(self) -> int:
        return len(self._records) // RECORD.size

    def __getitem__(self, index: int | slice) -> "Clip | ClipTable":
        if isinstance(index, slice):
            chosen = (self[i] for i in range(*index.indices(len(self))))
            return ClipTable(chosen, classes=self.classes, root=self.root)
        index = range(len(self))[index]
        folder, end, flags, seconds, fps, size = RECORD.unpack_from(self._records, index * RECORD.size)
        begin = RECORD.unpack_from(self._records, (index - 1) * RECORD.size)[1] if index else 0
        name, _, more = bytes(self._texts[begin:end]).partition(b"\0")
        labels = [tuple(value) if isinstance(value, list) else value for value in json.loads(more or "[]")]
        labels, place = labels[: len(self._labels)], labels[len(self._labels) :]
        part, source = None, ""
        if place:
            start, sha256, source = place
            part = Part(Path(self._files[self._shards[index]]), start, size, sha256)
        return Clip(
            path=Path(self._folders[folder], os.fsdecode(name)),
            labels=dict(zip(self._labels, labels, strict=True)),
            streams=Streams(bool(flags & VIDEO), bool(flags & AUDIO), seconds, fps) if flags else None,
            part=part,
            size=size if size >= 0 else None,
            root=self.root,
            source=source,
        )

    @property
    def folders(self) -> Sequence[str]:
        """The distinct folders of the clips, or the archives that they lie in."""
        return tuple(self._folders)

    @property
    def shards(self) -> np.ndarray | None:
        """(len,) which archive each clip lies in, -1 for none; None if no clip lies in one."""
        without = [-1] * (len(self) - len(self._shards))  # after the last that has one
        return np.array([*self._shards, *without], np.int32) if len(self._shards) else None


def check_labels(first: Clip, clip: Clip) -> None:
    """Whether two clips can be in one data set."""
    if clip.labels.keys() != first.labels.keys():
        raise ValueError(
            f"clips must share their label names, got {sorted(first.labels)} for {printable(first.path)}"
            f" but {sorted(clip.labels)} for {printable(clip.path)}"
        )


class _Strings(list[str]):
    """Distinct strings by number."""

    def __init__(self):
        self._numbers: dict[str, int] = {}

    def add(self, string: str) -> int:
        number = self._numbers.setdefault(string, len(self))
        if number == len(self):
            self.append(string)
        return number
