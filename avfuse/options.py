"""What the commands without a run folder can be told. Nothing here brings torch."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .choices import DataSet
from .command import SAID
from .rules import COUNT, INTERVAL, NOT_NEGATIVE, SECONDS, Rule, check_rules
from .training.settings import check_folder

TABLES = (".csv", ".parquet")


@dataclass(kw_only=True)
class FeaturesConfig:
    """Pooled image, audio and fusion features of every clip of a data set, or of a folder of videos.

    Of a clip, the model sees one frame and the seconds of sound that it takes (3 s by default): those in the
    middle, with --windows the mean over several, or with --every as many windows as there are, a row each.

    What comes out is one file, by its suffix a table or safetensors, written at the end, whole or not at all.
    Clips that cannot be read have no row.

    A table, .csv or .parquet (which needs avfuse[parquet]), has a row for each clip or window: video, its
    path below --data; start, in seconds; label_NAME for each label of a data set; missing, what the clip
    lacks; and image_0, image_1, ... audio_0, ... fusion_0, ..., empty where it does.

    safetensors hold image, audio, fusion (clips, width), and image_present and audio_present, which are False
    where a clip lacks that modality (its row is zeros), label_NAME, and of --every the start. The paths of
    the rows are in the file's metadata, and so are the clips that cannot be read, with the reason.
    `avfuse.features.read_features` reads it back.
    """

    paths: tyro.conf.Positional[
        Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[FOLDER OUT]", help_behavior_hint="")]
    ] = ()
    """The same as --data FOLDER --out OUT."""
    folder: Annotated[Path | None, tyro.conf.arg(name="data", help_behavior_hint="(required)")] = None
    """Any folder that can be trained on: of videos, searched recursively, of a data set, or of shards; clips
    to train on come first, then those to test on."""
    data_set: DataSet = "auto"
    """How that folder is laid out; auto tells by its manifest (`python -m avfuse.data check`) or files."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], help_behavior_hint="(required)")] = None
    """File to write: .csv, .parquet or .safetensors; one that is there is replaced."""
    checkpoint: str
    """Whose encoder: a run folder, a saved model, a name on the Hugging Face hub, or a released DeepAVFusion
    file."""
    every: Annotated[float | None, SAID, INTERVAL] = None
    """Seconds between the beginnings of windows, as long as a whole one is left. Default: the one in the
    middle of each clip."""
    windows: Annotated[int, COUNT] = 1
    """Windows of each clip, evenly from its start to its end, over which features are averaged; 1 = the
    middle."""
    frames: Annotated[int, NOT_NEGATIVE] = 0
    """Frames of a window, evenly over it; 0 = as many as --checkpoint takes. Of another number, positions are
    interpolated."""
    tokens: bool = False
    """Add all tokens: image_tokens, audio_tokens, fusion_tokens (clips, tokens, width). Everything is held in
    memory until it is written."""
    batch_size: Annotated[int, COUNT] = 32
    """Clips that are encoded at once; changes speed and memory, not what comes out."""
    missing: Literal["drop", "keep"] = "keep"
    """What becomes of clips without sound or without pictures."""
    clip_timeout: Annotated[float, SECONDS] = 60.0
    """Seconds a worker may take over one clip before it is given up as unreadable."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"]), NOT_NEGATIVE] = 2
    """Processes that read clips."""
    threads: Annotated[int, NOT_NEGATIVE] = 0
    """Threads of torch on the CPU. 0 = as OMP_NUM_THREADS says, else the cores that the workers leave, at
    least one."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Show no progress, only what came out, and faults."""

    def __post_init__(self):
        if self.paths:
            if len(self.paths) != 2 or self.folder or self.out:
                raise ValueError(
                    f"give FOLDER OUT, or --data and --out, got {' '.join(map(str, self.paths))}"
                )
            self.folder, self.out = self.paths
        if self.folder is None or self.out is None:
            raise ValueError("--data and --out are both needed")
        check_folder(self.folder)
        check_rules(self)
        if self.windows > 1 and (self.every is not None or self.tokens):
            raise ValueError(f"--windows {self.windows} are averaged: leave out --every and --tokens")
        check_suffix(self.out, (".safetensors", *TABLES))
        if self.tokens and self.out.suffix in TABLES:
            raise ValueError(f"--tokens are more than a table holds: write .safetensors, not {self.out}")


