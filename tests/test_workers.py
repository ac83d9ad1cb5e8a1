"""Worker processes that are killed, crash, hang, or answer by halves: one call is lost, and nothing else."""

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import calls
import pytest

from avfuse.data.workers import FOR_THE_PARENT, WorkerFailure, WorkerPool, share_cores

ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}


def is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def open_files(pid: int | str = "self") -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_the_order_of_their_keys(workers):
    with WorkerPool(calls.square, workers) as pool:
        for _ in range(2):
            assert list(pool.map(range(50))) == [number * number for number in range(50)]
        assert list(pool.map([])) == []
        assert list(pool.map([7], ahead=1)) == [49]


def test_calls_that_end_in_another_order(tmp_path):
    for number in 1, 2, 3:  # for the first one nobody waits
        os.mkfifo(tmp_path / str(number))
    with WorkerPool(calls.in_reverse, 4) as pool:
        assert list(pool.map((number, tmp_path) for number in range(4))) == [0, 1, 2, 3]


def test_maps_may_be_interleaved():
    with WorkerPool(calls.square, 2) as pool:
        one, two = pool.map(range(30)), pool.map(range(30, 60))
        pairs = list(zip(one, two, strict=True))
    assert pairs == [(number**2, (number + 30) ** 2) for number in range(30)]


