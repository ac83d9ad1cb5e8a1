"""What a trained model says of videos: `python -m avfuse.predict RUN VIDEO...`."""

from .command import begin, read
from .options import PredictConfig

if __name__ == "__main__":
    begin("avfuse.predict", read(PredictConfig), "cli")

import csv
import json
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .data.clips import open_window, read_clip, window_starts
from .data.workers import share_cores
from .encoder import AVEncoder
from .files import aside, printable
from .progress import progress_bar
from .tasks.saved import load
from .tasks.scenes import draw_map
from .tasks.separate import write_wav
from .tasks.separator import Separator
from .training.pictures import draw_attention


def main(config: PredictConfig) -> int:
    """Returns how many videos could not be read.

    Raises:
        ValueError: a setting is wrong, or there is no model.
    """
    for folder in (config.out and config.out.parent, config.pictures):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)  # if that fails, then before the work
    if config.out is not None and config.out.suffix == ".parquet" and not find_spec("pyarrow"):
        raise ValueError("--out .parquet needs pyarrow: pip install pyarrow, or write .csv")
    share_cores(config.threads, workers=0)
    model = load(config.model)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model, answers, failed = model.to(device), [], 0
    encoder = getattr(model, "encoder", model)
    shown = len(config.videos) > 1 and not config.quiet
    stems = Counter(path.stem for path in config.videos)
    videos = progress_bar(config.videos, desc="predict", unit="video", shown=shown)
    for number, path in enumerate(videos, start=1):
        name = path.stem if stems[path.stem] == 1 else f"{number}-{path.stem}"
        try:
            where, missing = starts(path, encoder, config.every)
            for start in where:
                answer = dict(video=str(path), start=round(start, 3)) | model.predict(path, start=start)
                answer["missing"] = missing
                tqdm.write(describe(answer, config.top))
                if config.pictures is not None:
                    draw(answer, model, path, start, config.pictures / f"{name}-{start:g}s.png")
                answers.append(answer)
        except ValueError as error:
            failed += 1
            tqdm.write(f"error: {printable(error)}", file=sys.stderr)
    if config.out is not None and answers:
        write(config.out, answers)
    return failed


def cli(config: PredictConfig) -> int:
    """The work of a command line: what to exit with."""
    return min(main(config), 1)


def starts(path: Path, encoder: AVEncoder, every: float | None) -> tuple[list[float], str]:
    """Where the windows of a video begin, in seconds; and what it lacks, "pictures" or "sound", or ""."""
    with open_window(path, encoder.inputs, None) as (reader, middle):
        streams = reader.streams
        missing = "pictures" if not streams.video else "" if streams.audio else "sound"
        if every is None:
            return [middle], missing
        return window_starts(streams.seconds, encoder.inputs.audio_seconds, every), missing


def describe(answer: dict, top: int) -> str:
    """Lines for the screen."""
    lacks = f", without {answer['missing']}" if answer["missing"] else ""
    lines = [f"{printable(answer['video'])} at {answer['start']:g} s{lacks}"]
    for name, value in answer.items():
        if isinstance(value, dict):
            best = ", ".join(f"{printable(c)} {p:.3f}" for c, p in list(value.items())[:top])
            lines.append(f"  {'by ' + name:<9} {best}")
        elif isinstance(value, torch.Tensor):
            lines.append(f"  {name:<9} {tuple(value.shape)}, {value.min():.3f} to {value.max():.3f}")
    return "\n".join(lines)


def draw(answer: dict, model: nn.Module, path: Path, start: float, target: Path) -> None:
    encoder = getattr(model, "encoder", model)
    if isinstance(model, Separator):
        write_wav(target.with_suffix(".wav"), answer["sound"], answer["sample_rate"])
        return
    image, audio = read_clip(path, encoder.inputs, start=start)
    if "map" in answer:
        draw_map(image[0], answer["map"], encoder.inputs, target)
    elif encoder.shows_attention and image is not None and audio is not None:
        device = encoder.fusion_tokens.device
        draw_attention(encoder, dict(image=image.to(device), audio=audio.to(device)), target)


def rows(answers: list[dict]) -> Iterator[dict]:
    """Flat rows: of a classifier one for each class, else one for each window, numbers in columns."""
    for answer in answers:
        where, missing = {name: answer[name] for name in ("video", "start")}, {"missing": answer["missing"]}
        said = {name: value for name, value in answer.items() if name not in where | missing}
        if all(isinstance(value, dict) for value in said.values()):
            for by, classes in said.items():
                odds = ({"by": by, "class": c, "probability": p} for c, p in classes.items())
                yield from (where | row | missing for row in odds)
        else:
            columns = {}
            for name, value in said.items():
                flat = value.flatten().tolist() if isinstance(value, torch.Tensor) else value
                columns |= (
                    {f"{name}_{n}": x for n, x in enumerate(flat)} if isinstance(flat, list) else {name: flat}
                )
            yield where | columns | missing


def write(path: Path, answers: list[dict]) -> None:
    """All answers in one file, written whole or not at all."""
    with aside(path) as partial:
        if path.suffix == ".json":
            partial.write_text(json.dumps(answers, default=torch.Tensor.tolist, indent=1) + "\n")
            return
        table = list(rows(answers))
        names = list(dict.fromkeys(name for row in table for name in row))
        if path.suffix == ".csv":
            with open(partial, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, names)
                writer.writeheader()
                writer.writerows(table)
            return
        from pyarrow import Table, parquet

        parquet.write_table(Table.from_pylist(table), partial)
