"""avfuse's encoders in the harness of MTEB, whose benchmark MVEB compares audio-visual encoders:
`mteb.evaluate(mteb_model("runs/demo"), tasks)`.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import get_args

import numpy as np
import torch
from PIL import Image
from scipy.io import wavfile
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader, Dataset

from .data.clips import Clip, ClipDataset
from .data.container import ClipError, Streams
from .data.decode import ClipReader
from .encoder import AVEncoder
from .files import printable, some
from .inputs import InputSettings
from .loading import load_encoder
from .model_card import licence_of
from .progress import progress_bar
from .training.features import FEATURES, pool_windows
from .training.judge import weights_hash

MODALITIES = ("image", "audio", "video")
INPUTS = ("image", "audio", "image_present", "audio_present")


def mteb_model(source: str | os.PathLike, *, features: Sequence[str] = FEATURES) -> "Embedder":
    """An encoder as a model that `mteb.evaluate` takes.

    Args:
        source: a run, a saved model, or its name on the hub, of which the encoder is taken.
        features: of "image", "audio" and "fusion", whose pooled tokens make up an embedding.

    Raises:
        ValueError: the package is not there, there is no such encoder, or other features.
    """
    try:
        from mteb.models import ModelMeta
        from mteb.types import Licenses
    except ImportError as error:
        raise ValueError(f'mteb_model needs mteb, pip install "avfuse[mteb]": {error}') from error
    if not features or not {*features} <= {*FEATURES}:
        raise ValueError(f"features must be of {', '.join(FEATURES)}, got {features!r}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    encoder = load_encoder(source).to(device)
    licence = (licence_of(encoder.facts or {}, encoder.origins) or "").lower()
    meta = ModelMeta(
        loader=None,
        name=f"avfuse/{Path(source).resolve().name}" if os.path.exists(source) else str(source),
        revision=weights_hash(encoder)[:16],  # by name and revision mteb finds results of before
        experiment_kwargs=None if {*features} == {*FEATURES} else {"features": "-".join(sorted(features))},
        modalities=list(MODALITIES),
        n_parameters=sum(weight.numel() for weight in encoder.parameters()),
        embed_dim=len({*features}) * encoder.fusion_tokens.shape[-1],
        license=licence if licence in get_args(Licenses) else None,
        similarity_fn_name="cosine",
        framework=["PyTorch"],
        use_instructions=False,
        **dict.fromkeys(("release_date", "languages", "memory_usage_mb", "max_tokens", "open_weights")),
        **dict.fromkeys(("public_training_code", "public_training_data", "training_datasets", "contacts")),
    )
    return Embedder(encoder, tuple(name for name in FEATURES if name in features), meta)


@dataclass
class Embedder:
    """An encoder by the protocol of MTEB (`EncoderProtocol`).

    An embedding is the pooled image, audio and fusion tokens of a clip, each of length 1, side by side, with
    zeros for a modality that is not there. Where none is missing, the cosine of two embeddings is the mean
    of the cosines of the three, which `avfuse.tasks.retrieve` sums. Pictures and sounds alone share the
    fusion tokens.
    """

    encoder: AVEncoder
    features: tuple[str, ...]
    mteb_model_meta: object

    @torch.no_grad()
    def encode(
        self,
        inputs: DataLoader,
        *,
        task_metadata,
        hf_split: str,
        hf_subset: str,
        prompt_type=None,
        show_progress_bar: bool = True,
        **_,
    ) -> np.ndarray:
        """(rows, D of each feature) float32 of the rows of `inputs.dataset`: "image", a picture; "video", a
        file of which only the pictures are looked at; "audio", a file or an array.

        Raises:
            ValueError: rows of text, or one that cannot be read.
        """
        rows = _Rows(_undecoded(inputs.dataset), self.encoder.inputs, task_metadata.name)
        loader = DataLoader(rows, inputs.batch_size, num_workers=inputs.num_workers)
        device = self.encoder.fusion_tokens.device
        embeddings = []
        for batch in progress_bar(loader, desc=task_metadata.name, shown=show_progress_bar):
            batch = {name: batch[name].to(device) for name in INPUTS}
            batch |= {name: batch[name][:, None] for name in ("image", "audio")}  # one window
            pooled = pool_windows(self.encoder, **batch)
            embedding = torch.cat([normalize(pooled[name], dim=-1) for name in self.features], dim=-1)
            if not embedding.any(-1).all():
                raise ValueError(f"{task_metadata.name}: some rows have no {' or '.join(self.features)}")
            embeddings.append(embedding.cpu())
        return torch.cat(embeddings).numpy()

    def similarity(self, embeddings1, embeddings2) -> Tensor:
        """Cosines (N, M)."""
        one, other = (normalize(torch.as_tensor(e).float(), dim=-1) for e in (embeddings1, embeddings2))
        return one @ other.mT

    def similarity_pairwise(self, embeddings1, embeddings2) -> Tensor:
        """Cosines (N,)."""
        return torch.cosine_similarity(
            *(torch.as_tensor(e).float() for e in (embeddings1, embeddings2)), dim=-1
        )


# --- rows ---------------------------------------------------------------------------------------------------


def _undecoded(dataset: Iterable) -> Iterable:
    """The rows with their files as they are: avfuse's reader is to decode them, as in training."""
    for name in {"video", "audio"} & {*getattr(dataset, "features", ())}:
        feature = dataset.features[name]
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(name, replace(feature, decode=False))
    return dataset


