"""What ends a run before its time: signals, losses that are not finite, and memory that does not suffice."""

import math
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from ..files import write_json
from ..weight_files import write_safetensors

STOPPING = "\nCtrl-C: what is under way is finished and saved; Ctrl-C again ends at once, without saving\n"
LARGEST = 10  # modules that a report names


class RunError(RuntimeError):
    """The run cannot go on; the message says why and what to do. What was saved before is whole."""


class Signals:
    """While this context lasts, signals are noted instead of ending the process: SIGUSR1 asks for a
    checkpoint, SIGTERM and SIGINT (Ctrl-C) for a checkpoint and the end. A second Ctrl-C ends it at once, and
    the first is answered by `answer` on stderr: a step may take long. Where nothing is to be saved, `at_once`
    has SIGTERM and Ctrl-C end it at once.
    """

    def __init__(self, answer: str = ""):
        self.answer, self.at_once = answer, False
        self.save = self.terminate = self.interrupt = False

    def __enter__(self) -> "Signals":
        self.before = {}
        if threading.current_thread() is threading.main_thread():  # the only one that may
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as whoever began the process has it
                    self.before[number] = signal.signal(number, self.note)
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, _frame) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif self.at_once:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        elif number == signal.SIGTERM:
            self.terminate = True
        else:
            self.interrupt = True
            with suppress(OSError):  # nobody may read on
                os.write(2, self.answer.encode())  # where print might meet the middle of another
            signal.signal(number, signal.default_int_handler)


def outlive_requests() -> None:
    """From now on SIGUSR1 does not end this process where nothing can be saved, before and after training."""
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL:
            signal.signal(signal.SIGUSR1, lambda *_: None)


@contextmanager
def memory_advice(micro_batch: int, *, checkpointing: bool, precision: str, cuda_graphs: bool = False):
    """Turns running out of memory into a `RunError` that says which settings need less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # OutOfMemoryError is a RuntimeError
        lacking = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not lacking and "can't allocate memory" not in str(error):  # as PyTorch says it of CPUs
            raise
        smaller = f"--micro-batch {micro_batch // 2} (the same step in smaller parts)"
        advice = [smaller] if micro_batch > 1 else []
        leave = "leave out --cuda-graphs, and " if cuda_graphs else ""
        advice += [] if checkpointing else [f"{leave}--grad-checkpointing (same losses, more time)"]
        advice += ["--precision bf16"] if precision == "no" else []
        advice = ", ".join(advice or ["a smaller --model"])
        raise RunError(f"out of memory with micro-batches of {micro_batch} clips: try {advice}") from error


@contextmanager
def together():
    """Turns the loss of another process of the run into a `RunError` that names it."""
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own
        if not isinstance(error, torch.distributed.DistError) and "/gloo/" not in str(error):
            raise
        raise RunError(
            f"another process of this run has ended or cannot be reached ({error}). What it printed says "
            "why, if its host is there; then, on all hosts, the same command goes on from the last checkpoint"
        ) from error


def examine(
    model: nn.Module,
    losses: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    batches: Sequence[dict[str, Tensor]],
    names: Sequence[Sequence[str]],
) -> dict[str, list]:
    """Why a loss is not finite: the clips whose own loss is not, alone in a batch, and the modules with the
    largest outputs, those that are not finite first, in the order in which they ran.

    Args:
        model: as it was before the step; its weights are not changed.
        losses: runs the model on a batch, and returns its losses by name.
        batches: what `losses` takes.
        names: the names of the clips in each.
    """
    largest: dict[str, float] = {}

    def watch(name):
        def remember(_module, _inputs, output):
            tensors = [x for x in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(x)]
            for tensor in tensors:
                if tensor.is_floating_point() and tensor.numel():
                    value, before = tensor.detach().abs().max().item(), largest.get(name, 0.0)
                    largest[name] = before if math.isnan(before) or value < before else value

        return remember

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    clips = []
    try:
        with torch.no_grad():
            for batch, of_batch in zip(batches, names, strict=True):
                for index, name in enumerate(of_batch):
                    alone = {key: x[index : index + 1] if x.ndim else x for key, x in batch.items()}
                    if not all(torch.isfinite(loss) for loss in losses(alone).values()):
                        clips.append(name)
    finally:
        for hook in hooks:
            hook.remove()
    finite = [name for name in largest if math.isfinite(largest[name])]
    broken = [name for name in largest if not math.isfinite(largest[name])]
    ordered = (broken + sorted(finite, key=largest.get, reverse=True))[:LARGEST]
    return dict(clips=clips, largest=[[name, str(largest[name])] for name in ordered])


def write_fault(folder: Path, model: nn.Module, batches: Sequence[dict[str, Tensor]], report: dict) -> None:
    """A state to debug from: the weights before the step, the batches, and a report."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "report.json", report)
    write_safetensors(folder / "model.safetensors", model.state_dict())
    for index, batch in enumerate(batches):
        write_safetensors(folder / f"batch-{index}.safetensors", batch)
