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
from .build import Settings, generate
from .read import (
    CLASSES,
    NAME,
    SPLITS,
    Entry,
    clips,
    is_built,
    load_masks,
    load_stems,
    read,
    read_frames,
    read_manifest,
    read_masks,
    read_sound,
)
from .synthesis import COLOURS, SHAPES

__all__ = [
    "CLASSES",
    "COLOURS",
    "NAME",
    "SHAPES",
    "SPLITS",
    "Entry",
    "Settings",
    "clips",
    "generate",
    "is_built",
    "load_masks",
    "load_stems",
    "read",
    "read_frames",
    "read_manifest",
    "read_masks",
    "read_sound",
]

__getattr__ = partial(module_of, __name__)
