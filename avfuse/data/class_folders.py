"""A plain folder of videos whose sub-folders name the classes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..files import some
from .find import Found
from .sets.folders import split_folders
from .table import Clip


def with_classes(
    found: Found,
    folder: Path | None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], object] = print,
) -> Found:
    """A data set with labels; those of a plain folder are the names of its sub-folders, as label "class".

    Args:
        found: the clips in the folder.
        names: of the classes; default: of all sub-folders, sorted, of train/ or of the folder itself.
        say: which they are, and which of them cannot be learned, is told through it, line by line.

    Raises:
        ValueError: a clip has a class that has no such name, or none, or the names are not those of the data.
    """
    if found.classes:
        if names is not None and names not in found.classes.values():
            raise ValueError("--class-list is that of no label of this data set")
        return found
    splits = split_folders(folder)
    roots = splits["train"], splits.get("test", splits["train"])
    if names is None:
        names = tuple(sorted(p.name for p in roots[0].iterdir() if p.is_dir() and p.name[0] != "."))
    train, test = (
        [labelled(clip, root, names) for clip in clips]
        for clips, root in zip((found.train, found.test), roots, strict=True)
    )
    found = found._replace(train=train, test=test, classes={"class": names})
    tell_classes(found, names, say)
    return found


def tell_classes(found: Found, names: tuple[str, ...], say: Callable[[str], object]) -> None:
    """Which folders are taken for classes, and which of these lack clips."""
    train, test = ({clip.path: names[clip.labels["class"]] for clip in clips} for clips in found[:2])
    counts = Counter((train | test).values())
    named = some([f"{name} ({counts[name]})" for name in names])
    say(f"{len(names)} classes, as folders are called, and their clips: {named}")
    if 2 * sum(count == 1 for count in counts.values()) > len(names):
        say(
            "WARNING: most of these folders hold a single clip: if they are recordings, put them into folders"
            " that name the classes, CLASS/RECORDING/CLIP.mp4"
        )
    if untaught := sorted({*names} - {*train.values()}):
        say(f"WARNING: no clip to train on, so what cannot be learned: {some(untaught)}")
    if untested := sorted({*names} - {*test.values()}):
        say(f"no clip to test on: {some(untested)}")


def labelled(clip: Clip, root: Path, names: tuple[str, ...]) -> Clip:
    """The clip with the number of the class whose folder it lies in."""
    if clip.part:
        raise ValueError(f"--data: {clip.path} is in a shard of a plain folder, which has no classes")
    folder, *rest = clip.path.relative_to(root).parts
    if not rest:
        raise ValueError(f"--data: {clip.path} lies in no sub-folder, which would name its class")
    if folder not in names:
        known = some(names, most=10) or "none"
        raise ValueError(f"--data: {clip.path} has the class {folder!r}, which is none of {known}")
    return replace(clip, labels={"class": names.index(folder)})


def read_class_list(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-list {path} cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    repeated = sorted({name for name in names if names.count(name) > 1})
    if not names or repeated:
        what = f"these more than once: {', '.join(repeated)}" if repeated else "none"
        raise ValueError(f"--class-list {path} must name each class once, one a line, and names {what}")
    return names