@dataclass
class PredictConfig:
    """What a model says of your videos, whatever training has left: classes with their probabilities by
    image, by sound and by both; a map of what sounds; the sound of what is seen; or features.

    A window is one frame and the seconds of sound that the model takes (3 s by default): the middle of each
    video, or one every few seconds.
    """

    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN")]
    """A run folder, a saved model, the name of one on the Hugging Face hub, or a file of released weights."""
    videos: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="VIDEO...", help_behavior_hint="(required)"),
    ]
    """Video or sound files."""
    every: Annotated[float | None, SAID, INTERVAL] = None
    """Seconds between the beginnings of windows, as long as a whole one is left. Default: the one in the
    middle."""
    top: Annotated[int, COUNT] = 3
    """Classes that are shown on the screen; a file gets all."""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], help_behavior_hint="")] = None
    """File for all answers: .json, .csv or .parquet (which needs avfuse[parquet]). It is written at the end,
    whole or not at all. Of a map a table has the peak, at map_y, map_x of the picture that the model sees,
    and of a sound the file in --pictures; .json has them in full."""
    pictures: Annotated[Path | None, SAID] = None
    """Folder for pictures: where the model looks and listens, maps of what sounds; of a separator, the
    sounds."""
    threads: Annotated[int, NOT_NEGATIVE] = 0
    """Threads of torch on the CPU. 0 = as OMP_NUM_THREADS says, else one for each core."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"])] = False
    """Show no progress, only what came out, and faults."""

    def __post_init__(self):
        if not self.videos:
            raise ValueError("VIDEO... must name at least one file")
        check_rules(self)
        if self.out is not None:
            check_suffix(self.out, (".json", *TABLES))


@dataclass(kw_only=True)
class DemoConfig:
    """A page in the browser, over the models that training has left: where their fusion tokens look and
    listen, what a classifier says with sound or picture taken away, and the sound of what is clicked on.

    Needs avfuse[demo]. Only this machine can open it unless --host says otherwise. Ctrl-C ends it; files that
    were dropped on it are deleted.
    """

    runs: Path = Path("runs")
    """Folder of run folders, whose models are found by themselves."""
    clips: Path = Path("data")
    """Folder of videos, a few of which are offered to choose from."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 = all, open to whoever reaches this machine."""
    port: Annotated[int, Rule("must be in 1..65535", lambda value: 0 < value < 65536)] = 7860
    """Port to listen at."""
    threads: Annotated[int, NOT_NEGATIVE] = 0
    """Threads of torch on the CPU. 0 = as OMP_NUM_THREADS says, else one for each core."""

    __post_init__ = check_rules


def check_suffix(out: Path, suffixes: tuple[str, ...]) -> None:
    if out.suffix not in suffixes:
        raise ValueError(f"--out must end in {', '.join(suffixes)}, got {out}")
    if out.suffix == ".parquet" and not find_spec("pyarrow"):
        raise ValueError("--out .parquet needs pyarrow: pip install 'avfuse[parquet]', or write .csv")


def run_folder(run: tyro.conf.Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]]) -> Path:
    """Write RUN/index.html: how far a training run is, its curves, probe, pictures, unreadable clips.

    Training writes this page by itself; use this for a run that is going on, or that crashed. It reads what
    the folder holds and changes nothing but index.html. Open the page in any browser: it needs no server.

    Args:
        run: Run folder, as given to `python -m avfuse.train --run-dir`.
    """
    return run
