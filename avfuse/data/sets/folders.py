"""Any folder of videos and sound files; `train/` and `test/` (or `eval/`, `val/`, `valid/`, `validation/`)
inside it become the splits, however they are capitalized.
"""

import os
from collections.abc import Collection
from pathlib import Path

from ...files import leads_out, printable, some
from ..listing import SOUNDS, SUFFIXES, Listing, is_run, walk
from ..table import Clip

SPLITS = ("train", "test")
TESTS = ("test", "eval", "val", "valid", "validation")


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder: train/ and one to test on, or train/ where there is nothing else; else all of
    `root` is to train on.
    """
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir())  # of train and Train, train
    except OSError:  # an address; of a folder that cannot be listed `walk` tells
        return {"train": root}
    named = {name.lower(): root / name for name in names}
    tests = [named[name] for name in TESTS if name in named]
    if "train" not in named:
        return {"train": root}
    for folder in named["train"], *tests[:1]:
        if leads_out(folder, root):
            raise ValueError(f"{printable(folder)} leads out of the data folder: it is not read")
    if tests:
        return {"train": named["train"], "test": tests[0]}
    is_alone = not any(map(_count, _beside(root, [named["train"]])))
    return {"train": named["train"] if is_alone else root}


def _beside(root: Path, folders: Collection[Path]) -> list[Path]:
    """What else is in a folder, by name, but for what is hidden."""
    return sorted(path for path in root.iterdir() if path not in folders and path.name[0] != ".")


def _count(path: Path) -> int:
    """How many clips a file is or a folder holds, beside runs."""
    if path.is_dir():
        return 0 if path.is_symlink() or is_run(os.listdir(path)) else len(walk(path, SUFFIXES + SOUNDS)[0])
    return int(path.name.lower().endswith(SUFFIXES + SOUNDS))


def _unused(root: Path, folders: Collection[Path]) -> list[str]:
    """Clips beside the folders of the splits, which are not used: a line, or none."""
    counts = {path.name + "/" * path.is_dir(): _count(path) for path in _beside(root, folders)}
    named = [f"{name} ({count})" if count > 1 else name for name, count in counts.items() if count]
    splits = " and ".join(f"{folder.name}/" for folder in folders)
    return [f"clips beside {splits} are not used: {some(named)}"] if named else []


def read(root: str | Path) -> Listing:
    """The clips that are there, without labels."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"folder {root} " + ("is a file" if root.exists() else "does not exist"))
    listing = Listing(root.resolve().name, root)  # of "." and ".." too
    splits = split_folders(root)
    listing.notes += _unused(root, splits.values()) if "test" in splits else []
    for split, folder in splits.items():
        paths, links, unlisted, passed_over = walk(folder, SUFFIXES + SOUNDS, root)
        listing.found[split] = [Clip(path) for path in paths]
        listing.expected[split] = len(paths)
        listing.links += links
        listing.unlisted += unlisted
        listing.passed_over += passed_over
    return listing
