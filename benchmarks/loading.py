"""How many clips a second one core reads, decodes and transforms, stage by stage."""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import measure
import torch
from tables import MISSING, aligned, spread

from avfuse import InputSettings
from avfuse.data import sounding_shapes
from avfuse.data.clips import ClipDataset
from avfuse.data.decode import ClipReader
from avfuse.data.find import find_data
from avfuse.data.transforms import Spectrogram, random_gain, training_images

STAGES = {
    "open": "open, read the header",
    "picture": "open, seek, decode one frame",
    "sound": "open, seek, decode 3 s of sound",
    "image": "crop, resize, normalise",
    "spectrogram": "gain, log-mel spectrogram",
    "whole": "a training item, all of it",
    "8 frames": "open, decode 8 frames of 3 s",
    "8 alone": "the same, each sought alone",
    "16 frames": "open, decode 16 frames of 3 s",
    "16 alone": "the same, each sought alone",
}


@dataclass(frozen=True)
class Options(measure.FileOptions):
    """Clips per second and core of the reader: opening, decoding, transforms, spectrogram, and all of it.

    The clips are Sounding Shapes (H.264 + AAC), generated for the run in each of the given sizes; 360 pixels
    is what the paper's clips have. What is measured is what a worker process does: one thread, one clip at a
    time, at the paper's input settings, with training crops, gains, windows and moments.
    """

    sizes: tuple[int, ...] = (128, 360)
    """Width and height of the clips, in pixels."""
    clips: int = 12
    """Clips of each size."""
    clip_seconds: float = 4.0
    """Length of a clip."""
    seconds: float = 20.0
    """How long each size is timed; five rounds at least."""


def main(options: Options) -> dict:
    options = replace(options, out=options.out or measure.RESULTS / "loading-cpu.json")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record = measure.begin_record("loading", asdict(options) | {"device": "cpu"}, options.note)
    record["sizes"] = {}
    for size in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            sounding_shapes.generate(
                folder, train=options.clips, test=0, size=size, seconds=options.clip_seconds, progress=False
            )
            record["sizes"][size] = measure_size(options, Path(folder), size)
    print(aligned(table(measure.write_record(options.out, record))))
    torch.set_num_threads(threads)
    return record


def measure_size(options: Options, folder: Path, size: int) -> dict[str, dict]:
    """Quantiles of clips per second by stage; one number for each pass over all clips."""
    clips = find_data(folder, lambda line: None, progress=False, workers=0).train
    dataset = ClipDataset(clips, InputSettings(), train=True)
    for clip, item in zip(clips, map(dataset.__getitem__, range(len(clips))), strict=True):
        if not isinstance(item, dict) or not item["image_present"] or not item["audio_present"]:
            raise ValueError(f"clip {clip.path.name} cannot be read whole")
    clocks = {name: measure.WallClock(stage, "cpu") for name, stage in stages(dataset).items()}
    times = measure.time_rounds(clocks, seconds=options.seconds, rounds=(5, 50), title=f"{size} pixels")
    return {
        name: dict(clips_per_second=measure.quantiles([len(clips) / second for second in seconds]))
        for name, seconds in times.items()
    }


def stages(dataset: ClipDataset) -> dict[str, Callable]:
    """Each stage as a call that does it for all clips; the transforms work on what was decoded beforehand."""
    settings, spectrogram = dataset.settings, Spectrogram(dataset.settings)
    generator = torch.Generator().manual_seed(0)
    window = settings.audio_seconds, settings.sample_rate
    starts = [max(0.0, clip.streams.seconds - settings.audio_seconds) / 2 for clip in dataset.clips]
    frames, sounds = [], []
    for clip, start in zip(dataset.clips, starts, strict=True):
        with ClipReader(clip.path) as reader:
            frames.append(torch.from_numpy(reader.frame(start + settings.audio_seconds / 2)).permute(2, 0, 1))
            sounds.append(torch.from_numpy(reader.audio(start, *window)))

    def for_each_clip(read: Callable) -> Callable:
        def run():
            for clip, start in zip(dataset.clips, starts, strict=True):
                with ClipReader(clip.path) as reader:
                    read(reader, start)

        return run

    def frames_of(count: int) -> dict[str, Callable]:
        times = replace(settings, image_frames=count).frame_times

        def together(reader, start):
            for _ in reader.frames([start + time for time in times]):
                pass

        def alone(reader, start):
            for time in times:
                reader.frame(start + time)

        return {f"{count} frames": for_each_clip(together), f"{count} alone": for_each_clip(alone)}

    return {
        "open": for_each_clip(lambda reader, start: reader.streams),
        "picture": for_each_clip(lambda reader, start: reader.frame(start + settings.audio_seconds / 2)),
        "sound": for_each_clip(lambda reader, start: reader.audio(start, *window)),
        "image": lambda: [training_images([frame], settings, generator) for frame in frames],
        "spectrogram": lambda: [spectrogram(random_gain(sound, generator)) for sound in sounds],
        "whole": lambda: [dataset[0, index] for index in range(len(dataset))],
        **frames_of(8),
        **frames_of(16),
    }


def table(record: dict) -> list[tuple]:
    """A row for each stage, a column for each size of clips."""
    rows = [("clips per second and core", *(f"{size} x {size}" for size in record["sizes"]))]
    for name, label in STAGES.items():
        sizes = (stages.get(name) for stages in record["sizes"].values())
        cells = (spread(stage["clips_per_second"], ".0f") if stage else MISSING for stage in sizes)
        rows.append((label, *cells))
    return rows


def summary(record: dict) -> str:
    speeds = ", ".join(
        f"{stages['whole']['clips_per_second']['median']:.0f} clips/s of {size} x {size} pixels"
        for size, stages in record["sizes"].items()
    )
    return f"Reading, decoding and transforming, one core: {speeds}."


if __name__ == "__main__":
    measure.run(main, Options)
