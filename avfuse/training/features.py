"""What an encoder makes of clips: their tokens, the means of these, and a file of them for many clips."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import check_count
from ..data.clips import Clip, ClipDataset, ClipLoader, Failure, MultiWindowDataset, SlidingWindowDataset
from ..encoder import FEATURES, AVEncoder, pool
from ..files import printable, some
from ..inputs import InputSettings
from ..progress import progress_bar
from ..weight_files import read_metadata, read_safetensors, write_safetensors


def pool_windows(
    encoder: AVEncoder,
    image: Tensor,
    audio: Tensor,
    image_present: Tensor,
    audio_present: Tensor,
    *,
    tokens: bool = False,
) -> dict[str, Tensor]:
    """The pooled tokens of clips (B, D), and if asked for all `tokens` as NAME_tokens: their means over the
    windows of `MultiWindowDataset`, zeros where a clip lacks the modality.
    """
    total: dict[str, Tensor] = {}
    for pixels, sound in zip(image.unbind(1), audio.unbind(1), strict=True):
        output = encoder(pixels, sound, image_present=image_present, audio_present=audio_present)
        row = pool(output)
        if tokens:
            row |= {f"{name}_tokens": getattr(output, name) for name in FEATURES}
        for name, value in row.items():
            total[name] = total.get(name, 0) + value.float() / image.shape[1]
    return without_absent(total, image_present, audio_present)


def without_absent(
    features: dict[str, Tensor], image_present: Tensor, audio_present: Tensor
) -> dict[str, Tensor]:
    """Zeros in the place of a modality that a clip lacks: tokens of what is not there mean nothing."""
    for name, present in (("image", image_present), ("audio", audio_present)):
        for kind in {name, f"{name}_tokens"} & features.keys():
            features[kind] = features[kind] * present.view(-1, *[1] * (features[kind].ndim - 1))
    return features


def windows_of(inputs: InputSettings, windows: int, averaged: str) -> str:
    """What a model is given of each clip: '10 windows of 3.0 s, logits averaged, middle frame'."""
    seconds, frames = f"{inputs.audio_seconds:.1f} s", inputs.image_frames
    given = (
        f"{windows} windows of {seconds}, {averaged} averaged" if windows > 1 else f"1 window of {seconds}"
    )
    return f"{given}, {'middle frame' if frames == 1 else f'{frames} frames'}"


# --- a whole data set ---------------------------------------------------------------------------------------


class Features(NamedTuple):
    """One row for each clip, or window of a clip, that could be read, in the order of the clips.

    `tensors` holds image, audio, fusion (N, D), the means of the tokens; image_present, audio_present (N,)
    bool, where False means a row of zeros; what the clips' labels are; of several frames, frames_shown (N,)
    or (N, windows), as the data set has it; of windows every so many seconds, their start in seconds; if
    asked for, image_tokens, audio_tokens, fusion_tokens (N, n, D), of several frames image_tokens
    (N, T, n, D).
    """

    tensors: dict[str, Tensor]
    clips: list[Clip]
    failures: list[Failure]


@torch.no_grad()
def extract(
    encoder: AVEncoder,
    clips: Sequence[Clip],
    *,
    every: float | None = None,
    windows: int = 1,
    tokens: bool = False,
    batch_size: int = 32,
    workers: int = 2,
    timeout: float = 60.0,
    progress: bool = True,
) -> Features:
    """Features of the middle of each clip, as `ClipDataset` reads it for evaluation, on the encoder's device;
    or their mean over several `windows` of it, see `MultiWindowDataset`; or of each window, one `every` so
    many seconds, see `SlidingWindowDataset`.

    The batch size changes speed and memory, not what comes out, beyond rounding.

    Raises:
        ValueError: no clips, or none that can be read; several windows with `every` or `tokens`.
    """
    check_count("batch_size", batch_size)
    if windows != 1 and (every is not None or tokens):
        raise ValueError(f"windows={windows} are averaged: neither every nor tokens goes with them")
    encoder.eval()
    device = encoder.fusion_tokens.device
    parts, failures = [], []
    if every is not None:
        dataset = SlidingWindowDataset(clips, encoder.inputs, every=every)
    elif windows != 1:
        dataset = MultiWindowDataset(clips, encoder.inputs, windows=windows)
    else:
        dataset = ClipDataset(clips, encoder.inputs, train=False)
    keys = [(0, index) for index in range(len(dataset))]
    with (
        ClipLoader(dataset, workers=workers, timeout=timeout) as loader,
        progress_bar(total=len(keys), desc="features", unit="window", shown=progress) as bar,
    ):
        for batch in loader.batches([keys[i : i + batch_size] for i in range(0, len(keys), batch_size)]):
            failed = batch.pop("failures")
            failures += failed
            bar.update(len(failed) + len(batch["index"]))
            if len(batch["index"]):
                parts.append(_features(encoder, batch, windows, tokens, device))
    if not parts:
        raise ValueError(f"none of the {len(clips)} clips can be read: {name_failures(failures)}")
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    failures = list({failure.path: failure for failure in failures}.values())
    return Features(tensors, [dataset.clips[i] for i in tensors.pop("index").tolist()], failures)


def _features(encoder, batch, windows, tokens, device) -> dict[str, Tensor]:
    inputs = {n: batch.pop(n).to(device) for n in ("image", "audio")}
    if windows == 1:
        inputs = {name: pixels[:, None] for name, pixels in inputs.items()}
    inputs |= {n: batch[n].to(device) for n in ("image_present", "audio_present")}
    row = pool_windows(encoder, **inputs, tokens=tokens)
    return {name: value.cpu() for name, value in row.items()} | batch


def save_features(path: Path, features: Features, folder: Path, checkpoint: str, protocol: str = "") -> None:
    """Writes one safetensors file, whole or not at all. Its metadata hold, as JSON, the `paths` of the rows
    relative to `folder`, of clips in shards what they were called before, and of the clips that are
    `unreadable` path and reason; and by what `protocol` clips were looked at.
    """
    metadata = dict(
        protocol=protocol,
        folder=printable(folder.resolve()),  # metadata are Unicode, which a name need not be
        checkpoint=printable(checkpoint),
        paths=json.dumps([clip.name(folder) for clip in features.clips]),
        unreadable=json.dumps([[os.path.relpath(f.path, folder), f.reason] for f in features.failures]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, features.tensors, metadata)


def table_rows(
    features: Features, folder: Path, classes: Mapping[str, Sequence[str]], window: float | None
) -> Iterator[dict]:
    """The same as rows of a table, with the paths and the names of labels in them.

    Args:
        classes: the names of the values of each label.
        window: seconds of the one in the middle of a clip; None = rows are means over several.
    """
    tensors = features.tensors
    for n, clip in enumerate(features.clips):
        row = dict(video=clip.name(folder))
        if "start" in tensors:
            row["start"] = round(tensors["start"][n].item(), 3)
        elif window is not None:
            row["start"] = round(max(0.0, clip.streams.seconds - window) / 2, 3)
        for name, label in clip.labels.items():
            numbers = label if isinstance(label, tuple) else (label,)
            row[f"label_{name}"] = "; ".join(classes[name][number] for number in numbers)
        lacks = dict(image="pictures", audio="sound")
        lacks = {name: what for name, what in lacks.items() if not tensors[f"{name}_present"][n]}
        row["missing"] = "".join(lacks.values())
        for name in FEATURES:
            row |= {} if name in lacks else numbered(name, tensors[name][n])
        yield row


def numbered(name: str, values: Tensor) -> dict[str, float]:
    """{"NAME_0": the first value, ...}"""
    return {f"{name}_{n}": value for n, value in enumerate(values.tolist())}


def read_features(path: str | Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of such a file, and the paths of their rows.

    Raises:
        ValueError: it is none, or damaged.
    """
    try:
        return read_safetensors(path), json.loads(read_metadata(path)["paths"])
    except (ValueError, KeyError, RecursionError) as error:
        raise ValueError(f"features {path} cannot be read: {error!r}") from error


def name_failures(failures: Sequence[Failure]) -> str:
    return some([f"{failure.path} ({failure.reason})" for failure in failures], separator="; ")
