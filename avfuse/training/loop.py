"""The training loop that pretraining and all tasks share, from the first check to the last checkpoint.

A `Task` says what is trained, on what, and how it is judged. The loop does the rest: it deals batches out to
processes and micro-batches so that neither changes the losses, saves and resumes, names clips that cannot be
read, and stops with an explanation where it cannot go on.
"""

import errno
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from itertools import islice
from typing import IO, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset
from tqdm import tqdm

from ..data.clips import Clip, ClipLoader, ClipSampler, Failure, generator_of
from ..data.find import Found, find_data, probe
from ..data.workers import share_cores
from ..files import printable, some
from ..progress import progress_bar
from .checkpoints import load_checkpoint, save_checkpoint
from .costs import count_parameters
from .faults import STOPPING, RunError, Signals, examine, memory_advice, together, write_fault
from .length import settle_length
from .run_folder import (
    MetricsFile,
    Quarantine,
    TooManyUnreadable,
    begin_run,
    check_run,
    has_trained_on_all,
    read_sides,
    run_before,
    write_sides,
)
from .settings import (
    FRESH,
    LoopConfig,
    Schedule,
    check_config,
    learning_rate,
    raised_warmup_cosine,
    schedule_of,
    warmup_cosine,
)
from .starts import begin_from, saved_settings

EVALUATION_BATCH = 64
SPLITTING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
WAITING = timedelta(hours=6)  # for the process that scans the data, AudioSet for over one, or measures


