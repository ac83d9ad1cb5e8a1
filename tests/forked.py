"""Runs in several processes that are forked from that of the tests, and so need not import anything."""

from accelerate import debug_launcher
from accelerate.state import AcceleratorState

from avfuse.training.loop import program
from avfuse.training.settings import LoopConfig
from avfuse.training.task import Task


def run_together(config: LoopConfig, kind: type[Task], processes: int) -> None:
    def work():
        AcceleratorState._reset_state(reset_partial_state=True)  # what is inherited
        assert program(config, kind) == 0

    debug_launcher(work, num_processes=processes)
