"""What a trained model says of videos: `python -m avfuse.predict RUN VIDEO...`."""

from .command import begin, read
from .options import PredictConfig

if __name__ == "__main__":
    begin("avfuse.predict", read(PredictConfig), "cli")

import json
import sys
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from .data.clips import open_window, read_clip, window_starts
from .data.listing import SOUNDS, SUFFIXES
from .data.workers import share_cores
from .encoder import AVEncoder
from .files import aside, check_target, printable, write_table
from .progress import progress_bar
from .tasks.saved import load
from .tasks.scenes import draw_map
from .tasks.separate import write_wav
from .tasks.separator import Separator
from .training.features import numbered
from .training.pictures import draw_attention

WHERE, AFTER = ("video", "start"), ("missing", "file")  # columns before and after what the model says


def main(config: PredictConfig) -> int:
    """Returns how many videos could not be read.

    Raises:
        ValueError: a setting is wrong, or there is no model.
    """
    for option, target in ("--out", config.out), ("--pictures", config.pictures and config.pictures / "*"):
        if target is not None:
            check_target(option, target)
    if Path(config.model).suffix.lower() in SUFFIXES + SOUNDS:
        raise ValueError(f"RUN comes before VIDEO..., and {printable(config.model)} is called like a video")
    share_cores(config.threads, workers=0)
    model = load(config.model)
    is_table = config.out is not None and config.out.suffix != ".json"
    if is_table and isinstance(model, Separator) and config.pictures is None:
        raise ValueError(f"--out {config.out} names the files of sounds, which --pictures FOLDER writes")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model, answers, failed = model.to(device), [], 0
    encoder = getattr(model, "encoder", model)
    shown = len(config.videos) > 1 and not config.quiet
    stems = [path.stem for path in config.videos]
    is_numbered = len({*stems}) < len(stems)  # else two pictures might be called alike
    videos = progress_bar(config.videos, desc="predict", unit="video", shown=shown)
    for number, path in enumerate(videos, start=1):
        name = f"{number}-{path.stem}" if is_numbered else path.stem
        try:
            where, missing = starts(path, encoder, config.every)
            for start in where:
                answer = dict(video=str(path), start=round(start, 3)) | model.predict(path, start=start)
                answer["missing"] = missing
                tqdm.write(describe(answer, config.top))
                if config.pictures is not None:
                    target = config.pictures / f"{name}-{in_seconds(start)}s.png"
                    drawn = draw(answer, model, path, start, target)
                    answer["file"] = str(drawn or "")
                    tqdm.write(f"  {'file':<9} {printable(drawn or 'none: there is nothing to draw')}")
                if config.out is not None:
                    answers.append(answer)
        except (ValueError, OSError) as error:  # the latter of a picture that cannot be written
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
    lines = [f"{printable(answer['video'])} at {in_seconds(answer['start'])} s{lacks}"]
    for name, value in answer.items():
        if isinstance(value, dict):
            best = ", ".join(f"{printable(c)} {p:.3f}" for c, p in list(value.items())[:top])
            lines.append(f"  {'by ' + name:<9} {best}")
        elif isinstance(value, torch.Tensor):
            lines.append(f"  {name:<9} {tuple(value.shape)}, {value.min():.3f} to {value.max():.3f}")
        elif isinstance(value, float) and name not in WHERE:
            lines.append(f"  {name:<9} {value:.3f}")
    return "\n".join(lines)


def in_seconds(start: float) -> str:
    """To the millisecond, without zeros at the end."""
    return f"{start:.3f}".rstrip("0").rstrip(".")


def draw(answer: dict, model: nn.Module, path: Path, start: float, target: Path) -> Path | None:
    """The file that was written: what there was to draw, or the sound to hear."""
    encoder = getattr(model, "encoder", model)
    if isinstance(model, Separator):
        target = target.with_suffix(".wav")
        write_wav(target, answer["sound"], answer["sample_rate"])
        return target
    image, audio = read_clip(path, encoder.inputs, start=start)
    is_taught_by_both = getattr(model, "settings", {}).get("modalities", "both") == "both"
    if "map" in answer:
        draw_map(image[0], answer["map"], encoder.inputs, target)
    elif encoder.shows_attention and is_taught_by_both and image is not None and audio is not None:
        device = encoder.fusion_tokens.device
        draw_attention(encoder, dict(image=image.to(device), audio=audio.to(device)), target)
    else:
        return None
    return target


def rows(answers: list[dict]) -> Iterator[dict]:
    """Flat rows: of a classifier one for each class, else one for each window, numbers in columns."""
    for answer in answers:
        where, after = ({name: answer[name] for name in names if name in answer} for names in (WHERE, AFTER))
        said = {name: value for name, value in answer.items() if name not in where | after}
        if all(isinstance(value, dict) for value in said.values()):
            for by, classes in said.items():
                odds = ({"by": by, "class": c, "probability": p} for c, p in classes.items())
                yield from (where | row | after for row in odds)
        else:
            columns = (columns_of(name, value) for name, value in said.items())
            yield where | dict(chain.from_iterable(c.items() for c in columns)) | after


def columns_of(name: str, value: torch.Tensor | int) -> dict:
    """For a table: of a map its highest place, of a sound its highest level, of other values all numbers."""
    if name == "map":
        axes = ("frame", "y", "x")[-value.ndim :]
        place = dict(zip(axes, torch.unravel_index(value.argmax(), value.shape), strict=True))
        return {"map_peak": value.max().item()} | {f"map_{axis}": n.item() for axis, n in place.items()}
    if name == "sound":
        return {"sound_peak": value.abs().max().item()}
    return numbered(name, value) if isinstance(value, torch.Tensor) else {name: value}


def write(path: Path, answers: list[dict]) -> None:
    """All answers in one file, written whole or not at all."""
    if path.suffix != ".json":
        write_table(path, rows(answers))
        return
    with aside(path) as partial, open(partial, "w") as file:  # a line for each: all at once are large
        file.write("[\n")
        for answer in answers:
            end = "\n" if answer is answers[-1] else ",\n"
            file.write(json.dumps(answer, default=torch.Tensor.tolist) + end)
        file.write("]\n")
