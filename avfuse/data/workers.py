"""A function called in worker processes, any of which may crash or hang: that costs the one call.

Each worker has a thread here, which hands it a key over a socket, reads the answer against a deadline, and
replaces the worker if none comes. Workers share nothing with each other, neither locks nor queues: one that
is killed at any moment, in the middle of an answer too, leaves nothing behind that others would wait for.
"""

import itertools
import math
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.util import Finalize
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..process import cores

PRELOADED = ["avfuse.data.clips"]  # imported once, by the process that workers are forked from
STARTING = 300.0  # seconds in which a worker must be ready; the first imports torch, maybe over a network
GRACE = 0.1  # seconds past a deadline, for what has arrived while this process was itself held up
STARTS = 4  # workers in a row that fail to start before the pool gives up
PROCESS_LOCK = threading.Lock()  # multiprocessing's records of its processes are not made for threads
FOR_THE_PARENT = [  # signals that a terminal or a scheduler sends to every process of a job
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2),
]


@dataclass(frozen=True)
class WorkerFailure:
    """What stands in place of a result that never came."""

    key: Any
    reason: str


class WorkerPool(AbstractContextManager):
    """Processes that call one function; one that crashes or hangs costs its own call and is replaced.

    They start when first needed, and end with `close`, the `with` statement, or this process, however that
    ends. A call whose worker is lost is made again in a fresh one, so that a worker killed from outside
    changes no result. No memory or files are shared between processes.

    Args:
        function: called with one key. It, the keys and the results are pickled; results best hold arrays
            instead of tensors, which pickle slowly.
        workers: number of processes; 0 calls in this process, where nothing bounds time, memory or crashes.
        timeout: seconds that a call may take, the way of its result included.
        retries: how often a call whose worker was lost is made again before it is given up.
        memory: bytes that a worker may allocate beyond what it started with (Linux); None is no limit. Past
            it allocation fails, which is for the function to handle, as is any exception.

    Raises:
        ValueError: `workers` or `retries` negative, `timeout` or `memory` not positive, or a function that
            cannot be pickled.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        workers: int,
        *,
        timeout: float = 60.0,
        retries: int = 1,
        memory: int | None = None,
    ):
        for name, value in (("workers", workers), ("retries", retries)):
            if value < 0:
                raise ValueError(f"{name} must be 0 or above, got {value}")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout must be a positive number of seconds, got {timeout}")
        if memory is not None and memory <= 0:
            raise ValueError(f"memory must be a positive number of bytes, got {memory}")
        self.function, self.workers, self.timeout, self.retries = function, workers, timeout, retries
        self.memory, self._closed = memory, False
        self._running, self._idle = set(), []  # workers; the idle ones are running too
        if workers:
            try:
                self._pickled = pickle.dumps(function, protocol=5)
            except Exception as error:
                raise ValueError(f"function must be one that can be pickled for workers: {error}") from error
            self._threads = ThreadPoolExecutor(workers, thread_name_prefix="worker")
            self._kill = Finalize(self, _kill, [self._running], exitpriority=0)

    def map(self, keys: Iterable, *, ahead: int | None = None) -> Iterator:
        """The function's results in the order of their keys; a `WorkerFailure` for one that never came.

        Failures are an unexpected exception, a crash, or a call that took too long. The iterator may be left
        before its end: calls under way then run to theirs, unheard.

        Args:
            keys: read as they are needed.
            ahead: how many keys are read, at most, before the result of the first is asked for; default 4 for
                each worker.

        Raises:
            RuntimeError: workers cannot be started, or the pool is closed.
        """
        if not self.workers:
            for key in keys:
                done, result = _attempt(self.function, key)
                yield result if done else WorkerFailure(key, result)
            return
        keys = iter(keys)
        calls = deque()
        try:
            for key in itertools.islice(keys, ahead or 4 * self.workers):
                calls.append(self._threads.submit(self._call, key))
            while calls:
                result = calls.popleft().result()
                for key in itertools.islice(keys, 1):
                    calls.append(self._threads.submit(self._call, key))
                yield result
        finally:
            for call in calls:
                call.cancel()

    def close(self) -> None:
        """End the workers, in the middle of a call if need be; the pool cannot be used again."""
        self._closed = True
        if self.workers:
            with PROCESS_LOCK:
                self._kill()
            self._threads.shutdown(cancel_futures=True)
            for worker in list(self._running):
                self._drop(worker)

    def __exit__(self, *exception) -> None:
        self.close()

    # --- in the threads: one for each worker ----------------------------------------------------------------

    def _call(self, key) -> Any:
        message = pickle.dumps(key)
        for attempt in range(1 + self.retries):
            worker = self._start() if attempt else self._take()
            try:
                done, result = worker.ask(message, self.timeout)
            except _Lost as lost:
                self._drop(worker)
                result = str(lost)
                continue
            self._idle.append(worker)
            return result if done else WorkerFailure(key, result)
        return WorkerFailure(key, result)

    def _take(self) -> "_Worker":
        while True:
            try:
                worker = self._idle.pop()
            except IndexError:
                return self._start()
            if worker.is_alive():
                return worker
            self._drop(worker)  # killed while it had nothing to do

    def _start(self) -> "_Worker":
        for seconds in range(STARTS):
            time.sleep(seconds)  # a process that workers are forked from takes a moment to be seen as dead
            worker = _Worker()
            try:
                with PROCESS_LOCK:
                    if self._closed:
                        raise RuntimeError("the worker pool is closed")
                    self._running.add(worker)
                    worker.start(self.timeout, self.memory, imports_main=b"__main__" in self._pickled)
                loaded, problem = worker.ask(self._pickled, STARTING)
            except _Lost as lost:
                self._drop(worker)
                problem = f"the last one {lost}"
                continue
            if loaded:
                return worker
            self._drop(worker)
            break
        raise RuntimeError(f"workers cannot be started: {problem}")

    def _drop(self, worker: "_Worker") -> None:
        worker.stop()
        self._running.discard(worker)


class _Lost(Exception):
    """Why a worker gave no answer."""


class _Worker:
    """One process and the socket to it. Messages are pickled, each after its length in 8 bytes."""

    def __init__(self):
        self.process, self.socket = None, None

    def start(self, *arguments, imports_main: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.socket, theirs = socket.socketpair()
        process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
        main = sys.modules["__main__"]
        resource_tracker.ensure_running()  # which lets signals through again when it starts
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)  # inherited, from the first moment on
        try:
            if not imports_main:  # else each would import the training program, or run a script without guard
                sys.modules["__main__"] = ModuleType("__main__")
            process.start()
            self.process = process
        except (OSError, EOFError) as error:  # the process that they are forked from was killed
            raise _Lost(f"could not be forked: {error}") from error
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            sys.modules["__main__"] = main
            theirs.close()

    def is_alive(self) -> bool:
        with PROCESS_LOCK:
            return self.process.is_alive()

    def ask(self, message: bytes, timeout: float) -> Any:
        deadline = time.monotonic() + timeout
        try:
            _send(self.socket, message, deadline)
            return pickle.loads(_receive(self.socket, deadline))
        except TimeoutError:
            raise _Lost(f"took longer than {timeout:g} s") from None
        except Exception as error:  # the other end is gone, or what came is no message
            raise _Lost(self._ending() or f"gave no answer ({error})") from error

    def _ending(self) -> str:
        with PROCESS_LOCK:
            self.process.join(1)
            code = self.process.exitcode
        if code is None:
            return ""
        return f"crashed its reader (signal {-code})" if code < 0 else f"ended its reader (exit code {code})"

    def stop(self) -> None:
        with PROCESS_LOCK:
            if self.process is not None:
                self.process.kill()
                self.process.join(5)
                if self.process.exitcode is not None:  # not even SIGKILL ends one that waits for a dead disk
                    self.process.close()
                self.process = None
            if self.socket is not None:
                self.socket.close()


def share_cores(threads: int, workers: int) -> None:
    """Has torch use so many threads in this process. With 0 it takes the cores that the workers leave, at
    least one: threads that wait for each other on cores with other work take several times as long as one.
    """
    if not threads and "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, cores() - workers)
    if threads:
        torch.set_num_threads(threads)


def _kill(workers: set[_Worker]) -> None:
    for worker in list(workers):
        if worker.process is not None:
            worker.process.kill()


# --- in a worker --------------------------------------------------------------------------------------------


def _work(connection: socket.socket, timeout: float, memory: int | None) -> None:
    """Answer until the parent's end of the connection is closed, by itself or by its death."""
    for number in FOR_THE_PARENT:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        loaded, function = _attempt(pickle.loads, _receive(connection))
        _send(connection, pickle.dumps((loaded, None if loaded else function)))
        _limit(memory)
        while True:
            key = pickle.loads(_receive(connection))
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout)  # if it hangs with no parent there to see it
            done, answer = _attempt(lambda key: pickle.dumps((True, function(key)), protocol=5), key)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _send(connection, answer if done else pickle.dumps((False, answer)))
    except (EOFError, ConnectionError):
        return


