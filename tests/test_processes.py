"""Training in several processes, and killed: the losses are those of one process left alone."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
from forked import run_together
from videos import write_video

from avfuse.data import sounding_shapes
from avfuse.files import read_rows
from avfuse.tasks.classify import Classification, linear_probe
from avfuse.train import Pretraining
from avfuse.training.checkpoints import list_checkpoints, step_of
from avfuse.training.judge import weights_hash
from avfuse.training.loop import program
from avfuse.training.recipes import parse

pytestmark = pytest.mark.usefixtures("undrawn")

TINY = (
    *("--warmup-epochs", "1", "--decoder-dim", "32", "--decoder-depth", "1", "--decoder-heads", "2"),
    *("--fusion-layers", "1", "3", "--measure-every", "0", "--workers", "1"),
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return sounding_shapes.generate(root, train=17, test=2, workers=1, progress=False)


def arguments(data, run, *options) -> list[str]:
    return ["--data", str(data), "--run-dir", str(run), *TINY, *options]


def command(data, run, *options, processes=1) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--standalone"]
    launcher = launcher if processes > 1 else []
    return [sys.executable, *launcher, "-m", "avfuse.train", *arguments(data, run, *options)]


def environment() -> dict[str, str]:
    return os.environ | dict(OMP_NUM_THREADS="1")


def losses(run) -> dict[int, list[float]]:
    rows = read_rows(run / "metrics.jsonl")
    names = ("loss", "image_loss", "audio_loss", "grad_norm", "lr", "clips")
    return {row["step"]: [row[name] for name in names] for row in rows if "loss" in row}


def train_here(data, run, *options, processes=1) -> dict[int, list[float]]:
    """In this process, or in several that are forked from it."""
    config = parse(arguments(data, run, *options, "--workers", "0"))
    if processes > 1:
        run_together(config, Pretraining, processes)
    else:
        assert program(config, Pretraining) == 0
    return losses(run)


def train(data, run, *options, processes=1) -> dict[int, list[float]]:
    """By the command."""
    result = subprocess.run(
        command(data, run, *options, processes=processes),
        capture_output=True,
        text=True,
        timeout=1200,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr
    return losses(run)


def assert_close(ours, truth):
    assert ours.keys() == truth.keys()
    for step, values in truth.items():
        assert ours[step] == pytest.approx(values, rel=2e-5), f"step {step}"


def test_losses_do_not_depend_on_the_number_of_processes(data, tmp_path):
    """Nor on micro-batches; batches of 8 out of 17 clips, dealt out to 1, 2 and 4 processes."""
    options = "--epochs", "2", "--batch-size", "8"
    truth = train_here(data, tmp_path / "1", *options)
    assert sorted(truth) == [1, 2, 3, 4]
    assert_close(train(data, tmp_path / "2", *options, "--micro-batch", "3", processes=2), truth)
    assert_close(train_here(data, tmp_path / "4", *options, processes=4), truth)


def test_broken_clips_do_not_either(data, tmp_path):
    """Clips that a scan takes for whole and nobody can read, in shares that become empty by it: each is
    named once, and adds nothing to the loss."""
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in sorted((data / "train").glob("*.mp4")):
        content = path.read_bytes()
        index = int(path.stem)
        (folder / path.name).write_bytes(content if index % 2 or index > 8 else hollow(content))
    options = "--epochs", "2", "--batch-size", "4", "--max-unreadable", "0.9"
    truth = train_here(folder, tmp_path / "1", *options)
    assert_close(train_here(folder, tmp_path / "2", *options, processes=2), truth)
    for run in "1", "2":
        rows = [json.loads(line) for line in (tmp_path / run / "quarantine.jsonl").read_text().splitlines()]
        assert sorted(row["path"][-5] for row in rows) == ["0", "2", "4", "6", "8"]


def test_all_processes_judge_the_model_that_is_saved(data, tmp_path):
    """With the running statistics of a BatchNorm, too, which each process has of its own clips."""
    run = tmp_path / "run"

    class Told(Classification):
        def judge(self, model, inputs, batch):
            told = run / f"judged-{self.step}-{batch['index'][0]}"
            told.write_text(weights_hash(model))
            return super().judge(model, inputs, batch)

        def measure(self, run, model, step, when):
            self.step = step
            return super().measure(run, model, step, when)

    config = linear_probe()
    config.data, config.run = data, run
    config.checkpoint, config.epochs, config.warmup_epochs = "none", 1, 0
    config.batch_size, config.workers = 8, 0
    run_together(config, Told, 2)
    saved = json.loads((run / "results.json").read_text())
    judged = {path.name: path.read_text() for path in run.glob(f"judged-{saved['step']}-*")}
    assert judged == dict.fromkeys(("judged-2-0", "judged-2-1"), saved["weights_sha256"])


def test_pairs_are_told_apart_over_all_processes(data, tmp_path):
    """The contrastive term and its gradients are those of one process with the whole batch, in shares of
    unequal size (3, 2, 2) and with a clip that has no sound.
    """
    options = "--epochs", "2", "--batch-size", "7", "--contrastive", "0.5"
    folder = tmp_path / "videos"
    folder.mkdir()
    for path in (data / "train").glob("*.mp4"):
        shutil.copy(path, folder)
    write_video(folder / "silent.mp4", 4.0, audio=False)
    options += "--missing", "keep", "--test-share", "0"
    rows = {}
    for processes in 1, 3:
        run = tmp_path / str(processes)
        train_here(folder, run, *options, processes=processes)
        rows[processes] = [row for row in read_rows(run / "metrics.jsonl") if "loss" in row]
    names = "loss", "contrastive_loss", "grad_norm"
    ours, truth = ([[row[name] for name in names] for row in rows[count]] for count in (3, 1))
    assert len(truth) == 4
    for step, (mine, true) in enumerate(zip(ours, truth, strict=True)):
        assert mine == pytest.approx(true, rel=2e-5), f"step {step}"
    first = rows[1][0]
    assert first["loss"] == pytest.approx(
        first["image_loss"] + first["audio_loss"] + first["contrastive_loss"]
    )


def hollow(video: bytes) -> bytes:
    """Headers as they were, zeros where the pictures and the sound were."""
    start = video.index(b"mdat") + 4
    size = int.from_bytes(video[start - 8 : start - 4], "big") - 8
    return video[:start] + bytes(size) + video[start + size :]


def kill_all(process: subprocess.Popen) -> None:
    """SIGKILL to a launcher, the processes that train, and their readers (in sessions of their own)."""
    family = [psutil.Process(process.pid)]
    family += family[0].children(recursive=True)
    for member in family:
        member.kill()
    psutil.wait_procs(family, timeout=60)
    process.wait()


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_stops_both(data, tmp_path):
    """In the middle of training; then the run is resumed by one process and ends with the same losses."""
    options = "--epochs", "100", "--batch-size", "8", "--checkpoint-every", "1000"
    truth = train(data, tmp_path / "whole", *options)
    process = subprocess.Popen(
        command(data, tmp_path / "run", *options, processes=2),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(process, lambda: metrics.exists() and len(losses(tmp_path / "run")) > 5)
    trains = [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if "avfuse.train" in child.cmdline() and "torch.distributed.run" not in child.cmdline()
    ]
    assert len(trains) == 2
    trains[1].send_signal(signal.SIGTERM)
    assert process.wait(timeout=120) != 0
    stopped = max(losses(tmp_path / "run"))
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == [f"step-{stopped:08d}"]
    assert_close(train(data, tmp_path / "run", *options), truth)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_it_ends_with_the_same_losses(data, tmp_path, processes):
    """SIGKILL to all its processes, 20 times: one in four while it starts, the others while it trains."""
    options = "--epochs", "150", "--batch-size", "8", "--checkpoint-every", "3"
    begun = time.time()
    truth = train(data, tmp_path / "whole", *options, processes=processes)
    starting = (tmp_path / "whole" / "run.json").stat().st_mtime - begun
    training = time.time() - begun - starting
    chance, reached, killed = random.Random(0), [], tmp_path / "killed"

    def saved() -> int:
        return max((step_of(path) for path in list_checkpoints(killed)), default=0)

    def trains(begun: float, first: int) -> bool:
        """Whether this life has written its configuration, and taken a step after its checkpoint."""
        config = killed / "run.json"
        fresh = config.exists() and config.stat().st_mtime > begun
        return fresh and (killed / "metrics.jsonl").exists() and max(losses(killed), default=0) > first

    for life in range(20):
        begun, first = time.time(), saved()
        process = subprocess.Popen(
            command(data, tmp_path / "killed", *options, processes=processes),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        )
        moment = chance.uniform(0, starting)
        if life % 4:
            wait_until(process, partial(trains, begun, first))
            moment = chance.uniform(0, training / 20)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=moment)
        assert process.poll() is None, "it ended before it was killed"
        kill_all(process)
        reached.append(saved())
    print(f"killed {len(reached)} times, at steps {reached} of {len(truth)}")
    assert train(data, tmp_path / "killed", *options, processes=processes) == truth
    assert len(set(reached)) > 3  # else it was not killed at many different moments


@pytest.fixture
def hosts():
    """Two network namespaces with a wire between them, by their addresses."""
    names = {f"10.77.0.{n}": f"avfuse-{os.getpid()}-{n}" for n in (1, 2)}

    def ip(*words) -> str:
        return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout

    try:
        for name in names.values():
            ip("netns", "add", name)
        one, two = names.values()
        ip(*f"link add wire netns {one} type veth peer name wire netns {two}".split())
        for address, name in names.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "wire")
            for device in "lo", "wire":
                ip("-n", name, "link", "set", device, "up")
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")
    else:
        yield names
    finally:
        for name in names.values():
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                for process in map(int, ip("netns", "pids", name).split()):
                    os.kill(process, signal.SIGKILL)
                ip("netns", "del", name)


@pytest.mark.slow
def test_two_hosts_one_of_which_dies(hosts, data, tmp_path):
    """The losses are those of one process; the host that is left names the other, and both go on."""
    options = "--epochs", "20", "--batch-size", "8", "--checkpoint-every", "3"
    truth = train(data, tmp_path / "one", *options)
    run, (first, second) = tmp_path / "two", hosts

    def start(address: str) -> subprocess.Popen:
        launcher = (
            f"--nnodes 2 --node-rank {int(address == second)} --master-addr {first} --master-port 29500"
        )
        words = [sys.executable, "-m", "torch.distributed.run", *launcher.split()]
        words = ["ip", "netns", "exec", hosts[address], *words, *command(data, run, *options)[1:]]
        with open(tmp_path / address, "w") as said:
            wire = environment() | dict(GLOO_SOCKET_IFNAME="wire")
            return subprocess.Popen(words, stdout=said, stderr=said, env=wire)

    for lost, left in (first, second), (second, first):
        begun = max(losses(run), default=0)
        running = {address: start(address) for address in hosts}
        wait_until(running[left], lambda begun=begun: max(losses(run), default=0) > begun + 4)
        kill_all(running[lost])
        assert running[left].wait(timeout=300) != 0
        said = (tmp_path / left).read_text()
        assert re.search(rf"error: another process .*{re.escape(lost)}.* the same command goes on", said)
        assert max(losses(run)) < max(truth)
    for process in [start(address) for address in hosts]:
        assert process.wait(timeout=900) == 0
    assert_close(losses(run), truth)


def wait_until(process: subprocess.Popen, condition) -> None:
    while process.poll() is None and not condition():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.1)
