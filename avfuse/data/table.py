"""A clip and what is known of it, and a table of clips that stays small by the million.

A list of a hundred thousand clips takes some 60 MB in every process that reads them; a table about 8 MB.
"""

import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import leads_out
from .decode import ClipError, ClipReader, Part, Streams


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

    def open(self) -> ClipReader:
        """A reader of the clip; every data set reads its clips by this, so that each may come from shards.

        Raises:
            ClipError: it cannot be opened, or leads out of its data folder.
        """
        if self.root is not None and leads_out(self.part.file if self.part else self.path, self.root):
            raise ClipError(self.path, "leads out of the data folder")
        return ClipReader(self.path, self.part)


class ClipTable(Sequence[Clip]):
    """Clips as short lines of JSON: reads like a list of `Clip`, each made when it is asked for. It pickles
    by value.

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
        self._folders: list[str] = []  # each once
        self._numbers: dict[str, int] = {}  # folder -> its place there
        self._lines, self._ends = bytearray(), array("q")
        self._labels: dict[str, bool] = {}  # name -> whether a clip has a tuple of classes
        self._shards = array("i")  # of each clip the archive, by its place in `_folders`; -1: none
        for clip in clips:
            self.append(clip)

    def append(self, clip: Clip) -> None:
        """Add a clip; its `root` is the table's."""
        if not len(self):
            self._labels = {name: isinstance(label, tuple) for name, label in clip.labels.items()}
        if clip.labels.keys() != self._labels.keys():
            check_labels(self[0], clip)
        for name, label in clip.labels.items():
            self._check(name, label, clip.path)
        folder, name = os.path.split(os.fspath(clip.path))
        line = [self._number(folder), name, [clip.labels[label] for label in self._labels]]
        line += [clip.streams, clip.part.size if clip.part else clip.size]
        line += [clip.part.start] if clip.part else []
        self._lines += json.dumps(line, separators=(",", ":")).encode()
        self._ends.append(len(self._lines))
        self._shards.append(self._number(os.fspath(clip.part.file)) if clip.part else -1)

    def _number(self, folder: str) -> int:
        number = self._numbers.setdefault(folder, len(self._folders))
        if number == len(self._folders):
            self._folders.append(folder)
        return number

    def _check(self, name: str, value: int | tuple[int, ...], path: Path) -> None:
        if isinstance(value, tuple) != self._labels[name]:
            raise ValueError(f"label {name} must be a number in every clip or a tuple in every clip: {path}")
        count = len(self.classes.get(name, ()))
        for number in value if isinstance(value, tuple) else (value,):
            if count and not 0 <= number < count:
                raise ValueError(f"label {name} must be in 0..{count - 1}, got {number} for {path}")

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int | slice) -> "Clip | ClipTable":
        if isinstance(index, slice):
            chosen = (self[i] for i in range(*index.indices(len(self))))
            return ClipTable(chosen, classes=self.classes, root=self.root)
        index = range(len(self))[index]
        line = self._lines[self._ends[index - 1] if index else 0 : self._ends[index]]
        folder, name, labels, streams, size, *start = json.loads(line)
        labels = zip(self._labels, labels, strict=True)
        return Clip(
            path=Path(self._folders[folder], name),
            labels={name: tuple(label) if isinstance(label, list) else label for name, label in labels},
            streams=streams and Streams(*streams),
            part=Part(Path(self._folders[self._shards[index]]), *start, size) if start else None,
            size=size,
            root=self.root,
        )

    @property
    def folders(self) -> Sequence[str]:
        """The distinct folders of the clips, and the archives that they lie in."""
        return tuple(self._folders)

    @property
    def shards(self) -> np.ndarray | None:
        """(len,) which archive each clip lies in, -1 for none; None if no clip lies in one."""
        return np.array(self._shards, np.int32) if any(number >= 0 for number in self._shards) else None


def check_labels(first: Clip, clip: Clip) -> None:
    """Whether two clips can be in one data set."""
    if clip.labels.keys() != first.labels.keys():
        raise ValueError(
            f"clips must share their label names, got {sorted(first.labels)} for {first.path}"
            f" but {sorted(clip.labels)} for {clip.path}"
        )
