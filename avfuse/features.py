"""Features of any folder of videos in one file: `python -m avfuse.features FOLDER OUT.safetensors`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors import SafetensorError

from .data.clips import Failure
from .data.find import find_data
from .data.table import ClipTable
from .files import printable
from .loading import load_encoder
from .training.features import FEATURES, extract, name_failures, read_features, save_features

__all__ = ["FEATURES", "FeaturesConfig", "extract", "main", "read_features", "save_features"]


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


def main(config: FeaturesConfig) -> None:
    """Raises:
    ValueError: a setting is wrong, or there is no clip that can be read.
    """
    if config.out.suffix != ".safetensors" or config.out.is_dir():
        raise ValueError(f"out must be a .safetensors file, got {config.out}")
    config.out.parent.mkdir(parents=True, exist_ok=True)  # if that fails, then before the work
    if not config.folder.is_dir():
        what = "is a file" if config.folder.exists() else "does not exist"
        raise ValueError(f"folder {config.folder} {what}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = load_encoder(config.checkpoint).to(device)
    options = dict(workers=config.workers, timeout=config.clip_timeout)
    found = find_data(config.folder, missing=config.missing, **options)
    clips = found.train
    if found.test is not clips:
        clips = ClipTable((*clips, *found.test), classes=found.classes, root=clips.root)
    features = extract(encoder, clips, tokens=config.tokens, batch_size=config.batch_size, **options)
    broken = [Failure(-1, error.path, error.reason) for error in found.unreadable]
    features = features._replace(failures=broken + features.failures)
    save_features(config.out, features, config.folder, config.checkpoint)
    shapes = ", ".join(f"{name} {tuple(features.tensors[name].shape)}" for name in FEATURES)
    print(printable(f"{config.out}: {shapes}"))
    if features.failures:
        print(f"{len(features.failures)} could not be read: {name_failures(features.failures)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(FeaturesConfig, prog="python -m avfuse.features"))
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {printable(error)}")
