"""What the commands without a run folder can be told. Nothing here brings torch."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

SUFFIXES = (".json", ".csv", ".parquet")


@dataclass
class FeaturesConfig:
    """Pooled image, audio and fusion features of every clip of a data set, or of a folder of videos.

    What comes out is one safetensors file: image, audio, fusion (clips, width), and image_present and
    audio_present, which are False where a clip lacks that modality (its row is zeros), and label_NAME for
    each label of a data set. The paths of the rows are in the file's metadata, and so are the clips that
    cannot be read, with the reason; these have no row.
    `avfuse.features.read_features` reads it back. It is written at the end, whole or not at all.
    """

    folder: tyro.conf.Positional[Path]
    """Any folder that can be trained on: of videos, searched recursively, of a data set, or of shards; clips
    to train on come first, then those to test on."""
    out: tyro.conf.Positional[Path]
    """File to write, such as features.safetensors; one that is there is replaced."""
    checkpoint: str
    """Whose encoder: a run folder, a saved model, a name on the Hugging Face hub, or a released DeepAVFusion
    file."""
    tokens: bool = False
    """Add all tokens: image_tokens, audio_tokens, fusion_tokens (clips, tokens, width). Everything is held in
    memory until it is written."""
    batch_size: int = 32
    """Clips that are encoded at once; changes speed and memory, not what comes out."""
    missing: Literal["drop", "keep"] = "keep"
    """What becomes of clips without sound or without pictures."""
    clip_timeout: float = 60.0
    """Seconds a worker may take over one clip before it is given up as unreadable."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 2
    """Processes that read clips."""


@dataclass
class PredictConfig:
    """What a model says of your videos, whatever training has left: classes with their probabilities by
    image, by sound and by both; a map of what sounds; the sound of what is seen; or features.

    A window is one frame and the seconds of sound that the model takes (3 s by default): the middle of each
    video, or one every few seconds.
    """

    model: tyro.conf.Positional[str]
    """A run folder, a saved model, or the name of one on the Hugging Face hub."""
    videos: tyro.conf.Positional[tuple[Path, ...]]
    """Video or sound files."""
    every: float | None = None
    """Seconds between the beginnings of windows, as long as a whole one is left; without it, there is the one
    in the middle."""
    top: int = 3
    """Classes that are shown on the screen; a file gets all."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None
    """File for all answers: .json, .csv or .parquet (which needs pyarrow). It is written at the end, whole or
    not at all."""
    pictures: Path | None = None
    """Folder for pictures: where the model looks and listens, maps of what sounds; of a separator, the
    sounds."""

    def __post_init__(self):
        if not self.videos:
            raise ValueError("VIDEO... must name at least one file")
        if self.every is not None and not 0 < self.every < math.inf:
            raise ValueError(f"--every must be a positive number of seconds, got {self.every}")
        if self.top < 1:
            raise ValueError(f"--top must be a positive integer, got {self.top}")
        if self.out is not None and self.out.suffix not in SUFFIXES:
            raise ValueError(f"--out must end in {', '.join(SUFFIXES)}, got {self.out}")


def run_folder(run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]) -> Path:
    """Write RUN/index.html: how far a training run is, its curves, probe, pictures, unreadable clips.

    Training writes this page by itself; use this for a run that is going on, or that crashed. It reads what
    the folder holds and changes nothing but index.html. Open the page in any browser: it needs no server.

    Args:
        run: Run folder, as given to `python -m avfuse.train --run-dir`.
    """
    return run
