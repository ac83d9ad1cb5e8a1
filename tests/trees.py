"""Data folders in the layouts of published data sets, made of Sounding Shapes clips."""

import shutil
from pathlib import Path

from avfuse.data import sounding_shapes


def videos(folder: Path, count: int) -> list[Path]:
    """Distinct clips of pictures and sound, a second long."""
    sounding_shapes.generate(folder, train=count, test=0, seconds=1.0, size=32, workers=1, progress=False)
    return sorted((folder / "train").glob("*.mp4"))


def plant(source: Path, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(source, path))


def write_list(path: Path, text: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


VGGSOUND = """\
aaaaaaaaaaa,0,playing harp,train
-bbbbbbbbbb,30,"playing violin, fiddle",train
_cccccccccc,7,police car (siren),train
ddddddddddd,120,playing harp,test
eeeeeeeeeee,0,"playing violin, fiddle",test
ggggggggggg,1,dog barking,train
"""
IN_VGGSOUND = {  # all but that of the last row; by the rows' labels in sorted order
    "playing_harp/aaaaaaaaaaa_000000_000010.mp4": ("train", 1),
    "playing_violin__fiddle/-bbbbbbbbbb_000030_000040.mp4": ("train", 2),
    "police_car__siren_/_cccccccccc_000007_000017.mp4": ("train", 3),
    "playing_harp/ddddddddddd_000120_000130.mp4": ("test", 1),
    "playing_violin__fiddle/eeeeeeeeeee_000000_000010.mp4": ("test", 2),
}


def vggsound(root: Path, sources: list[Path]) -> Path:
    """Five of the six clips that its list names."""
    write_list(root / "annotations/vggsound.csv", VGGSOUND)
    for path, source in zip(IN_VGGSOUND, sources, strict=False):
        plant(source, root / "clips" / path)
    return root


CLASS_LIST = """\
index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/m/04rlf,"Music"
3,/m/015lz1,"Singing"
"""
COMMENTS = """\
# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=1, num_segs=1, num_unique_labels=1, num_positive_labels=1
# YTID, start_seconds, end_seconds, positive_labels
"""
AUDIOSET = {
    "unbalanced_train": '---aaaaaaaa, 30.000, 40.000, "/m/09x0r,/m/05zppz"\n'
    'bbbbbbbbbbb, 0.000, 10.000, "/m/04rlf"\nggggggggggg, 0.000, 10.000, "/m/04rlf"\n',
    "balanced_train": 'ccccccccccc, 5.500, 15.500, "/m/015lz1,/m/04rlf"\n',
    "eval": '-ddddddddd_, 0.000, 4.000, "/m/09x0r"\n',
}
IN_AUDIOSET = {
    "--/---aaaaaaaa_000030_000040.mp4": ("unbalanced_train", (0, 1)),
    "bb/bbbbbbbbbbb_000000_000010.mp4": ("unbalanced_train", (2,)),
    "cc/ccccccccccc_000005_000015.mp4": ("balanced_train", (2, 3)),
    "-d/-ddddddddd__000000_000004.mp4": ("eval", (0,)),
}


def audioset(root: Path, sources: list[Path]) -> Path:
    """Four of the five clips that its lists name."""
    write_list(root / "annotations/class_labels_indices.csv", CLASS_LIST)
    for split, text in AUDIOSET.items():
        write_list(root / f"annotations/{split}_segments.csv", COMMENTS + text)
    for path, source in zip(IN_AUDIOSET, sources, strict=False):
        plant(source, root / "clips" / path)
    return root
