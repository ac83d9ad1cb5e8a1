"""Clips as training data: each is read as a frame and a spectrogram, and batched.

    found = find_data(folder)
    dataset = ClipDataset(found.train, settings, train=True)
    keys = torch.utils.data.BatchSampler(ClipSampler(dataset, train=True), batch_size, drop_last=True)
    with ClipLoader(dataset) as loader:
        for batch in loader.batches(keys):

Every random choice about a clip is drawn from a generator seeded by (seed, epoch, index), so that the clip is
the same whatever worker or process reads it. A clip that cannot be read is named, never replaced by another;
one that crashes or hangs its decoder takes a worker process with it, and nothing else.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice, tee
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from ..checks import check_count, is_number
from ..files import printable
from ..inputs import InputSettings
from .container import ClipError, Streams
from .decode import ClipReader
from .table import Clip, ClipTable, check_labels
from .transforms import Spectrogram, evaluation_image, random_gain, training_images
from .workers import WorkerFailure, WorkerPool

TOGETHER = 8  # shards that are shuffled into each other
MEMORY = 4 * 2**30  # bytes a worker may allocate; the largest frames and those they refer to take less


# --- reading ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Failure:
    """What stands in a batch for a clip that cannot be read."""

    index: int
    path: Path
    reason: str


class ClipDataset(Dataset):
    """Clips, each read as one normalised frame, or T of them, and one log-mel spectrogram.

    `dataset[epoch, index]`; `dataset[index]` is epoch 0. In training, the window of sound, the moment of the
    frame within it, crop, flip and gain are drawn from (seed, epoch, index). In evaluation they are the
    middle window, its middle frame, the central crop, no flip and no gain. T = `settings.image_frames` > 1
    frames are those at `settings.frame_times` of the window, in training too, with one crop and flip for all;
    where the pictures end first, the last one stays.

    An item is a dictionary, or a `Failure` of a clip that cannot be read:
        image: (3, height, width) float32, or (T, 3, height, width); zeros for a clip without pictures.
        audio: (1, mel_bins, frames) float32; zeros for a clip without sound.
        image_present, audio_present: () bool.
        frames_shown: () long, only if T > 1: how many of the T times come before the pictures end.
        index: () long.
        label_<name>: for each label of the clip, () long; of a label that is a tuple, (classes,) float32 with
            ones at its classes.
        and what `extras` returns.

    Args:
        clips: best from `avfuse.data.find.find_data`, which knows what each holds; else every reading has to
            find out. A `ClipTable` takes less than a tenth of the memory of a list, in every worker.
        settings: transforms and sizes of the model that will see them.
        train: whether there is augmentation.
        seed: another seed, other random choices.
        extras: gives more that belongs to an item, such as the masks of a masked autoencoder, drawn from the
            generator it is called with, after everything else; workers need one that can be pickled.
        still: whether the only frame of a window is that of its middle in training, too, as a bias of time
            takes it to be, and not one from anywhere. Of a clip shorter than the window it is the clip's.

    Raises:
        ValueError: no clips, clips whose labels have different names, labels that are tuples but no
            `ClipTable` that says of how many classes, or a negative seed.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        settings: InputSettings,
        *,
        train: bool,
        seed: int = 0,
        extras: Callable[[torch.Generator], dict[str, Tensor]] | None = None,
        still: bool = False,
    ):
        _check_seed(seed)
        if not clips:
            raise ValueError("clips must not be empty")
        self.classes = clips.classes if isinstance(clips, ClipTable) else {}
        if not isinstance(clips, ClipTable):  # which has seen to this itself
            clips = list(clips)
            for clip in clips:
                check_labels(clips[0], clip)
        for name, label in clips[0].labels.items():
            if isinstance(label, tuple) and name not in self.classes:
                raise ValueError(f"clips must be a ClipTable that names the classes of label {name!r}")
        self.clips, self.settings, self.spectrogram = clips, settings, Spectrogram(settings)
        self.train, self.seed, self.extras, self.still = train, seed, extras, still

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Tensor] | Failure:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[index]
        clip, generator = self.clips[index], generator_of(self.seed, epoch, 1 + index)
        try:
            with clip.open() as reader:
                item = self.item(clip, reader, generator)
        except ClipError as error:
            where = "" if error.path == clip.path else f"{error.path.name}: "
            return Failure(index, clip.path, where + error.reason)
        return self._complete(item, clip, generator) | {"index": torch.tensor(index)}

    def item(self, clip: Clip, reader: ClipReader, generator: torch.Generator) -> dict[str, Tensor]:
        """What is read of a clip, or a ClipError: the method that a data set of another kind overrides.

        Args:
            clip: which one.
            reader: what `clip.open()` gave.
            generator: the source of all that is random.
        """
        place, moment = torch.rand(2, generator=generator).tolist() if self.train else (0.5, 0.5)
        streams = clip.streams or reader.streams
        start = place * max(0.0, streams.seconds - self.settings.audio_seconds)
        return self.window_from(start, streams, reader, generator, 0.5 if self.still else moment)

    def blank(self) -> dict[str, Tensor]:
        """An item without "index" that stands for no clip: as of one with neither pictures nor sound."""
        clip = replace(self.clips[0], streams=Streams(False, False, 0.0, 0.0))
        generator = torch.Generator().manual_seed(self.seed)
        return self._complete(self.item(clip, None, generator), clip, generator)

    def window_from(
        self,
        start: float,
        streams: Streams,
        reader: ClipReader,
        generator: torch.Generator | None,
        moment: float = 0.5,
        images: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The window of sound from `start` on, in seconds, and the frame at a moment of it in 0..1; several
        `image_frames` have times of their own. Frames that were read before are given as `images`.
        """
        settings, times = self.settings, self.times_of(start, streams, moment)
        if images is None:
            images = self.images_at(times, streams, reader, generator)
        audio = torch.zeros(1, settings.mel_bins, settings.frames)
        if streams.audio:
            waveform = torch.from_numpy(reader.audio(start, settings.audio_seconds, settings.sample_rate))
            audio = self.spectrogram(random_gain(waveform, generator) if self.train else waveform)
        item = {
            "image": images[0] if len(times) == 1 else torch.stack(images),
            "audio": audio,
            "image_present": torch.tensor(streams.video),
            "audio_present": torch.tensor(streams.audio),
        }
        if len(times) > 1:
            shown = sum(time < reader.picture_end for time in times) if streams.video else 0
            item["frames_shown"] = torch.tensor(shown)
        return item

    def times_of(self, start: float, streams: Streams, moment: float = 0.5) -> list[float]:
        """When the frames of a window are shown, in seconds of the clip."""
        settings = self.settings
        if settings.image_frames == 1:
            return [start + moment * min(settings.audio_seconds, streams.seconds)]
        return [start + time for time in settings.frame_times]

    def images_at(
        self,
        times: Sequence[float],
        streams: Streams,
        reader: ClipReader,
        generator: torch.Generator | None,
    ) -> list[Tensor]:
        """The frames shown at rising times, as the model sees them; zeros where there are no pictures."""
        if not streams.video:
            return [torch.zeros(3, *self.settings.image_shape)] * len(times)
        frames = (torch.from_numpy(frame).permute(2, 0, 1) for frame in reader.frames(times))
        if self.train:
            return training_images(frames, self.settings, generator)
        return [evaluation_image(frame, self.settings) for frame in frames]

    def _complete(self, item: dict[str, Tensor], clip: Clip, generator: torch.Generator) -> dict[str, Tensor]:
        """With the clip's labels, and what `extras` returns."""
        labels = {f"label_{name}": self._label(name, label) for name, label in clip.labels.items()}
        return item | labels | (self.extras(generator) if self.extras else {})

    def _label(self, name: str, label: int | tuple[int, ...]) -> Tensor:
        if isinstance(label, int):
            return torch.tensor(label)
        several = torch.zeros(len(self.classes[name]))
        several[list(label)] = 1.0
        return several


class ReadClip(NamedTuple):
    """A batch of one clip, for `encoder(*clip)`; a modality that the clip lacks is None."""

    image: Tensor | None  # (1, 3, height, width) float32; of T > 1 frames (1, T, 3, height, width)
    audio: Tensor | None  # (1, 1, mel_bins, frames) float32


def read_clip(path: str | Path, inputs: InputSettings, *, start: float | None = None) -> ReadClip:
    """The frame, or frames, and the spectrogram of a video or sound file, as a model sees them in evaluation.

    Args:
        path: the file.
        inputs: the transforms of the model, `encoder.inputs`.
        start: where the window of `inputs.audio_seconds` begins, in seconds; None = that in the middle. The
            frame is that in the middle of the window, or of a clip shorter than it; several are those shown
            at `inputs.frame_times` of it. Sound that ends early is extended by mirrored copies.

    Raises:
        ValueError: the file cannot be read, with the reason, or `start` is not within it.
    """
    if not isinstance(inputs, InputSettings):
        raise ValueError(f"inputs must be InputSettings, got {type(inputs).__name__}")
    with open_window(path, inputs, start) as (reader, start):
        dataset = ClipDataset([Clip(Path(path))], inputs, train=False)
        item = dataset.window_from(start, reader.streams, reader, None)
    return ReadClip(*(item[name][None] if item[f"{name}_present"] else None for name in ("image", "audio")))


@contextmanager
def open_window(
    path: str | Path, inputs: InputSettings, start: float | None
) -> Iterator[tuple[ClipReader, float]]:
    """A file, open for reading, and where its window begins in seconds; see `read_clip`."""
    try:
        with Clip(Path(path)).open() as reader:
            seconds = reader.streams.seconds
            if start is None:
                start = max(0.0, seconds - inputs.audio_seconds) / 2
            if not is_number(start) or not (start == 0 or 0 <= start < seconds):
                raise ValueError(f"start must be within the {seconds:g} s of {path}, got {start!r}")
            yield reader, start
    except ClipError as error:
        raise ValueError(f"{printable(error.path)} cannot be read: {printable(error.reason)}") from error


def check_one_frame(image_frames: int, what: str) -> None:
    """Raises ValueError for clips of several frames, where something takes one."""
    if image_frames != 1:
        raise ValueError(
            f"image_frames must be 1 for {what}, got {image_frames}: --frames 1 takes one frame of each clip"
        )


def window_starts(seconds: float, length: float, every: float) -> list[float]:
    """Where windows of `length` begin in a clip, one every so many seconds as long as a whole one is left. A
    clip that is shorter has one.
    """
    return [n * every for n in range(int(max(0.0, seconds - length) / every + 1e-9) + 1)]


class MultiWindowDataset(ClipDataset):
    """Clips for evaluation, an item each: `windows` of it, evenly spaced from its start to its end (one: the
    middle), stacked. What windows share of the pictures is decoded once.

    Items are those of `ClipDataset`, but for
        image: (windows, 3, height, width), or of T > 1 frames (windows, T, 3, height, width).
        audio: (windows, 1, mel_bins, frames).
        frames_shown: (windows,), of T > 1 frames.
    """

    def __init__(self, clips: Sequence[Clip], settings: InputSettings, *, windows: int = 1):
        super().__init__(clips, settings, train=False)
        check_count("windows", windows)
        self.places = np.linspace(0, 1, windows).tolist() if windows > 1 else [0.5]

    def item(self, clip, reader, generator):
        streams = clip.streams or reader.streams
        room = max(0.0, streams.seconds - self.settings.audio_seconds)
        starts = [place * room for place in self.places]
        times = np.array([self.times_of(start, streams) for start in starts])
        order = times.argsort(axis=None, kind="stable")
        images = self.images_at(times.flatten()[order].tolist(), streams, reader, generator)
        images = torch.stack(images)[order.argsort()].unflatten(0, times.shape)
        items = [
            self.window_from(start, streams, reader, generator, images=list(own))
            for start, own in zip(starts, images, strict=True)
        ]
        each = items[0].keys() & {"image", "audio", "frames_shown"}
        return items[0] | {name: torch.stack([item[name] for item in items]) for name in each}


class SlidingWindowDataset(ClipDataset):
    """Windows for evaluation, an item each: of every clip one each `every` seconds, see `window_starts`. Item
    n is of `clips[n]`, so a clip stands there as often as it has windows; "start" is where it begins in
    seconds.
    """

    start = 0.0

    def __init__(self, clips: Sequence[Clip], settings: InputSettings, *, every: float):
        super().__init__(clips, settings, train=False)
        length = settings.audio_seconds
        windows = [(c, start) for c in clips for start in window_starts(c.streams.seconds, length, every)]
        self.clips, self.starts = zip(*windows, strict=True)

    def __getitem__(self, key):
        self.start = self.starts[key[1] if isinstance(key, tuple) else key]
        return super().__getitem__(key)

    def item(self, clip, reader, generator):
        window = self.window_from(self.start, clip.streams, reader, generator)
        return window | {"start": torch.tensor(self.start)}


# --- batching -----------------------------------------------------------------------------------------------


def collate(
    items: Sequence[dict[str, Tensor] | Failure], blank: Callable[[], dict[str, Tensor]]
) -> dict[str, Tensor | list[Failure]]:
    """Items of a `ClipDataset` as one batch: the tensors stacked, and "failures", a list.

    The batch is smaller by its failures. If no clip could be read it holds one blank, which is present in no
    modality, and "index" is empty: `len(batch["index"])` is how many clips were read.

    Args:
        items: what the dataset gave.
        blank: gives the blank, see `ClipDataset.blank`.
    """
    read = [item for item in items if not isinstance(item, Failure)]
    rows = read or [blank()]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if not read:
        batch["index"] = torch.empty(0, dtype=torch.long)
    return batch | {"failures": [item for item in items if isinstance(item, Failure)]}


class ClipLoader(AbstractContextManager):
    """Batches of a dataset, read ahead by worker processes that live until it is closed.

    What is read depends on the keys alone, not on the number of workers. A clip whose reader crashes, hangs
    or raises becomes a `Failure` as one that cannot be read does; see `WorkerPool`.

    Args:
        dataset: whose items are read; a copy of it goes to each worker.
        workers: number of processes; 0 reads in this one, without a limit of time or memory.
        timeout: seconds that a clip may take.
        memory: bytes that a worker may allocate; a clip that takes more is a failure.

    Raises:
        ValueError: a negative number of workers, a limit that is not positive, or `extras` that cannot be
            pickled.
    """

    def __init__(
        self, dataset: ClipDataset, *, workers: int = 2, timeout: float = 60.0, memory: int = MEMORY
    ):
        self.dataset = dataset
        self._pool = WorkerPool(partial(_read, dataset), workers, timeout=timeout, memory=memory)

    def batches(
        self, batches: Iterable[Sequence[tuple[int, int]]]
    ) -> Iterator[dict[str, Tensor | list[Failure]]]:
        """Collated batches, one for each sequence of `(epoch, index)`, in order.

        Up to two batches of the size of the first are read ahead of the one that is asked for, or four clips
        for each worker if those are more.

        Raises:
            RuntimeError: workers cannot be started, or the loader is closed.
        """
        batches, read = tee(batches)
        first = next(read, None)
        if first is None:
            return
        ahead = max(2 * len(first), 4 * self._pool.workers, 1)
        items = self._pool.map(chain(first, chain.from_iterable(read)), ahead=ahead)
        for keys in batches:
            yield collate([self._item(item) for item in islice(items, len(keys))], self.dataset.blank)

    def close(self) -> None:
        """End the workers; the loader cannot be used again."""
        self._pool.close()

    def __exit__(self, *exception) -> None:
        self.close()

    def _item(self, item: dict[str, np.ndarray] | Failure | WorkerFailure) -> dict[str, Tensor] | Failure:
        if isinstance(item, WorkerFailure):
            index = range(len(self.dataset))[item.key[1]]
            return Failure(index, self.dataset.clips[index].path, item.reason)
        if isinstance(item, Failure):
            return item
        return {name: torch.from_numpy(array) for name, array in item.items()}


def _read(dataset: ClipDataset, key: tuple[int, int]) -> dict[str, np.ndarray] | Failure:
    """An item as arrays: they pickle by value, tensors by files shared between processes."""
    item = dataset[key]
    return item if isinstance(item, Failure) else {name: tensor.numpy() for name, tensor in item.items()}


class ClipSampler(Sampler[tuple[int, int]]):
    """The `(epoch, index)` of every clip once: shuffled by (seed, epoch) in training, in order in evaluation.

    As each key carries the epoch, workers that live on across epochs still know it. Clips in shards are
    shuffled by `TOGETHER` shards at a time, in random order, so that what is read next lies near.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, dataset: Sized, *, train: bool, seed: int = 0):
        _check_seed(seed)
        self.dataset, self.train, self.seed, self.epoch = dataset, train, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0 or above) that the next iteration is for."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, order = self.epoch, range(len(self))
        if self.train:
            generator = generator_of(self.seed, epoch, 0)
            order = torch.randperm(len(self), generator=generator)
            shards = getattr(getattr(self.dataset, "clips", self.dataset), "shards", None)
            if shards is not None:
                turns = torch.randperm(int(shards.max()) + 2, generator=generator) // TOGETHER
                order = order[turns[torch.from_numpy(shards + 1).long()[order]].argsort(stable=True)]
            order = order.tolist()
        return ((epoch, index) for index in order)


def generator_of(seed: int, epoch: int, number: int) -> torch.Generator:
    """The randomness of clip `number - 1` in an epoch; number 0 is the order of the clips."""
    state = np.random.SeedSequence((seed, epoch, number)).generate_state(1)
    return torch.Generator().manual_seed(int(state[0]))


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ValueError(f"seed must be 0 or above, got {seed}")
