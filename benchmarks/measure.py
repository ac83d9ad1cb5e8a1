"""What all benchmarks share: options, time in rounds, memory in fresh processes, ceilings, when results
agree, and what a result file says about where it comes from.
"""

import ctypes
import datetime
import gc
import json
import multiprocessing
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, Self

import torch
import tyro
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
PACKAGES = ("torch", "timm", "triton", "xformers", "numpy", "av")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


# --- options ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileOptions:
    """What every benchmark can be given."""

    note: str = ""
    """Kept with the results, such as what else the machine was doing."""
    out: Path | None = None
    """File for the results. Default: benchmarks/results/BENCHMARK-DEVICE.json."""


@dataclass(frozen=True)
class Options(FileOptions):
    """What benchmarks of tensors can be given."""

    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Default: float32 on a CPU, bfloat16 on a GPU."""
    seconds: float = 60.0
    """How long each group of rows is timed."""

    def on_device(self) -> Self:
        """These options with the device and the dtype that will be used."""
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: there is no CUDA device")
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = self.dtype or ("bfloat16" if device == "cuda" else "float32")
        return replace(self, device=device, dtype=dtype)


def run(main: Callable, options: type) -> None:
    """`main` as a command, with its options from the command line."""
    try:
        main(tyro.cli(options, prog=f"python benchmarks/{Path(sys.argv[0]).name}"))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")


# --- time ---------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class WallClock:
    """Seconds per call, seen from outside: one call that does not count, then as many as fill `turn` seconds
    (at least one) between two synchronisations. `before` is called ahead of them, outside the clock.

    Calls that take longer than LONG are warm enough from the last turn: only their first is not counted.
    """

    LONG = 2.0  # seconds

    def __init__(self, call: Callable, device: str, *, turn: float = 0.0, before: Callable | None = None):
        self.call, self.device, self.turn, self.before = call, device, turn, before
        self.repeats, self.last = 1, 0.0

    def __call__(self) -> float:
        if self.last < self.LONG:
            self.call()
        if self.before:
            self.before()
        synchronize(self.device)
        start = time.perf_counter()
        for _ in range(self.repeats):
            self.call()
        synchronize(self.device)
        elapsed = (time.perf_counter() - start) / self.repeats
        self.repeats, self.last = max(1, round(self.turn / elapsed)), elapsed
        return elapsed


class GpuClock:
    """Seconds per call by the GPU's own events, the median of `repeats`. `before`, such as emptying the
    cache, does not count.

    The GPU is kept waiting until all of a call is in its queue, so that gaps between launches do not count
    either. The wait is twice what the host needs to launch a call. Where the GPU began before the host was
    done, because something else held up the host, the number is thrown away and the wait doubled.
    """

    LONGEST = 2**28  # GPU cycles of a wait, more than a tenth of a second

    def __init__(self, call: Callable, *, repeats: int = 20, before: Callable | None = None):
        self.call, self.repeats, self.before, self.wait = call, repeats, before or call, None

    def __call__(self) -> float:
        self.wait = self.wait or self.cycles_to_launch()
        return statistics.median(self.sample() for _ in range(self.repeats))

    def cycles_to_launch(self) -> int:
        """Twice the host's time for a warm call, in cycles of a GPU that makes two in a nanosecond."""
        self.call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        self.call()
        return min(self.LONGEST, round(2 * 2e9 * (time.perf_counter() - start)))

    def sample(self) -> float:
        wait = self.wait
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.before()
            torch.cuda._sleep(wait)
            start.record()
            self.call()
            end.record()
            waited = not start.query()
            torch.cuda.synchronize()
            if waited:
                return start.elapsed_time(end) / 1e3
            if wait == self.LONGEST:
                raise RuntimeError(f"the host cannot launch a call within {wait} GPU cycles")
            wait = min(2 * wait, self.LONGEST)


