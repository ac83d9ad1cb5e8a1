"""`make gpu`, rehearsed on the CPU with every step at its smallest: no slip may cost the time of a GPU."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import kernel_sweep  # noqa: E402
import measure  # noqa: E402


@pytest.mark.parametrize("parts", ["1", "2 3 4"])
def test_rehearsal(parts, tmp_path):
    """Through make, as it is typed, also from the make that runs the tests."""
    options = f"PART={parts}", "DEVICE=cpu", "SMALL=1", f"PYTHON={sys.executable}"  # where there is no .venv
    command = ["make", "--no-print-directory", "gpu", *options, f"ARGS=--out {tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = tmp_path.iterdir()
    record = json.loads((folder / "gpu.json").read_text())
    steps = [step for part in parts.split() for step in gpu.PARTS[int(part)]]
    assert record["commit"] and list(record["steps"]) == [step.name for step in steps]
    for step, line in zip(steps, done.stdout.splitlines()[-len(steps) :], strict=True):
        result, needs = record["steps"][step.name], "{sanitizer}" in step.command
        assert line.split()[0] == step.name and result["state"] == ("left out" if needs else "done")
        assert needs or result["said"] and (folder / f"{step.name}.log").exists()
        if step.file:
            result = json.loads((folder / step.file.format(device="cpu")).read_text())
            assert result["commit"] == record["commit"]


@pytest.mark.parametrize("part", gpu.PARTS)
def test_a_part_fits_nine_minutes_and_its_page_says_so(part):
    assert sum(step.limit for step in gpu.PARTS[part]) <= 9 * 60
    page = (ROOT / "benchmarks/README.md").read_text()
    for step in gpu.PARTS[part]:
        (line,) = (line for line in page.splitlines() if f"| {step.name} | {step.limit} s |" in line)
        assert step.file.format(device="cuda") in line


STEP = """
import os, signal, sys
from pathlib import Path

here = Path(__file__).parent

def count(step):
    with open(here / f"{step}.pids", "a") as file:
        print(os.getpid(), file=file)

def tell(line):
    print(line)

def go_on():
    out = Path(sys.argv[sys.argv.index("--out") + 1])
    print("goes on" if out.exists() else "begins")
    out.touch()
    sys.exit((here / "failing").exists())

def interrupt():
    if not (here / "interrupted").exists():
        (here / "interrupted").touch()
        os.kill(os.getppid(), signal.SIGTERM)
        signal.pause()
