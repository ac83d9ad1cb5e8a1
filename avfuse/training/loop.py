"""The training loop that pretraining and all tasks share, from the first check to the last checkpoint.

A `Task` says what is trained, on what, and how it is judged. The loop does the rest: it deals batches out to
processes and micro-batches so that neither changes the losses, saves and resumes, names clips that cannot be
read, and stops with an explanation where it cannot go on.
"""

import errno
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from functools import partial

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
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from ..data.clips import Clip, ClipLoader
from ..data.find import Found
from ..data.workers import share_cores
from ..files import printable
from ..progress import progress_bar
from .checkpoints import load_checkpoint, save_checkpoint
from .faults import STOPPING, RunError, Signals, memory_advice, outlive_requests, together
from .length import settle_length
from .run_folder import (
    MetricsFile,
    Quarantine,
    TooManyUnreadable,
    are_too_many,
    begin_run,
    check_run,
    write_sides,
)
from .settings import (
    FRESH,
    LoopConfig,
    check_config,
    learning_rate,
    raised_warmup_cosine,
    schedule_of,
    warmup_cosine,
)
from .starts import saved_settings
from .steps import steps_of, stopping, sum_over_processes, train_step
from .task import Run, Task

EVALUATION_BATCH = 64
UNREAD = "error: nobody reads what is printed any longer; the same command goes on"
SPLITTING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
WAITING = timedelta(hours=6)  # for the process that scans the data, AudioSet for over one, or measures


def program(config: LoopConfig, kind: type[Task]) -> int | str:
    """Runs to the end and returns what to exit with. Mistakes and faults that are explained need no
    traceback.
    """
    outlive_requests()
    try:
        with together():
            run = set_up(config, kind)
    except BrokenPipeError:
        return UNREAD
    except (ValueError, OSError, RunError) as error:
        return f"error: {printable(error)}"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    try:
        with together():
            return train(run)
    except BrokenPipeError:
        return UNREAD
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
    processes, cards = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    has_its_own = cards == 1 and os.environ.get("CUDA_VISIBLE_DEVICES")  # each process another one, perhaps
    if accelerator.distributed_type == DistributedType.MULTI_GPU and processes > cards and not has_its_own:
        raise ValueError(f"{processes} processes share {cards} GPUs here: start one for each")
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
    if config.restart and are_too_many(len(found.unreadable), config.max_unreadable, found.looked_at):
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
