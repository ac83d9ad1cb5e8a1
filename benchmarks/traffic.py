"""What the rows of throughput.py ask of a GPU, counted without one: bytes, launches, FLOPs, predicted time.

An operator takes max(bytes / bandwidth, FLOPs / FLOP/s) + launch, attention at half of the FLOP/s. Nothing is
timed, so the numbers are the same on every machine.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import measure
import torch
from counting import Operator, backward, imagined_gpu, operators_of
from tables import terminal, times
from throughput import (
    MODES,
    PRESETS,
    ROWS,
    Mode,
    RowName,
    encoder_of,
    make_base,
    make_inputs,
    make_model,
    of_mode,
    rows_by,
)
from tqdm import tqdm

TOKENS = "none-tokens"  # the second baseline of training
BATCH = 64  # of the budgets
SHOWN = 30  # operators in `--by operator`


@dataclass(frozen=True)
class Options(measure.FileOptions):
    """Bytes, launches, GFLOP and predicted time of the ways to fuse, counted without a GPU.

    Inference is the encoder on whole clips. A training step is the masked autoencoder's forward and backward,
    without the optimizer.
    """

    preset: Literal["tiny", "small", "base", "large"] = "base"
    """Size of both transformers."""
    modes: tuple[Mode, ...] = ("inference", "training")
    """What to count."""
    rows: tuple[RowName, ...] = ()
    """Which rows. Default: all; of video, those that say most there."""
    frames: int = 1
    """Of a clip. Several: 10 s of sound instead of 3, so 196 tokens a frame and 400 of sound."""
    batch: tuple[int, ...] = ()
    """Clips in a batch. Default: 1, 16, 64, 128 and 256; of several frames 1, 4 and 16."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Of the weights in inference, of autocast in training."""
    by: Literal["row", "operator"] = "row"
    """With "operator", nothing is written: the operators of one row are shown, those that take longest first;
    of two rows (--rows none dense), what the second takes more than the first. At the first batch size."""
    bandwidth: float = 3.9e12
    """Bytes per second of the GPU's memory."""
    flops: float = 620e12
    """FLOP per second of products of 16-bit numbers."""
    flops_float32: float = 42e12
    """And of float32. Default: the same share of what the datasheet of an H100 says (67 of 989 TFLOP/s)."""
    launch: float = 2.2e-6
    """Seconds that an operator takes however small it is."""


def main(options: Options) -> dict:
    several = options.frames > 1
    options = replace(
        options,
        rows=options.rows or rows_by(options.frames),
        batch=options.batch or ((1, 4, 16) if several else (1, 16, 64, 128, 256)),
        out=options.out or measure.RESULTS / f"traffic-meta{f'-video{options.frames}' * several}.json",
    )
    if min(options.batch) < 1:
        raise ValueError(f"--batch must be positive, got {options.batch}")
    if options.by == "operator":
        if len(options.rows) > 2:
            raise ValueError(f"--by operator shows one row or the difference of two, got {options.rows}")
        for mode in options.modes:
            if of_mode(options.rows, mode) == options.rows:
                print("\n" + terminal([f"{mode}, batch {options.batch[0]}:", by_operator(options, mode)]))
        return {}
    versions = {name: version for name, version in measure.versions().items() if name in ("torch", "timm")}
    settings = {name: value for name, value in asdict(options).items() if name not in ("note", "out", "by")}
    record = dict(benchmark="traffic", command=measure.command(), versions=versions, note=options.note)
    record["settings"] = settings | dict(device="meta")
    for mode in options.modes:
        progress = tqdm(of_mode(options.rows, mode), desc=mode, leave=False, disable=None)
        record[mode] = {name: count_row(options, name, mode) for name in progress}
    record = measure.write_json(options.out, record)
    print("\n" + terminal(tables(record)))
    return record


# --- counting -----------------------------------------------------------------------------------------------


def operators(options: Options, name: str, mode: Mode) -> Iterator[list[Operator]]:
    """Those of a row, at each batch size."""
    dtype = measure.DTYPES[options.dtype]
    with torch.device("meta"):
        model = make_model(ROWS[name], make_base(options.preset, options.frames), mode)
        model.to(dtype if mode == "inference" else None)
    encoder = encoder_of(model)

    def infer(image, audio):
        with torch.inference_mode():
            model(image.to(dtype), audio.to(dtype))

    def train(image, audio):
        with torch.autocast("cuda", dtype, enabled=dtype.itemsize == 2):
            loss = model(image, audio).loss
        backward(loss)

    with imagined_gpu():
        model.to_empty(device="cuda")
        if mode == "inference":
            operators_of(partial(infer, *make_inputs(encoder, 1, "cuda")))  # may prepare what later calls use
        for batch in options.batch:
            clips = make_inputs(encoder, batch, "cuda")
            yield operators_of(partial(infer if mode == "inference" else train, *clips))


def seconds_of(options: Options, operator: Operator) -> float:
    rate = options.flops if operator.half else options.flops_float32
    rate = rate / 2 if operator.is_attention else rate
    return max(operator.bytes / options.bandwidth, operator.flop / rate) + options.launch


