"""A folder as clips to train on and clips to measure on."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from . import sounding_shapes
from .clips import Clip, find_clips, scan_clips
from .decode import ClipError

DEMO = Path("data/sounding-shapes")
SPLITS = ("train", "test")


class Found(NamedTuple):
    """The clips of a data set, and what a scan of it found."""

    train: list[Clip]
    test: list[Clip]
    test_name: str  # what to call the latter
    unreadable: list[ClipError]
    looked_at: int  # files
    classes: dict[str, tuple[str, ...]]  # the names of the values of each label


def find_data(folder: Path | None, say: Callable[[str], object] = print, **options) -> Found:
    """Looks through a data set; None is the demo's, which is built first.

    Args:
        folder: Sounding Shapes, or videos, which train/ and test/ inside it part into the splits.
        say: what is found is told through it.
        options: missing, timeout and workers of `avfuse.data.clips.find_clips`.

    Raises:
        ValueError: there is no clip to use.
    """
    root = sounding_shapes.generate(DEMO) if folder is None else folder
    classes = {}
    if sounding_shapes.is_built(root):
        scans = [scan_clips(sounding_shapes.clips(root, split), **options) for split in SPLITS]
        classes = dict(shape=tuple(sounding_shapes.SHAPES), colour=tuple(sounding_shapes.COLOURS))
    elif all((root / split).is_dir() for split in SPLITS):
        scans = [find_clips(root / split, **options) for split in SPLITS]
    else:
        scans = [find_clips(root, **options)]
        say("no train/ and test/ inside: what is measured are the training clips themselves")
    for name, scan in zip(SPLITS, scans, strict=False):
        say(f"{name}: {scan.summary()}" if len(scans) > 1 else scan.summary())
    return Found(
        train=scans[0].clips,
        test=scans[-1].clips,
        test_name="held-out clips" if len(scans) > 1 else "training clips",
        unreadable=[error for scan in scans for error in scan.unreadable],
        looked_at=sum(scan.looked_at for scan in scans),
        classes=classes,
    )
