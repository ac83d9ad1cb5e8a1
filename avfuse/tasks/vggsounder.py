"""VGGSounder (Zverev et al. 2025), VGGSound's test clips with all that is seen or heard in each: logits of a
classifier in the form that its package reads.
"""

import pickle
import re
from collections.abc import Sequence
from pathlib import Path

from ..data.table import Clip
from ..files import aside, printable, some

KINDS = {"a": "audio_input", "v": "image_input", "av": ""}  # its names of what a model is given, and ours
NAME = re.compile(r"([\w-]{11}_\d{6})(_\d{6})?", re.ASCII)  # id, start and perhaps end of a clip of VGGSound


def labels():
    """The labels of VGGSounder, of all its clips.

    Raises:
        ValueError: the package is not there.
    """
    try:
        from vggsounder import VGGSounder
    except ImportError as error:
        raise ValueError(
            f'--export takes classes from vggsounder, pip install "avfuse[eval]": {error}'
        ) from error
    return VGGSounder(background_music=None)


def columns(classes: Sequence[str], clips: Sequence[Clip]) -> list[int]:
    """Where the classes of VGGSounder, in its order, stand among those of a classifier.

    Raises:
        ValueError: they are not the same, or the clips are not those of VGGSound's test.
    """
    known = labels()
    theirs = known.get_all_labels()
    if unknown := sorted({*classes} - {*theirs}):
        raise ValueError(f"--export: VGGSounder has no class {some([*map(repr, unknown)])}")
    if missing := sorted({*theirs} - {*classes}):
        raise ValueError(f"--export: VGGSounder has {some([*map(repr, missing)])}, which --data has not")
    if not any([name_of(clip) in known for clip in clips]):  # all of them, as each must have a name
        raise ValueError("--export: VGGSounder has labels for none of the test clips")
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[name] for name in theirs]


def name_of(clip: Clip) -> str:
    """What VGGSounder calls a clip: <id>_<start second, six digits>."""
    found = NAME.fullmatch(Path(clip.source or clip.path).stem)
    if found is None:
        raise ValueError(f"--export: {printable(clip.path)} is not named as clips of VGGSound, ID_START.mp4")
    return found[1]


def write(path: Path, clips: Sequence[Clip], rows: Sequence[dict], order: Sequence[int]) -> str:
    """Writes {name: {"logits": {"a", "v", "av": one for each class}}}, as plain Python, whole or not at all.
    Returns how many of VGGSounder's clips they are: its package passes over others, and says nothing.

    Args:
        clips: those that the rows tell the `index` of.
        rows: arrays of logits by the names of `KINDS`.
        order: the `columns`.
    """
    logits = {}
    for row in rows:
        by_kind = {kind: row[name][order].tolist() for kind, name in KINDS.items()}
        logits[name_of(clips[int(row["index"])])] = {"logits": by_kind}
    path.parent.mkdir(parents=True, exist_ok=True)
    with aside(path) as partial:
        partial.write_bytes(pickle.dumps(logits))
    known = labels()
    return f"{sum(name in known for name in logits)} of the {len(known)} clips of VGGSounder"
