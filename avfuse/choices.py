"""What options and functions choose from, by the names that users write."""

from typing import Literal

DataSet = Literal["auto", "vggsound", "audioset", "music", "music21", "sounding-shapes", "folder"]
Interactions = Literal["dense", "bilinear", "factorized", "token", "none"]  # `avfuse.fusion.VARIANTS`
Size = Literal["tiny", "small", "base", "large"]  # of both transformers, see `avfuse.presets`
