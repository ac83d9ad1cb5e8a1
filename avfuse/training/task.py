"""What a loop trains, as `Task` says it, and all the parts of a run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset

from ..data.clips import Clip, Failure
from ..data.find import Found, find_data, probe
from .costs import count_parameters
from .run_folder import MetricsFile, Quarantine, has_trained_on_all, read_sides, run_before
from .settings import FRESH, LoopConfig, Schedule
from .starts import begin_from


class Task:
    """What a loop trains: the base class of pretraining and of every task."""

    name: str
    model: nn.Module  # around an encoder
    has_unused_parameters = False  # that a loss does not reach

    @staticmethod
    def find(config: LoopConfig, say: Callable[[str], object], look: Callable = probe) -> Found:
        """The data that the settings name; what is found is told through `say`, line by line. Clips stay on
        the side that they had in the run that this one begins with, or goes on with. `look` is that of
        `find_data`.
        """
        run = run_before(config)
        names = "demo", "data_set", "train_split", "missing", "test_share", "seed", "workers"
        options = {name: getattr(config, name) for name in names}
        options |= dict(before=read_sides(run), progress=not config.quiet, timeout=config.clip_timeout)
        found = find_data(config.data, say, look=look, **options)
        if found.test is found.train and config.epochs:
            say("no clips to test on: what is measured are the training clips themselves")
        if found.held_out and run not in (None, config.run) and has_trained_on_all(run, config.data):
            say(f"WARNING: {run} has trained on all clips, those that are held out here among them")
        return found

    def __init__(self, config: LoopConfig, found: Found):
        self.config, self.found = config, found

    def describe(self) -> str:
        """One line for people about the model."""
        config, parameters = self.config, count_parameters(self.model)
        weights = "fresh weights" if config.checkpoint == FRESH else f"the encoder of {config.checkpoint}"
        return f"{self.name}: {parameters / 1e6:.1f} M parameters, from {weights}"

    def begin(self, say: Callable[[str], object]) -> None:
        """Gives the model the weights that it begins with, beyond those of its encoder, and tells of them."""
        if self.config.checkpoint != FRESH:
            begin_from(self.model, self.config.checkpoint, say, is_trained=self.config.epochs > 0)

    def dataset(self, clips: Sequence[Clip], *, train: bool) -> Dataset:
        """Items by (epoch, index): dictionaries of tensors, among them "index", or a `Failure`; see
        `avfuse.data.clips.ClipDataset`.
        """
        raise NotImplementedError

    def inputs(self, batch: dict) -> dict[str, Tensor]:
        """What of a batch the model and its losses need. If no clip could be read, the batch holds a blank,
        of which `counts` are 0: every process has a backward in every step.
        """
        raise NotImplementedError

    def counts(self, inputs: dict[str, Tensor]) -> dict[str, int]:
        """By the name of each loss, over how many terms (clips, patches) its mean goes."""
        raise NotImplementedError

    def losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """By name, the means whose sum is minimised. `model` is that of the task, as Accelerate wraps it."""
        raise NotImplementedError

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups, see `avfuse.pretrained.Pretrained.parameter_groups`. A group whose "ramp" is true
        has its learning rate raised from 0 over the first half of training.
        """
        return self.model.parameter_groups(weight_decay)

    def measure(self, run: "Run", model: nn.Module, step: int, when: str) -> list[Failure]:
        """Judges `model` "before", "during" or "after" training, and tells and draws what came out. All
        processes call it; each returns the clips that it could not read.
        """
        raise NotImplementedError


@dataclass
class Run:
    """All parts of a run. The last four belong to its folder, see `open_folder`."""

    config: LoopConfig
    accelerator: Accelerator
    schedule: Schedule
    found: Found
    task: Task
    model: nn.Module  # that of the task, as Accelerate wraps it
    average: AveragedModel | None  # of its weights
    optimizer: torch.optim.Optimizer
    rates: torch.optim.lr_scheduler.LRScheduler
    extended_at: int = 0  # the step at which it had come to its end when it was given more
    metrics: MetricsFile = field(init=False)
    quarantine: Quarantine = field(init=False)
    first_step: int = 0  # after which it goes on
    lock: IO | None = None  # while it is open, the run folder is ours
