"""A plain folder of videos whose sub-folders name the classes."""

from dataclasses import replace
from pathlib import Path

from ..files import some
from .find import Found
from .sets.folders import split_folders
from .table import Clip


def with_classes(found: Found, folder: Path | None, names: tuple[str, ...] | None = None) -> Found:
    """A data set with labels; those of a plain folder are the names of its sub-folders, as label "class".

    Args:
        found: the clips in the folder.
        names: of the classes; default: of all sub-folders, sorted, of train/ or of the folder itself.

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
    return found._replace(train=train, test=test, classes={"class": names})


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
