"""What all downstream tasks share: where they start, every test clip judged once, and the results."""

import datetime
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from ..data.clips import Failure
from ..data.find import Found
from ..encoder import AVEncoder
from ..files import write_json
from ..loading import load_encoder
from ..presets import create_encoder
from ..pretrained import load_strictly, parameter_groups, save_model
from .loop import Run, Task, evaluation_batches
from .recipes import count_parameters
from .report import write_report
from .settings import LoopConfig

DEMO_RUN = Path("runs/demo")
FRESH = "none"
DRAWN = 6  # test clips of which there are pictures


@dataclass(kw_only=True)
class TaskConfig(LoopConfig):
    """Settings that all tasks have."""

    checkpoint: str = ""
    """Whose encoder to start from: a run folder, a saved model, a name on the Hugging Face hub, a released
    DeepAVFusion file, or "none" for fresh weights. Default: runs/demo, if `python -m avfuse.train` has left
    one there, else none."""
    model: Literal["tiny", "small", "base", "large"] = "tiny"
    """Size of both transformers, if weights are fresh."""
    interactions: Literal["dense", "bilinear", "factorized", "token", "none"] = "dense"
    """How fusion tokens read image and audio tokens, if weights are fresh."""

    def __post_init__(self):
        if not self.checkpoint:  # found out once: a run that is resumed must find the same
            self.checkpoint = str(DEMO_RUN) if (DEMO_RUN / "model").is_dir() else FRESH


def starting_encoder(config: TaskConfig, drop_path: float = 0.0) -> AVEncoder:
    """The encoder that a task starts from, dropping blocks at this rate and not at that of its checkpoint.

    Raises:
        ValueError: the checkpoint holds none.
    """
    if config.checkpoint == FRESH:
        encoder = create_encoder(config.model, config.interactions)
    else:
        encoder = load_encoder(config.checkpoint)
    encoder = with_drop_path(encoder, drop_path)
    encoder.set_grad_checkpointing(config.grad_checkpointing)
    return encoder


def with_drop_path(encoder: AVEncoder, rate: float) -> AVEncoder:
    """The same encoder, in whose training blocks are dropped: up to `rate` of the time in the uni-modal
    branches, rising with depth as in timm, and `rate` in the fusion blocks (released ones drop nothing).
    """
    config = encoder.config()
    dropping = config | dict(drop_path=rate)
    for branch in "image", "audio":
        dropping[branch] = config[branch] | dict(drop_path_rate=rate)
    if dropping == config:
        return encoder
    return load_strictly(AVEncoder.from_config(dropping), encoder.state_dict())


class JudgedTask(Task):
    """A task with a model around an encoder, which is judged on every test clip.

    Its `model` has an `encoder`, and was made from it with `options`. A subclass gives both, `name`,
    `protocol` (the definition of its metrics by name), `dataset`, `inputs`, `counts` and `losses` (see
    `Task`), and the three methods below.
    """

    name: str
    protocol: str
    options: dict  # goes into JSON
    has_unused_parameters = True  # such as the last audio block where only image tokens are read

    def __init__(self, config: TaskConfig, found: Found):
        self.config, self.found = config, found

    def judge(self, model: nn.Module, inputs: dict[str, Tensor], batch: dict) -> list[dict]:
        """One row of numbers and small arrays for each clip of a batch, whatever else is in the batch.

        Args:
            model: in eval mode, without gradients.
            inputs: what `inputs` returns, on the device.
            batch: as read, on the CPU.
        """
        raise NotImplementedError

    def summarize(self, rows: list[dict]) -> dict[str, float | int]:
        """The metrics by name, from the rows of all test clips in their order."""
        raise NotImplementedError

    def draw(self, folder: Path, model: nn.Module, inputs: dict[str, Tensor], batch: dict, step: int) -> None:
        """Pictures of the first test clips, as folder/KIND-{step:06d}.png."""

    def describe(self) -> str:
        config, parameters = self.config, count_parameters(self.model)
        weights = "fresh weights" if config.checkpoint == FRESH else f"the encoder of {config.checkpoint}"
        return f"{self.name}: {parameters / 1e6:.1f} M parameters, from {weights}"

    def parameter_groups(self, weight_decay):
        return parameter_groups(self.model, self.model.encoder.depth, weight_decay)

    def measure(self, run, model, step, when):
        rows, failures = judge_all(run, model)
        if not run.accelerator.is_main_process:
            return failures
        folder, named = run.config.run, run.found.test_name
        if when == "after":
            save_model(folder / "model", model, self.options)
        if not rows:
            tqdm.write(f"{when} training: none of the {named} to measure on could be read")
            return failures
        metrics = self.summarize(rows)
        tqdm.write(f"{when} training, {len(rows)} {named}: {described(metrics)}")
        run.metrics.write(step=step, when=when, clips=named, judged=len(rows), metrics=metrics)
        numbers = {name: value for name, value in metrics.items() if value is not None}
        run.accelerator.log(numbers, step=step)
        if when == "after":
            write_results(
                folder / "results.json",
                model,
                run.found,
                task=self.name,
                protocol=self.protocol,
                judged=len(rows),
                seed=run.config.seed,
                step=step,
                checkpoint=run.config.checkpoint,
                metrics=metrics,
            )
        try:
            self.draw_first(run, model, step)
            write_report(folder)
        except OSError as error:  # a full disk: no picture is worth a run
            tqdm.write(f"pictures could not be drawn: {error}")
        return failures

    @torch.no_grad()
    def draw_first(self, run: Run, model: nn.Module, step: int) -> None:
        model.eval()
        indices = range(min(DRAWN, len(run.found.test)))
        for batch in [batch for batch in evaluation_batches(run, indices) if len(batch["index"])][:1]:
            inputs = to_device(self.inputs(batch), run.accelerator.device)
            self.draw(run.config.run / "pictures", model, inputs, batch, step)


@torch.no_grad()
def judge_all(run: Run, model: nn.Module) -> tuple[list[dict], list[Failure]]:
    """The rows of all test clips in their order, each judged by one of the processes and none twice; and the
    clips that this process could not read.
    """
    accelerator, task = run.accelerator, run.task
    rows, failures = [], []
    model.eval()
    indices = range(accelerator.process_index, len(run.found.test), accelerator.num_processes)
    batches = evaluation_batches(run, indices)
    for batch in tqdm(batches, desc="judging", leave=False, disable=not accelerator.is_main_process):
        failures += batch["failures"]
        if len(batch["index"]):
            judged = task.judge(model, to_device(task.inputs(batch), accelerator.device), batch)
            rows += zip(batch["index"].tolist(), judged, strict=True)
    return [row for _, row in sorted(gather_object(rows), key=lambda pair: pair[0])], failures


def to_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def described(metrics: dict[str, float | int]) -> str:
    """The same for people."""
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in metrics.items()
    )


def write_results(
    path: Path, model: nn.Module, found: Found, *, task: str, protocol: str, judged: int, **told
) -> None:
    """What came out, and of what: everything that another result must share to be compared with it.

    Args:
        path: of the file.
        model: whose weights were judged, on the test clips of `found`.
        task, protocol, judged: of `JudgedTask`, and how many clips could be read.
        told: seed, checkpoint, metrics and the like.
    """
    expected = found.coverage.get("test", (0, len(found.test)))[1]
    content = dict(
        task=task,
        protocol=protocol,
        split=found.test_name,
        coverage=dict(judged=judged, expected=expected),
        weights_sha256=weights_hash(model),
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        torch=torch.__version__,
        **told,
    )
    write_json(path, content)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all weights."""
    described = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        described.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        described.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return described.hexdigest()
