"""Sounding Shapes: a generated data set of H.264 + AAC clips in which sound and picture belong together.

    python -m avfuse.data.sounding_shapes OUT

Shapes move and pulse; one of them sounds. Sound alone tells which shape that is, and nothing of its colour.
The picture alone shows every colour, and nothing of which object sounds. So naming the colour of the sounding
one takes both: audio alone is right 1 time in 6, the picture alone 1 time in as many objects as there are.

    python -m avfuse.data.sounding_shapes OUT --scene synchrony

Here the shapes are all alike, and so are their sounds. They pulse to rhythms of their own, and the sound
follows one of them: naming its colour takes the sound and several pictures.
"""

from functools import partial

from ...lazy import module_of

# X as X: what is imported here to be offered here.
from .build import Settings as Settings
from .build import generate as generate
from .read import CLASSES as CLASSES
from .read import NAME as NAME
from .read import SPLITS as SPLITS
from .read import Entry as Entry
from .read import clips as clips
from .read import is_built as is_built
from .read import load_masks as load_masks
from .read import load_stems as load_stems
from .read import read as read
from .read import read_frames as read_frames
from .read import read_manifest as read_manifest
from .read import read_masks as read_masks
from .read import read_sound as read_sound
from .synthesis import COLOURS as COLOURS
from .synthesis import SHAPES as SHAPES

__getattr__ = partial(module_of, __name__)
