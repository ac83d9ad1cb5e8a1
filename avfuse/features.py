"""Features of any folder of videos in one file: `python -m avfuse.features FOLDER OUT.safetensors`."""

from .command import begin, read
from .options import TABLES, FeaturesConfig

if __name__ == "__main__":
    begin("avfuse.features", read(FeaturesConfig))


import torch

from .data.clips import Failure
from .data.find import find_data
from .data.table import ClipTable
from .data.workers import share_cores
from .files import check_target, printable, write_table
from .loading import load_encoder
from .training.features import (
    FEATURES,
    extract,
    name_failures,
    read_features,
    save_features,
    table_rows,
    windows_of,
)

__all__ = ["FEATURES", "FeaturesConfig", "extract", "main", "read_features", "save_features"]


def main(config: FeaturesConfig) -> None:
    """Raises:
    ValueError: a setting is wrong, or there is no clip that can be read.
    """
    check_target("--out", config.out)
    share_cores(config.threads, config.workers)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = load_encoder(config.checkpoint)
    encoder = (encoder.with_frames(config.frames) if config.frames else encoder).to(device)
    options = dict(workers=config.workers, timeout=config.clip_timeout, progress=not config.quiet)
    found = find_data(config.folder, data_set=config.data_set, missing=config.missing, **options)
    clips = found.train
    if found.test is not clips:
        clips = ClipTable((*clips, *found.test), classes=found.classes, root=clips.root)
    options |= dict(every=config.every, windows=config.windows, tokens=config.tokens)
    features = extract(encoder, clips, batch_size=config.batch_size, **options)
    broken = [Failure(-1, error.path, error.reason) for error in found.unreadable]
    features = features._replace(failures=broken + features.failures)
    if config.out.suffix in TABLES:
        window = encoder.inputs.audio_seconds if config.windows == 1 else None
        write_table(config.out, table_rows(features, config.folder, clips.classes, window))
    else:
        protocol = windows_of(encoder.inputs, config.windows, "features")
        if config.every is not None:
            protocol += f", every {config.every:g} s"
        save_features(config.out, features, config.folder, config.checkpoint, protocol)
    shapes = ", ".join(f"{name} {tuple(features.tensors[name].shape)}" for name in FEATURES)
    print(printable(f"{config.out}: {shapes}"))
    if features.failures:
        print(f"{len(features.failures)} could not be read: {name_failures(features.failures)}")
