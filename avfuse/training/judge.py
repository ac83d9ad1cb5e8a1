"""One frame for judging, of pretraining and of every task: each test clip judged once, and the results."""

import datetime
import hashlib
import os
from collections.abc import Hashable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from tqdm import tqdm

from ..data.clips import Clip, Failure
from ..data.find import Found
from ..files import printable, write_json
from ..progress import progress_bar
from .conditions import CONDITIONS, BesideOthers, condition_table, derangement, has_sound
from .loop import evaluation_batches
from .report import write_report
from .settings import FRESH
from .task import Run, Task

AVERAGED = 0.2  # share of the first weights in an average from which on it is said
DRAWN = 6  # test clips of which there are pictures


class JudgedTask(Task):
    """A task whose model is judged on every test clip, each by one of the processes.

    A subclass gives `name`, `protocol` (the definition of its metrics by name), what `Task` demands besides
    `measure`, and `judge`, `summarize` and `tables`; and `draw`, if there is something to see. The rest suits
    a downstream task, with a model around the encoder that its settings name.
    """

    protocol: str
    recipe = ("checkpoint", "epochs", "batch_size", "base_lr", "weight_decay", "precision", "seed")
    has_unused_parameters = True  # such as the last audio block where only image tokens are read
    conditions: tuple[str, ...] = ()  # of conditions.py, under which the trained model is judged again
    headline: tuple[str, ...] = ()  # metrics that tell what became of it

    def judge(self, model: nn.Module, inputs: dict[str, Tensor], batch: dict) -> list[dict]:
        """One row of numbers and small arrays for each clip of a batch, whatever else is in the batch.

        Args:
            model: in eval mode, without gradients.
            inputs: what `inputs` returns, on the device.
            batch: as read, on the CPU.
        """
        raise NotImplementedError

    def judge_again(self, model: nn.Module, inputs: dict[str, Tensor], batch: dict) -> list[dict]:
        """The same where a condition has changed the inputs: what the headline is made from is enough."""
        return self.judge(model, inputs, batch)

    def kind(self, clip: Clip) -> Hashable:
        """What a clip sounds like; `other_sound` is that of a clip of another kind, where there is one. By
        default the labels of a clip, or the clip itself if it has none. Of tuples of classes, one in common
        makes two clips alike.
        """
        return frozenset(clip.labels.items()) or clip.path

    def summarize(self, rows: list[dict]) -> dict:
        """The metrics by name, from the rows of all test clips in their order."""
        raise NotImplementedError

    def count(self, rows: list[dict], metrics: dict) -> int:
        """Of how many of the rows the metrics are."""
        return len(rows)

    def draw(self, folder: Path, model: nn.Module, inputs: dict[str, Tensor], batch: dict, step: int) -> None:
        """Pictures of the first test clips, as folder/KIND-{step:06d}.png."""

    def tables(self, metrics: dict) -> list[list[tuple]]:
        """The metrics for people, beside what they compare with: tables of rows, of which the first names the
        columns.
        """
        raise NotImplementedError

    def doubt(self, metrics: dict) -> str:
        """In what the trained model is no better than one that has learned nothing; "" if it is."""
        return ""

    def advice(self, metrics: dict) -> str:
        """What may help a trained model that is in doubt."""
        return "more clips, more --epochs or another --base-lr may help"

    def numbers(self, metrics: dict) -> dict[str, float | int]:
        """The metrics for trackers and model cards, which take numbers by name."""
        return {name: value for name, value in metrics.items() if value is not None}

    def record(self, judged: int, metrics: dict) -> dict:
        """What a row of metrics.jsonl tells of them."""
        return dict(judged=judged, metrics=metrics)

    def save(self, folder: Path, model: nn.Module) -> None:
        """Leaves the trained model in a run folder."""
        model.save_pretrained(folder / "model")

    # --- how it is carried out ---

    def measure(self, run, model, step, when):
        judged, failures = judge_all(run, model)
        changed = {}
        if when == "after" and judged and self.conditions:
            changed, more = judge_conditions(run, model, judged)
            failures += more
        if run.accelerator.is_main_process:
            self.conclude(run, model, step, when, [row for row, _ in judged.values()], changed)
        return failures

    def conclude(
        self,
        run: Run,
        model: nn.Module,
        step: int,
        when: str,
        rows: list[dict],
        changed: dict[str, list[dict]] | None = None,
    ) -> None:
        """Prints, records and draws what came out, of the clips as they are and under the conditions that
        `changed` what the model was given; and at the end saves the model.
        """
        folder, clips, judged = run.config.run, run.found.test_name, len(rows)
        if rows:
            metrics, told = self.summarize(rows), {}
            judged = self.count(rows, metrics)
            tables = self.tables(metrics)
            if changed:
                told = dict(conditions=self.tested(changed))
                tables = [*tables, condition_table(metrics | dict(judged=judged), told["conditions"])]
            trained = f"{when} training, " if step or when == "before" else ""  # retrieval trains nothing
            tqdm.write(f"{trained}{judged} {printable(clips)}:")
            for table in tables:
                tqdm.write(aligned(table) + "\n")
            run.metrics.write(step=step, when=when, clips=clips, **self.record(judged, metrics), **told)
            run.accelerator.log(self.numbers(metrics), step=step)
            model.facts = self.facts(step, judged, metrics, tables)
        else:
            tqdm.write(f"{when} training: none of the {printable(clips)} to measure on could be read")
        if when == "after":
            self.save(folder, model)
            if rows:
                write_json(folder / "results.json", self.results(model, step, judged, metrics) | told)
                self.warn(metrics, step, run.config.ema)
        try:
            self.show(run, model, step, rows)
            write_report(folder)
        except OSError as error:  # a full disk: no picture is worth a run
            tqdm.write(printable(f"pictures could not be drawn: {error}"))

    def warn(self, metrics: dict, step: int, ema: float) -> None:
        """Says in what the trained model is in doubt, and what may help."""
        if not (doubt := self.doubt(metrics)):
            return
        first = ema**step  # share of the first weights in the average; 0 without one
        advice = f": {self.advice(metrics)}"
        if first > AVERAGED:
            advice = f": {first:.0%} of the average (--ema) are still what training began with"
        tqdm.write(printable(f"WARNING: {doubt}{advice if step else ''}"))

    @torch.no_grad()
    def show(self, run: Run, model: nn.Module, step: int, rows: list[dict]) -> None:
        """Has pictures drawn of the first test clips."""
        indices = range(min(DRAWN, len(run.found.test)))
        for batch in [batch for batch in evaluation_batches(run, indices) if len(batch["index"])][:1]:
            inputs = to_device(self.inputs(batch), run.accelerator.device)
            self.draw(run.config.run / "pictures", model, inputs, batch, step)

    def tested(self, changed: dict[str, list[dict]]) -> dict[str, dict]:
        """The headline under each condition, and of how many clips."""
        found = {name: (rows, self.summarize(rows)) for name, rows in changed.items()}
        return {
            name: {metric: metrics[metric] for metric in self.headline if metric in metrics}
            | dict(judged=self.count(rows, metrics))
            for name, (rows, metrics) in found.items()
        }

    def facts(self, step: int, judged: int, metrics: dict, tables: Sequence[list[tuple]]) -> dict:
        """What the model card tells of the run."""
        config, found = self.config, self.found
        coverage = {side: f"{there} of {expected}" for side, (there, expected) in found.coverage.items()}
        if "test" in found.coverage:  # of which some could not be read
            coverage["test"] = f"{judged} of {found.coverage['test'][1]}"
        headline = {name: metrics[name] for name in self.headline if metrics.get(name) is not None}
        recipe = {name: getattr(config, name) for name in self.recipe} | dict(steps=step)
        if "batch_size" in recipe:  # which a small data set makes smaller
            recipe["batch_size"] = min(recipe["batch_size"], len(found.train))
        if os.path.exists(recipe.get("checkpoint", "")):  # the path says nothing to others
            source = Path(recipe["checkpoint"]).resolve()
            recipe["checkpoint"] = source.parent.name if source.name == "model" else source.name
        return dict(
            recipe=recipe,
            data=dict(
                name=config.data.resolve().name if config.data else "Sounding Shapes",
                clips=len(found.train),
                measured_on=f"{judged} {found.test_name}",
                measured_by=self.protocol,
                coverage=coverage,
            ),
            metrics=headline or self.numbers(metrics),
            tables=[[list(row) for row in table] for table in tables],
        )

    def results(self, model: nn.Module, step: int, judged: int, metrics: dict) -> dict:
        """What came out, and of what: everything that another result must share to be compared with it."""
        expected = self.found.coverage.get("test", (0, len(self.found.test)))[1]
        return dict(
            task=self.name,
            protocol=self.protocol,
            split=self.found.test_name,
            coverage=dict(judged=judged, expected=expected),
            weights_sha256=weights_hash(model),
            date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            torch=torch.__version__,
            seed=self.config.seed,
            step=step,
            checkpoint=getattr(self.config, "checkpoint", FRESH),
            metrics=metrics,
        )


