"""Pretrain an audio-visual masked autoencoder: `python -m avfuse.train`."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    set_seed,
)
from safetensors import SafetensorError
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from .checkpoints import load_checkpoint, save_checkpoint
from .data import sounding_shapes
from .data.clips import Clip, ClipDataset, ClipLoader, ClipSampler, find_clips, printable, scan_clips
from .data.decode import ClipError
from .evaluate import INPUTS, describe_measures, flat, measures
from .faults import RunError, Signals, examine, memory_advice, write_fault
from .mae import AVMAE
from .pictures import draw_attention, draw_losses, draw_reconstructions
from .pretrained import load_strictly
from .recipes import (
    Schedule,
    TrainConfig,
    check_config,
    count_parameters,
    learning_rate,
    make_model,
    parse,
    plan,
    schedule_of,
)
from .released import read_weights
from .report import write_report
from .run_folder import MetricsFile, Quarantine, TooManyUnreadable, begin_run, check_run, describe_data
from .vit import input_shape

DEMO = Path("data/sounding-shapes")
EVALUATION_BATCH = 64
WAITING = timedelta(hours=1)  # for the process that scans the data or measures
SPLITS = ("train", "test")


def main(config: TrainConfig) -> int:
    """Trains to the end, and returns 0; or until a signal asks to stop, and returns 128 + its number.

    Raises:
        ValueError: a setting or folder is wrong; nothing was written or deleted.
        RunError: the run could not go on; the message says why.
    """
    return train(set_up(config))


@dataclass
class Run:
    """All parts of a run, ready to go on after `first_step`."""

    config: TrainConfig
    accelerator: Accelerator
    schedule: Schedule
    train_clips: list
    test_clips: list
    test_name: str
    mae: AVMAE
    model: torch.nn.Module  # mae as Accelerate wraps it
    average: AveragedModel | None  # of the weights of mae
    optimizer: torch.optim.Optimizer
    rates: torch.optim.lr_scheduler.LRScheduler
    metrics: MetricsFile
    quarantine: Quarantine
    first_step: int
    lock: object  # a file: while it is open, the run folder is ours


def set_up(config: TrainConfig) -> Run:
    """Checks everything, and only then begins the run folder, or resumes what is in it."""
    check_config(config)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else several processes on CPUs would not know each other
        mixed_precision=config.precision,
        log_with="tensorboard",
        project_dir=config.run,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=WAITING)],
    )
    if accelerator.gradient_accumulation_steps != 1:
        raise ValueError("gradient accumulation is a matter of --micro-batch: leave Accelerate's at 1")
    if config.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; bf16 runs on CPUs")
    say = accelerator.print
    settings = run_settings(config)
    check_run(config.run, settings, config.restart)
    set_seed(config.seed)

    # --- data: one process looks, all are told ---
    (found,) = broadcast_object_list([find_data(config, say) if accelerator.is_main_process else None])
    if not found.train:
        raise ValueError("--data: none of the clips to train on can be read")
    schedule = schedule_of(config, len(found.train), accelerator.process_index, accelerator.num_processes)
    if not found.test:
        raise ValueError("--data: none of the clips to measure on can be read")
    if config.restart and len(found.unreadable) > config.max_unreadable * found.looked_at:
        raise ValueError(
            f"{len(found.unreadable)} of {found.looked_at} clips cannot be read, more than --max-unreadable "
            f"{config.max_unreadable:g}: nothing was deleted"
        )
    if schedule.batch_size < config.batch_size:
        say(
            f"batch size {schedule.batch_size}: the data set is smaller than --batch-size {config.batch_size}"
        )

    if accelerator.distributed_type == DistributedType.FSDP:
        if config.ema:
            raise ValueError("--ema needs whole weights in each process: not with FSDP")
        if schedule.batch_size % accelerator.num_processes:
            raise ValueError("--batch-size must be a multiple of the number of processes with FSDP")

    # --- model, optimizer, learning rates ---
    mae = make_model(config)
    load_branch("--image-weights", mae.encoder.image, config.image_weights)
    load_branch("--audio-weights", mae.encoder.audio, config.audio_weights)
    sizes = [f"{count_parameters(module) / 1e6:.1f} M" for module in (mae.encoder, mae)]
    say(
        f"{config.model} model, {config.interactions}: {sizes[0]} parameters in the encoder, "
        f"{sizes[1]} with decoders, on {accelerator.device}"
    )
    average = None
    if config.ema:
        average = AveragedModel(mae, multi_avg_fn=get_ema_multi_avg_fn(config.ema)).to(accelerator.device)
    groups = optimizer_groups(mae, config)
    lr = learning_rate(config, schedule.batch_size)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))
    model, optimizer = accelerator.prepare(mae, optimizer)
    shape = dict(warmup=config.warmup_epochs * schedule.steps_per_epoch, total=schedule.steps)
    rate, raised_rate = partial(warmup_cosine, **shape), partial(raised_warmup_cosine, **shape)
    rates = [raised_rate if group["ramp"] else rate for group in groups]
    rates = accelerator.prepare(torch.optim.lr_scheduler.LambdaLR(optimizer, rates))

    # --- run folder ---
    lock = None
    if accelerator.is_main_process:
        data = describe_data(found.train)
        lock = begin_run(config.run, settings, data, config.restart, accelerator.device)
    accelerator.wait_for_everyone()
    first_step = load_checkpoint(accelerator, config.run, average)
    if first_step:
        say(f"resuming after step {first_step} of {schedule.steps}")
    is_main = accelerator.is_main_process
    quarantine = Quarantine(config.run / "quarantine.jsonl", is_main, found.looked_at, config.max_unreadable)
    quarantine.add("scan", found.unreadable)
    metrics = MetricsFile(config.run / "metrics.jsonl", is_main, first_step)
    accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": first_step + 1}})
    return Run(
        config=config,
        accelerator=accelerator,
        schedule=schedule,
        train_clips=found.train,
        test_clips=found.test[: config.probe_clips],
        test_name=found.test_name,
        mae=mae,
        model=model,
        average=average,
        optimizer=optimizer,
        rates=rates,
        metrics=metrics,
        quarantine=quarantine,
        first_step=first_step,
        lock=lock,
    )


def train(run: Run) -> int:
    """From `first_step` to the end: 0, or 128 + the signal that asked to stop."""
    accelerator, steps = run.accelerator, run.schedule.steps
    memory = memory_advice(
        run.schedule.micro_batch,
        checkpointing=run.config.grad_checkpointing,
        precision=run.config.precision,
    )
    with run.lock or nullcontext(), Signals() as signals, memory:
        if run.first_step == 0:
            measure(run, 0, "before")
        stopped = take_steps(run, signals)
        if not stopped:
            measure(run, steps, "after")
            accelerator.print(run.quarantine.summary())
            accelerator.print(
                f"done: look at {run.config.run}/index.html; model in {run.config.run}/model "
                "(AVMAE.from_pretrained)"
            )
        accelerator.end_training()
    return 128 + stopped if stopped else 0


def take_steps(run: Run, signals: Signals) -> int:
    """All steps that are left, with checkpoints and measures on the way; the signal that cut them short."""
    config, accelerator, steps = run.config, run.accelerator, run.schedule.steps
    progress = tqdm(
        total=steps,
        initial=run.first_step,
        desc="training",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    with make_loader(run.mae, config, run.train_clips, train=True) as loader, progress:
        batches = steps_of(run, loader)
        for step in range(run.first_step + 1, steps + 1):
            try:
                asked = train_step(run, step, batches, signals, progress)
            except TooManyUnreadable:  # in all processes, before anything was changed
                if step - 1 > run.first_step:
                    save_checkpoint(accelerator, config.run, step - 1, config.keep_checkpoints, run.average)
                raise
            progress.update()
            if config.measure_every and step % config.measure_every == 0 and step < steps:
                measure(run, step, "during")
            if any(asked) or step % config.checkpoint_every == 0 or step == steps:
                save_checkpoint(accelerator, config.run, step, config.keep_checkpoints, run.average)
            if asked.stop:
                accelerator.print(f"stopped after step {step} of {steps}: the same command resumes")
                return asked.stop
    return 0


# --- one step -----------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    """What signals, in any of the processes, asked for."""

    save: bool
    stop: int  # the signal that asked to stop, or 0


def train_step(run: Run, step: int, batches: Iterator[list[dict]], signals: Signals, progress: tqdm) -> Asked:
    """One update of the weights, the same whatever the number of processes and the size of micro-batches:
    the loss is the mean over the hidden patches of the whole batch, to which each micro-batch adds its share.
    """
    config, accelerator = run.config, run.accelerator
    started = time.perf_counter()
    read = next(batches)
    waited = time.perf_counter() - started

    inputs = [model_inputs(run.mae, batch) for batch in read]
    counts = [torch.tensor([count_hidden(batch, name) for name in ("image", "audio")]) for batch in inputs]
    failures = [failure for batch in read for failure in batch["failures"]]
    clips = sum(len(batch["image"]) for batch in read if "image" in batch)
    save, signals.save = signals.save, False
    flags = [clips, len(failures), save, signals.terminate, signals.interrupt]
    values = sum_over_processes(accelerator, [*sum(counts).tolist(), *flags])  # what all decide by
    *hidden, clips, failed, save, terminate, interrupt = values
    asked = Asked(save > 0, signal.SIGTERM if terminate else signal.SIGINT if interrupt else 0)
    if failed:
        run.quarantine.add(f"step {step}", gather_object(failures))
    if not clips:  # nothing to learn from
        run.rates.step()
        return asked

    # --- forward and backward ---
    run.model.train()
    # From its own seed: what a step draws does not depend on whether the run was interrupted before it.
    torch.manual_seed(random_seed(config.seed, step, accelerator.process_index))
    losses = torch.zeros(2, device=accelerator.device)
    total = torch.tensor(hidden).clamp(min=1)
    inputs = [{name: value.to(accelerator.device) for name, value in batch.items()} for batch in inputs]
    for batch, count in zip(inputs, counts, strict=True):
        is_last = batch is inputs[-1]
        with nullcontext() if is_last else accelerator.no_sync(run.model):
            output = run.model(**batch)
            share = (count / total).to(accelerator.device)
            weighted = torch.stack([output.image_loss, output.audio_loss]) * share
            gradients_of = weighted.sum() * accelerator.num_processes  # over which they are averaged
            accelerator.backward(gradients_of)
        losses += weighted.detach()
    image_loss, audio_loss = sum_over_processes(accelerator, losses.tolist())
    norm = accelerator.clip_grad_norm_(run.model.parameters(), config.clip_grad or math.inf)
    norm = float(norm) if norm is not None else math.nan

    # --- update, unless it would spoil the weights ---
    overflow = config.precision == "fp16"  # whose scaler skips gradients that are not finite
    if not math.isfinite(image_loss + audio_loss) or not (math.isfinite(norm) or overflow):
        stop_at_fault(run, step, image_loss + audio_loss, norm, inputs, read)
    row = dict(
        loss=image_loss + audio_loss,
        image_loss=image_loss,
        audio_loss=audio_loss,
        lr=run.rates.get_last_lr()[0],
        grad_norm=norm if math.isfinite(norm) else None,
    )
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.rates.step()
    if run.average is not None:
        run.average.update_parameters(run.mae)

    seconds = time.perf_counter() - started
    epoch = (step - 1) // run.schedule.steps_per_epoch
    times = dict(seconds=round(seconds, 4), data_seconds=round(waited, 4))
    run.metrics.write(step=step, epoch=epoch, clips=int(clips), **row, **times)
    numbers = {name: value for name, value in row.items() if value is not None}
    accelerator.log(numbers | dict(clips_per_second=clips / seconds), step=step)
    progress.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
    return asked


def steps_of(run: Run, loader: ClipLoader) -> Iterator[list[dict]]:
    """This process's micro-batches of every step that is left; the loader reads ahead, over epochs too."""
    schedule, epochs = run.schedule, run.config.epochs
    sampler = ClipSampler(run.train_clips, train=True, seed=run.config.seed)

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


