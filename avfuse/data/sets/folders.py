"""Any folder of videos and sound files; `train/` and `test/` (or `eval/`, `val/`, `validation/`) inside it
become the splits.
"""

from pathlib import Path

from ..listing import SOUNDS, SUFFIXES, Listing, walk
from ..table import Clip

SPLITS = ("train", "test")
TESTS = ("test", "eval", "val", "validation")


def split_folders(root: Path) -> dict[str, Path]:
    """Split -> its folder: train/ and one to test on, or train/ where there is nothing else; else all of
    `root` is to train on.
    """
    tests = [root / name for name in TESTS if (root / name).is_dir()]
    if not (root / "train").is_dir():
        return {"train": root}
    if tests:
        return {"train": root / "train", "test": tests[0]}
    others = (path for path in root.iterdir() if path.name != "train" and path.name[0] != ".")
    is_alone = not any(path.is_dir() or path.name.lower().endswith(SUFFIXES + SOUNDS) for path in others)
    return {"train": root / "train" if is_alone else root}


def read(root: str | Path) -> Listing:
    """The clips that are there, without labels."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"folder {root} " + ("is a file" if root.exists() else "does not exist"))
    listing = Listing(root.resolve().name, root)  # of "." and ".." too
    for split, folder in split_folders(root).items():
        paths, links, unlisted, passed_over = walk(folder, SUFFIXES + SOUNDS)
        listing.found[split] = [Clip(path) for path in paths]
        listing.expected[split] = len(paths)
        listing.links += links
        listing.unlisted += unlisted
        listing.passed_over += passed_over
    return listing