def count_row(options: Options, name: str, mode: Mode) -> dict:
    """What a row takes at each batch size; of inference also `aside_ms`, with the launches of the fusion
    branch hidden behind the work of the others.
    """
    batches = {}
    for batch, ran in zip(options.batch, operators(options, name, mode), strict=True):
        seconds = sum(seconds_of(options, operator) for operator in ran)
        batches[batch] = dict(
            bytes=sum(operator.bytes for operator in ran),
            launches=len(ran),
            flop=sum(operator.flop for operator in ran),
            ms=round(1e3 * seconds, 4),
        )
        if mode == "inference":
            hidden = options.launch * sum(operator.aside for operator in ran)
            batches[batch]["aside_ms"] = round(1e3 * (seconds - hidden), 4)
    return dict(label=ROWS[name].label, batches=batches)


def by_operator(options: Options, mode: Mode) -> list[tuple]:
    """What the operators of a row take at the first batch size; or of the second row, less the first's."""
    totals = defaultdict(lambda: [0, 0, 0, 0.0])
    for sign, name in zip((-1, 1)[-len(options.rows) :], options.rows, strict=True):
        for operator in next(operators(options, name, mode)):
            amounts = 1, operator.bytes, operator.flop, seconds_of(options, operator)
            for key in "all", f"{operator.name} {operator.shapes}":
                totals[key] = [old + sign * new for old, new in zip(totals[key], amounts, strict=True)]
    rows = [(" less ".join(reversed(options.rows)), "launches", "MB", "GFLOP", "us")]
    for key, (launches, size, flop, seconds) in sorted(totals.items(), key=lambda item: -item[1][3]):
        if launches or size or flop:
            amounts = (size / 1e6, flop / 1e9, seconds * 1e6)
            rows.append((key, launches, *(f"{amount:,.1f}" for amount in amounts)))
    return rows[: 1 + SHOWN]


# --- tables -------------------------------------------------------------------------------------------------


def tables(record: dict, measured: dict | None = None) -> list:
    """What was counted, beside what throughput.py measured at the same batch size, if it did."""
    settings = record["settings"]
    gpu = f"{settings['bandwidth'] / 1e12:g} TB/s, {settings['flops'] / 1e12:g} TFLOP/s"
    gpu += f" (float32: {settings['flops_float32'] / 1e12:g}), {settings['launch'] * 1e6:g} us a launch"
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    counted = f"`{record['command']}`: {PRESETS[settings['preset']]}, {settings['dtype']}; {gpu}; {versions}."
    parts = [counted + (f" Measured on {measured['machine'].get('gpu')}." if measured else "")]
    return parts + [mode_table(record, mode, measured) for mode in MODES if mode in record]


def mode_table(record: dict, mode: Mode, measured: dict | None) -> list[tuple]:
    """A line for each row and batch size; ratios are to no fusion at the same one."""
    rows, known = record[mode], measured_rows(record, mode, measured)
    extra = "side stream" if mode == "inference" else f"over {TOKENS}"
    header = "batch", "GB", "launches", "GFLOP/clip", "predicted ms", "over none", extra
    lines = [(mode, *header, "measured ms", "measured over none")]
    for name, row in rows.items():
        for batch, counted in row["batches"].items():
            ratios, ms, over = against(rows, name, batch), "-", "-"
            speeds = [ratios.get("speed"), ratios.get("side stream")]
            if mode == "training":
                speeds[1] = against(rows, name, batch, TOKENS).get("speed")
            result = known.get(name, {}).get("batches", {}).get(batch, {})
            if "clips_per_second" in result:
                ms = f"{1e3 * int(batch) / result['clips_per_second']['median']:,.2f}"
            if "speed_over_none" in result:
                over = times(result["speed_over_none"]["median"])
            cells = f"{counted['bytes'] / 1e9:,.1f}", f"{counted['launches']:,}"
            cells += f"{counted['flop'] / 1e9 / int(batch):,.1f}", f"{counted['ms']:,.2f}"
            speeds = ("-" if speed is None else times(speed) for speed in speeds)
            lines.append((row["label"], batch, *cells, *speeds, ms, over))
    return lines


def measured_rows(record: dict, mode: Mode, measured: dict | None) -> dict:
    """Those of throughput.py, where it ran the same models in the same dtype."""
    same = measured and mode in measured and measured["settings"]["dtype"] == record["settings"]["dtype"]
    same = same and measured[mode]["preset"] == record["settings"]["preset"]
    same = same and measured["settings"].get("frames", 1) == record["settings"].get("frames", 1)
    return measured[mode]["rows"] if same else {}


def against(rows: dict, name: str, batch: str, baseline: str = "none") -> dict[str, float]:
    """Bytes, launches and predicted speed over those of a baseline; empty where that was not counted."""
    ours, theirs = (rows.get(row, {}).get("batches", {}).get(batch) for row in (name, baseline))
    if ours is None or theirs is None:
        return {}
    ratios = {what: ours[what] / theirs[what] for what in ("bytes", "launches")}
    ratios["speed"] = theirs["ms"] / ours["ms"]
    if "aside_ms" in ours:
        ratios["side stream"] = theirs["ms"] / ours["aside_ms"]
    return ratios


def numbers(record: dict) -> dict[str, float]:
    """What budgets are about: ratios at one batch size."""
    return {
        f"{mode} {name} {what} over {baseline}": value
        for mode in MODES
        for name in record.get(mode, ())
        for baseline in ("none", TOKENS)
        for what, value in against(record[mode], name, str(BATCH), baseline).items()
    }


if __name__ == "__main__":
    measure.run(main, Options)
