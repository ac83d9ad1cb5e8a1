"""Clips for audio-visual training: readers of video files with sound, and a data set that is generated."""

from functools import partial

from ..lazy import module_of

__getattr__ = partial(module_of, __name__)
