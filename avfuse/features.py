"""Features of any folder of videos in one file: `python -m avfuse.features FOLDER OUT.safetensors`."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from .checks import check_count
from .data.clips import Clip, ClipDataset, ClipLoader, Failure, find_clips, printable
from .encoder import AVEncoder, EncoderOutput
from .pretrained import load_encoder, write_safetensors
from .vit import presence_mask

FEATURES = ("image", "audio", "fusion")


def encode(
    encoder: AVEncoder,
    image: Tensor | None,
    audio: Tensor | None,
    image_present: Tensor | None = None,
    audio_present: Tensor | None = None,
) -> EncoderOutput:
    """The tokens of clips of which some lack a modality.

    Args:
        image, audio: (B, 3, height, width) and (B, 1, mel, time); one of them may be None.
        image_present, audio_present: (B,) bool, which clips have it; None = all.
    """
    return encoder(
        image,
        audio,
        image_mask=None if image is None else presence_mask(encoder.image, image_present),
        audio_mask=None if audio is None else presence_mask(encoder.audio, audio_present),
    )


def pool(tokens: EncoderOutput) -> dict[str, Tensor]:
    """The means of all image, audio and fusion tokens, (B, D) each; what is None is left out."""
    return {name: t.mean(1) for name in FEATURES if (t := getattr(tokens, name)) is not None}


# --- a whole data set ---------------------------------------------------------------------------------------


class Features(NamedTuple):
    """One row for each clip that could be read, in the order of the clips.

    `tensors` holds image, audio, fusion (N, D), the means of the tokens; image_present, audio_present (N,)
    bool, where False means a row of zeros; what the clips' labels are; and, if asked for, image_tokens,
    audio_tokens, fusion_tokens (N, n, D).
    """

    tensors: dict[str, Tensor]
    clips: list[Clip]
    failures: list[Failure]


@torch.no_grad()
def extract(
    encoder: AVEncoder,
    clips: Sequence[Clip],
    *,
    tokens: bool = False,
    batch_size: int = 32,
    workers: int = 2,
    timeout: float = 60.0,
    progress: bool = True,
) -> Features:
    """Features of the middle of each clip, as `ClipDataset` reads it for evaluation, on the encoder's device.

    The batch size changes speed and memory, not what comes out, beyond rounding.

    Raises:
        ValueError: no clips, or none that can be read.
    """
    check_count("batch_size", batch_size)
    encoder.eval()
    device = encoder.fusion_tokens.device
    parts, failures = [], []
    keys = [(0, index) for index in range(len(clips))]
    dataset = ClipDataset(clips, encoder.inputs, train=False)
    with (
        ClipLoader(dataset, workers=workers, timeout=timeout) as loader,
        tqdm(total=len(clips), desc="features", unit="clip", disable=not progress) as bar,
    ):
        for batch in loader.batches([keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]):
            failed = batch.pop("failures")
            failures += failed
            bar.update(len(failed) + len(batch.get("index", ())))
            if "index" in batch:
                parts.append(_features(encoder, batch, tokens, device))
    if not parts:
        raise ValueError(f"none of the {len(clips)} clips can be read: {_named(failures)}")
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Features(tensors, [clips[i] for i in tensors.pop("index").tolist()], failures)


def _features(encoder, batch, tokens, device) -> dict[str, Tensor]:
    inputs = {n: batch[n].to(device) for n in ("image", "audio", "image_present", "audio_present")}
    output = encode(encoder, **inputs)
    row = pool(output)
    if tokens:
        row |= {f"{name}_tokens": getattr(output, name) for name in FEATURES}
    for name in list(row):  # the tokens of what is not there mean nothing
        if name.startswith(("image", "audio")):
            present = inputs[f"{name[:5]}_present"]
            row[name] = row[name] * present.view(-1, *[1] * (row[name].ndim - 1))
    row = {name: value.float().cpu() for name, value in row.items()}
    return row | {name: value for name, value in batch.items() if name not in ("image", "audio")}


def save_features(path: Path, features: Features, folder: Path, checkpoint: str) -> None:
    """Writes one safetensors file, whole or not at all. Its metadata hold, as JSON, the `paths` of the rows
    relative to `folder`, and of the clips that are `unreadable` path and reason.
    """
    metadata = dict(
        folder=printable(folder.resolve()),  # metadata are Unicode, which a name need not be
        checkpoint=printable(checkpoint),
        paths=json.dumps([os.path.relpath(clip.path, folder) for clip in features.clips]),
        unreadable=json.dumps([[os.path.relpath(f.path, folder), f.reason] for f in features.failures]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, features.tensors, metadata)


def read_features(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of such a file, and the paths of their rows.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            paths = json.loads((file.metadata() or {})["paths"])
            return {name: file.get_tensor(name) for name in file.keys()}, paths
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"features {path} cannot be read: {error!r}") from error


# --- command line -------------------------------------------------------------------------------------------


@dataclass
class FeaturesConfig:
    """Pooled image, audio and fusion features of every video in a folder, searched recursively.

    What comes out is one safetensors file: image, audio, fusion (clips, width), and image_present and
    audio_present, which are False where a clip lacks that modality (its row is zeros). The paths of the rows
    are in the file's metadata, and so are the clips that cannot be read, with the reason; these have no row.
    `avfuse.features.read_features` reads it back. It is written at the end, whole or not at all.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of videos."""
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
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = load_encoder(config.checkpoint).to(device)
    options = dict(workers=config.workers, timeout=config.clip_timeout)
    scan = find_clips(config.folder, missing=config.missing, **options)
    print(scan.summary())
    features = extract(encoder, scan.clips, tokens=config.tokens, batch_size=config.batch_size, **options)
    broken = [Failure(-1, error.path, error.reason) for error in scan.unreadable]
    features = features._replace(failures=broken + features.failures)
    save_features(config.out, features, config.folder, config.checkpoint)
    shapes = ", ".join(f"{name} {tuple(features.tensors[name].shape)}" for name in FEATURES)
    print(f"{config.out}: {shapes}")
    if features.failures:
        print(f"{len(features.failures)} could not be read: {_named(features.failures)}")


def _named(failures: Sequence[Failure]) -> str:
    return "; ".join(f"{printable(f.path)} ({printable(f.reason)})" for f in failures)


if __name__ == "__main__":
    try:
        main(tyro.cli(FeaturesConfig, prog="python -m avfuse.features"))
    except (ValueError, OSError, SafetensorError) as error:
        sys.exit(f"error: {printable(error)}")
