"""Any folder of videos and sound files; `train/` and `test/` inside it become the splits."""

from pathlib import Path

from ..listing import SOUNDS, SUFFIXES, Listing, walk
from ..table import Clip

SPLITS = ("train", "test")


def read(root: str | Path) -> Listing:
    """The clips that are there, without labels."""
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"folder {root} " + ("is a file" if root.exists() else "does not exist"))
    listing = Listing(root.name, root)
    folders = {split: root / split for split in SPLITS}
    if not all(folder.is_dir() for folder in folders.values()):
        folders = {"train": root}
    for split, folder in folders.items():
        paths, links, unlisted, passed_over = walk(folder, SUFFIXES + SOUNDS)
        listing.found[split] = [Clip(path) for path in paths]
        listing.expected[split] = len(paths)
        listing.links += links
        listing.unlisted += unlisted
        listing.passed_over += passed_over
    return listing
