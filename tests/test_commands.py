"""The command lines as users meet them: one family, quick to answer, and ended by Ctrl-C at any moment."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from typing import get_args

import pytest
import tyro

from avfuse.__main__ import COMMANDS
from avfuse.choices import DataSet, Interactions, Size
from avfuse.command import read
from avfuse.data.__main__ import Check, Shard
from avfuse.data.__main__ import parse as parse_data
from avfuse.data.find import READERS
from avfuse.data.sounding_shapes.__main__ import Command
from avfuse.fusion import VARIANTS
from avfuse.options import DemoConfig, FeaturesConfig, PredictConfig
from avfuse.presets import SIZES
from avfuse.rules import Rule, check_rules, marks, option
from avfuse.tasks.options import (
    ClassifyConfig,
    LocalizeConfig,
    RetrieveConfig,
    SegmentConfig,
    SeparateConfig,
)
from avfuse.training.recipes import TrainConfig, parse
from avfuse.training.settings import LoopConfig, checked

HEAVY = {"torch", "timm", "matplotlib", "accelerate", "torchvision", "huggingface_hub", "sklearn"}
MODULES = [module for module, _ in COMMANDS.values()]


def run(*arguments, on_ctrl_c=signal.SIG_DFL, **environment) -> subprocess.CompletedProcess:
    """What a command said. It hears Ctrl-C even where the tests run in the background and do not."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | dict(COLUMNS="120") | environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, on_ctrl_c),
    )


def imported(done: subprocess.CompletedProcess) -> set[str]:
    """The packages that a process under `-X importtime` has imported."""
    lines = (line for line in done.stderr.splitlines() if line.startswith("import time:"))
    return {line.rsplit("|", 1)[1].strip().partition(".")[0] for line in lines}


def test_one_command_lists_all():
    done = run("-X", "importtime", "-m", "avfuse", "--help")
    assert done.returncode == 0 and not imported(done) & HEAVY
    listed = {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")}
    names = "train predict features classify retrieve segment localize separate data shapes demo report"
    assert listed == set(names.split())
    assert run("-m", "avfuse").stdout == done.stdout


@pytest.mark.parametrize(
    "arguments",
    [*(["avfuse", name] for name in COMMANDS), *([module] for module in MODULES)]
    + [[*command, sub] for command in (["avfuse", "data"], ["avfuse.data"]) for sub in ("check", "shard")],
    ids=" ".join,
)
def test_help_needs_nothing_heavy(arguments):
    done = run("-X", "importtime", "-m", *arguments, "--help")
    called = "avfuse " if arguments[0] == "avfuse" else "python -m avfuse."
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {called}")
    assert "avfuse" in imported(done) and not imported(done) & HEAVY
    assert not re.search(r"default: (None|''|)\)|\{None\}", done.stdout)  # the text says what holds instead


def test_texts_of_options_fill_their_lines():
    """They are broken where a terminal ends, not where our files break them."""
    done = run("-m", "avfuse", "predict", "--help", COLUMNS="200")
    assert "as long as a whole one is left. Default: the one in the middle." in done.stdout


@pytest.mark.parametrize("arguments", [["avfuse"], ["avfuse", "train"], ["avfuse.predict"]], ids=" ".join)
def test_help_may_be_cut_short(arguments):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-m", *arguments, "--help"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == -signal.SIGPIPE and not done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["train", "--epoch", "3"], "--epochs INT"),
        (["train", "--epochs", "0"], "error: --epochs must be positive, got 0"),
        (["train", "--data", "nowhere"], "error: --data nowhere does not exist"),
        (["classify", "--drop-path", "1"], "--drop-path must be in [0, 1), got 1.0"),
        (["segment", "--missing", "keep"], "--missing keep: each annotated picture needs its sound"),
        (["predict", "run"], "VIDEO... must name at least one file"),
        (["predict", "run", "a.mp4", "--every", "0"], "--every must be a positive number of seconds"),
        (["classify", "--windows", "0"], "--windows must be positive, got 0"),
        (["data", "chekc"], "check"),
        (["data", "shard", "a", "b", "--megabytes", "0"], "--megabytes must be positive, got 0"),
        (["fetures"], "error: no command 'fetures': did you mean features?"),
        (["x"], "error: no command 'x': there are train, classify"),
    ],
)
def test_mistakes_are_told_as_soon(arguments, message):
    done = run("-X", "importtime", "-m", "avfuse", *arguments)
    assert done.returncode != 0 and message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr and not imported(done) & HEAVY


KINDS = (TrainConfig, ClassifyConfig, RetrieveConfig, SeparateConfig, LocalizeConfig, SegmentConfig)
OTHERS = (FeaturesConfig, PredictConfig, DemoConfig, Check, Shard, Command)


def test_all_runs_are_among_these():
    def kinds_of(kind):
        return [below for sub in kind.__subclasses__() for below in kinds_of(sub)] or [kind]

    runs = {kind for kind in kinds_of(LoopConfig) if kind.__module__.startswith("avfuse.")}
    assert runs == set(KINDS)