def model_inputs(mae: AVMAE, batch: dict) -> dict[str, Tensor]:
    """What the model is called with. Of a batch in which no clip could be read a blank clip is left, present
    in no modality and so without a loss: every process has a backward in every step.
    """
    if "image" not in batch:
        encoder, generator = mae.encoder, torch.Generator().manual_seed(0)
        batch = {name: torch.zeros(1, *input_shape(getattr(encoder, name))) for name in ("image", "audio")}
        batch |= {name: mask[None] for name, mask in mae.mask_sampler()(generator).items()}
        batch |= dict(image_present=torch.tensor([False]), audio_present=torch.tensor([False]))
    everywhere = [name for name in ("image_present", "audio_present") if batch[name].all()]
    return {name: batch[name] for name in INPUTS if name not in everywhere}  # no mask: a faster path


def count_hidden(inputs: dict[str, Tensor], name: str) -> int:
    """Over how many patches of one modality a batch has a loss."""
    removed, present = inputs[f"{name}_removed"], inputs.get(f"{name}_present")
    return int(removed.sum() if present is None else removed[present].sum())


def sum_over_processes(accelerator: Accelerator, values: list[float]) -> list[float]:
    summed = accelerator.reduce(torch.tensor(values, dtype=torch.float32, device=accelerator.device), "sum")
    return summed.tolist()


