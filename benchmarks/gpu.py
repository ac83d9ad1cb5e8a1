"""Everything that only a machine with a GPU can tell, in parts of at most nine minutes: `make gpu`."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from json import loads
from pathlib import Path
from typing import Literal, NamedTuple

import measure
import torch
from tables import MISSING

SANITIZER = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
ENDING = signal.SIGINT, signal.SIGTERM
SAID = 14  # lines of what a step printed last that are shown and kept


class Step(NamedTuple):
    """One command, stopped after `limit` seconds, which writes what it finds at once."""

    name: str
    limit: int
    command: str
    small: str  # more options, with which it is at its smallest
    file: str = ""  # of its results; its log is NAME.log
    good: str = ""  # what its log holds if it came to a good end


PYTEST = "{python} -m pytest -q -n {workers} --dist worksteal -p no:cacheprovider -rfE"
KERNEL_TESTS = "tests/test_pair_attention_kernels.py tests/test_residual_norm.py"
# Those of them that compile for GPUs which are not there, and need none.
COMPILING = "spilling or compiled_once or left_to_the_default or types_of_a_kernel or another_lanes"
# torch keeps memory that is freed, and a read beside a tensor would be one of memory that there is.
SANITIZED = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 {sanitizer} --target-processes all --print-limit 5"
NO_ERRORS = r"\A(?s:(?!.*SUMMARY: [1-9]).*SUMMARY: 0 )"  # of one process at least
FEW = "{python} benchmarks/kernel_check.py --shapes kept split --dtypes bfloat16 float32 --truth-on cpu"
ALONE = "{python} benchmarks/pair_attention.py --seconds 2 --rows avfuse reference sdpa"
THROUGHPUT = "{python} benchmarks/throughput.py --seconds 5 --batch 128"
GRAPHED = "none token factorized dense none-fused dense-fused"
TINY = "--preset tiny --batch 1 --seconds 0"

# In order of value. The limits of a part add up to less than nine minutes.
PARTS = {
    1: (  # is it right
        Step("tests", 135, f"{PYTEST} -m gpu", f'-m "not slow" -k flop {KERNEL_TESTS}'),
        Step(
            "kernel-tests", 110, f'{PYTEST} {KERNEL_TESTS} -m "not gpu and not slow" -k "not ({COMPILING})"',
            "-k second_derivatives",
        ),
        Step("check", 70, "{python} benchmarks/kernel_check.py", "--shapes tiny --dtypes float32"),
        Step("memcheck", 110, f"{SANITIZED} --tool memcheck {FEW}", "", good=NO_ERRORS),
        Step("racecheck", 110, f"{SANITIZED} --tool racecheck {FEW}", "", good=NO_ERRORS),
    ),
    2: (  # how fast is it, and how does it grow
        Step(
            "pair_attention", 150,
            f"{ALONE} --shapes paper pretraining long video --variants plain bias frames",
            "--rows avfuse --shapes pretraining --variants plain --batch 1 --heads 1 --seconds 0",
            "pair_attention-{device}.json",
        ),
        Step(
            "graphs", 235, f"{THROUGHPUT} --compile cuda-graph --rows {GRAPHED}",
            f"{TINY} --rows none --compile no", "throughput-{device}-graph.json",
        ),
        Step(
            "scaling", 140, "{python} benchmarks/scaling.py --tokens 512 1024 2048 4096 --seconds 3",
            "--rows dense --tokens 512 1024 --modes forward --dim 16 --heads 1 --seconds 0",
            "scaling-{device}.json",
        ),
    ),
    3: (  # how fast is it where the host launches, and where the time goes
        Step(
            "throughput", 260, f"{THROUGHPUT} --rows none token materialized factorized dense",
            f"{TINY} --rows none dense", "throughput-{device}.json",
        ),
        Step(
            "kernel_times", 130, "{python} benchmarks/kernel_times.py --ways eager graph", TINY,
            "kernel_times-{device}.json",
        ),
        Step(
            "compiled", 145, f"{THROUGHPUT} --modes inference --rows none dense --compile default",
            f"{TINY} --rows none --compile no", "throughput-{device}-compiled.json",
        ),
    ),
    4: (  # which settings of the kernels are fastest
        Step(
            "kernel_sweep", 530, "{python} benchmarks/kernel_sweep.py", "--small",
            "kernel_sweep-{device}.json",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Are the kernels right on this GPU (part 1), how fast is everything and how does it grow (2), how fast
    where the host launches and where does the time go (3), and with which settings would the kernels be
    faster (4)?

    A part takes at most nine minutes and is a list of steps, each with a limit of its own. Interrupted, it
    goes on where it stopped when it is called again: steps that came to a good end, at this commit and on
    this card, are left out. Results, logs and a summary (gpu.json) are in a folder named after both.
    """

    part: tuple[Literal[*PARTS], ...] = tuple(PARTS)
    """Which parts, in order of value."""
    device: Literal["cuda", "cpu"] = "cuda"
    """With cpu, a rehearsal: kernels run in Triton's interpreter, nothing is compiled; needs --small."""
    small: bool = False
    """Every step at its smallest: options that are parsed, then overridden."""
    again: bool = False
    """Also run the steps that are done. Files that differ from their commit always do."""
    out: Path = measure.ROOT / "runs/gpu"
    """Where the folder of results is made."""


