"""What options and functions choose from, by the names that users write."""

from typing import Literal

DataSet = Literal["auto", "vggsound", "audioset", "music", "music21", "sounding-shapes", "folder"]
Interactions = Literal[  # `avfuse.fusion.VARIANTS`
    "dense", "bilinear", "factorized", "token", "joint", "cross", "none"
]
SceneKind = Literal["binding", "synchrony"]  # of Sounding Shapes
DecodeFrom = Literal["patches", "fusion"]  # what the decoders of `avfuse.AVMAE` see
Demo = Literal[SceneKind, "many", "solos"]  # Sounding Shapes that are built where no folder is given
Size = Literal["micro", "tiny", "small", "base", "large"]  # of both transformers, see `avfuse.presets`