@torch.no_grad()
def judge_all(run: Run, model: nn.Module) -> tuple[dict[int, tuple[dict, bool]], list[Failure]]:
    """All test clips that can be read, by number and in order, each judged by one of the processes and none
    twice, as its row and whether it has sound; and the clips that this process could not read.
    """
    accelerator, task = run.accelerator, run.task
    judged, failures = [], []
    model.eval()
    indices = range(accelerator.process_index, len(run.found.test), accelerator.num_processes)
    batches = evaluation_batches(run, indices)
    shown = accelerator.is_main_process and not run.config.quiet
    for batch in progress_bar(batches, desc="judging", leave=False, shown=shown):
        failures += batch["failures"]
        if len(batch["index"]):
            rows = task.judge(model, to_device(task.inputs(batch), accelerator.device), batch)
            clips = zip(rows, has_sound(batch).tolist(), strict=True)
            judged += zip(batch["index"].tolist(), clips, strict=True)
    return dict(sorted(gather_object(judged))), failures


@torch.no_grad()
def judge_conditions(
    run: Run, model: nn.Module, judged: dict[int, tuple[dict, bool]]
) -> tuple[dict[str, list[dict]], list[Failure]]:
    """The rows of the same clips, in the same order, under each of the task's conditions that changes what
    the model is given; and the clips that this process could not read again.
    """
    accelerator, task, clips = run.accelerator, run.task, run.found.test
    given = getattr(run.config, "modalities", "both")
    names = [name for name in task.conditions if given in ("both", CONDITIONS[name].modality)]
    kinds = {n: task.kind(clips[n]) for n, (_, is_heard) in judged.items() if is_heard}
    others = derangement(kinds) if "other_sound" in names else {}
    names = [name for name in names if name != "other_sound" or others]
    indices = [n for n in judged if n % accelerator.num_processes == accelerator.process_index]
    shown = accelerator.is_main_process and not run.config.quiet
    rows, failures = [], []
    with progress_bar(total=len(indices), desc="judging", unit="clip", leave=False, shown=shown) as progress:
        for batch in evaluation_batches(run, indices, partial(BesideOthers, others=others)):
            failures += batch["failures"]
            numbers = batch["index"].tolist()
            inputs = to_device(task.inputs(batch), accelerator.device)
            for name in names if numbers else ():
                progress.set_postfix_str(f"heard and seen: {CONDITIONS[name].title}")
                changed = CONDITIONS[name].change(inputs, batch, model.encoder.inputs)
                again = task.judge_again(model, changed, batch)
                rows += zip([name] * len(numbers), numbers, again, strict=True)
            progress.update(len(numbers))
    rows = sorted(gather_object(rows), key=lambda row: row[:2])
    by_name = {name: [row for of, _, row in rows if of == name] for name in names}
    return {name: of for name, of in by_name.items() if of}, failures