def main(options: Options) -> dict:
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device; for a rehearsal: --device cpu --small")
    if options.device == "cpu" and not options.small:
        raise ValueError("--device cpu is for rehearsals and needs --small")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the step under way ends, too
    record = measure.begin_record("gpu", asdict(options), "")
    card = record["machine"].get("gpu", "cpu")
    folder = options.out.resolve() / slug(card, record["commit"], "small" * options.small)
    summary = folder / "gpu.json"
    again = options.again or not measure.is_certain(record["commit"])
    record["steps"] = done = loads(summary.read_text())["steps"] if summary.exists() else {}
    for step in steps(options):
        if done.get(step.name, {}).get("state") == "done":
            if not again:
                continue
            del done[step.name]
            measure.write_record(summary, record)
            if step.file:  # with which a step that was interrupted goes on
                (folder / step.file.format(device=options.device)).unlink(missing_ok=True)
        print(f"\n== {step.name}: at most {step.limit} s", flush=True)
        done[step.name] = result = run(step, options, folder, record["commit"])
        measure.write_record(summary, record)
        print(*result["said"], f"== {step.name}: {result['state']}, {result['seconds']} s", sep="\n")
    print(f"\n{card}, commit {record['commit']}, {folder}", *table(options, done), sep="\n")
    if any(done[step.name]["state"] in ("failed", "stopped") for step in steps(options)):
        sys.exit(1)
    return record


def slug(*words: str) -> str:
    return re.sub("[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")


def steps(options: Options) -> Iterator[Step]:
    for part in options.part:
        yield from PARTS[part]


def run(step: Step, options: Options, folder: Path, commit: str) -> dict:
    """How a step ended, after how long, and what it said last."""
    if "{sanitizer}" in step.command and (SANITIZER is None or options.device == "cpu"):
        return dict(state="left out", seconds=0, said=["there is no compute-sanitizer, or no GPU"])
    to_file = f"--out {{out}}/{step.file}" if step.file else ""
    command = f"{step.command} {step.small if options.small else ''} {to_file}".format(
        python=shlex.quote(sys.executable),
        out=shlex.quote(str(folder)),
        sanitizer=SANITIZER,
        device=options.device,
        workers=0 if options.small else max(1, len(os.sched_getaffinity(0)) - 2),
    )
    began, log = time.monotonic(), folder / f"{step.name}.log"
    folder.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        status = status_of(shlex.split(command), step.limit, environment(options, commit), file)
    text = log.read_text(errors="replace")
    ended = "done" if re.search(step.good, text) else "failed"
    return dict(
        state={0: ended, None: "stopped"}.get(status, "failed"),
        status=status,
        seconds=round(time.monotonic() - began),
        said=[line for line in text.splitlines() if line.strip() and MISSING not in line][-SAID:],
    )


def status_of(words: list[str], limit: int, environment: dict, output) -> int | None:
    """Exit status of a command, None if it reached its limit. However this ends, what it started ends too."""
    came = []  # signals while it starts: ended then, this would not know what to end
    before = {number: signal.signal(number, lambda number, _: came.append(number)) for number in ENDING}
    try:
        process = subprocess.Popen(
            words, cwd=measure.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    try:
        for number in came:
            signal.raise_signal(number)
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def environment(options: Options, commit: str) -> dict[str, str]:
    """That of this process, with the checkout in front of what may be installed."""
    path = os.pathsep.join([str(measure.ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = os.environ | dict(PYTHONPATH=path, PYTHONUNBUFFERED="1", AVFUSE_COMMIT=commit)
    if options.device == "cpu":
        variables |= dict(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1", TORCH_COMPILE_DISABLE="1")
        variables |= dict(OMP_NUM_THREADS="1")  # threads would wait for each other longer than they compute
    return variables


def table(options: Options, done: dict) -> Iterator[str]:
    """A line for every step: how it ended, and the last it said."""
    for step in steps(options):
        result = done[step.name]
        said = result["said"][-1][:100] if result["said"] else ""
        yield f"{step.name:15s} {result['state']:8s} {result['seconds']:4d} s  {said}"


if __name__ == "__main__":
    measure.run(main, Options)
