"""Clips to test on, out of a folder that names none."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from .table import Clip, ClipTable

# What the names of pieces of a recording end in: talk_003, talk-Scene-003, talk part 2, talk (2), talk/003,
# ID_000030_000040.
WORD, NUMBER = r"[ ._-]+(?:scene|part|clip|seg|segment|chunk)", r"[ ._(-]*+[0-9]++\)?+"
PIECE = re.compile(rf"(?:(?:{WORD})?+{NUMBER})++$", re.IGNORECASE)
MARKED = re.compile(rf"{WORD}{NUMBER}$", re.IGNORECASE)
DATE = r"(?:19|20)[0-9]{2}-?(?:0[1-9]|1[0-2])-?(?:0[1-9]|[12][0-9]|3[01])"
CAMERA = re.compile(  # names by DCF, by telephones, and by the second
    r"[A-Z0-9_]{4}[0-9]{4}|[A-Z]{3}[_-][0-9]{8}[_-].*"
    rf"|{DATE}[ _T-]?[0-9]{{2}}(?:[.:-]?[0-9]{{2}}){{2}}.*"
)
SEVERAL = 5  # names of a class, by their first numbers: fewer may be years or sizes
ALONE = 200  # recordings: of as many each is drawn by itself, and their share is near enough
SCHEME = 0.75  # share of each class of a clip whose names begin alike: dog_01, dog_02 are no pieces


@dataclass
class Sides:
    """What a run has trained and tested on: by paths below its data folder, and by full ones, as another run
    may be given a folder inside that.
    """

    said: str  # what the run calls its clips to test on
    root: str  # its data folder
    train: Collection[str]
    test: Collection[str]
    sizes: dict[str, int] = field(default_factory=dict)  # of the clips in bytes, where they are on record
    earlier: Collection[str] = ()  # full paths, of what the models that it began with were trained on

    def __post_init__(self):
        full = os.path.join
        self.known = {*(full(self.root, name) for name in self.train), *self.earlier}  # all trained on
        self.train = {*self.train, *self.known}
        self.test = {*self.test, *(full(self.root, name) for name in self.test)}

    def of(self, clips: Iterable[Clip], root: Path) -> list[str | None]:
        """Of each clip in the folder `root` "train", "test" or, where the run knows nothing of it, None. A
        clip of the same name in another folder is the same one if it is as large.
        """
        above, sides = os.path.realpath(root), []
        for clip in clips:
            file = os.path.relpath(clip.path, root)
            key = {os.path.join(above, file)}
            for name in {file, clip.name(root)}:
                if name not in self.sizes or self.sizes[name] == size_of(clip):
                    key.add(name)
            sides.append("train" if key & self.train else "test" if key & self.test else None)
        return sides


def size_of(clip: Clip) -> int:
    """Of its file, in bytes; by a manifest, whose clip may have gone."""
    size = getattr(clip, "size", None)
    return clip.path.stat().st_size if size is None else size


def hold_out(
    clips: ClipTable, base: Path, *, share: float, seed: int, sides: Iterable[str | None] = ()
) -> tuple[ClipTable, ClipTable]:
    """Clips to train on and clips to test on, both in their order; the latter are none of a single recording.

    A hash of seed and name, in 0..1, orders the recordings. Each class that has two has one on either side;
    beyond that those with the lowest hashes of their class are held out, of each class the same part, until
    the share of clips is as near as it can be. Where there are `ALONE` or more, they are those below `share`:
    files that are added leave the others on their side, unless their class had none, or none else, there.

    Args:
        clips: with labels, or else in sub-folders that name the classes.
        base: the folder that these are in.
        share: of the clips.
        seed: another one, another draw.
        sides: on which each clip stays, "train" or "test", and the unknown pieces of its recording with it;
            None is one to draw.
    """
    sides = list(sides) or [None] * len(clips)
    paths = _paths(clips, base)
    classes = [list(_classes(clip, path)) for clip, path in zip(clips, paths, strict=True)]
    names = _recordings(["/".join(path.parts[1:]) or path.name for path in paths], classes)
    draws = {name: _draw(seed, name) for name in names}
    kept: dict[str, bool] = {}  # recording with a known side -> whether it is held out: not if on both
    for name, side in zip(names, sides, strict=True):
        if side:
            kept[name] = side == "test" and kept.get(name, True)
    drawn_alone = len(draws) >= ALONE
    held = {name for name, draw in draws.items() if kept.get(name, drawn_alone and draw < share)}
    members = defaultdict(Counter)  # class -> recording -> clips
    for name, of_clip in zip(names, classes, strict=True):
        for kind in of_clip:
            members[kind][name] += 1
    # Each class that has two recordings has one on either side: of those that may still be moved, its largest
    # is given back to train on, its smallest is taken to test on.
    orders = [sorted(of, key=lambda name: (of[name], draws[name])) for of in members.values() if len(of) > 1]
    movable = [(order, [name for name in order if name not in kept]) for order in orders]
    held -= {candidates[-1] for order, candidates in movable if candidates and held.issuperset(order)}
    for order, candidates in movable:
        if candidates and held.isdisjoint(order):
            held.add(candidates[0])
    if not drawn_alone:
        places = defaultdict(list)  # of a recording in its classes, from 0 to 1
        for of in members.values():
            for place, name in enumerate(sorted(of, key=draws.get)):
                places[name].append(place / len(of))
        drawn = sorted(draws.keys() - kept.keys(), key=lambda name: (fmean(places[name]), draws[name]))
        _fill(held, drawn, Counter(names), share, orders)
    undecided = draws.keys() - kept.keys()
    if undecided and held.issuperset(draws):  # nothing would be left to train on
        held.remove(max(undecided, key=draws.get))
    train, test = (ClipTable(classes=clips.classes, root=clips.root) for _ in range(2))
    for clip, name, side in zip(clips, names, sides, strict=True):
        (test if (side or ("train", "test")[name in held]) == "test" else train).append(clip)
    return train, test


def _fill(held: set[str], drawn: list[str], clips: Counter, share: float, orders: list[list[str]]) -> None:
    """Holds out more of the recordings that were drawn, the first first: those that fit into the share of
    clips, then one that passes it by less than it lacks. Each class keeps one to train on.
    """
    lacking = share * clips.total() - sum(clips[name] for name in held)
    for is_last in False, True:
        for name in drawn:
            size = clips[name]
            fits = size < 2 * lacking if is_last else size <= lacking + 1e-6  # a share is no exact number
            if fits and name not in held and not any(held | {name} >= {*order} for order in orders):
                held.add(name)
                lacking -= clips[name]


def _paths(clips: Iterable[Clip], base: Path) -> list[Path]:
    """The paths of clips, without suffix, below the folder that may hold folders of classes: of clips in
    shards that folder was train/, if all were there.
    """
    paths = [Path(clip.name(base)).with_suffix("") for clip in clips]
    if all(clip.source for clip in clips) and {path.parts[0].lower() for path in paths} == {"train"}:
        return [path.relative_to(path.parts[0]) for path in paths]
    return paths


def _classes(clip: Clip, path: Path) -> Iterable[Hashable]:
    if not clip.labels:
        return path.parent.parts[:1] or ["."]
    several = {name: v if isinstance(v, tuple) else (v,) for name, v in clip.labels.items()}
    return [(name, value) for name, values in several.items() for value in values]


def _recordings(paths: list[str], classes: list[list[Hashable]]) -> list[str]:
    """The recording that each clip is of: its folder, where a class has several below its own; else as far as
    names tell; else a name of its own.
    """
    folders, of_classes = [path.rpartition("/")[0] for path in paths], defaultdict(set)
    for of_clip, folder in zip(classes, folders, strict=True):
        for kind in of_clip:
            of_classes[kind].add(folder)
    return [
        f"{folder}/" if folder and any(len(of_classes[kind]) > 1 for kind in of_clip) else name
        for name, folder, of_clip in zip(_names(paths, classes), folders, classes, strict=True)
    ]


def _names(paths: list[str], classes: list[list[Hashable]]) -> list[str]:
    """The shortest of the `_prefixes` of each path that is not how most names of its classes begin; beyond
    the shortest one, only where a class has `SEVERAL` of them or they are marked as scenes or parts, and some
    have several clips together. Else a name of the clip's own.
    """
    prefixes, sizes = list(map(_prefixes, paths)), Counter(kind for of_clip in classes for kind in of_clip)
    names: list[str | None] = [None] * len(paths)
    for level in range(max(map(len, prefixes), default=0)):
        left = [n for n, name in enumerate(names) if name is None and level < len(prefixes[n])]
        alike = Counter((kind, prefixes[n][level]) for n in left for kind in classes[n])
        many = Counter(kind for kind, _ in alike)
        together = {kind for (kind, _), clips in alike.items() if clips > 1}
        schemes = {
            prefixes[n][level]
            for n in left
            if all(alike[kind, prefixes[n][level]] > max(1, SCHEME * sizes[kind]) for kind in classes[n])
        }
        for n in left:
            name, kinds = prefixes[n][level], classes[n]
            is_clear = MARKED.search(paths[n]) or max(many[kind] for kind in kinds) >= SEVERAL
            is_recording = level == 0 or (is_clear and not together.isdisjoint(kinds))
            if is_recording and name not in ("", *schemes):
                names[n] = name
    own = (f"{of_clip!r}/{path}" for of_clip, path in zip(classes, paths, strict=True))
    return [alone if name is None else name for name, alone in zip(names, own, strict=True)]


def _prefixes(path: str) -> list[str]:
    """What may name the recording of a clip, the shortest first: its path without the numbers at its end,
    without all but the first of them, and so on; of pieces of what a camera has named that name alone.
    """
    whole = MARKED.sub("", path)
    if CAMERA.fullmatch(whole.rpartition("/")[2]):
        return [whole] if whole != path else []
    pieces = PIECE.search(path)
    if pieces is None:
        return [path]
    ends = [number.end() for number in re.finditer("[0-9]+", path) if number.end() > pieces.start()]
    prefixes = [path[:end] for end in (pieces.start(), *ends[:-1])]
    named = [prefix for prefix in prefixes if CAMERA.fullmatch(prefix.rpartition("/")[2])]
    return named[:1] or prefixes


def _draw(seed: int, name: str) -> float:
    content = hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape"))
    return int.from_bytes(content.digest()[:8]) / 2**64
