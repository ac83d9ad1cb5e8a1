"""A plain folder of videos whose sub-folders name the classes."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from ..files import some
from .find import Found
from .sets.folders import split_folders
from .table import Clip, ClipTable

NAMED = 20  # classes that are named, with their clips


def with_classes(
    found: Found,
    folder: Path | None,
    names: tuple[str, ...] | None = None,
    say: Callable[[str], object] = print,
) -> Found:
    """A data set with labels; those of a plain folder are the names of its sub-folders, as label "class".

    Args:
        found: the clips in the folder.
        names: of the classes; default: of the sub-folders, sorted, of train/ or of the folder itself, that
            hold a clip to use. Others, such as the runs/ of a command begun in there, are named and are none.
        say: which they are, and which of them cannot be learned, is told through it, line by line.

    Raises:
        ValueError: a clip has a class that has no such name, or none, or the names are not those of the data;
            or a manifest is of other splits than the folder has now.
    """
    if found.classes:
        if names is not None and names not in found.classes.values():
            raise ValueError("--class-list is that of no label of this data set")
        return found
    if not folder.is_dir():
        raise ValueError(f"--data: {folder} is no folder here, whose sub-folders would name classes")
    splits = split_folders(folder)
    roots = splits["train"], splits.get("test", splits["train"])
    for clips, root in zip((found.train, found.test), roots, strict=True):
        if stray := next((clip.path for clip in clips if not clip.path.is_relative_to(root)), None):
            raise ValueError(f"--data: {stray} is not in {root}: python -m avfuse.data check {folder}, anew")
    if names is None:
        names = tuple(sorted(p.name for p in roots[0].iterdir() if p.is_dir() and p.name[0] != "."))
        pairs = zip((found.train, found.test), roots, strict=True)
        used = {clip.path.relative_to(root).parts[0] for clips, root in pairs for clip in clips}
        if idle := [name for name in names if name not in used]:
            say(f"no clip to use in these folders, which are no classes: {some(idle)}")
            names = tuple(name for name in names if name in used)
    classes, numbers = {"class": names}, {name: number for number, name in enumerate(names)}
    train, test = (
        ClipTable(
            (labelled(clip, root, numbers) for clip in clips),
            classes=classes,
            root=next((clip.root for clip in clips), None),
        )
        for clips, root in zip((found.train, found.test), roots, strict=True)
    )
    found = found._replace(train=train, test=test, classes=classes)
    tell_classes(found, names, say)
    return found


def tell_classes(found: Found, names: tuple[str, ...], say: Callable[[str], object]) -> None:
    """Which folders are taken for classes, and which of these lack clips."""
    train, test = ({clip.path: names[clip.labels["class"]] for clip in clips} for clips in found[:2])
    counts = Counter((train | test).values())
    for line in described({name: counts[name] for name in names}):
        say(line)
    if 2 * sum(count == 1 for count in counts.values()) > len(names):
        say(
            "WARNING: most of these folders hold a single clip: if they are recordings, put them into folders"
            " that name the classes, CLASS/RECORDING/CLIP.mp4"
        )
    if untaught := sorted({*names} - {*train.values()}):
        say(f"WARNING: no clip to train on, so what cannot be learned: {some(untaught)}")
    if untested := sorted({*names} - {*test.values()}):
        say(f"no clip to test on: {some(untested)}")


def described(counts: Mapping[str, int]) -> list[str]:
    """Lines that name classes, how many clips each has, and which of them may be meant as one."""
    named = some([f"{name} ({count})" for name, count in counts.items()], most=NAMED)
    lines = [f"{len(counts)} classes, as folders are called, and their clips: {named}"]
    if pairs := [f"{one} and {other}" for one, other in lookalikes(counts)]:
        lines.append(f"WARNING: folders of their own that may be meant as one class: {some(pairs)}")
    return lines


def lookalikes(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs that are the same but for capitals, spaces and signs, or for a letter left out, added, exchanged
    or swapped with the next: bell and bel, Guitar and guitar. Three letters are too few to tell (cat, bat).
    """
    groups = defaultdict(dict)  # what is left of a name without a letter -> the names, in their order
    for name in names:
        plain = "".join(c for c in name.casefold() if c.isalnum())
        shorter = {plain[:at] + plain[at + 1 :] for at in range(len(plain))} if plain.isalpha() else set()
        for rest in {plain, *(shorter if len(plain) > 3 else ())}:
            groups[rest][name] = None
    pairs = {pair: None for group in groups.values() for pair in combinations(group, 2)}
    return sorted(pairs)


def labelled(clip: Clip, root: Path, numbers: Mapping[str, int]) -> Clip:
    """The clip with the number of the class whose folder it lies in."""
    if clip.part:
        raise ValueError(f"--data: {clip.path} is in a shard of a plain folder, which has no classes")
    folder, *rest = clip.path.relative_to(root).parts
    if not rest:
        raise ValueError(f"--data: {clip.path} lies in no sub-folder, which would name its class")
    if folder not in numbers:
        known = some(list(numbers), most=10) or "none"
        raise ValueError(f"--data: {clip.path} has the class {folder!r}, which is none of {known}")
    return replace(clip, labels={"class": numbers[folder]})


def read_class_list(path: Path) -> tuple[str, ...]:
    """The names in a text file, one a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--class-list {path} cannot be read: {error}") from error
    names = tuple(line.strip() for line in lines if line.strip())
    repeated = sorted(name for name, count in Counter(names).items() if count > 1)
    if not names or repeated:
        what = f"these more than once: {', '.join(repeated)}" if repeated else "none"
        raise ValueError(f"--class-list {path} must name each class once, one a line, and names {what}")
    return names