def time_rounds(
    clocks: dict[str, Callable[[], float]],
    *,
    seconds: float,
    rounds: tuple[int, int] = (3, 50),
    title: str = "",
) -> dict[str, list[float]]:
    """Seconds per call, by name: one number for each round, so that the n-th numbers of all were taken
    together.

    In a round every clock has its turn, in an order drawn anew: whatever slows the machine for a while slows
    all of them. Rounds go on for `seconds`, but are as many as `rounds` allows.
    """
    keep_freed_memory()
    order, rng, times = list(clocks), random.Random(0), {name: [] for name in clocks}
    began = time.perf_counter()
    with tqdm(total=rounds[1], desc=title, unit="round", leave=False, disable=None) as bar:
        for done in range(rounds[1] if clocks else 0):
            if done >= rounds[0] and time.perf_counter() - began > seconds:
                break
            rng.shuffle(order)
            for name in order:
                bar.set_postfix_str(name)
                times[name].append(clocks[name]())
            bar.update()
    return times


def keep_freed_memory() -> None:
    """Tell glibc's malloc to keep what is freed. By default it gives large blocks back to the system, and by
    the luck of their order some models then pay for ten thousand page faults a call, and others for none.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # other C libraries have none
        mallopt(M_MMAP_THRESHOLD, 2**25)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """How many there are, their median, and the quartiles and extremes around it."""
    low, median, high = (
        statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    )
    spread = dict(min=min(values), q25=low, median=median, q75=high, max=max(values))
    return dict(n=len(values)) | {name: float(f"{value:.6g}") for name, value in spread.items()}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Quantiles of ours / theirs, round by round: what slowed both in a round cancels."""
    return quantiles([a / b for a, b in zip(ours, theirs, strict=False)])


# --- memory -------------------------------------------------------------------------------------------------


def in_fresh_process(function: Callable, *args):
    """The value of `function(*args)` in a process of its own, which has imported and not yet allocated; a
    MemoryError where that does not fit.
    """
    # The fork server imports once; with this, what malloc frees goes back to the system at once.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "65536")
    if torch.cuda.is_initialized():  # what this process only caches is for the other to allocate
        gc.collect()
        torch.cuda.empty_cache()
    try:
        with memory_errors(), ProcessPoolExecutor(1, mp_context=fork_server()) as pool:
            return pool.submit(function, *args).result()
    except BrokenProcessPool:
        raise MemoryError("killed by the system, which was out of memory") from None


def fork_server() -> multiprocessing.context.BaseContext:
    """Starts processes that have imported what this one has of avfuse, and done nothing else yet."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", *(name for name in sys.modules if name.startswith("avfuse."))])
    return context


@contextmanager
def memory_errors() -> Iterator[None]:
    """What torch's allocators raise becomes a MemoryError, with the size that did not fit."""
    try:
        yield
    except RuntimeError as error:
        size = re.search(r"tried to allocate ([\d.]+) *([A-Za-z]+)", str(error), re.I)
        if size is None:
            raise
        amount = f"{float(size[1]) / GIB:.1f} GiB" if size[2] == "bytes" else f"{size[1]} {size[2]}"
        raise MemoryError(f"out of memory: one more tensor of {amount} did not fit") from None


