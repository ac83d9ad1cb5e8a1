"""What ends a run before its time, provoked in real runs: signals, losses not finite, lack of memory."""

import errno
import json
import math
import os
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from avfuse import AVMAE, training
from avfuse.data import sounding_shapes
from avfuse.files import read_rows
from avfuse.tasks.localize import Localization
from avfuse.tasks.options import LocalizeConfig, SegmentConfig
from avfuse.tasks.segment import Segmentation
from avfuse.train import Pretraining, main
from avfuse.training import loop
from avfuse.training.checkpoints import list_checkpoints
from avfuse.training.faults import RunError, Signals, examine, memory_advice
from avfuse.training.loop import set_up
from avfuse.training.recipes import TrainConfig

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    return sounding_shapes.generate(root, train=8, test=2, workers=1, progress=False)


@pytest.fixture
def config(data, tmp_path):
    return TrainConfig(
        data=data,
        run=tmp_path / "run",
        epochs=2,
        warmup_epochs=1,
        batch_size=4,
        micro_batch=2,
        workers=0,
        decoder_dim=32,
        decoder_depth=1,
        decoder_heads=2,
        fusion_layers=(1,),
        checkpoint_every=100,
        measure_every=0,
    )


def losses(run) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


def measured(run) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "when" in row]


def send_at(monkeypatch, step, *numbers):
    """Sends signals to this process in the middle of a step."""
    take = loop.train_step

    def send_then_take(run, at, *args):
        for number in numbers if at == step else ():
            os.kill(os.getpid(), number)
        return take(run, at, *args)

    monkeypatch.setattr(loop, "train_step", send_then_take)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves_and_resumes(config, tmp_path, monkeypatch, number, capfd):
    open_board, boards = loop.Accelerator.init_trackers, []

    def observe(accelerator, name, init_kwargs):
        boards.append(init_kwargs["tensorboard"]["purge_step"])
        open_board(accelerator, name, init_kwargs=init_kwargs)

    monkeypatch.setattr(loop.Accelerator, "init_trackers", observe)
    with monkeypatch.context() as patch:
        send_at(patch, 3, number)
        assert main(config) == 128 + number
    assert [path.name for path in list_checkpoints(config.run)] == ["step-00000003"]
    out, err = capfd.readouterr()
    assert "stopped after step 3 of 4: the same command resumes" in out
    assert ("Ctrl-C again ends at once" in err) == (number == signal.SIGINT)
    assert main(config) == 0
    assert boards == [0, 4]  # from this step on, TensorBoard forgets what it was told before
    interrupted, config.run = losses(config.run), tmp_path / "whole"
    assert main(config) == 0
    assert losses(config.run) == interrupted and sorted(interrupted) == [1, 2, 3, 4]