def random_seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def stop_at_fault(
    run: Run, step: int, loss: float, norm: float, inputs: list[dict], read: list[dict]
) -> None:
    """Leaves a state to debug from, and raises a RunError that names clips and activations."""
    config, accelerator = run.config, run.accelerator
    names = [
        [str(run.train_clips[i].path) for i in batch.get("index", torch.empty(0)).tolist()] for batch in read
    ]
    is_whole = accelerator.distributed_type != DistributedType.FSDP  # whose processes hold parts of a model
    mae = run.mae if is_whole else whole_model(run)
    report = examine(mae, inputs, names) if is_whole else dict(clips=[], largest=[])
    everyone = [name for of_batch in names for name in of_batch]
    report |= dict(step=step, loss=str(loss), gradient_norm=str(norm), batch=everyone)
    folder = config.run / "faults" / f"step-{step:08d}" / f"process-{accelerator.process_index}"
    try:
        write_fault(folder, mae, inputs, report)
    except (OSError, SafetensorError) as error:  # a full disk must not hide what happened
        tqdm.write(f"{folder} could not be written: {error}")
    blamed, everyone = gather_object(report["clips"]), gather_object(everyone)
    largest = ", ".join(f"{name} {value}" for name, value in report["largest"][:3])
    raise RunError(
        f"step {step}: the loss is {loss:g}, the gradient norm {norm:g}; nothing was updated. "
        f"Clips whose own loss is not finite: {', '.join(blamed) or 'none alone'} "
        f"(the batch: {', '.join(everyone[:8])}{', ...' if len(everyone) > 8 else ''}). "
        f"Largest activations: {largest}. Weights and batch are in {folder.parent}"
    )