def peak_memory(call: Callable, device: str) -> int:
    """The largest memory in use during a call, over that before, in bytes.

    On a GPU what torch allocated there, on a CPU what the process held (resident set size).
    """
    synchronize(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        torch.ones(16, 16) @ torch.ones(16, 16)  # the first product pages in torch, 29 MiB of torch 2.15
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = process_memory("VmRSS")
    call()
    synchronize(device)
    return (torch.cuda.max_memory_allocated() if device == "cuda" else process_memory("VmHWM")) - before


def process_memory(field: str) -> int:
    """VmRSS (resident now), VmHWM (its peak) or VmSize (addresses in use), in bytes. Linux only."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def limit_memory(device: str, gib: float) -> None:
    """Let this process allocate `gib` more and then fail with an error, instead of being killed."""
    if device == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * GIB / total))
    else:
        import resource

        limit = process_memory("VmSize") + int(gib * GIB)
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def free_memory(device: str) -> float:
    """GiB that could be allocated now."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / GIB
    return int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024 / GIB


# --- ceilings -----------------------------------------------------------------------------------------------


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches now: bytes/s of copying a large tensor, FLOP/s of a large matrix product."""
    large = torch.ones(2**28 if device == "cuda" else 2**26, dtype=torch.uint8, device=device)
    other, size = torch.empty_like(large), 8192 if device == "cuda" else 2048
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    calls = {"copy": lambda: other.copy_(large), "matmul": lambda: matrix @ matrix}
    clocks = {name: WallClock(call, device, turn=0.05) for name, call in calls.items()}
    times = time_rounds(clocks, seconds=2, rounds=(5, 20), title="ceilings")
    return {
        "copy_bytes_per_s": 2 * large.numel() / min(times["copy"]),
        "matmul_flop_per_s": 2 * size**3 / min(times["matmul"]),
    }


# --- agreement ----------------------------------------------------------------------------------------------


def agreement(
    ours: dict[str, torch.Tensor],
    truth: dict[str, torch.Tensor],
    plain: Sequence[dict[str, torch.Tensor]],
    dtype: torch.dtype,
) -> dict:
    """Errors by name, and whether they are those of the dtype: each at most twice that of plain PyTorch in
    the same dtype (the largest of several), and a rounding.
    """
    errors = {name: relative_error(ours[name], tensor) for name, tensor in truth.items()}
    allowed = {
        name: 2 * max(relative_error(other[name], tensor) for other in plain) + torch.finfo(dtype).eps
        for name, tensor in truth.items()
    }
    return dict(agrees=all(errors[name] <= allowed[name] for name in truth), errors=errors, allowed=allowed)


def print_agreement(name: str, compared: dict) -> None:
    verdict = "agrees" if compared["agrees"] else "DISAGREES"
    print(f"  {verdict}: {name}, {largest_error(compared['errors'])}")


def largest_error(errors: dict[str, float]) -> str:
    return f"largest error {max(errors.values()):.1e}"


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth, where that is not 0."""
    difference, size = (ours - truth).norm().item(), truth.norm().item()
    return float(f"{difference / (size or 1.0):.3g}")


# --- results ------------------------------------------------------------------------------------------------


def begin_record(benchmark: str, settings: dict, note: str) -> dict:
    """Where the numbers of a run come from; without host names and paths. To be taken before the run."""
    return dict(
        benchmark=benchmark,
        command=command(),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=commit(),
        machine=machine(settings["device"]),
        versions=dict(python=platform.python_version()) | versions(),
        load_at_start=round(os.getloadavg()[0], 2),
        note=note,
        settings={name: value for name, value in settings.items() if name not in ("note", "out")},
    )


def write_record(path: Path, record: dict) -> dict:
    """Writes what is measured so far, and returns it as a reader of the file finds it."""
    record["load_at_end"] = round(os.getloadavg()[0], 2)
    return write_json(path, record)


def write_json(path: Path, content: dict) -> dict:
    """Writes a file, in a folder that is made for it, and returns what a reader of the file finds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")  # so that an interrupted run leaves no half of a file
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)
    return json.loads(path.read_text())


def command() -> str:
    """The command line as somebody else would type it: without where this one wrote its file."""
    words, kept = iter(sys.argv[1:]), []
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *kept])


def commit() -> str:
    """The commit that ran, marked where tracked files outside of the results differ from it. The environment
    variable AVFUSE_COMMIT says it for a copy of the files, whose git does not know.
    """
    if named := os.environ.get("AVFUSE_COMMIT"):
        return named
    git = ["git", "-C", str(ROOT)]
    try:
        command = [*git, "rev-parse", "--short=12", "HEAD"]
        head = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
        paths = ["avfuse", "kernels", "benchmarks/*.py"]
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *paths]).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + (" with changes" if changed else "")


def is_certain(commit: str) -> bool:
    """Whether what ran is what the commit holds."""
    return commit != "unknown" and "changes" not in commit


def machine(device: str) -> dict:
    """What the numbers were measured on."""
    described = dict(
        cpu=cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        threads=torch.get_num_threads(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
    )
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        described |= dict(
            gpu=gpu.name, gpu_memory_gib=round(gpu.total_memory / GIB, 1), cuda=torch.version.cuda
        )
    return described


def cpu_name() -> str:
    """The model name, and the widest of the vector and matrix instructions that it has."""
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"model name\s*: (.+)", info)
    has = [flag for flag in ("amx_bf16", "avx512f", "avx2") if re.search(rf"\b{flag}\b", info)]
    return " ".join([name[1] if name else platform.machine(), *(f"({flag})" for flag in has[:1])])


def versions() -> dict[str, str]:
    installed = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            installed[package] = version(package)
    return installed
