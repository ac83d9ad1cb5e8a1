"""What every run has in common, pretraining or task: its settings, and its way through the data."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from ..choices import DataSet, Demo, Interactions, SceneKind, Size
from ..command import SAID
from ..files import address
from ..rules import COUNT, NOT_NEGATIVE, RATE, SECONDS, Rule, check_rules, marks


@dataclass(frozen=True)
class Formerly:
    """What a run does that began before there was this setting."""

    value: object


DEMO_RUN = Path("runs/demo")
DEMO_RUNS = {"binding": DEMO_RUN, "synchrony": Path("runs/synchrony-demo")}  # by scenes
FRESH = "none"  # in place of a checkpoint
RUN_FILES = "run.json", "config.json"  # of a run folder, its settings; older runs have the second
FREE = "changes how a run is carried out, not what comes out: may differ when the run is resumed"
LENGTH = "may grow when the run is resumed at its end, see `settle_length`"
ONCE = "is an order to one start of a run, and no part of what the run is"


@dataclass(kw_only=True)
class LoopConfig:
    """Settings of a training loop."""

    kind = ""  # of run, in the name of its folder
    demos: ClassVar[dict[SceneKind, Demo]] = {}  # by scenes, where it takes other data than all programs do

    # FREE, as the folder may be moved; which clips it holds may not differ, see `describe_data`.
    data: Annotated[Path | None, SAID, FREE] = None
    """Folder of videos (searched recursively; train/ and test/ inside it are the splits), or the address of
    one that has a manifest, such as https://HOST/SHARDS. Default: Sounding Shapes, built once."""
    scene: Annotated[SceneKind, Formerly("binding")] = "binding"
    """Which Sounding Shapes those are: shapes that sound differently, and pulse (binding), or alike, told
    apart by when they pulse (synchrony: takes several frames)."""
    data_set: DataSet = "auto"
    """How that folder is laid out; auto tells by its manifest (`python -m avfuse.data check`) or files."""
    train_split: Annotated[str, SAID] = ""
    """The split to train on where there are several, such as balanced_train of AudioSet. Default: all."""
    test_share: Annotated[float, RATE, Formerly(0.0)] = 0.2
    """Share of the clips to hold out and test on, where the data name none. Names and --seed decide which;
    pieces of one recording (talk_001, talk_002) stay together, and each class has clips on both sides. From
    200 recordings on each is drawn by itself: then files that are added leave the others on their side.
    0 = measure on the training clips."""
    run: Annotated[Path | None, tyro.conf.arg(name="run-dir", help_behavior_hint=""), FREE] = None
    """Run folder: settings, metrics, checkpoints, pictures, results, report, final model. Default: under
    runs/, by the name of --data and of the task."""
    restart: Annotated[bool, ONCE] = False
    """Delete what the run folder holds and begin anew; not for commands that a scheduler repeats."""

    epochs: Annotated[int, COUNT, LENGTH] = 60
    """Passes over the data. A run that came to its end goes on when it is given more."""
    min_steps: Annotated[int, NOT_NEGATIVE, Formerly(0)] = 240
    """Fewest steps of a run whose --epochs are left at their default: a small data set gets more epochs, and
    warm-up in proportion. 0 = no such floor."""
    warmup_epochs: Annotated[int, NOT_NEGATIVE, LENGTH] = 6
    """Epochs of linear warm-up before the cosine decay."""
    batch_size: Annotated[int, COUNT] = 64
    """Clips per step, over all processes; a smaller data set shrinks it."""
    micro_batch: Annotated[int, NOT_NEGATIVE, FREE] = 0
    """Clips that a process takes at once; gradients are accumulated over the rest of its share of the batch.
    0 = its whole share. Changes memory and speed, not the losses."""
    base_lr: Annotated[float, NOT_NEGATIVE] = 1e-3
    """Learning rate per 256 clips: lr = base_lr * batch / 256."""
    lr_scaling: Annotated[Literal["root", "linear"], Formerly("linear")] = "root"
    """How the learning rate falls with batches below the default without a preset, for which --base-lr was
    chosen: with the square root of the batch, as suits AdamW (Malladi et al. 2022), or in proportion, as it
    is above."""
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.05
    """AdamW weight decay; biases and norms are left out."""
    layer_decay: Annotated[float, Rule("must be in (0, 1]", lambda value: 0 < value <= 1)] = 1.0
    """Factor of the learning rate from each layer to the one below it; 1 = none."""
    clip_grad: Annotated[float, NOT_NEGATIVE] = 1.0
    """Largest gradient norm; 0 = no clipping."""
    ema: Annotated[float, RATE] = 0.0
    """Decay of an exponential moving average of the weights, which is then what is measured and saved, such
    as 0.99 for hundreds of steps, 0.9999 for tens of thousands: of the first weights DECAY to the power of
    the steps is left. 0 = none."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of Accelerate, of training; held-out clips are judged in float32."""
    grad_checkpointing: Annotated[bool, FREE] = False
    """Recompute activations in the backward: less memory, more time, same losses."""

    frames: Annotated[int, NOT_NEGATIVE, Formerly(0)] = 0
    """Frames of a clip, evenly over its seconds of sound. 0 = as many as --checkpoint has, of fresh weights 1
    (the paper's). Weights of another number of frames are taken as they are; positions are interpolated."""
    pair_bias: Annotated[Literal["", "position", "time"], SAID, Formerly("")] = ""
    """A learned bias for the pairs of dense or bilinear interactions: of positions in image and spectrogram,
    or of the time between frame and sound, by which fusion can learn what happens together. Default: that of
    --checkpoint, of fresh weights none."""

    missing: Literal["drop", "keep"] = "drop"
    """A clip without sound or without pictures: drop it (counted and named), or keep it with that modality
    absent.
    """
    max_unreadable: Annotated[float, NOT_NEGATIVE, FREE] = 0.01
    """Share of the clips that may turn out unreadable before the run stops."""
    clip_timeout: Annotated[float, SECONDS, FREE] = 60.0
    """Seconds a worker may take over one clip before it is replaced, and the clip named."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"]), NOT_NEGATIVE, FREE] = 2
    """Worker processes that read clips, for each process that trains; 0 reads in the training process, where
    a decoder that hangs or crashes takes the run with it."""
    threads: Annotated[int, NOT_NEGATIVE, FREE] = 0
    """Threads of torch on the CPU, for each process that trains. 0 = as OMP_NUM_THREADS says,
    else the cores that the workers leave, at least one. Threads that share cores with others' work can be
    three times as slow as one alone. Changes speed, and losses by rounding."""
    norm_eps: Annotated[float | None, tyro.conf.Suppress, Formerly(1e-5)] = None
    """Of the norms of fresh fusion blocks; that of the transformers, but for runs that began with another."""
    seed: Annotated[int, Rule("must be 0 or more, and below 2**32", lambda value: 0 <= value < 2**32)] = 0
    """Seed of weights, masks, crops and order."""
    measure_every: Annotated[int, NOT_NEGATIVE, FREE] = 0
    """Steps between measures and pictures on the way; before and after there always are. 0 = none."""
    checkpoint_every: Annotated[int, COUNT, FREE] = 40
    """Steps between checkpoints; there always is one at the end, and before each measure on the way."""
    keep_checkpoints: Annotated[int, COUNT, FREE] = 2
    """How many of the latest checkpoints stay."""
    quiet: Annotated[bool, tyro.conf.arg(aliases=["-q"]), ONCE] = False
    """Show no progress, only what was found, results and faults."""
    given: Annotated[tuple[str, ...] | None, tyro.conf.Suppress, ONCE] = None
    """The settings that a command line gives, be it their default; None: it was no command line."""

    def __post_init__(self):
        if self.run is None:
            self.run = self.default_run()

    def is_asked(self, name: str) -> bool:
        """Whether somebody chose this setting, rather than a preset."""
        if self.given is None:
            return getattr(self, name) != getattr(type(self), name)
        return name in self.given

    @property
    def demo(self) -> Demo:
        """Which data are built where no folder is given."""
        return self.demos.get(self.scene, self.scene)

    def default_run(self) -> Path:
        """Of the demo's data runs/KIND, else runs/DATA-KIND; never the folder of the demo for other data."""
        if self.data is None:
            return Path("runs", self.kind if self.scene == "binding" else f"{self.scene}-{self.kind}")
        run = Path("runs", "-".join(name for name in (self.data.resolve().name, self.kind) if name))
        return Path("runs/demo-data") if run in (*DEMO_RUNS.values(), Path("runs")) else run


