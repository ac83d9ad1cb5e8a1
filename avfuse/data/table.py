"""A clip and what is known of it, and a table of clips that stays small by the million.

A list of a hundred thousand clips takes some 60 MB in every process that reads them; a table about 8 MB.
"""

import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..files import leads_out
from .decode import ClipError, ClipReader, Part, Streams

KNOWN, VIDEO, AUDIO = 1, 2, 4  # flags of a clip's streams


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
    """Clips in columns: reads like a list of `Clip`, each made when it is asked for. It pickles by value.

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
        self._folders = _Strings()
        self._folder, self._names, self._ends = array("I"), bytearray(), array("q")
        self._flags, self._seconds, self._fps = array("B"), array("d"), array("d")
        self._size = array("q")  # -1: not known
        self._labels: dict[str, _Column] = {}
        self._files, self._file, self._start = _Strings(), array("i"), array("q")  # of parts; file -1: none
        for clip in clips:
            self.append(clip)

    def append(self, clip: Clip) -> None:
        """Add a clip; its `root` is the table's."""
        if not len(self):
            self._labels = {name: _Column(value) for name, value in clip.labels.items()}
        if clip.labels.keys() != self._labels.keys():
            check_labels(self[0], clip)
        for name, value in clip.labels.items():
            self._check(name, value, clip.path)
        for name, value in clip.labels.items():
            self._labels[name].append(value)
        folder, name = os.path.split(os.fspath(clip.path))
        self._folder.append(self._folders.add(folder))
        self._names += os.fsencode(name)
        self._ends.append(len(self._names))
        streams = clip.streams
        self._flags.append(streams is not None and KNOWN | VIDEO * streams.video | AUDIO * streams.audio)
        self._seconds.append(streams.seconds if streams else 0.0)
        self._fps.append(streams.fps if streams else 0.0)
        self._size.append(-1 if clip.size is None else clip.size)
        if clip.part is not None and not len(self._file):
            self._file, self._start = array("i", [-1] * (len(self) - 1)), array("q", [0] * (len(self) - 1))
        if clip.part is not None or len(self._file):
            self._file.append(self._files.add(os.fspath(clip.part.file)) if clip.part else -1)
            self._start.append(clip.part.start if clip.part else 0)
            if clip.part:
                self._size[-1] = clip.part.size

    def _check(self, name: str, value: int | tuple[int, ...], path: Path) -> None:
        if isinstance(value, tuple) != self._labels[name].several:
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
        name = os.fsdecode(bytes(self._names[self._ends[index - 1] if index else 0 : self._ends[index]]))
        flags, size, part = self._flags[index], self._size[index], None
        if len(self._file) and self._file[index] >= 0:
            part = Part(Path(self._files[self._file[index]]), self._start[index], size)
        streams = Streams(bool(flags & VIDEO), bool(flags & AUDIO), self._seconds[index], self._fps[index])
        return Clip(
            path=Path(self._folders[self._folder[index]], name),
            labels={name: column[index] for name, column in self._labels.items()},
            streams=streams if flags & KNOWN else None,
            part=part,
            size=size if size >= 0 else None,
            root=self.root,
        )

    @property
    def folders(self) -> Sequence[str]:
        """The distinct folders of the clips, or the archives that they lie in."""
        return tuple(self._folders)

    @property
    def shards(self) -> np.ndarray | None:
        """(len,) which archive each clip lies in, -1 for none; None if no clip lies in one."""
        return np.array(self._file, np.int32) if len(self._file) else None


def check_labels(first: Clip, clip: Clip) -> None:
    """Whether two clips can be in one data set."""
    if clip.labels.keys() != first.labels.keys():
        raise ValueError(
            f"clips must share their label names, got {sorted(first.labels)} for {first.path}"
            f" but {sorted(clip.labels)} for {clip.path}"
        )


class _Strings:
    """Distinct strings by number."""

    def __init__(self):
        self._numbers: dict[str, int] = {}
        self._strings: list[str] = []

    def add(self, string: str) -> int:
        number = self._numbers.setdefault(string, len(self._strings))
        if number == len(self._strings):
            self._strings.append(string)
        return number

    def __getitem__(self, number: int) -> str:
        return self._strings[number]

    def __iter__(self) -> Iterator[str]:
        return iter(self._strings)


class _Column:
    """The labels of one name: a number for each clip, or a tuple of them where the first has a tuple."""

    def __init__(self, first: int | tuple[int, ...]):
        self.several = isinstance(first, tuple)
        self._values, self._ends = array("i"), array("q")  # the latter where there are several

    def append(self, value: int | tuple[int, ...]) -> None:
        self._values.extend(value if self.several else (value,))
        if self.several:
            self._ends.append(len(self._values))

    def __getitem__(self, index: int) -> int | tuple[int, ...]:
        if not self.several:
            return self._values[index]
        return tuple(self._values[self._ends[index - 1] if index else 0 : self._ends[index]])