"""


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path, monkeypatch):
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = gpu.Options(part=(1,), device="cpu", small=True, out=tmp_path / "out")

    def step(name, code, limit=60, good=""):
        return gpu.Step(name, limit, f"{{python}} -c 'from step import *; {code}'", "", good=good)

    steps = (
        step("first", "count(1)"), step("second", "count(2); interrupt()"),
        step("failing", "count(3); sys.exit(5)"), step("telling", 'tell("x")', good=gpu.NO_ERRORS),
        step("endless", "signal.pause()", limit=0),
    )  # fmt: skip
    monkeypatch.setattr(gpu, "PARTS", {1: steps})

    def run(commit="0123456789ab"):
        monkeypatch.setenv("AVFUSE_COMMIT", commit)
        process = multiprocessing.get_context("fork").Process(target=gpu.main, args=(options,))
        process.start()
        process.join()
        return process.exitcode

    def pids(step):
        path = tmp_path / f"{step}.pids"
        return path.read_text().split() if path.exists() else []

    def states(folder="cpu-0123456789ab-small"):
        steps = json.loads((tmp_path / "out" / folder / "gpu.json").read_text())["steps"]
        return [result["state"] for result in steps.values()]

    assert run() == 143 and states() == ["done"]
    assert [len(pids(step)) for step in (1, 2, 3)] == [1, 1, 0]
    with pytest.raises(ProcessLookupError):  # the step under way has ended, too
        os.kill(int(pids(2)[0]), 0)
    assert run() == 1 and states() == ["done", "done", "failed", "failed", "stopped"]
    assert [len(pids(step)) for step in (1, 2, 3)] == [1, 2, 1]
    run()
    assert [len(pids(step)) for step in (1, 2, 3)] == [1, 2, 2], "what failed runs again"
    run("ba9876543210")
    assert [len(pids(step)) for step in (1, 2, 3)] == [2, 3, 3] and len(states()) == 5
    for _ in range(2):
        run("ba9876543210 with changes")
    assert [len(pids(step)) for step in (1, 2, 3)] == [4, 5, 5]


def test_a_sanitizer_has_to_say_that_there_are_no_errors():
    none, some = "========= ERROR SUMMARY: 0 errors\n", "========= RACECHECK SUMMARY: 2 hazards displayed\n"
    for log, is_good in (
        (none, True),
        (none + none, True),
        (none + some, False),
        (some + none, False),
        ("", False),
    ):
        assert bool(re.search(gpu.NO_ERRORS, f"8 of 8 cases agree\n{log}")) == is_good


def test_what_is_done_is_measured_again_from_the_start(tmp_path, monkeypatch):
    """A step that was not goes on with its file."""
    (tmp_path / "step.py").write_text(STEP)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("AVFUSE_COMMIT", "0123456789ab")
    sweep = gpu.Step("sweep", 60, "{python} -c 'from step import *; go_on()'", "", "sweep-{device}.json")
    monkeypatch.setattr(gpu, "PARTS", {1: (sweep,)})
    options = gpu.Options(part=(1,), device="cpu", small=True, again=True, out=tmp_path / "out")

    def said():
        process = multiprocessing.get_context("fork").Process(target=gpu.main, args=(options,))
        process.start()
        process.join()
        (summary,) = tmp_path.glob("out/*/gpu.json")
        return json.loads(summary.read_text())["steps"]["sweep"]["said"]

    (tmp_path / "failing").touch()
    assert said() == ["begins"]
    (tmp_path / "failing").unlink()
    assert said() == ["goes on"]
    assert said() == ["begins"]


def test_a_step_that_is_interrupted_while_it_is_measured_again_is_not_done(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setenv("AVFUSE_COMMIT", "0123456789ab")
    monkeypatch.setattr(gpu, "PARTS", {1: (gpu.Step("sweep", 60, "{python} -c pass", ""),)})
    monkeypatch.setattr(signal, "signal", lambda number, handler: handler)
    options = gpu.Options(part=(1,), device="cpu", small=True, out=tmp_path)
    assert gpu.main(options)["steps"]["sweep"]["state"] == "done"
    monkeypatch.setattr(gpu, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(replace(options, again=True))
    (summary,) = tmp_path.glob("*/gpu.json")
    assert json.loads(summary.read_text())["steps"] == {}


@pytest.mark.parametrize(
    ("commit", "goes_on"),
    [("0123456789ab", True), ("0123456789ab with changes", False), ("unknown", False)],
)
def test_a_sweep_goes_on_with_what_the_same_files_have_measured(tmp_path, commit, goes_on):
    record, out = dict(commit=commit, machine={}, versions={}, settings={}), tmp_path / "sweep.json"
    out.write_text(json.dumps(record | dict(cases=dict(some=1))))
    assert kernel_sweep.cases_of_before(out, record) == (dict(some=1) if goes_on else {})


def test_a_step_that_was_starting_when_the_run_was_ended_ends_too(monkeypatch):
    started = []

    class EndedMeanwhile(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)
            signal.raise_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        monkeypatch.setattr(subprocess, "Popen", EndedMeanwhile)
        with pytest.raises(SystemExit):
            gpu.status_of([sys.executable, "-c", "import signal; signal.pause()"], 60, {**os.environ}, None)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert started[0].returncode == -signal.SIGKILL


@pytest.mark.parametrize("wrong", ["--device cuda --small", "--device cpu"])
def test_a_rehearsal_has_to_be_asked_for(wrong, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu.py", *wrong.split()])
    with pytest.raises(SystemExit, match="^error: .*--small"):
        measure.run(gpu.main, gpu.Options)