@dataclass
class _Rows(Dataset):
    """Rows of a data set of MTEB as items of a `ClipDataset`: the middle window, its middle frame."""

    rows: Sequence[dict]
    inputs: InputSettings
    task: str

    def __post_init__(self):
        self.clips = ClipDataset([Clip(Path())], self.inputs, train=False)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = {name: value for name, value in self.rows[index].items() if value is not None}
        given = row.keys() & {"text", *MODALITIES}
        if not given or "text" in given or given >= {"image", "video"}:
            what = "no text, and one of image and video with or without audio"
            raise ValueError(f"{self.task}: avfuse embeds {what}, got {some(sorted(row))}")
        try:
            with ExitStack() as stack:
                folder = Path(stack.enter_context(TemporaryDirectory()))
                files = {name: _file(row[name], folder / name) for name in given - {"image"}}
                readers = {name: stack.enter_context(ClipReader(file)) for name, file in files.items()}
                item = self.item(row.get("image"), readers.get("video"), readers.get("audio"))
        except (ClipError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise ValueError(f"{self.task}: row {index} cannot be read: {printable(reason)}") from error
        return {name: item[name] for name in INPUTS}

    def item(
        self, picture: Image.Image | None, video: ClipReader | None, sound: ClipReader | None
    ) -> dict[str, Tensor]:
        if video is not None and not video.streams.video:
            raise ValueError("its video has no pictures")
        seconds = next((reader.streams.seconds for reader in (sound, video) if reader is not None), 0.0)
        if picture is not None:
            if not isinstance(picture, Image.Image):
                raise ValueError(f"image must be a picture of PIL, got {type(picture).__name__}")
            if picture.mode in ("I", "F") or ";" in picture.mode:
                raise ValueError(f"image must have 8 bits a channel, got mode {picture.mode}")
            pixels = np.array(picture.convert("RGB"))
            video = SimpleNamespace(frames=lambda times: [pixels] * len(times), picture_end=inf)
        streams = Streams(video is not None, sound is not None, seconds, 0.0)
        reader = SimpleNamespace(
            frames=video and video.frames,
            picture_end=video and video.picture_end,
            audio=sound and sound.audio,
        )
        return self.clips.window_from(
            max(0.0, seconds - self.inputs.audio_seconds) / 2, streams, reader, None
        )


def _file(value: object, path: Path) -> Path:
    """A file of what a row holds: bytes, which are written to `path`, a path, or an array of sound."""
    if isinstance(value, str | os.PathLike):
        return Path(value)
    value = {"bytes": value} if isinstance(value, bytes) else value
    held = {name: x for name, x in value.items() if x is not None} if isinstance(value, dict) else {}
    if {"array", "sampling_rate"} <= held.keys():
        samples, rate = np.asarray(held["array"]), int(held["sampling_rate"])
        if samples.dtype.kind == "f":
            samples = samples.astype(np.float32)
        if str(samples.dtype) not in ("float32", "int32", "int16", "uint8"):  # what WAV has
            raise ValueError(f"{path.name}: array must hold samples as WAV files do, got {samples.dtype}")
        if rate < 1 or samples.ndim not in (1, 2) or samples.ndim == 2 and len(samples) > samples.shape[1]:
            shape = f"{rate} Hz and shape {samples.shape}"
            raise ValueError(f"{path.name}: array must be (samples,) or (channels, samples), got {shape}")
        wavfile.write(path, rate, samples.T)
    elif "bytes" in held:
        path.write_bytes(held["bytes"])
    elif "path" in held:
        return Path(held["path"])
    else:
        got = sorted(map(str, held)) if held else type(value).__name__
        raise ValueError(f"{path.name} must be a file or an array with its sampling_rate, got {got}")
    return path
