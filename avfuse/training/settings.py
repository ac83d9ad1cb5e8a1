"""What every run has in common, pretraining or task: its settings, and its way through the data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..data.find import DataSet


@dataclass(kw_only=True)
class LoopConfig:
    """Settings of a training loop."""

    data: Path | None = None
    """Folder of videos (searched recursively; train/ and test/ inside it are the splits). Default: Sounding
    Shapes, built once."""
    data_set: DataSet = "auto"
    """How that folder is laid out; auto tells by its manifest (`python -m avfuse.data check`) or files."""
    train_split: str = ""
    """The split to train on where there are several, such as balanced_train of AudioSet. Default: all."""
    run: Annotated[Path, tyro.conf.arg(name="run-dir")] = Path("runs/run")
    """Run folder: config, metrics, checkpoints, pictures, report, final model."""
    restart: bool = False
    """Delete what the run folder holds and begin anew; not for commands that a scheduler repeats."""

    epochs: int = 60
    """Passes over the data."""
    warmup_epochs: int = 6
    """Epochs of linear warm-up before the cosine decay."""
    batch_size: int = 64
    """Clips per step, over all processes; a smaller data set shrinks it."""
    micro_batch: int = 0
    """Clips that a process takes at once; gradients are accumulated over the rest of its share of the batch.
    0 = its whole share. Changes memory and speed, not the losses."""
    base_lr: float = 1e-3
    """Learning rate per 256 clips: lr = base_lr * batch / 256."""
    weight_decay: float = 0.05
    """AdamW weight decay; biases and norms are left out."""
    layer_decay: float = 1.0
    """Factor of the learning rate from each layer to the one below it; 1 = none."""
    clip_grad: float = 1.0
    """Largest gradient norm; 0 = no clipping."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.9999, which is then what is measured
    and saved; 0 = none."""
    precision: Literal["no", "fp16", "bf16"] = "no"
    """Mixed precision of Accelerate."""
    grad_checkpointing: bool = False
    """Recompute activations in the backward: less memory, more time, same losses."""

    missing: Literal["drop", "keep"] = "drop"
    """A clip without sound or without pictures: drop it (counted and named), or keep it with that modality
    absent.
    """
    max_unreadable: float = 0.01
    """Share of the clips that may turn out unreadable before the run stops."""
    clip_timeout: float = 60.0
    """Seconds a worker may take over one clip before it is replaced, and the clip named."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 2
    """Worker processes that read clips, for each process that trains; 0 reads in the training process, where
    a decoder that hangs or crashes takes the run with it."""
    seed: int = 0
    """Seed of weights, masks, crops and order."""
    measure_every: int = 0
    """Steps between measures and pictures on the way; before and after there always are. 0 = none."""
    checkpoint_every: int = 40
    """Steps between checkpoints; there always is one at the end."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay."""


# These change how a run is carried out, not what comes out: they may differ when it is resumed.
FREE = {
    *("preset", "plan", "run", "restart", "clips", "micro_batch", "grad_checkpointing", "max_unreadable"),
    *("clip_timeout", "workers", "measure_every", "checkpoint_every", "keep_checkpoints"),
}


def check_config(config: LoopConfig) -> None:
    """Raises ValueError naming the option that makes no sense."""
    for name in ("epochs", "batch_size", "checkpoint_every", "keep_checkpoints"):
        check_positive(config, name)
    for name in (
        *("warmup_epochs", "workers", "clip_grad", "weight_decay", "base_lr", "micro_batch", "measure_every"),
        *("max_unreadable", "seed"),
    ):
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{option(name)} must not be negative, got {getattr(config, name)}")
    if not 0 < config.clip_timeout < math.inf:
        raise ValueError(f"--clip-timeout must be a positive number of seconds, got {config.clip_timeout}")
    if config.seed >= 2**32:
        raise ValueError(f"--seed must be below 2**32, got {config.seed}")
    if config.warmup_epochs > config.epochs:
        raise ValueError(f"--warmup-epochs {config.warmup_epochs} are more than --epochs {config.epochs}")
    if not 0 <= config.ema < 1:
        raise ValueError(f"--ema must be in [0, 1), got {config.ema}")
    if not 0 < config.layer_decay <= 1:
        raise ValueError(f"--layer-decay must be in (0, 1], got {config.layer_decay}")


def check_positive(config: LoopConfig, name: str) -> None:
    """Raises ValueError unless a setting is a count of 1 or more."""
    if getattr(config, name) < 1:
        raise ValueError(f"{option(name)} must be positive, got {getattr(config, name)}")


def option(name: str) -> str:
    """The name of a setting on the command line."""
    return "--" + name.replace("_", "-")


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
    """The linear scaling rule, lr = base_lr * batch / 256."""
    return config.base_lr * batch_size / 256


# --- learning rates -----------------------------------------------------------------------------------------


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate: up to it in `warmup` equal steps, then down to 0 by half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def raised_warmup_cosine(step: int, warmup: int, total: int) -> float:
    """The same for weights that were pretrained: raised from 0 by half a cosine over the first half of
    training, so that fresh fusion blocks do not undo them (released code).
    """
    raised = 0.5 * (1 - math.cos(math.pi * min(1.0, step / max(1, total / 2))))
    return raised * warmup_cosine(step, warmup, total)