# --- settings -----------------------------------------------------------------------------------------------


def run_settings(config: TrainConfig) -> dict:
    """The settings, ready for JSON."""
    settings = {name: value for name, value in asdict(config).items() if name not in ("plan", "restart")}
    paths = {name: str(value.resolve()) for name, value in settings.items() if isinstance(value, Path)}
    return json.loads(json.dumps(settings | paths))


def load_branch(option: str, vit: torch.nn.Module, path: Path | None) -> None:
    """Starts a transformer from the weights in a file, if one is given."""
    if path is None:
        return
    try:
        load_strictly(vit, read_weights(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{option} {path}: {error}") from error


def optimizer_groups(mae: AVMAE, config: TrainConfig) -> list[dict]:
    """The model's groups, with those of transformers that start from weights apart (`ramp`)."""
    branches = (mae.encoder.image, config.image_weights), (mae.encoder.audio, config.audio_weights)
    pretrained = {id(p) for vit, weights in branches if weights is not None for p in vit.parameters()}
    groups = []
    for group in mae.parameter_groups(config.weight_decay):
        for ramp in False, True:
            parameters = [p for p in group["params"] if (id(p) in pretrained) == ramp]
            if parameters:
                groups.append(group | dict(params=parameters, ramp=ramp))
    return groups


# --- data ---------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The clips of a data set, and what a scan of it found."""

    train: list[Clip]
    test: list[Clip]
    test_name: str  # what to call the latter
    unreadable: list[ClipError]
    looked_at: int  # files


def find_data(config: TrainConfig, say) -> Found:
    """Looks through the data set, which is built first if it is the demo's."""
    options = dict(missing=config.missing, timeout=config.clip_timeout, workers=config.workers)
    root = sounding_shapes.generate(DEMO) if config.data is None else config.data
    if sounding_shapes.is_built(root):
        scans = [scan_clips(sounding_shapes.clips(root, split), **options) for split in SPLITS]
    elif all((root / split).is_dir() for split in SPLITS):
        scans = [find_clips(root / split, **options) for split in SPLITS]
    else:
        scans = [find_clips(root, **options)]
        say("no train/ and test/ inside: what is measured are the training clips themselves")
    for name, scan in zip(SPLITS, scans, strict=False):
        say(f"{name}: {scan.summary()}" if len(scans) > 1 else scan.summary())
    return Found(
        train=scans[0].clips,
        test=scans[-1].clips,
        test_name="held-out clips" if len(scans) > 1 else "training clips",
        unreadable=[error for scan in scans for error in scan.unreadable],
        looked_at=sum(scan.looked_at for scan in scans),
    )


def make_loader(mae: AVMAE, config: TrainConfig, clips: list, *, train: bool) -> ClipLoader:
    """A loader of clips, with the masks of each drawn from (seed, epoch, clip)."""
    dataset = ClipDataset(clips, mae.encoder.inputs, train=train, seed=config.seed, extras=mae.mask_sampler())
    return ClipLoader(dataset, workers=config.workers, timeout=config.clip_timeout)


# --- learning rates -----------------------------------------------------------------------------------------


def warmup_cosine(step: int, warmup: int, total: int) -> float:
    """Share of the peak learning rate: up to it in `warmup` equal steps, then down to 0 by half a cosine."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def raised_warmup_cosine(step: int, warmup: int, total: int) -> float:
    """The same for weights that were pretrained: raised from 0 by half a cosine over the first half of
    training, so that fresh fusion blocks do not undo them (released code).
    """
    raised = 0.5 * (1 - math.cos(math.pi * min(1.0, step / max(1, total / 2))))
    return raised * warmup_cosine(step, warmup, total)


# --- reports ------------------------------------------------------------------------------------------------


def measure(run: Run, step: int, when: str) -> None:
    """Held-out loss, nearest-neighbour probe, pictures, report: the main process does it, the others wait."""
    mae, failures = whole_model(run), []
    if run.accelerator.is_main_process:
        if when == "after":
            mae.save_pretrained(run.config.run / "model")
        size = min(run.schedule.micro_batch, EVALUATION_BATCH, len(run.test_clips))
        keys = [(0, index) for index in range(len(run.test_clips))]
        with make_loader(mae, run.config, run.test_clips, train=False) as loader:
            batches = list(loader.batches([keys[i : i + size] for i in range(0, len(keys), size)]))
        failures = [failure for batch in batches for failure in batch["failures"]]
        batches = [batch for batch in batches if "image" in batch]
        if batches:
            row = measures(mae, batches, run.accelerator.device)
            tqdm.write(describe_measures(row, when, run.test_name))
            run.metrics.write(step=step, when=when, clips=run.test_name, **row)
            run.accelerator.log(flat(row), step=step)
        else:
            tqdm.write(f"{when} training: none of the {run.test_name} to measure on could be read")
        draw(run.config.run, mae, batches, step, run.accelerator.device)
    run.quarantine.add(when, gather_object(failures))
    run.accelerator.wait_for_everyone()


def draw(folder: Path, mae: AVMAE, batches: list[dict], step: int, device: torch.device) -> None:
    """Loss curves, reconstructions, attention maps where there is fusion, and the report that shows them."""
    pictures = folder / "pictures"
    try:
        draw_losses(folder / "metrics.jsonl", pictures / "losses.png")
        for batch in batches[:1]:
            batch = {name: value.to(device) for name, value in batch.items() if torch.is_tensor(value)}
            draw_reconstructions(mae, batch, pictures / f"reconstructions-{step:06d}.png")
            if mae.encoder.fusion_layers:
                draw_attention(mae.encoder, batch, pictures / f"attention-{step:06d}.png")
        write_report(folder)
    except OSError as error:  # a full disk: no picture is worth a run
        tqdm.write(f"pictures could not be drawn: {error}")


def whole_model(run: Run) -> AVMAE:
    """The model to measure and keep: the average of the weights if there is one, else the weights."""
    if run.average is not None:
        return run.average.module
    if run.accelerator.distributed_type != DistributedType.FSDP:
        return run.mae
    state = run.accelerator.get_state_dict(run.model)  # of which all processes give a part to the main one
    whole = make_model(run.config).to(run.accelerator.device)
    if run.accelerator.is_main_process:
        whole.load_state_dict(state)
    return whole


def cli() -> int | str:
    """The command line: what to exit with. Mistakes and faults that are explained need no traceback."""
    config = parse()
    try:
        check_config(config)
        if config.plan:
            if os.environ.get("RANK", "0") == "0":
                print(plan(config, processes=int(os.environ.get("WORLD_SIZE", 1))))
            return 0
        run = set_up(config)
    except (ValueError, OSError, RunError) as error:
        return f"error: {printable(error)}"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    try:
        return train(run)
    except (OSError, RunError) as error:
        return f"error: {printable(error)}"


if __name__ == "__main__":
    sys.exit(cli())