@pytest.mark.parametrize("kind", [*KINDS, *OTHERS], ids=lambda kind: kind.__name__)
def test_errors_name_options_as_the_help_does(kind, capsys):
    """Of every option with a rule, and of those that say with which settings a run began."""
    (hidden,) = tyro.conf.Suppress[int].__metadata__
    suppressed = {name for name, mark in marks(kind) if mark is hidden}
    ruled = {name for name, mark in marks(kind) if isinstance(mark, Rule)} - suppressed
    named = {field.name for field in fields(kind)} - suppressed if kind in KINDS else ruled
    markers = (tyro.conf.PositionalRequiredArgs, tyro.conf.OmitArgPrefixes) if kind is Command else ()
    with pytest.raises(SystemExit):
        read(kind, *markers)(args=["--help"])
    words = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert ruled and {option(kind, name) for name in named} <= words
    for name in ruled:
        config = object.__new__(kind)
        for field in fields(kind):
            object.__setattr__(config, field.name, None)
        object.__setattr__(config, name, -1)
        with pytest.raises(ValueError, match=rf"^{option(kind, name)} must .*, got -1$"):
            check_rules(config)


def test_former_names_of_options_are_taken():
    former = parse_data(["check", "a", "--timeout", "5", "--pictures=key-frames"], "x")
    assert former == parse_data(["check", "a", "--clip-timeout", "5", "--decode", "key-frames"], "x")


def test_choices_are_those_of_the_models():
    assert get_args(Interactions) == tuple(VARIANTS) and set(get_args(Size)) == set(SIZES)


def test_data_sets_are_those_that_can_be_read():
    assert get_args(DataSet) == ("auto", *READERS)


def test_shortening_a_run_takes_one_option():
    def warmup(*args):
        return checked(parse)(args=args).warmup_epochs

    assert [warmup(*options.split()) for options in ("", "--epochs 12", "--epochs 3", "--epochs 1")] == [
        6,
        6,
        1,
        0,
    ]
    assert warmup("--preset", "vggsound-ablation", "--epochs", "10") == 5
    assert warmup("--epochs", "3", "--warmup-epochs", "2") == warmup("--epochs=3", "--warmup_epochs=2") == 2
    with pytest.raises(ValueError, match="--warmup-epochs 4 are more than --epochs 3"):
        warmup("--epochs", "3", "--warmup-epochs", "4")


# --- Ctrl-C -------------------------------------------------------------------------------------------------

# Stands in the place of a library that is being imported when Ctrl-C is pressed.
INTERRUPTED = """
import os, signal
try:
    os.kill(os.getpid(), signal.SIGINT)
except BaseException as error:
    raise ImportError("no traceback, please") from error
"""
WORK = """
import atexit, os, signal, sys
from avfuse.command import begin

def press():
    os.kill(os.getpid(), signal.SIGINT)

def work(options):
    try:
        press()
    finally:
        print("in order again", flush=True)

def read(args, prog):
    if args == ["reading"]:
        press()
    return args

atexit.register(press)
sys.exit(begin("avfuse.x", read, (lambda _: print("done")) if sys.argv[1] == "leaving" else work))
"""


WHILE_IMPORTING = """
import gc, importlib.abc, importlib.util, sys
from avfuse.command import begin

class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == "made_up" else None

    def exec_module(self, module):
        print(gc.isenabled())
        module.main = lambda options: print(gc.isenabled())

sys.meta_path.insert(0, Finder())
begin("made_up", lambda args, prog: None)
"""


def test_what_ends_a_command_is_all_that_it_says():
    """Libraries that look for what they have lost, as nanobind does, find nothing."""
    done = run("-m", "avfuse.predict", "no/such/run", "no.mp4")
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


def test_garbage_is_collected_once_all_is_imported():
    assert run("-c", WHILE_IMPORTING).stdout.split() == ["False", "True"]


@pytest.mark.parametrize("module", MODULES[:1] + MODULES[5:8])
def test_ctrl_c_while_libraries_are_imported(module, tmp_path):
    (tmp_path / "torch.py").write_text(INTERRUPTED)
    arguments = {
        "avfuse.predict": ["run", "a.mp4"],
        "avfuse.features": [str(tmp_path), "b.safetensors", "--checkpoint", "c"],
    }
    done = run("-m", module, *arguments.get(module, []), PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ctrl_c_while_a_package_of_avfuse_is_imported(tmp_path):
    (tmp_path / "av.py").write_text(INTERRUPTED)
    done = run("-m", "avfuse", "shapes", str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.parametrize(
    "moment, said", [("reading", ""), ("working", "in order again\n"), ("leaving", "done\n")]
)
def test_ctrl_c_at_other_moments(moment, said):
    done = run("-c", WORK, moment)
    assert (done.returncode, done.stdout, done.stderr) == (130, said, "")


def test_ctrl_c_is_ignored_where_it_was_ignored():
    """As in the background of a shell, or under nohup."""
    done = run("-c", WORK, "working", on_ctrl_c=signal.SIG_IGN)
    assert (done.returncode, done.stdout) == (0, "in order again\n")