@pytest.mark.parametrize(
    "threads, workers, environment, used",
    [(3, 1, "", 3), (0, 2, "", 6), (0, 9, "", 1), (0, 0, "", 8), (0, 2, "4", None), (3, 2, "4", 3)],
)
def test_threads_take_the_cores_that_workers_leave(monkeypatch, threads, workers, environment, used):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    taken = []
    monkeypatch.setattr("avfuse.data.workers.cores", lambda: 8)
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    share_cores(threads, workers)
    assert taken == ([] if used is None else [used])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_what_a_terminal_sends_to_all_processes_reaches_this_one_alone():
    """From the first moment on: also while the process that workers are forked from imports torch."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with WorkerPool(calls.blocked_signals, 1) as pool:
        (masks,) = pool.map([0])
    assert all(mask >= {*FOR_THE_PARENT} for mask in masks)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


# -------------------------------------------------------------------------------------------------- failures

REASONS = {
    "crash": "crashed its reader (signal 11)",
    "hang": "took longer than 2 s",
    "raise": "KeyError: 'a bug'",
    "exit": "ended its reader (exit code 3)",
    "hang in the middle of the answer": "took longer than 2 s",
    "die in the middle of the answer": "crashed its reader (signal 9)",
}


def test_only_the_call_that_misbehaves_is_lost():
    keys = [key for number, how in enumerate(REASONS) for key in (number, how)] + ["end"]
    with WorkerPool(calls.misbehave, 2, timeout=2.0, retries=0) as pool:
        results = list(pool.map(keys))
    for key, result in zip(keys, results, strict=True):
        if key in REASONS:
            assert result == WorkerFailure(key, REASONS[key])
        else:
            assert result.startswith(f"{key} ..")


@pytest.mark.parametrize("workers", [0, 1])
def test_unexpected_exceptions_do_not_end_a_worker(workers):
    unsendable = "answer with what cannot be sent"
    with WorkerPool(calls.misbehave, workers) as pool:
        good, raised, unsent = pool.map(["good", "raise", unsendable])
    assert good.startswith("good") and raised == WorkerFailure("raise", "KeyError: 'a bug'")
    if workers:
        assert unsent.key == unsendable and "local object 'misbehave.<locals>" in unsent.reason


def test_a_crash_is_tried_again(tmp_path):
    marks = [tmp_path / str(number) for number in range(4)]
    with WorkerPool(calls.killed_at_first, 2) as pool:
        assert list(pool.map(marks)) == ["0", "1", "2", "3"]
    with WorkerPool(calls.killed_at_first, 1, retries=0) as pool:
        again = tmp_path / "again"
        assert list(pool.map([again, again])) == [
            WorkerFailure(again, "crashed its reader (signal 9)"),
            "again",
        ]


def test_workers_killed_from_outside_change_nothing():
    with WorkerPool(calls.whereabouts, 2) as pool:
        seen = []
        for key, pid, _ in pool.map(range(200)):
            seen.append(key)
            if key % 20 == 0 and is_there(pid):
                os.kill(pid, signal.SIGKILL)
    assert seen == list(range(200))


def test_a_worker_killed_while_idle_costs_no_call_a_try():
    with WorkerPool(calls.whereabouts, 1, retries=0) as pool:
        ((_, pid, _),) = pool.map([0])
        os.kill(pid, signal.SIGKILL)
        (idle,) = pool._idle
        idle.process.join(60)
        ((key, other, _),) = pool.map([1])
        assert key == 1 and other != pid
        assert idle.socket.fileno() == -1 and idle not in pool._running  # nothing of it is left open


def test_signals_to_every_process_of_a_job_are_for_the_parent():
    with WorkerPool(calls.whereabouts, 1) as pool:
        ((_, pid, _),) = pool.map([0])
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, number)
        assert [result[1] for result in pool.map(range(20))] == 20 * [pid]


def test_the_process_that_workers_are_forked_from_may_be_killed():
    with WorkerPool(calls.whereabouts, 1) as pool:
        ((_, pid, parent),) = pool.map([0])
        os.kill(parent, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        ((_, other, new_parent),) = pool.map([0])
    assert other != pid and new_parent != parent


def test_memory_has_a_limit():
    with WorkerPool(calls.allocate, 1, memory=2**28) as pool:
        small, large, again = pool.map([2**26, 2**29, 2**26])
    assert (small, again) == (2**26, 2**26)
    assert large == WorkerFailure(2**29, "MemoryError")


def test_a_function_of_the_program_itself(tmp_path, monkeypatch):
    script, main = tmp_path / "script.py", ModuleType("__main__")
    script.write_text("def doubled(number):\n    return 2 * number\n")
    exec(script.read_text(), vars(main))
    main.__file__ = str(script)
    monkeypatch.setitem(sys.modules, "__main__", main)
    with WorkerPool(main.doubled, 1) as pool:
        assert list(pool.map([21])) == [42]
    with WorkerPool(calls.square, 1) as pool:  # whose workers import no program
        assert list(pool.map([6])) == [36]
    assert sys.modules["__main__"] is main


def test_a_function_that_no_worker_can_load():
    with WorkerPool(calls.Unloadable(), 2) as pool:
        with pytest.raises(RuntimeError, match="workers cannot be started: KeyError: 'a bug'"):
            list(pool.map(range(3)))


# ------------------------------------------------------------------------------------------------ bounds, end


@pytest.mark.parametrize("ahead, expected", [(5, 5), (None, 4 * 2)])
def test_keys_are_read_as_they_are_needed(ahead, expected):
    read = itertools.count()
    with WorkerPool(calls.square, 2) as pool:
        for taken, result in enumerate(pool.map(iter(lambda: next(read), -1), ahead=ahead), 1):
            assert result == (taken - 1) ** 2
            if taken == 40:
                break
    assert next(read) == 40 + expected


def test_a_map_that_is_left():
    with WorkerPool(calls.whereabouts, 2) as pool:
        results = pool.map(itertools.count())
        pids = {next(results)[1] for _ in range(20)}
        results.close()
        with pytest.raises(ZeroDivisionError):
            for key, pid, _ in pool.map(itertools.count()):
                pids.add(pid)
                1 / (key - 3)
        assert [key for key, _, _ in pool.map(range(9))] == list(range(9))
    assert len(pids) <= 2 and not any(is_there(pid) for pid in pids)


def test_closing_in_the_middle_of_a_call():
    with WorkerPool(calls.misbehave, 2, timeout=1000.0) as pool:
        results = pool.map(["good", "hang", "hang", "hang"])
        assert next(results).startswith("good")
    with pytest.raises(RuntimeError, match="shutdown"):
        next(pool.map([1]))
    pool.close()


def test_replaced_workers_leave_nothing_open():
    with WorkerPool(calls.misbehave, 2, retries=0) as pool, WorkerPool(calls.whereabouts, 1) as other:
        ((_, _, parent),) = other.map([0])
        list(pool.map(["crash", "good"] * 2))
        before = open_files(), open_files(parent)
        results = list(pool.map(["crash", "good"] * 50))
        assert sum(isinstance(result, WorkerFailure) for result in results) == 50
        # Each of the 50 that have crashed would leave one at least; the process of the tests may open others.
        assert open_files() < before[0] + 10 and open_files(parent) < before[1] + 10


SCRIPT = """
import os, signal, sys, calls
from avfuse.data.workers import WorkerPool

pool = WorkerPool(calls.misbehave, 3, timeout=1.5)
print(len(list(pool.map(range(6)))), flush=True)
results = pool.map(["good"] + (["hang"] if sys.argv[1] == "kill" else []))
next(results)
if sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["kill", "exit"])
def test_workers_end_with_their_parent(tmp_path, how):
    """Who is left of the script and its workers, idle or in a call that hangs, would hold its output open.

    The script has no `if __name__ == "__main__"`: no worker imports it, for its function is not from there.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, how], env=ENVIRONMENT, capture_output=True, text=True, timeout=100
    )
    assert done.stdout == "6\n"
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 0), done.stderr


def test_arguments():
    for name, value in (("workers", -1), ("retries", -1), ("timeout", 0.0), ("memory", 0)):
        with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
            WorkerPool(calls.square, **{"workers": 1, name: value})
    with pytest.raises(ValueError, match="function must be one that can be pickled .*lambda"):
        WorkerPool(lambda key: key, 1)