class Task:
    """What a loop trains: the base class of pretraining and of every task."""

    name: str
    model: nn.Module  # around an encoder
    has_unused_parameters = False  # that a loss does not reach

    @staticmethod
    def find(config: LoopConfig, say: Callable[[str], object], look: Callable = probe) -> Found:
        """The data that the settings name; what is found is told through `say`, line by line. Clips stay on
        the side that they had in the run that this one begins with, or goes on with. `look` is that of
        `find_data`.
        """
        run = run_before(config)
        names = "demo", "data_set", "train_split", "missing", "test_share", "seed", "workers"
        options = {name: getattr(config, name) for name in names}
        options |= dict(before=read_sides(run), progress=not config.quiet, timeout=config.clip_timeout)
        found = find_data(config.data, say, look=look, **options)
        if found.test is found.train and config.epochs:
            say("no clips to test on: what is measured are the training clips themselves")
        if found.held_out and run not in (None, config.run) and has_trained_on_all(run, config.data):
            say(f"WARNING: {run} has trained on all clips, those that are held out here among them")
        return found

    def __init__(self, config: LoopConfig, found: Found):
        self.config, self.found = config, found

    def describe(self) -> str:
        """One line for people about the model."""
        config, parameters = self.config, count_parameters(self.model)
        weights = "fresh weights" if config.checkpoint == FRESH else f"the encoder of {config.checkpoint}"
        return f"{self.name}: {parameters / 1e6:.1f} M parameters, from {weights}"

    def begin(self, say: Callable[[str], object]) -> None:
        """Gives the model the weights that it begins with, beyond those of its encoder, and tells of them."""
        if self.config.checkpoint != FRESH:
            begin_from(self.model, self.config.checkpoint, say, is_trained=self.config.epochs > 0)

    def dataset(self, clips: Sequence[Clip], *, train: bool) -> Dataset:
        """Items by (epoch, index): dictionaries of tensors, among them "index", or a `Failure`; see
        `avfuse.data.clips.ClipDataset`.
        """
        raise NotImplementedError

    def inputs(self, batch: dict) -> dict[str, Tensor]:
        """What of a batch the model and its losses need. If no clip could be read, the batch holds a blank,
        of which `counts` are 0: every process has a backward in every step.
        """
        raise NotImplementedError

    def counts(self, inputs: dict[str, Tensor]) -> dict[str, int]:
        """By the name of each loss, over how many terms (clips, patches) its mean goes."""
        raise NotImplementedError

    def losses(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """By name, the means whose sum is minimised. `model` is that of the task, as Accelerate wraps it."""
        raise NotImplementedError

    def parameter_groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups, see `avfuse.pretrained.Pretrained.parameter_groups`. A group whose "ramp" is true
        has its learning rate raised from 0 over the first half of training.
        """
        return self.model.parameter_groups(weight_decay)

    def measure(self, run: "Run", model: nn.Module, step: int, when: str) -> list[Failure]:
        """Judges `model` "before", "during" or "after" training, and tells and draws what came out. All
        processes call it; each returns the clips that it could not read.
        """
        raise NotImplementedError


@dataclass
class Run:
    """All parts of a run. The last four belong to its folder, see `open_folder`."""

    config: LoopConfig
    accelerator: Accelerator
    schedule: Schedule
    found: Found
    task: Task
    model: nn.Module  # that of the task, as Accelerate wraps it
    average: AveragedModel | None  # of its weights
    optimizer: torch.optim.Optimizer
    rates: torch.optim.lr_scheduler.LRScheduler
    extended_at: int = 0  # the step at which it had come to its end when it was given more
    metrics: MetricsFile = field(init=False)
    quarantine: Quarantine = field(init=False)
    first_step: int = 0  # after which it goes on
    lock: IO | None = None  # while it is open, the run folder is ours


def program(config: LoopConfig, kind: type[Task]) -> int | str:
    """Runs to the end and returns what to exit with. Mistakes and faults that are explained need no
    traceback.
    """
    try:
        with together():
            run = set_up(config, kind)
    except (ValueError, OSError, RunError) as error:
        return f"error: {printable(error)}"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    try:
        with together():
            return train(run)
    except (OSError, SafetensorError, RunError) as error:
        is_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        where = f" ({config.run}); once there is room, the same command goes on" if is_full else ""
        return f"error: {printable(error)}{printable(where)}"


def tell(accelerator: Accelerator, line: object) -> None:
    """One process prints a line, whatever names are in it."""
    accelerator.print(printable(line))


def set_up(config: LoopConfig, kind: type[Task]) -> Run:
    """Checks everything, and only then begins the run folder, or resumes what is in it.

    Args:
        config: the settings.
        kind: the task, made from the settings and the data that it finds.

    Raises:
        ValueError: a setting or folder is wrong; nothing was written or deleted.
    """
    check_config(config)
    share_cores(config.threads, config.workers)
    accelerator = make_accelerator(config)
    config = check_run(config)
    saved_settings(getattr(config, "checkpoint", FRESH))  # a name that leads nowhere, before clips are read
    set_seed(config.seed)
    found = look_for_clips(config, accelerator, kind)
    asked, (config, extended_at) = config, settle_length(config, len(found.train))
    if config.epochs != asked.epochs:
        enough = f"so that there are --min-steps {config.min_steps}"
        tell(accelerator, f"{config.epochs} epochs instead of {asked.epochs}, {enough}")
    task = kind(config, found)
    task.begin(partial(tell, accelerator))
    run = build(config, accelerator, found, task, extended_at)
    open_folder(run)
    return run


def make_accelerator(config: LoopConfig) -> Accelerator:
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not know each other
        mixed_precision=config.precision,
        log_with="tensorboard",
        project_dir=config.run,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAITING)],
    )
    if accelerator.distributed_type in SPLITTING:
        raise ValueError(
            f"{accelerator.distributed_type.value} splits the model among processes, which has never been "
            "tested here: configure Accelerate for DDP (accelerate launch --multi_gpu), or use torchrun"
        )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("gradient accumulation is a matter of --micro-batch: leave Accelerate's at 1")
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; bf16 runs on CPUs")
    return accelerator


def look_for_clips(config: LoopConfig, accelerator: Accelerator, kind: type[Task]) -> Found:
    """The data: one process looks, and tells all."""
    found = kind.find(config, partial(tell, accelerator)) if accelerator.is_main_process else None
    (found,) = broadcast_object_list([found])
    check_found(found)
    if config.restart and len(found.unreadable) > config.max_unreadable * found.looked_at:
        raise ValueError(
            f"{len(found.unreadable)} of {found.looked_at} clips cannot be read, more than --max-unreadable "
            f"{config.max_unreadable:g}: nothing was deleted"
        )
    return found


def check_found(found: Found) -> None:
    """Raises ValueError unless there are clips on both sides."""
    for clips, purpose in (found.train, "train"), (found.test, "measure"):
        if not clips:
            raise ValueError(f"--data: none of the clips to {purpose} on can be read")


def build(
    config: LoopConfig, accelerator: Accelerator, found: Found, task: Task, extended_at: int = 0
) -> Run:
    """Schedule, model, optimizer and learning rates; `extended_at` as for `warmup_cosine`."""
    schedule = schedule_of(config, len(found.train), accelerator.process_index, accelerator.num_processes)
    if schedule.batch_size < config.batch_size:
        wanted = f"the data set is smaller than --batch-size {config.batch_size}"
        tell(accelerator, f"batch size {schedule.batch_size}: {wanted}")
    if schedule.micro_batch == 1 and getattr(config, "batch_norm", False):
        raise ValueError(
            "--batch-norm needs more than one clip at once, and each process takes one: give a larger "
            "--batch-size, or fewer processes"
        )
    lr = learning_rate(config, schedule.batch_size)
    if config.lr_scaling == "root" and schedule.batch_size < type(config).batch_size:
        why = f"with batches below {type(config).batch_size} it falls by the square root (--lr-scaling)"
        tell(accelerator, f"learning rate {lr:.2g}: {why}")
    tell(accelerator, f"{task.describe()}, on {accelerator.device}")
    average = None
    if config.ema:
        # Buffers, too: the running statistics of a BatchNorm are those of its weights.
        average = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
        average = average.to(accelerator.device)
    groups = optimizer_groups(task, config, lr)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    if task.has_unused_parameters:
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
    model, optimizer = accelerator.prepare(task.model, optimizer)
    warmup = config.warmup_epochs * schedule.steps_per_epoch
    shape = dict(warmup=warmup, total=schedule.steps, extended_at=extended_at)
    rate, raised_rate = partial(warmup_cosine, **shape), partial(raised_warmup_cosine, **shape)
    rates = [raised_rate if group["ramp"] else rate for group in groups]
    rates = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, rates))
    return Run(config, accelerator, schedule, found, task, model, average, optimizer, rates, extended_at)


def open_folder(run: Run) -> None:
    """Begins the run folder, or resumes what is in it."""
    config, accelerator, found = run.config, run.accelerator, run.found
    is_main = accelerator.is_main_process
    if is_main:
        processes = accelerator.num_processes
        inputs = getattr(run.task.model, "encoder", run.task.model).given_inputs
        described = asdict(inputs) if inputs else None
        run.lock = begin_run(config, found, accelerator.device, processes, run.extended_at, described)
    accelerator.wait_for_everyone()
    if is_main and config.data is not None:
        write_sides(config, found)
    run.first_step = load_checkpoint(accelerator, config.run, run.average)
    if run.first_step:
        tell(accelerator, f"resuming after step {run.first_step} of {run.schedule.steps}")
    if run.extended_at and run.first_step == run.extended_at:
        rates = run.rates.scheduler  # whose checkpoint holds the rate after the end of the shorter run
        rates.last_epoch -= 1
        rates.step()
        rise = f"rises from 0 in {config.warmup_epochs} epochs to" if config.warmup_epochs else "is"
        there = f"what it is in a run of {config.epochs}"
        tell(accelerator, f"the learning rate {rise} {there}, and goes down to 0 with that")
    quarantine = config.run / "quarantine.jsonl"
    run.quarantine = Quarantine(quarantine, is_main, found.looked_at, config.max_unreadable)
    run.quarantine.add("scan", found.unreadable)
    again = is_measured(run, run.first_step)
    metrics = config.run / "metrics.jsonl"
    run.metrics = MetricsFile(metrics, is_main, run.first_step, run.extended_at, measured_again=again)
    tensorboard = dict(purge_step=run.first_step + 1 if run.first_step else 0)  # with what was before
    accelerator.init_trackers("tensorboard", init_kwargs=dict(tensorboard=tensorboard))


def train(run: Run) -> int:
    """From `first_step` to the end: 0, or 128 + the signal that asked to stop.

    Raises:
        RunError: the run could not go on; the message says why.
    """
    accelerator, steps = run.accelerator, run.schedule.steps
    memory = memory_advice(
        run.schedule.micro_batch,
        checkpointing=run.config.grad_checkpointing,
        precision=run.config.precision,
        cuda_graphs=getattr(run.config, "cuda_graphs", False),
    )
    signals = Signals(STOPPING if accelerator.is_main_process else "")
    with run.lock or nullcontext(), signals, memory:
        signals.at_once = True  # the same command measures again
        if run.first_step == 0 < steps:
            measure(run, 0, "before")
        signals.at_once = False
        stopped = take_steps(run, signals) if steps else 0
        signals.at_once = True
        if not stopped:
            measure(run, steps, "after")
            tell(accelerator, run.quarantine.summary())
            tell(accelerator, f"done: look at {run.config.run}/index.html")
            if steps:
                tell(accelerator, f"the model is in {run.config.run}/model")
    # First the wrapped model, then what it communicates through: the other way round, the wrapper takes the
    # last reference down with it, and may wait for ever for a thread that waits for Python (torch 2.11).
    run.model = None
    accelerator.free_memory()
    accelerator.end_training()
    return 128 + stopped if stopped else 0


def take_steps(run: Run, signals: Signals) -> int:
    """All steps that are left, with checkpoints and measures on the way; the signal that cut them short."""
    config, accelerator, steps = run.config, run.accelerator, run.schedule.steps
    shown = accelerator.is_main_process and not config.quiet
    progress = progress_bar(total=steps, initial=run.first_step, desc="training", unit="step", shown=shown)
    step, stop = run.first_step, 0  # where none is left
    with make_loader(run.task, config, run.found.train, train=True) as loader, progress:
        batches = steps_of(run, loader)
        for step in range(run.first_step + 1, steps + 1):
            if is_measured(run, step - 1):  # when it is saved: a signal need not wait, which may be for long
                signals.at_once = True  # the same command measures again
                try:
                    measure(run, step - 1, "during")
                except (KeyboardInterrupt, SystemExit):
                    tell(accelerator, stopped_after(step - 1, steps))
                    raise
                signals.at_once = False
            try:
                asked = train_step(run, step, batches, signals, progress)
            except TooManyUnreadable:  # in all processes, before anything was changed
                if step - 1 > run.first_step:
                    save_checkpoint(accelerator, config.run, step - 1, config.keep_checkpoints, run.average)
                raise
            progress.update()
            measured_next = step == steps or is_measured(run, step)
            if any(asked) or measured_next or step % config.checkpoint_every == 0:
                save_checkpoint(accelerator, config.run, step, config.keep_checkpoints, run.average)
            stop = asked.stop
            if measured_next and not stop:  # one may have come since the step began
                late = dict(terminate=signals.terminate, interrupt=signals.interrupt)
                stop = stopping(**sum_over_processes(accelerator, late))
            if stop:
                break
    if stop:
        tell(accelerator, stopped_after(step, steps))
    return stop


def stopped_after(step: int, steps: int) -> str:
    return f"stopped after step {step} of {steps}: the same command resumes"


def is_measured(run: Run, step: int) -> bool:
    """Whether a step on the way is measured; not where the run begins, nor where it begins to extend one that
    ended there: that has been.
    """
    every, is_end_before = run.config.measure_every, step == run.first_step == run.extended_at
    return every > 0 and step % every == 0 and step > 0 and not is_end_before


# --- one step -----------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What signals, in any of the processes, asked for."""

    save: bool
    stop: int  # the signal that asked to stop, or 0


def stopping(terminate: float, interrupt: float) -> int:
    """The signal to end by, if any process has got one, or 0."""
    return signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0


def train_step(run: Run, step: int, batches: Iterator[list[dict]], signals: Signals, progress: tqdm) -> Asked:
    """One update of the weights, the same whatever the number of processes and the size of micro-batches:
    each loss is a mean over the whole batch, to which each micro-batch adds its share.
    """
    config, accelerator, task = run.config, run.accelerator, run.task
    started = time.perf_counter()
    read = next(batches)
    waited = time.perf_counter() - started

    inputs = [task.inputs(batch) for batch in read]
    counts = [task.counts(batch) for batch in inputs]
    failures = [failure for batch in read for failure in batch["failures"]]
    save, signals.save = signals.save, False
    ours = {name: sum(count[name] for count in counts) for name in counts[0]}
    ours |= dict(clips=sum(len(batch["index"]) for batch in read), failures=len(failures))
    ours |= dict(save=save, terminate=signals.terminate, interrupt=signals.interrupt)
    sums = sum_over_processes(accelerator, ours)  # by which all processes decide alike
    clips = int(sums["clips"])
    asked = Asked(sums["save"] > 0, stopping(sums["terminate"], sums["interrupt"]))
    if sums["failures"]:
        run.quarantine.add(f"step {step}", gather_object(failures))
    if not clips:  # nothing to learn from
        run.rates.step()
        return asked

    # --- gradients, and an update unless it would spoil the weights ---
    run.model.train()
    # From its own seed: what a step draws does not depend on whether the run was interrupted before it.
    torch.manual_seed(generator_of(config.seed, step, accelerator.process_index).initial_seed())
    inputs = [{name: value.to(accelerator.device) for name, value in batch.items()} for batch in inputs]
    losses = backward(run, inputs, counts, {name: sums[name] for name in counts[0]})
    loss = sum(losses.values())
    norm = accelerator.clip_grad_norm_(run.model.parameters(), config.clip_grad or math.inf)
    norm = float(norm) if norm is not None else math.nan
    if not math.isfinite(loss) or not (math.isfinite(norm) or may_overflow(accelerator)):
        stop_at_fault(run, step, loss, norm, inputs, read)
    row = dict(
        loss=loss,
        **losses,
        lr=max(run.rates.get_last_lr()),
        grad_norm=norm if math.isfinite(norm) else None,
    )
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.rates.step()
    if run.average is not None:
        run.average.update_parameters(task.model)

    seconds = time.perf_counter() - started
    epoch = (step - 1) // run.schedule.steps_per_epoch
    times = dict(seconds=round(seconds, 4), data_seconds=round(waited, 4))
    run.metrics.write(step=step, epoch=epoch, clips=clips, **row, **times)
    numbers = {name: value for name, value in row.items() if value is not None}
    accelerator.log(numbers | dict(clips_per_second=clips / seconds), step=step)
    progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return asked


def may_overflow(accelerator: Accelerator) -> bool:
    """Whether gradients may have grown too large for fp16: its scaler then leaves out the update and scales
    by less. Below 1 they are too large, or no numbers, by themselves.
    """
    return accelerator.scaler is not None and accelerator.scaler.get_scale() >= 1


def backward(
    run: Run, inputs: list[dict[str, Tensor]], counts: list[dict[str, int]], totals: dict[str, float]
) -> dict[str, float]:
    """Adds up the gradients of the micro-batches of a step, and returns its losses by name.

    Args:
        inputs, counts: of the micro-batches of this process.
        totals: the counts of all micro-batches of all processes.
    """
    accelerator = run.accelerator
    losses = torch.zeros(len(totals), device=accelerator.device)
    for batch, count in zip(inputs, counts, strict=True):
        is_last = batch is inputs[-1]
        with nullcontext() if is_last else accelerator.no_sync(run.model):
            means = run.task.losses(run.model, batch)
            shares = [count[name] / max(1.0, total) for name, total in totals.items()]
            shares = torch.tensor(shares, device=accelerator.device)
            weighted = torch.stack([means[name] for name in totals]) * shares
            gradients_of = weighted.sum() * accelerator.num_processes  # over which they are averaged
            accelerator.backward(gradients_of)
        losses += weighted.detach()
    return sum_over_processes(accelerator, dict(zip(totals, losses.tolist(), strict=True)))


def steps_of(run: Run, loader: ClipLoader) -> Iterator[list[dict]]:
    """This process's micro-batches of every step that is left; the loader reads ahead, over epochs too."""
    schedule, epochs = run.schedule, run.config.epochs
    sampler = ClipSampler(run.found.train, train=True, seed=run.config.seed)

    def keys() -> Iterator[Sequence[tuple[int, int]]]:
        for epoch in range(run.first_step // schedule.steps_per_epoch, epochs):
            sampler.set_epoch(epoch)
            order, start = list(sampler), epoch * schedule.steps_per_epoch
            for step in range(max(start, run.first_step), start + schedule.steps_per_epoch):
                yield from schedule.micro_batches(order, step)

    batches = loader.batches(keys())
    per_step = len(schedule.micro_batches(range(schedule.clips), 0))
    for _ in range(run.first_step, schedule.steps):
        yield list(islice(batches, per_step))


def sum_over_processes(accelerator: Accelerator, values: dict[str, float]) -> dict[str, float]:
    ours = torch.tensor(list(values.values()), dtype=torch.float32, device=accelerator.device)
    return dict(zip(values, accelerator.reduce(ours, "sum").tolist(), strict=True))


def stop_at_fault(
    run: Run, step: int, loss: float, norm: float, inputs: list[dict], read: list[dict]
) -> None:
    """Leaves a state to debug from, and raises a RunError that names clips and activations."""
    config, accelerator, clips = run.config, run.accelerator, run.found.train
    names = [[str(clips[i].path) for i in batch.get("index", torch.empty(0)).tolist()] for batch in read]
    model = run.task.model
    report = examine(model, partial(run.task.losses, model), inputs, names)
    everyone = [name for of_batch in names for name in of_batch]
    report |= dict(step=step, loss=str(loss), gradient_norm=str(norm), batch=everyone)
    folder = config.run / "faults" / f"step-{step:08d}" / f"process-{accelerator.process_index}"
    try:
        write_fault(folder, model, inputs, report)
    except (OSError, SafetensorError) as error:  # a full disk must not hide what happened
        tqdm.write(printable(f"{folder} could not be written: {error}"))
    blamed, everyone = gather_object(report["clips"]), gather_object(everyone)
    largest = ", ".join(f"{name} {value}" for name, value in report["largest"][:3])
    raise RunError(
        f"step {step}: the loss is {loss:g}, the gradient norm {norm:g}; nothing was updated. "
        f"Clips whose own loss is not finite: {some(blamed, most=8) or 'none alone'} "
        f"(the batch: {some(everyone, most=8)}). "
        f"Largest activations: {largest}. Weights and batch are in {folder.parent}"
    )


# --- measures -----------------------------------------------------------------------------------------------


def measure(run: Run, step: int, when: str) -> None:
    """Has the task judge the weights; clips that could not be read for it go on record."""
    model = whole_model(run)
    with in_own_precision(model):
        failures = run.task.measure(run, model, step, when)
    run.quarantine.add(when, gather_object(failures))
    run.accelerator.wait_for_everyone()


def evaluation_batches(
    run: Run, indices: Sequence[int], wrap: Callable[[Dataset], Dataset] | None = None
) -> Iterator[dict]:
    """Batches of the test clips with these indices, as they are read for evaluation; `wrap` makes another
    data set out of that which reads them.
    """
    size = max(1, min(run.schedule.micro_batch, EVALUATION_BATCH, len(indices)))
    keys = [(0, index) for index in indices]
    with make_loader(run.task, run.config, run.found.test, train=False, wrap=wrap) as loader:
        yield from loader.batches([keys[i : i + size] for i in range(0, len(keys), size)])


def whole_model(run: Run) -> nn.Module:
    """The model to measure and keep, the same in all processes: the average of the weights if there is one,
    else the weights.
    """
    whole = run.task.model if run.average is None else run.average.module
    for tensor in whole.state_dict().values():  # running statistics are those of one process's clips
        broadcast(tensor)
    return whole


@contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """While this lasts, a model runs as that which is loaded will: without the autocast into which Accelerate
    has put its `forward`, and which an average of the weights has not.
    """
    cast = vars(model).pop("forward", None)
    try:
        yield
    finally:
        if cast is not None:
            model.forward = cast


# --- parts --------------------------------------------------------------------------------------------------


def optimizer_groups(task: Task, config: LoopConfig, lr: float) -> list[dict]:
    """The task's groups, each with its learning rate: `layer_decay` to the power of the layers above it."""
    groups = task.parameter_groups(config.weight_decay)
    top = max(group["layer"] for group in groups)
    decay = config.layer_decay
    return [dict(ramp=False) | group | dict(lr=lr * decay ** (top - group["layer"])) for group in groups]


def make_loader(
    task: Task,
    config: LoopConfig,
    clips: Sequence[Clip],
    *,
    train: bool,
    wrap: Callable[[Dataset], Dataset] | None = None,
) -> ClipLoader:
    """A loader of clips, as the task sees them."""
    dataset = task.dataset(clips, train=train)
    dataset = dataset if wrap is None else wrap(dataset)
    return ClipLoader(dataset, workers=config.workers, timeout=config.clip_timeout)
