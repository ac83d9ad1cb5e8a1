"""Pictures with sound and boxes: frames/<name>.jpg and audio/<name>.wav of Flickr-SoundNet and of VGG-SS.

The lists of SLAVC (Mo and Morgado, NeurIPS 2022) may lie beside them: <set>_test.csv names the pictures to
test on, and <set>_test_plus_silent.csv pairs pictures with sounds of other clips, which come from nowhere.
"""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from ...checks import check_choice
from ..container import ClipError
from ..listing import Listing, Row, check_fields, check_video, rows
from ..scenes import Boxes, Moment, Scene, Scenes, check_file
from .folders import SPLITS


def test_list(root: Path, kind: str) -> Path | None:
    """The list of pictures to test on, if it is there; `kind` is "flickr" or "vggss"."""
    path = root / f"{kind}_test.csv"
    return path if path.exists() else None


def read_pictures(
    root: Path,
    kind: str,
    names: Iterable[str],
    boxes_of: Callable[[str], Boxes],
    split: str,
    *,
    test_share: float,
    negatives: bool,
) -> Scenes:
    """The pictures of a split, in the order of their names, each with the sound around the middle of its
    file; to test on, `negatives` behind them: pictures with the sound of another clip, and no box.

    Args:
        root: the data folder.
        kind: how the lists of the data set begin.
        names: of all that is annotated.
        boxes_of: reads an annotation, or raises a ClipError.
        split: "train" or "test".
        test_share: how many of the pictures are to test on, where no list says which. A hash of its name
            decides for each, so that it stays where it is when others come or go.
        negatives: whether to read their list, but for pairs with a clip that is trained on.
    """
    check_choice("split", split, SPLITS)
    if not 0 <= test_share <= 1:
        raise ValueError(f"test_share must be in 0..1, got {test_share}")
    names, found, wrong = set(names), Scenes(), []
    if path := test_list(root, kind):
        tested = {name for (name,) in _read_list(path, _parse_name, wrong)}
    else:
        tested = {name for name in names if _share_of(name) < test_share}
    trained = names - tested

    def add(picture: str, sound: str, boxes_of: Callable[[str], Boxes]) -> None:
        found.expected += 1
        with found.noting_missing():
            boxes, path = boxes_of(picture), check_file(root, f"frames/{picture}.jpg")
            moment = Moment(truth=boxes, picture=path)
            sound = check_file(root, f"audio/{sound}.wav")
            found.scenes.append(Scene(path=path, sound=sound, moments=(moment,)))

    for name in sorted(trained if split == "train" else tested):
        add(name, name, boxes_of)
    if split == "test":
        if negatives:
            for ((picture, sound),) in _read_list(
                root / f"{kind}_test_plus_silent.csv", _parse_silent, wrong
            ):
                if not trained & {picture, sound}:
                    add(picture, sound, lambda _: Boxes(()))
        found.expected += len(wrong)
        found.missing += wrong
    return found


def _read_list(path: Path, parse: Callable[[list[str]], Row], wrong: list[ClipError]) -> list[Row]:
    """The rows of a list; those that are wrong become errors."""
    listing = Listing("", path.parent)
    listed = list(rows(listing, path, parse))
    wrong += [ClipError(path, text.partition(", ")[2]) for text in listing.wrong]
    return listed


def _parse_name(fields: list[str]) -> tuple[str]:
    return (check_video(fields[0]),)


def _parse_silent(fields: list[str]) -> tuple[tuple[str, str]]:
    check_fields(fields, 3)
    if fields[2] != "non-sounding":
        raise ValueError(f"{fields[2]!r} is not 'non-sounding'")
    return ((check_video(fields[0]), check_video(fields[1])),)


def _share_of(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name."""
    return int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:6]) / 2**48
