"""Training: settings, the loop that pretraining and tasks share, checkpoints, judging, a run's report."""

from functools import partial

from ..lazy import module_of

__getattr__ = partial(module_of, __name__)