@pytest.mark.parametrize("where", ["backward", "save_checkpoint", "train_step"])
def test_asked_to_stop_it_does_not_measure_first(config, monkeypatch, where):
    """Which may take longer than whoever asks will wait; the run that goes on measures instead."""
    room = training.steps if where == "backward" else loop
    config.measure_every, steps, work = 3, [], getattr(room, where)
    take = loop.train_step

    def count(run, step, *args):
        steps.append(step)
        return take(run, step, *args)

    def send_and_work(*args):
        if steps[-1:] == [2 if where == "train_step" else 3]:
            os.kill(os.getpid(), signal.SIGTERM)
        return (count if where == "train_step" else work)(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", count)
        patch.setattr(room, where, send_and_work)
        assert main(config) == 128 + signal.SIGTERM
    assert [path.name for path in list_checkpoints(config.run)] == ["step-00000003"]
    assert measured(config.run) == [0]
    assert main(config) == 0 and measured(config.run) == [0, 3, 4]


@pytest.mark.parametrize("every", [2, 0])
def test_asked_to_stop_while_it_measures_it_ends_at_once_and_has_saved(config, monkeypatch, capsys, every):
    config.measure_every = 2
    measure = loop.measure

    def measure_then_send(run, step, when):
        measure(run, step, when)
        if when == "during":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="143"):
        patch.setattr(loop, "measure", measure_then_send)
        main(config)
    assert [path.name for path in list_checkpoints(config.run)] == ["step-00000002"]
    assert "stopped after step 2 of 4: the same command resumes" in capsys.readouterr().out
    config.measure_every = every
    assert main(config) == 0 and measured(config.run) == [0, 2, 4]  # each once


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_while_the_last_step_is_saved(config, monkeypatch, number, capfd):
    save = loop.save_checkpoint

    def send_and_save(accelerator, run, step, *args):
        if step == 4:
            os.kill(os.getpid(), number)
        save(accelerator, run, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_checkpoint", send_and_save)
        assert main(config) == 128 + number
    assert "stopped after step 4 of 4: the same command resumes" in capfd.readouterr().out
    assert not (config.run / "model").exists()
    assert main(config) == 0 and (config.run / "model").is_dir()


def test_signals_wait_for_the_end_of_a_step_and_not_of_a_measure(config, monkeypatch):
    config.measure_every, listening, seen, take = 2, [], [], loop.train_step

    class Listening(Signals):
        def __enter__(self):
            listening.append(self)
            return super().__enter__()

    def take_step(run, step, *args):
        seen.append((step, listening[0].at_once))
        return take(run, step, *args)

    monkeypatch.setattr(loop, "Signals", Listening)
    monkeypatch.setattr(loop, "train_step", take_step)
    monkeypatch.setattr(loop, "measure", lambda run, step, when: seen.append((when, listening[0].at_once)))
    assert main(config) == 0
    steps = [(step, False) for step in (1, 2, 3, 4)]
    assert seen == [("before", True), *steps[:2], ("during", True), *steps[2:], ("after", True)]


def test_a_step_is_measured_once_wherever_a_run_begins():
    def measured(first_step, extended_at=0):
        config = SimpleNamespace(measure_every=3)
        run = SimpleNamespace(config=config, first_step=first_step, extended_at=extended_at)
        return [step for step in range(first_step, 10) if loop.is_measured(run, step)]

    assert measured(0) == [3, 6, 9]
    assert measured(3) == [3, 6, 9]  # it was stopped before it measured
    assert measured(6, extended_at=6) == [9]  # measured when the shorter run ended
    assert measured(9, extended_at=6) == [9]


def test_of_both_signals_that_of_the_scheduler_counts():
    ends = [loop.stopping(*heard) for heard in ((0, 0), (0, 1), (2, 0), (1, 1))]
    assert ends == [0, signal.SIGINT, signal.SIGTERM, signal.SIGTERM]


def test_signals_that_are_ignored_stay_so():
    """As SIGINT is of what a script has started with &."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Signals() as signals:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert not signals.interrupt and signals.terminate
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_run(config, monkeypatch, number):
    def write(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(loop, "measure", write)
    said = loop.program(config, Pretraining)
    assert os.strerror(number) in said and str(config.run) in said and "goes on" in said


@pytest.mark.parametrize(
    ("fault", "end"),
    [
        (KeyboardInterrupt(), 130),
        (RunError("a clip"), "error: a clip"),
        (OSError("a disk"), "error: a disk"),
        (ValueError("a setting"), "error: a setting"),
    ],
    ids=repr,
)
def test_faults_before_training_need_no_traceback(config, monkeypatch, fault, end):
    def refuse(*_):
        raise fault

    monkeypatch.setattr(loop, "make_accelerator", refuse)
    assert loop.program(config, Pretraining) == end


def test_the_first_ctrl_c_is_answered_at_once(capfd):
    with Signals("heard\n") as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.terminate and not capfd.readouterr().err
        os.kill(os.getpid(), signal.SIGINT)
        assert capfd.readouterr().err == "heard\n"


def test_asked_to_save_it_goes_on(config, monkeypatch):
    send_at(monkeypatch, 2, signal.SIGUSR1)
    assert main(config) == 0
    assert [path.name for path in list_checkpoints(config.run)] == ["step-00000004", "step-00000002"]


def test_before_and_after_training_nothing_can_be_saved_and_the_run_goes_on(config, monkeypatch):
    heard, look, end = [], loop.look_for_clips, loop.Accelerator.end_training

    def ask(done):
        heard.append(signal.getsignal(signal.SIGUSR1) != signal.SIG_DFL)
        if heard[-1]:  # else it would end the tests
            os.kill(os.getpid(), signal.SIGUSR1)
        return done

    monkeypatch.setattr(loop, "look_for_clips", lambda *args: ask(look(*args)))
    monkeypatch.setattr(loop.Accelerator, "end_training", lambda self: ask(end(self)))
    before = signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    try:
        assert loop.program(config, Pretraining) == 0 and heard == [True, True]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert [path.name for path in list_checkpoints(config.run)] == ["step-00000004"]


def test_nobody_reads_what_is_printed(config, monkeypatch):
    def show(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    said = "error: nobody reads what is printed any longer; the same command goes on"
    for moment in "measure", "build":
        monkeypatch.setattr(loop, moment, show)
        assert loop.program(config, Pretraining) == said


def test_every_step_draws_numbers_of_its_own_in_training_mode(config, tmp_path, monkeypatch):
    drawn, losses_of = [], Pretraining.losses

    def draw(task, model, inputs):
        assert model.training
        drawn.append(torch.rand(()).item())
        return losses_of(task, model, inputs)

    monkeypatch.setattr(Pretraining, "losses", draw)
    config.epochs = 1
    for config.seed in 0, 1:
        config.run = tmp_path / str(config.seed)
        assert main(config) == 0
    assert len(drawn) == len(set(drawn)) == 8  # of each seed two steps of two micro-batches


def test_what_was_learned_before_too_many_clips_were_unreadable_is_saved(config, monkeypatch):
    config.checkpoint_every, config.keep_checkpoints, config.ema, take = 2, 2, 0.5, loop.train_step

    def take_until(stop):
        def take_step(run, step, *args):
            if step == stop:
                raise loop.TooManyUnreadable("too many")
            return take(run, step, *args)

        monkeypatch.setattr(loop, "train_step", take_step)
        with pytest.raises(RunError, match="too many"):
            main(config)
        return [path.name for path in list_checkpoints(config.run)]

    assert take_until(1) == [] and take_until(4) == ["step-00000003", "step-00000002"]
    monkeypatch.setattr(loop, "train_step", take)
    assert main(config) == 0  # with the average of the weights, too


def test_signals_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with Signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.interrupt and not signals.terminate
        with pytest.raises(KeyboardInterrupt):  # the second
            os.kill(os.getpid(), signal.SIGINT)
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(config, monkeypatch, value):
    """One pixel of one clip is spoilt in the first micro-batch of step 3."""
    run = set_up(config, Pretraining)
    taken, spoilt, prepare, take = [], {}, run.task.inputs, loop.train_step

    def take_step(run, step, *args):
        taken.append(step)
        return take(run, step, *args)

    def spoil(batch):
        inputs = prepare(batch)
        if taken[-1:] != [3] or spoilt:
            return inputs
        spoilt["clip"] = str(run.found.train[batch["index"][1]].path)
        spoilt["weights"] = {name: tensor.clone() for name, tensor in run.task.model.state_dict().items()}
        inputs["image"][1, 0, 0, 0] = value
        inputs["image_removed"][1] = inputs["image_removed"][1].sort().values.flip(0)  # the first are hidden
        return inputs

    monkeypatch.setattr(loop, "train_step", take_step)
    monkeypatch.setattr(run.task, "inputs", spoil)
    with pytest.raises(RunError, match="step 3: the loss is nan.*; nothing was updated") as stopped:
        loop.train(run)
    assert f"not finite: {spoilt['clip']} (the batch" in str(stopped.value)
    assert sorted(losses(config.run)) == [1, 2]

    folder = config.run / "faults" / "step-00000003" / "process-0"
    report = json.loads((folder / "report.json").read_text())
    assert report["clips"] == [spoilt["clip"]] and len(report["batch"]) == 4 and report["step"] == 3
    assert report["largest"] and all(name for name, _ in report["largest"])
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in spoilt["weights"].items())
    batches = [load_file(folder / f"batch-{n}.safetensors") for n in (0, 1)]
    assert [len(batch["image"]) for batch in batches] == [2, 2] and not batches[0]["image"].isfinite().all()


@pytest.mark.parametrize("fault", [OSError, SafetensorError])
def test_a_gradient_that_is_not_finite_stops_before_the_update(config, monkeypatch, capsys, fault):
    """Also where nothing can be left to debug from."""

    def write(*_):
        raise fault("the disk is full")

    monkeypatch.setattr(training.steps, "write_fault", write)
    run = set_up(config, Pretraining)
    weight, losses_of = next(run.task.model.parameters()), run.task.losses

    def steep(*args):
        nothing = (weight - weight.detach()).sum().sqrt()  # 0, of which the slope is infinite
        return {name: mean + nothing for name, mean in losses_of(*args).items()}

    before = {name: tensor.clone() for name, tensor in run.task.model.state_dict().items()}
    monkeypatch.setattr(run.task, "losses", steep)
    with pytest.raises(RunError, match=r"step 1: the loss is \d\S*, the gradient norm (nan|inf); nothing"):
        loop.train(run)
    assert "process-0 could not be written: the disk is full" in capsys.readouterr().out
    assert all(torch.equal(before[name], x) for name, x in run.task.model.state_dict().items())


@pytest.mark.parametrize(("more", "stop"), [(0.0, 4), (math.nan, 1)])
def test_gradients_of_fp16_may_overflow_until_scaling_is_not_to_blame(config, monkeypatch, more, stop):
    """Updates are left out while the scale goes down from 4; at 1/2 the gradients themselves are at fault. A
    loss is never to be excused.
    """
    make = loop.make_accelerator

    def make_accelerator(config):
        accelerator = make(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", make_accelerator)
    run = set_up(config, Pretraining)
    weight, losses_of = next(run.task.model.parameters()), run.task.losses

    def steep(*args):
        nothing = (weight - weight.detach()).sum().sqrt() + more
        return {name: mean + nothing for name, mean in losses_of(*args).items()}

    before = {name: tensor.clone() for name, tensor in run.task.model.state_dict().items()}
    monkeypatch.setattr(run.task, "losses", steep)
    with pytest.raises(RunError, match=rf"step {stop}: the loss is \S+, the gradient norm (nan|inf);"):
        loop.train(run)
    recorded = [row["grad_norm"] for row in read_rows(config.run / "metrics.jsonl") if "loss" in row]
    assert recorded == [None] * (stop - 1)
    assert all(torch.equal(before[name], x) for name, x in run.task.model.state_dict().items())


def test_examine_finds_clip_and_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity()

        def forward(self, x):
            return self.third(self.second(self.first(x)) ** 3).mean()

    model = Model()
    nn.init.eye_(model.first.weight), nn.init.zeros_(model.first.bias)
    nn.init.constant_(model.second.weight, 1e13), nn.init.zeros_(model.second.bias)
    x = torch.tensor([[1e-13, 0.0], [1.0, 1.0], [2e-13, 1e-13]])
    report = examine(
        model, lambda batch: dict(loss=model(**batch)), [dict(x=x[:2]), dict(x=x[2:])], [["a", "b"], ["c"]]
    )
    assert report["clips"] == ["b"]  # (2e13)**3 is above the largest float32
    assert [name for name, _ in report["largest"]] == ["third", "second", "first"]
    assert report["largest"][0][1] == "inf" and float(report["largest"][2][1]) == 1.0


def test_out_of_memory_says_what_to_change(config, monkeypatch):
    def forward(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    run = set_up(config, Pretraining)
    monkeypatch.setattr(AVMAE, "forward", forward)
    run.first_step = 1  # past the measures before training
    advice = "--micro-batch 1 .the same step in smaller parts., --grad-checkpointing .same losses, more time."
    with pytest.raises(
        RunError, match=f"out of memory with micro-batches of 2 clips: try {advice}, --precision bf16"
    ):
        loop.train(run)


def test_memory_advice_is_what_is_left_to_try():
    with pytest.raises(RunError, match="try a smaller --model$"):
        with memory_advice(1, checkpointing=True, precision="bf16"):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    with pytest.raises(RuntimeError, match="^something else$"):
        with memory_advice(1, checkpointing=True, precision="bf16"):
            raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("config", "task"),
    [(SegmentConfig, Segmentation), (LocalizeConfig, Localization)],
    ids=["segment", "localize"],
)
def test_scenes_whose_loss_is_not_finite_end_with_a_report(config, task, data, tmp_path, monkeypatch):
    options = dict(model="micro", checkpoint="none", epochs=1, warmup_epochs=0, batch_size=4, workers=0)
    run = set_up(config(data=data, run=tmp_path / "run", **options), task)
    prepare = run.task.inputs
    monkeypatch.setattr(run.task, "inputs", lambda batch: spoilt(prepare(batch)))

    def spoilt(inputs):
        inputs["image"][1, 0, 0, 0] = math.nan
        return inputs

    with pytest.raises(RunError, match="step 1: the loss is nan"):
        loop.train(run)
    report = json.loads((tmp_path / "run/faults/step-00000001/process-0/report.json").read_text())
    assert len(report["clips"]) == 1


def test_where_nothing_is_to_be_saved_signals_end_it_at_once():
    with Signals() as signals:
        signals.at_once = True
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.save
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(SystemExit, match="143"):
            os.kill(os.getpid(), signal.SIGTERM)
