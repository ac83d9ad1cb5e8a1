"""Clips to test on, out of a folder that names none."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path

from .table import Clip, ClipTable

# What the names of pieces of a recording end in: talk_003, talk-Scene-003, talk part 2, talk (2), talk/003,
# ID_000030_000040.
PIECE = re.compile(
    r"(?:(?:[ ._-]+(?:scene|part|clip|seg|segment|chunk))?+[ ._(-]*+[0-9]++\)?+)++$", re.IGNORECASE
)
CAMERA = re.compile(r"[A-Z0-9_]{4}[0-9]{4}|[A-Z]{3}[_-][0-9]{8}[_-].*")  # names by DCF and by telephones
SCHEME = 0.75  # share of each class of a clip whose names begin alike: dog_01, dog_02 are no pieces


def hold_out(clips: ClipTable, base: Path, *, share: float, seed: int) -> tuple[ClipTable, ClipTable]:
    """Clips to train on and clips to test on, both in their order; the latter are none of a single recording.

    A recording is held out where a hash of seed and name, in 0..1, is below `share`: files that are added
    leave the others on their side. Beyond that each class that has two recordings has one on either side.

    Args:
        clips: with labels, or else in sub-folders that name the classes.
        base: the folder that these are in.
        share: of the recordings, about.
        seed: another one, another draw.
    """
    classes = [list(_classes(clip, base)) for clip in clips]
    names = _recordings([_name(clip, base) for clip in clips], classes)
    draws = {name: _draw(seed, name) for name in names}
    held = {name for name, draw in draws.items() if draw < share}
    members = defaultdict(Counter)  # class -> recording -> clips
    for name, of_clip in zip(names, classes, strict=True):
        for kind in of_clip:
            members[kind][name] += 1
    orders = [sorted(of, key=lambda name: (of[name], draws[name])) for of in members.values() if len(of) > 1]
    held -= {order[-1] for order in orders if held.issuperset(order)}
    held |= {order[0] for order in orders if held.isdisjoint(order)}
    train, test = (ClipTable(classes=clips.classes, root=clips.root) for _ in range(2))
    for clip, name in zip(clips, names, strict=True):
        (test if name in held else train).append(clip)
    return train, test


def _classes(clip: Clip, base: Path) -> Iterable[Hashable]:
    if not clip.labels:
        return [os.path.relpath(clip.path.parent, base).split(os.sep)[0]]
    several = {name: v if isinstance(v, tuple) else (v,) for name, v in clip.labels.items()}
    return [(name, value) for name, values in several.items() for value in values]


def _name(clip: Clip, base: Path) -> str:
    """Its path below the folder that may name the class: pieces may have one for each recording."""
    folder, *below = Path(os.path.relpath(clip.path, base)).with_suffix("").parts
    return "/".join(below) or folder


def _recordings(paths: list[str], classes: list[list[Hashable]]) -> list[str]:
    """The recording that each clip is of, as far as names tell; else a name of its own."""
    names = [
        None if CAMERA.fullmatch(path.rpartition("/")[2]) else PIECE.sub("", path) or None for path in paths
    ]
    sizes = Counter(kind for of_clip in classes for kind in of_clip)
    alike = Counter((kind, name) for of_clip, name in zip(classes, names, strict=True) for kind in of_clip)
    schemes = {
        name
        for of_clip, name in zip(classes, names, strict=True)
        if all(alike[kind, name] > max(1, SCHEME * sizes[kind]) for kind in of_clip)
    }
    own = [f"{of_clip!r}/{path}" for of_clip, path in zip(classes, paths, strict=True)]
    return [
        alone if name is None or name in schemes else name for name, alone in zip(names, own, strict=True)
    ]


def _draw(seed: int, name: str) -> float:
    content = hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape"))
    return int.from_bytes(content.digest()[:8]) / 2**64
