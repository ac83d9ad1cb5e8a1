"""A built Sounding Shapes data set: its manifest, clips, masks and sounds."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from ...files import inside
from ..listing import Listing
from ..table import Clip
from .synthesis import COLOURS, SHAPES

NAME = "Sounding Shapes"
SPLITS = ("train", "test")
CLASSES = {"shape": SHAPES, "colour": COLOURS}  # of the labels of a clip


@dataclass(frozen=True)
class Entry:
    """One clip of the manifest. Paths are relative to the data folder; `sounding` indexes `objects`."""

    file: str
    split: str
    shape: str  # the labels: those of the first sounding object
    colour: str
    seconds: float
    fps: int
    size: int
    sample_rate: int
    # back to front: the fields of `MovingShape` or `SwitchingShape`, sounding (bool), stem (path or None)
    objects: list[dict]
    sounding: list[int]
    masks: str
    background: dict

    @property
    def stems(self) -> list[str]:
        """Paths of the sounds of the sounding objects, in the order of `sounding`."""
        return [self.objects[n]["stem"] for n in self.sounding]


def is_built(root: str | Path) -> bool:
    """Whether the folder holds a finished data set."""
    return all((Path(root) / name).exists() for name in ("dataset.json", "manifest.jsonl"))


def read_manifest(root: str | Path, split: str) -> list[Entry]:
    """The clips of a split, "train" or "test", in order."""
    root = Path(root)
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if not is_built(root):
        raise FileNotFoundError(f"{root} holds no finished {NAME} data set: `generate` makes one")
    entries = []
    manifest = root / "manifest.jsonl"
    for number, line in enumerate(manifest.read_text().splitlines(), start=1):
        try:
            entry = Entry(**json.loads(line))
            for path in (entry.file, entry.masks, *entry.stems):
                inside(root, path)
        except (TypeError, KeyError, IndexError, ValueError) as error:
            raise ValueError(f"{manifest}, line {number}: {error}") from error
        entries.append(entry)
    return [entry for entry in entries if entry.split == split]


def read(root: str | Path) -> Listing:
    """All clips, as `clips` gives them, by the splits that have any."""
    listing = Listing(NAME, Path(root), classes=CLASSES)
    for split in SPLITS:
        if found := clips(root, split):
            listing.found[split], listing.expected[split] = found, len(found)
    return listing


def clips(root: str | Path, split: str) -> list[Clip]:
    """The clips of a split for the generic reader, labelled with indices into SHAPES and COLOURS."""
    return [
        Clip(
            path=inside(Path(root), entry.file),
            labels={"shape": SHAPES.index(entry.shape), "colour": COLOURS.index(entry.colour)},
        )
        for entry in read_manifest(root, split)
    ]


def load_masks(root: str | Path, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    """Where the sounding objects are seen, in the order of `entry.sounding`.

    Returns:
        masks (S, T, H, W) bool, of visible pixels; boxes (S, T, 4) int16, tight around them in pixels:
        x0, y0, x1, y1, the last two exclusive, and all 0 where the object is hidden.
    """
    return read_masks(inside(Path(root), entry.masks))


def read_masks(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The same from the file that an entry names."""
    with np.load(path, allow_pickle=False) as file:
        shape = tuple(file["shape"])
        return np.unpackbits(file["masks"], count=math.prod(shape)).reshape(shape).astype(bool), file["boxes"]


def load_stems(root: str | Path, entry: Entry) -> np.ndarray:
    """The sounds of the sounding objects: (S, samples) float32 in [-1, 1], in the order of `entry.sounding`.

    Their sum is the sound of the clip as it was before AAC.
    """
    return np.stack([read_sound(inside(Path(root), path)) for path in entry.stems])


def read_sound(path: Path) -> np.ndarray:
    """All samples of a mono file: (samples,) float32."""
    with av.open(path) as container:
        parts = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
    sound = np.concatenate(parts)
    return sound.astype(np.float32) / 32768 if sound.dtype == np.int16 else sound


def read_frames(path: Path) -> np.ndarray:
    """All pictures of a file: (T, H, W, 3) uint8."""
    with av.open(path) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
