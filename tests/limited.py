"""Calls in processes of their own, each with 2 s of the processor and 500 MB besides what there was."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

SECONDS, BYTES = 2, 500 * 2**20
HANGS = 30  # seconds after which a call that waits for something is given up
UNLIMITED = "UNLIMITED"  # in the environment: to see what a call takes


def outcomes(calls: dict[str, Callable]) -> dict[str, str]:
    """How each call ended: "ValueError: its message", or another error, "returned" or "killed by signal 9".

    A child is forked for each, so the caller must not have used more than one thread.
    """
    return {name: outcome(call) for name, call in calls.items()}


def outcome(call: Callable) -> str:
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            signal.alarm(HANGS)
            if UNLIMITED not in os.environ:
                resource.setrlimit(resource.RLIMIT_AS, (address_space + BYTES,) * 2)
                resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
            try:
                call()
                message = "returned"
            except BaseException as error:
                message = f"{type(error).__name__}: {error}"
            os.write(writing, message[:2000].encode(errors="backslashreplace"))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as told:
        message = told.read().decode()
    _, status, usage = os.wait4(child, 0)
    if UNLIMITED in os.environ:
        used = f"{usage.ru_utime + usage.ru_stime:.1f} s, {usage.ru_maxrss / 1024:.0f} MB"
        print(f"{used}: {message[:150]}", file=sys.stderr)
    return message if not os.WIFSIGNALED(status) else f"killed by signal {os.WTERMSIG(status)}"