@dataclass(kw_only=True)
class TaskConfig(LoopConfig):
    """Settings that all tasks have."""

    # By scenes, the runs to start from, of which the first that is there is taken.
    starts: ClassVar[dict[SceneKind, tuple[Path, ...]]] = {scene: (run,) for scene, run in DEMO_RUNS.items()}

    checkpoint: Annotated[str, SAID] = ""
    """Whose weights to start from: a run folder, a saved model, a name on the Hugging Face hub, a released
    DeepAVFusion file, or "none" for fresh weights. Its encoder is taken, and of a model of the same task
    whatever fits; what is new is said. Default: runs/demo (of --scene synchrony runs/synchrony-demo), if
    `python -m avfuse.train` has left one there, else none; to localize and separate rather runs/segment, if
    `python -m avfuse.tasks.segment` has; to segment none."""
    model: Size = "tiny"
    """Size of both transformers, if weights are fresh."""
    interactions: Interactions = "dense"
    """How fusion tokens read image and audio tokens, if weights are fresh."""

    def __post_init__(self):
        super().__post_init__()
        if not self.checkpoint:  # found out once: a run that is resumed must find the same
            left = (str(run) for run in self.starts[self.scene] if (run / "model").is_dir())
            self.checkpoint = next(left, FRESH)