def _attempt(function: Callable, key: Any) -> tuple[bool, Any]:
    """(True, result), or (False, what went wrong)."""
    try:
        return True, function(key)
    except Exception as error:
        return False, f"{type(error).__name__}: {error}".removesuffix(": ")


def _limit(memory: int | None) -> None:
    if memory is None or not Path("/proc/self/statm").exists():
        return
    import resource  # which not every system has

    pages = int(Path("/proc/self/statm").read_text().split()[5])  # private and writable, as the limit counts
    limit, hard = pages * resource.getpagesize() + memory, resource.getrlimit(resource.RLIMIT_DATA)[1]
    if hard == resource.RLIM_INFINITY or limit < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


# --- messages -----------------------------------------------------------------------------------------------


def _send(connection: socket.socket, message: bytes, deadline: float = math.inf) -> None:
    connection.settimeout(_left(deadline))
    connection.sendall(len(message).to_bytes(8, "big"))
    connection.settimeout(_left(deadline))
    connection.sendall(message)


def _receive(connection: socket.socket, deadline: float = math.inf) -> bytearray:
    return _read(connection, int.from_bytes(_read(connection, 8, deadline), "big"), deadline)


def _read(connection: socket.socket, size: int, deadline: float) -> bytearray:
    message, done = bytearray(size), 0
    while done < size:
        connection.settimeout(_left(deadline))
        count = connection.recv_into(memoryview(message)[done:])
        if not count:
            raise EOFError("the other end is closed")
        done += count
    return message


def _left(deadline: float) -> float | None:
    return None if deadline == math.inf else max(deadline - time.monotonic(), GRACE)
