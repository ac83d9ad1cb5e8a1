"""Sounding Shapes is built: scenes from seeds, written as H.264 + AAC clips, stems, masks and a manifest."""

import json
import math
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import av
import numpy as np

from ...choices import SceneKind
from ...command import SAID
from ...files import aside, printable, write_text
from ...process import cores
from ...progress import progress_bar
from ..sound import encode, frame_of
from .read import CLASSES, NAME, SPLITS, Entry
from .synthesis import OBJECTS, ShapeScene, draw, play, sample_scene

VERSION = 1  # a new version draws new scenes: it is part of every seed
SAMPLE_RATES = (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000)  # of AAC
KEY_FRAME_EVERY = 16  # frames
FIRST_SCENE = ("scene", "binding")  # what data sets are of that do not say it
PATIENCE = 600.0  # seconds in which a clip must be written


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what is generated.

    Raises:
        ValueError: naming the setting and its value.
    """

    scene: SceneKind = "binding"
    """What names the colour of the object that sounds: its shape, which its timbre tells (binding), or the
    moments at which it is large and loud, of objects of one shape and pitch (synchrony: takes several
    frames)."""
    train: int = 256
    """Clips to train on."""
    test: int = 256
    """Clips to evaluate on."""
    seed: int = 0
    """Another seed gives other clips; the same seed gives the same manifest, byte for byte."""
    objects: Annotated[int | None, SAID] = None
    """Objects in a clip, 1 to 4, of distinct colours, and in scenes of binding of distinct shapes. Default:
    3, of synchrony 4."""
    sounding: int = 1
    """How many of them sound, in scenes of synchrony 1. The labels are those of the first; the picture does
    not tell which that is."""
    seconds: float = 4.0
    """Length of a clip; a whole number of frames."""
    fps: int = 10
    """Frames per second."""
    size: int = 128
    """Width and height in pixels; even, as H.264 wants it."""
    sample_rate: int = 16_000
    """Samples of sound per second, mono."""

    def __post_init__(self):
        if self.objects is None:
            object.__setattr__(self, "objects", OBJECTS.get(self.scene, 0))
        object.__setattr__(self, "seconds", float(self.seconds))  # 4 and 4.0 are the same data set
        is_synchrony = self.scene == "synchrony"  # two at once, or with a single change, cannot be told apart
        frames = self.seconds * self.fps
        whole = math.isfinite(frames) and round(frames) >= 1 and abs(frames - round(frames)) < 1e-6
        for name, right, wish in (
            ("scene", self.scene in OBJECTS, f"one of {tuple(OBJECTS)}"),
            ("train", self.train >= 0, "0 or more"),
            ("test", self.test >= 0, "0 or more"),
            ("seed", self.seed >= 0, "0 or more"),
            ("objects", 1 <= self.objects <= 4, "1 to 4"),
            ("sounding", 1 <= self.sounding <= self.objects, f"1 to objects={self.objects}"),
            ("sounding", not is_synchrony or self.sounding == 1, "1 in scenes of synchrony"),
            ("seconds", not is_synchrony or self.seconds >= 2, "2 or more in scenes of synchrony"),
            ("fps", self.fps >= 1, "1 or more"),
            ("size", self.size >= 32 and self.size % 2 == 0, "even and at least 32"),
            ("seconds", whole, f"a whole number of frames at {self.fps} fps"),
            ("sample_rate", self.sample_rate in SAMPLE_RATES, f"one of {SAMPLE_RATES}"),
        ):
            if not right:
                raise ValueError(f"{name} must be {wish}, got {getattr(self, name)}")


def generate(root: str | Path, *, workers: int | None = None, progress: bool = True, **settings) -> Path:
    """Write the data set into the folder `root`, or go on where a build was interrupted, or find it built.

    A clip is written aside and renamed, and `dataset.json` is written last: where it is, all clips are.
    Two calls at once do the work twice and no harm; a killed one may leave a `.part` file that nothing reads.

    Args:
        root: the folder; made if need be.
        workers: processes; None is one per core, 1 stays in this process. The result does not depend on it.
        progress: show a progress bar.
        settings: fields of `Settings`, such as scene="synchrony", train=256, test=256, seed=0, objects=3.

    Returns:
        `root`, as a Path.

    Raises:
        ValueError: a setting is wrong, or the folder holds something else or was begun with other settings.
        OSError: a clip cannot be written; what is whole stays, and the same call goes on.
    """
    root, settings = Path(root), Settings(**settings)
    workers = cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers must be 1 or more, got {workers}")
    said = {name: value for name, value in asdict(settings).items() if (name, value) != FIRST_SCENE}
    description = {"name": NAME, "version": VERSION, "settings": said, "classes": CLASSES}
    description = json.dumps(description, indent=2, sort_keys=True) + "\n"
    numbers = [(split, number) for split in SPLITS for number in range(getattr(settings, split))]
    if not _begin(root, description, settings, numbers):
        if progress:
            print(printable(f"{root}: already built"))
        return root
    from ..workers import WorkerFailure, WorkerPool  # brings torch

    missing = [clip for clip in numbers if not (root / _name(*clip, ".mp4")).exists()]
    processes = min(workers, len(missing))
    bar = {"initial": len(numbers) - len(missing), "total": len(numbers), "unit": "clip", "desc": NAME}
    write = partial(_write_clip, root, settings)
    with WorkerPool(write, processes if processes > 1 else 0, timeout=PATIENCE) as pool:
        for failure in progress_bar(pool.map(missing), shown=progress, **bar):
            if isinstance(failure, WorkerFailure):
                path = root / _name(*failure.key, ".mp4")
                raise OSError(f"{printable(path)}: {printable(failure.reason)}")
    write_text(root / "dataset.json", description)
    return root


def _begin(root: Path, description: str, settings: Settings, numbers: list) -> bool:
    """Check what the folder holds, and write the manifest, which a resumed build must find unchanged."""
    built, manifest = root / "dataset.json", root / "manifest.jsonl"
    if built.exists():
        if built.read_text() != description:
            raise ValueError(f"{root} holds a data set of other settings: {_differences(built, settings)}")
        return False
    entries = (_entry(settings, *clip, _scene(settings, *clip)[0]) for clip in numbers)
    lines = "".join(json.dumps(asdict(entry), sort_keys=True) + "\n" for entry in entries)
    if manifest.exists():
        if manifest.read_text() != lines:
            raise ValueError(f"{root} holds an unfinished data set of other settings than {settings}")
    elif any((root / split).exists() for split in SPLITS):
        raise ValueError(f"{root} holds something else than {NAME}: a train or test folder, no manifest")
    for split in SPLITS:
        (root / split).mkdir(parents=True, exist_ok=True)
    write_text(manifest, lines)
    return True


def _differences(built: Path, settings: Settings) -> str:
    there = dict([FIRST_SCENE]) | json.loads(built.read_text()).get("settings", {})
    pairs = [(name, there.get(name), value) for name, value in asdict(settings).items()]
    return (
        ", ".join(f"{name}={old}, not {new}" for name, old, new in pairs if old != new) or "another version"
    )


# --- writing ------------------------------------------------------------------------------------------------


def _scene(settings: Settings, split: str, number: int) -> tuple[ShapeScene, np.random.Generator]:
    """The scene of a clip, from a seed of its own, whoever draws it and whatever the size of the data set."""
    rng = np.random.default_rng(np.random.SeedSequence((VERSION, settings.seed, SPLITS.index(split), number)))
    options = {name: getattr(settings, name) for name in ("scene", "objects", "sounding", "seconds")}
    return sample_scene(rng, **options), rng


def _name(split: str, number: int, ending: str) -> str:
    return f"{split}/{number:06d}{ending}"


def _entry(settings: Settings, split: str, number: int, scene: ShapeScene) -> Entry:
    stems = {n: _name(split, number, f".stem{order}.flac") for order, n in enumerate(scene.sounding)}
    first = scene.objects[scene.sounding[0]]
    return Entry(
        file=_name(split, number, ".mp4"),
        split=split,
        shape=first.shape,
        colour=first.colour,
        seconds=settings.seconds,
        fps=settings.fps,
        size=settings.size,
        sample_rate=settings.sample_rate,
        objects=[
            {**asdict(thing), "sounding": n in stems, "stem": stems.get(n)}
            for n, thing in enumerate(scene.objects)
        ],
        sounding=list(scene.sounding),
        masks=_name(split, number, ".masks.npz"),
        background=scene.background,
    )


def _write_clip(root: Path, settings: Settings, clip: tuple[str, int]) -> None:
    scene, rng = _scene(settings, *clip)
    entry = _entry(settings, *clip, scene)
    times = np.arange(round(settings.seconds * settings.fps)) / settings.fps
    frames, masks = draw(scene, times, settings.size)
    stems = play(scene, settings.seconds, settings.sample_rate, rng)
    for path, stem in zip(entry.stems, stems, strict=True):
        with aside(root / path) as partial_, av.open(partial_, "w", format="flac") as container:
            stream = container.add_stream("flac", rate=settings.sample_rate, layout="mono")
            encode(container, stream, [frame_of(stem, settings.sample_rate)])
    with aside(root / entry.masks) as partial_, open(partial_, "wb") as file:
        np.savez_compressed(file, masks=np.packbits(masks), shape=masks.shape, boxes=_boxes(masks))
    mix = stems.sum(0).astype(np.float32) / 32768
    with aside(root / entry.file) as partial_:  # last: a clip whose mp4 is there is whole
        _write_mp4(partial_, frames, mix, settings)


def _write_mp4(path: Path, frames: np.ndarray, sound: np.ndarray, settings: Settings) -> None:
    with av.open(path, "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=settings.fps, width=settings.size, height=settings.size)
        video.pix_fmt = "yuv420p"
        video.codec_context.thread_count = 1  # there is a process on every core already
        video.codec_context.gop_size = KEY_FRAME_EVERY
        video.options = {"preset": "veryfast", "crf": "18", "sc_threshold": "0"}
        audio = container.add_stream("aac", rate=settings.sample_rate, layout="mono")
        audio.bit_rate = 64_000
        encode(container, video, (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames))
        encode(container, audio, [frame_of(sound, settings.sample_rate)])


def _boxes(masks: np.ndarray) -> np.ndarray:
    """Tight boxes (S, T, 4) int16 around masks (S, T, H, W): x0, y0, x1, y1 (exclusive), 0 where unseen."""
    edges = []
    for seen in (masks.any(2), masks.any(3)):  # columns, rows
        edges.append((seen.argmax(-1), (seen.shape[-1] - seen[..., ::-1].argmax(-1)) * seen.any(-1)))
    (x0, x1), (y0, y1) = edges
    return np.stack([x0, y0, x1, y1], -1).astype(np.int16)
