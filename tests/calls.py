"""What the tests of worker processes have them call: light to import, and mostly ill-behaved."""

import os
import signal
import sys
from pathlib import Path, PosixPath

from avfuse.data import workers


def square(number: int) -> int:
    return number * number


def blocked_signals(_) -> list[set]:
    """The signals that do not reach this process, nor the one it was forked from."""
    masks = [
        Path(f"/proc/{pid}/status").read_text().split("SigBlk:")[1].split()[0]
        for pid in (os.getpid(), os.getppid())
    ]
    return [{n for n in range(1, 65) if int(mask, 16) >> (n - 1) & 1} for mask in masks]


def whereabouts(key) -> tuple:
    """The key, this process, and the one it was forked from."""
    return key, os.getpid(), os.getppid()


def misbehave(how) -> str:
    if how == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if how == "hang":
        signal.pause()
    if how == "raise":
        raise KeyError("a bug")
    if how == "exit":
        sys.exit(3)
    if how == "answer with what cannot be sent":
        return lambda: None
    if how == "hang in the middle of the answer":
        workers._send = send_half(signal.pause)
    if how == "die in the middle of the answer":
        workers._send = send_half(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return f"{how} {'.' * 1_000_000}"  # more than a socket holds


def send_half(then):
    def send(connection, message: bytes, *_) -> None:
        connection.sendall(len(message).to_bytes(8, "big") + message[: len(message) // 2])
        then()

    return send


def killed_at_first(mark: Path) -> str:
    """Killed when called for the first time, as the kernel does when memory runs out."""
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return mark.name


def in_reverse(key: tuple[int, Path]) -> int:
    """Ends only when the call for the next number has, at whose pipe it waits: a loop would keep a core."""
    number, folder = key
    if (next_one := folder / str(number + 1)).exists():
        next_one.read_bytes()
    (folder / str(number)).write_bytes(b"")
    return number


def allocate(size: int) -> int:
    return len(bytearray(size))


class Bomb(PosixPath):
    """A path that misbehaves in the worker that it is sent to."""

    def __reduce__(self):
        return misbehave, (self.stem,)


class Unloadable:
    def __call__(self, key):
        raise AssertionError("cannot be reached")

    def __reduce__(self):
        return misbehave, ("raise",)
