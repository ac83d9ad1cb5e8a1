"""A step of training: one update of the weights, what each process reads for it, and the stop at a fault."""

import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import islice
from typing import NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from ..data.clips import ClipLoader, ClipSampler, generator_of
from ..files import printable, some
from .faults import RunError, Signals, examine, write_fault
from .task import Run


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
    shares = [[count[name] / max(1.0, total) for name, total in totals.items()] for count in counts]
    shares = torch.tensor(shares, device=accelerator.device)  # once the GPU works, it would wait for that
    for batch, share in zip(inputs, shares, strict=True):
        is_last = batch is inputs[-1]
        with nullcontext() if is_last else accelerator.no_sync(run.model):
            means = run.task.losses(run.model, batch)
            weighted = torch.stack([means[name] for name in totals]) * share
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