def to_device(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in inputs.items()}


def to_rows(columns: dict[str, Tensor]) -> list[dict]:
    """Columns (B, ...) by name -> one row for each clip, of arrays, which go to another process by value.

    Rows are copies. Views would keep the columns, which lie between the large tensors of a batch: malloc
    could not use the place of these again, and each batch took as much memory anew.
    """
    arrays = [column.detach().cpu().numpy() for column in columns.values()]
    rows = ([value.copy() for value in row] for row in zip(*arrays, strict=True))
    return [dict(zip(columns, row, strict=True)) for row in rows]


def to_columns(rows: list[dict]) -> dict[str, Tensor]:
    """The same back, of all rows."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def first_clips(found: Found, count: int) -> Found:
    """The same data, of whose test clips only the first are judged, in the order of a list; those of a plain
    folder come class by class, so that each n-th is taken.
    """
    expected = min(count, found.coverage.get("test", (0, count))[1])
    test = found.test[:count]
    if not found.classes and count < len(found.test):
        test = [found.test[n * len(found.test) // count] for n in range(count)]
    return found._replace(test=test, coverage=found.coverage | dict(test=(len(test), expected)))


def aligned(rows: list[tuple]) -> str:
    """Rows of texts, numbers and None as columns, the first to the left and the others to the right."""
    cells = [
        [f"{c:.3f}" if isinstance(c, float) else printable("" if c is None else c) for c in row]
        for row in rows
    ]
    first, *others = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = (
        "  ".join([name.ljust(first), *(c.rjust(w) for c, w in zip(row, others, strict=True))])
        for name, *row in cells
    )
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 over names, shapes and bytes of all weights."""
    content = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return content.hexdigest()
