"""This process: what its user called it, and how it ends from outside."""

import os
import signal
from typing import NoReturn

INTERRUPTED = 128 + signal.SIGINT

called = ""  # such as "avfuse train", if not by `python -m`


def end_at_once() -> bool:
    """From now on Ctrl-C ends this process at once: Python's own KeyboardInterrupt is lost, or turned into
    another fault, where it meets the middle of an import. False where Ctrl-C is ignored, as under nohup.
    """
    is_heard = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, leave)
    if is_heard:
        signal.signal(signal.SIGINT, leave)
    return is_heard


def end_with_its_reader(yes: bool) -> None:
    """Whether this process ends, as others do, when nobody reads on what it prints (`--help | head`); else
    that is a BrokenPipeError, as for Python.
    """
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL if yes else signal.SIG_IGN)


def leave(*_) -> NoReturn:
    os._exit(INTERRUPTED)


def cores() -> int:
    """How many of them this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