def checked(parse: Callable[..., LoopConfig]) -> Callable[..., LoopConfig]:
    """The same reader of a command line, for options that make sense together: else it raises ValueError. The
    warm-up follows where epochs alone are given.
    """

    def parse_and_check(args: Sequence[str], prog: str | None = None) -> LoopConfig:
        config = parse(args=args, prog=prog)
        options = (arg.partition("=")[0] for arg in args if arg.startswith("--"))
        config.given = tuple(option.removeprefix("--").replace("-", "_") for option in options)
        if not config.is_asked("warmup_epochs"):
            config.warmup_epochs = min(config.warmup_epochs, config.epochs // 2)
        check_config(config)
        return config

    return parse_and_check


def check_config(config: LoopConfig) -> None:
    """Raises ValueError naming the option that makes no sense; --data first, which is most often mistaken."""
    if config.data is not None:
        check_folder(config.data)
        if config.scene != "binding":
            raise ValueError(f"--scene {config.scene} builds its own data: leave out --data {config.data}")
    check_rules(config)
    if config.warmup_epochs > config.epochs:
        raise ValueError(f"--warmup-epochs {config.warmup_epochs} are more than --epochs {config.epochs}")


def check_folder(data: Path) -> None:
    """Raises ValueError unless --data is a folder, or an address."""
    if not data.is_dir() and not address(data):
        raise ValueError(
            f"--data {data} is not a folder" if data.exists() else f"--data {data} does not exist"
        )


def settings_of(config: LoopConfig, *, fixed: bool = False) -> dict:
    """The settings that describe a run, ready for JSON; or only those that are fixed from its first start."""
    names = {name for name, mark in marks(type(config)) if mark is ONCE or fixed and mark in (FREE, LENGTH)}
    settings = {name: value for name, value in asdict(config).items() if name not in names}
    paths = {name: path for name, path in settings.items() if isinstance(path, Path)}
    paths = {name: address(path) or str(path.resolve()) for name, path in paths.items()}
    return json.loads(json.dumps(settings | paths))


# --- the way through the data -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """Which clips make up a step, and which of them one of several processes reads, whatever their number.

    An epoch is cut into batches of `batch_size` clips, the rest is left out. A batch is dealt out to the
    processes clip by clip, and each takes its share in micro-batches of at most `micro_batch`.
    """

    clips: int
    epochs: int
    batch_size: int  # over all processes
    micro_batch: int
    process: int = 0
    processes: int = 1

    def __post_init__(self):
        if self.batch_size < self.processes:
            raise ValueError(
                f"--batch-size {self.batch_size} leaves some of the {self.processes} processes without a clip"
            )

    @property
    def steps_per_epoch(self) -> int:
        return self.clips // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    def micro_batches(self, order: Sequence, step: int) -> list[Sequence]:
        """This process's share of the batch of a step, out of the order of the clips in its epoch."""
        start = step % self.steps_per_epoch * self.batch_size
        share = order[start : start + self.batch_size][self.process :: self.processes]
        return [share[i : i + self.micro_batch] for i in range(0, len(share), self.micro_batch)]


def schedule_of(config: LoopConfig, clips: int, process: int = 0, processes: int = 1) -> Schedule:
    """The schedule over a data set of `clips` clips; one smaller than the batch shrinks it."""
    batch_size = min(config.batch_size, clips)
    share = -(-batch_size // processes)
    return Schedule(
        clips, config.epochs, batch_size, min(config.micro_batch or share, share), process, processes
    )


def learning_rate(config: LoopConfig, batch_size: int) -> float:
    """The linear scaling rule, lr = base_lr * batch / 256; for batches below the default one that of the
    square root, by which AdamW takes steps as large for their noise.
    """
    usual = type(config).batch_size
    if config.lr_scaling == "root" and batch_size < usual:
        return config.base_lr * math.sqrt(batch_size * usual) / 256
    return config.base_lr * batch_size / 256


# --- learning rates -----------------------------------------------------------------------------------------


def warmup_cosine(step: int, warmup: int, total: int, extended_at: int = 0) -> float:
    """Share of the peak learning rate: linear warm-up, then down to 0 at `total` by half a cosine.

    A run that had come to its end at step `extended_at` (0: none) and was given more steps warms up once
    more from there, to the cosine of a run that had `total` from the start.
    """
    if step < warmup:
        return (step + 1) / warmup
    total = total_at(step, total, extended_at)
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
    if 0 < extended_at <= step:
        return cosine * min(1.0, (step + 1 - extended_at) / max(1, warmup))
    return cosine


def raised_warmup_cosine(step: int, warmup: int, total: int, extended_at: int = 0) -> float:
    """The same for weights that were pretrained: raised from 0 by half a cosine over the first half of
    training, so that fresh fusion blocks do not undo them (released code).
    """
    half = max(1, total_at(step, total, extended_at) / 2)
    raised = 0.5 * (1 - math.cos(math.pi * min(1.0, step / half)))
    return raised * warmup_cosine(step, warmup, total, extended_at)


def total_at(step: int, total: int, extended_at: int) -> int:
    """How many steps the run was meant to have at a step: before it was extended, fewer."""
    return extended_at if step < extended_at else total
