"""How time and memory of a dense fusion block grow with the tokens: exact, and with pairs stored."""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Literal

import measure
import torch
from materialized import PairKeyFusion, PairTokenFusion, folded
from tables import MISSING, spread, terminal
from tqdm import tqdm

from avfuse import DenseFusion
from avfuse.inputs import middles

ROWS = {
    "dense": DenseFusion,
    "dense-time": DenseFusion,
    "pair-keys": PairKeyFusion,
    "materialized": PairTokenFusion,
}
QUERIES = 4  # whose outputs are compared
LABELS = {
    "dense": "dense, exact (avfuse)",
    "dense-time": "with a bias of time (avfuse)",
    "pair-keys": "pair keys stored",
    "materialized": "pair tokens stored (Eq. 4-7)",
}
FIT_FROM = dict(tokens=512, frames=4)  # below, what does not grow weighs too much
FRAME, SOUND, SECONDS = 196, 400, 10.0  # tokens of a frame and of the sound, which lasts so long
KNOTS = 101  # of the bias of time: one for each step of the audio tokens, in either direction
FEW_PAIRS = 100_000  # that float64 can store
MODES = ("forward", "training")
RowName = Literal[*ROWS]
Mode = Literal[*MODES]


@dataclass(frozen=True)
class Options(measure.Options):
    """Time and peak memory of one dense fusion block on N image and N audio tokens, as N grows.

    Exact dense interactions against the same with every pair in memory, as pair tokens (the paper's Eq. 4-7)
    or as pair keys and values, until these do not fit. Memory is what a call needs over what was there before
    (weights, inputs), each in a fresh process. Slopes of log time and log memory over log N are fitted from
    512 up: 1 is linear in the tokens, 2 linear in the pairs.

    With --by frames, N frames of 196 image tokens and 10 s of sound, 400 tokens: there is also a row with
    a bias of time, which the rows that store pairs have, too.
    """

    by: Literal["tokens", "frames"] = "tokens"
    """What grows."""
    rows: tuple[RowName, ...] = ()
    """Default: all; the bias of time only by frames."""
    tokens: tuple[int, ...] = ()
    """N: image tokens, and as many audio tokens; or frames. Default: 64 to 4096 tokens, 1 to 64 frames."""
    modes: tuple[Mode, ...] = MODES
    """Training is forward and backward."""
    batch: int | None = None
    """Clips. Default: 1 on a CPU, 8 on a GPU."""
    dim: int = 768
    heads: int = 12
    fusion_tokens: int = 16
    memory_limit: float | None = None
    """GiB that a row may allocate; where it needs more, it stops. Default: 4 on a CPU, 64 on a GPU."""


def main(options: Options) -> dict:
    options = options.on_device()
    device = options.device
    by_frames = options.by == "frames"
    usual = (1, 2, 4, 8, 16, 32, 64) if by_frames else (64, 128, 256, 512, 1024, 2048, 4096)
    if "dense-time" in options.rows and not by_frames:
        raise ValueError("--rows dense-time needs --by frames")
    options = replace(
        options,
        rows=options.rows or tuple(row for row in ROWS if by_frames or row != "dense-time"),
        tokens=tuple(sorted(options.tokens or usual)),
        batch=options.batch or (8 if device == "cuda" else 1),
        memory_limit=options.memory_limit or (64.0 if device == "cuda" else 4.0),
        out=options.out or measure.RESULTS / f"scaling-{device}{'-frames' * by_frames}.json",
    )
    record = measure.begin_record("scaling", asdict(options), options.note)
    for mode in options.modes:
        record[mode] = measure_mode(options, mode)
        written = measure.write_record(options.out, record)
        print(
            f"\n{mode}: one block, width {options.dim}, batch {options.batch}, {options.dtype}, {device}; "
            f"at most {options.memory_limit:g} GiB\n\n{terminal(mode_parts(written, mode))}"
        )
    return record


# --- blocks -------------------------------------------------------------------------------------------------


def make_blocks(options: Options) -> dict[str, DenseFusion]:
    """One block of each kind, in float32 on the CPU, that compute the same, but for the bias of time."""
    torch.manual_seed(0)
    with_bias = dict(time_bias=(SECONDS, KNOTS)) if options.by == "frames" else {}
    blocks = {
        name: kind(options.dim, options.heads, **{} if name == "dense" else with_bias)
        for name, kind in ROWS.items()
    }
    with torch.no_grad():
        # Else all pairs weigh nearly the same, and mistakes do not show.
        blocks["materialized"].query.weight *= 4
        if with_bias:
            blocks["materialized"].time_bias.table.normal_()
    weights = folded(blocks["materialized"].state_dict())
    for name in ("dense-time", "pair-keys"):
        blocks[name].load_state_dict(weights)
    blocks["dense"].load_state_dict({name: weights[name] for name in blocks["dense"].state_dict()})
    return blocks


def counts(options: Options, n: int) -> tuple[int, int]:
    """Image and audio tokens."""
    return (n * FRAME, SOUND) if options.by == "frames" else (n, n)


def make_inputs(options: Options, n: int) -> list[torch.Tensor]:
    """Fusion, image and audio tokens in float32 on the CPU."""
    rng = torch.Generator().manual_seed(n)
    sizes = (options.fusion_tokens, *counts(options, n))
    return [torch.randn(options.batch, count, options.dim, generator=rng) for count in sizes]


def times(options: Options, row: RowName, n: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
    """When frames and audio tokens are seen and heard, which a bias of time asks."""
    if options.by == "tokens" or row == "dense":
        return {}
    options = dict(device=like.device, dtype=torch.promote_types(like.dtype, torch.float32))
    return dict(image_times=middles(n, SECONDS, **options), audio_times=middles(SOUND, SECONDS, **options))


def call_of(options: Options, mode: Mode, block: DenseFusion, row: RowName, n: int) -> Callable:
    """One call on the device. Gradients add up in place, so that they take memory only once."""
    dtype = measure.DTYPES[options.dtype]
    inputs = [tensor.to(options.device, dtype) for tensor in make_inputs(options, n)]
    block, when = block.to(options.device, dtype), times(options, row, n, inputs[0])
    if mode == "forward":
        return torch.inference_mode()(lambda: block(*inputs, **when))
    inputs = [tensor.requires_grad_() for tensor in inputs]
    return lambda: block(*inputs, **when).float().square().mean().backward()


@torch.inference_mode()
def disagreement(options: Options, blocks: dict, row: RowName, tokens: int) -> str | None:
    """What is wrong with a row's output; None if nothing is. The truth is exact dense fusion in float64,
    which is itself compared with the stored pair tokens in float64 where these are few. A few queries of one
    clip are compared.
    """
    dtype, inputs = measure.DTYPES[options.dtype], make_inputs(options, tokens)
    few = [inputs[0][:1, :QUERIES], *(tensor[:1] for tensor in inputs[1:])]
    on_device = dict(device=options.device, dtype=torch.float64)
    double, pairs = [tensor.to(**on_device) for tensor in few], math.prod(counts(options, tokens))
    stored = blocks["materialized"].to(**on_device)
    exact = blocks["dense" if row == "dense" or options.by == "tokens" else "dense-time"].to(**on_device)
    weights = folded(stored.state_dict())
    exact.load_state_dict({name: weights[name] for name in exact.state_dict()})
    when = times(options, row, tokens, double[0])
    truth = exact(*double, **when)
    if pairs <= FEW_PAIRS and (row != "dense" or options.by == "tokens"):
        error = measure.relative_error(stored(*double, **when), truth)
        if error > 1e-10:
            return f"exact dense fusion is off by {error} from stored pairs"
    terms = pairs if row in ("pair-keys", "materialized") else max(counts(options, tokens))
    rounded = with_rounded_sums(exact, *double, when, terms=terms)
    block = blocks[row].to(options.device, dtype)
    inputs = [tensor.to(options.device, dtype) for tensor in inputs]
    ours = block(*inputs, **times(options, row, tokens, inputs[0]))[:1, :QUERIES].double()
    error = measure.relative_error(ours, truth)
    allowed = 16 * torch.finfo(dtype).eps + measure.relative_error(rounded, truth)
    return None if error < allowed else f"disagrees by {error:.1e}, allowed {allowed:.1e}"


def with_rounded_sums(block: DenseFusion, fusion, image, audio, when: dict, terms: int) -> torch.Tensor:
    """The output of a block whose attention adds up so many weighted values in float32, one after the other:
    half an epsilon of the sum of their magnitudes at each step, whose signs are random.
    """
    tokens = (
        (block.norm_image(image), block.image_key_value),
        (block.norm_audio(audio), block.audio_key_value),
    )
    values = [block.keys_and_values(key_value(normed))[1] for normed, key_value in tokens]
    weights = block.attention_weights(fusion, image, audio, **when)
    attended, size = (
        block.merge_heads(sum(w @ v for w, v in zip(weights, of_values, strict=True)))
        for of_values in (values, [value.abs() for value in values])
    )
    signs = torch.randn(size.shape, generator=torch.Generator().manual_seed(0)).sign().to(size)
    rounding = math.sqrt(terms) * torch.finfo(torch.float32).eps / 2 * size * signs
    return block.update(fusion, attended + block.value_bias + rounding)


# --- measuring ----------------------------------------------------------------------------------------------


def measure_mode(options: Options, mode: Mode) -> dict:
    rows, blocks = {name: dict(points={}) for name in options.rows}, make_blocks(options)
    for row in (bar := tqdm(options.rows, desc=f"{mode}: memory", leave=False, disable=None)):
        for tokens in options.tokens:
            bar.set_postfix_str(f"{row} {tokens} + {tokens}")
            try:
                used, wrong = measure.in_fresh_process(peak_memory, options, mode, row, tokens)
            except MemoryError as error:
                rows[row]["stopped"] = f"{place(options.by, tokens)}: {error}"
                break
            rows[row]["points"][tokens] = dict(memory_bytes=used) | ({"failed": wrong} if wrong else {})
    calls = {
        (row, tokens): call_of(options, mode, blocks[row], row, tokens)
        for row, result in rows.items()
        for tokens, point in result["points"].items()
        if "failed" not in point
    }
    clocks = {key: measure.WallClock(call, options.device, turn=0.02) for key, call in calls.items()}
    timed = measure.time_rounds(clocks, seconds=options.seconds, title=f"{mode}: time")
    for (row, tokens), seconds in timed.items():
        rows[row]["points"][tokens]["seconds"] = measure.quantiles(seconds)
    for row, result in rows.items():
        fitted = [
            tokens for tokens in result["points"] if tokens >= FIT_FROM[options.by] and (row, tokens) in timed
        ]
        if len(fitted) > 1:
            of_rounds = zip(*(timed[row, tokens] for tokens in fitted), strict=True)
            result["time_slope"] = measure.quantiles([slope(fitted, seconds) for seconds in of_rounds])
            used = [result["points"][tokens]["memory_bytes"] for tokens in fitted]
            result["memory_slope"] = round(slope(fitted, used), 3)
    return rows


def peak_memory(options: Options, mode: Mode, row: RowName, tokens: int) -> tuple[int, str | None]:
    """Bytes that a call needs over what was there before, and what is wrong with the output; run in a fresh
    process.
    """
    measure.limit_memory(options.device, options.memory_limit)
    blocks = make_blocks(options)
    first = min(options.tokens[0], 64)
    call_of(options, mode, blocks[row], row, first)()  # libraries take their memory, gradients are allocated
    call = call_of(options, mode, blocks[row], row, tokens)
    used = measure.peak_memory(call, options.device)
    del call
    return used, disagreement(options, blocks, row, tokens)


def slope(tokens: list[int], values: list[float]) -> float:
    """Of the logarithms, by least squares."""
    return statistics.linear_regression([math.log(x) for x in tokens], [math.log(y) for y in values]).slope


# --- tables -------------------------------------------------------------------------------------------------


def tables(record: dict) -> list:
    return [part for mode in MODES for part in mode_parts(record, mode)]


def mode_parts(record: dict, mode: Mode) -> list:
    """A row for each number of tokens: milliseconds and MiB of each block; and which block stopped where."""
    if mode not in record:
        return [f"{mode}: {MISSING}."]
    results = record[mode]
    table = [(mode, *(cell for name in results for cell in (f"{LABELS[name]}, ms", "MiB")))]
    by = record["settings"].get("by", "tokens")
    for tokens in record["settings"]["tokens"]:
        points = (row["points"].get(str(tokens)) for row in results.values())
        named = place(by, tokens).removesuffix(" tokens")
        table.append((named, *(cell for point in points for cell in point_cells(point))))
    slopes = (cell for row in results.values() for cell in slope_cells(row))
    table.append((f"slope from {FIT_FROM[by]} up", *slopes))
    stopped = [f"{LABELS[name]} at {row['stopped']}" for name, row in results.items() if "stopped" in row]
    return [table, *([f"Stopped: {'; '.join(stopped)}."] if stopped else [])]


def place(by: str, n: int) -> str:
    return f"{n} frame{'s' * (n > 1)}" if by == "frames" else f"{n} + {n} tokens"


def point_cells(point: dict | None) -> tuple[str, str]:
    if point is None:
        return "-", "-"
    memory = f"{point['memory_bytes'] / 2**20:,.1f}"
    return (spread(point["seconds"], ",.1f", 1e3) if "seconds" in point else point["failed"]), memory


def slope_cells(row: dict) -> tuple[str, str]:
    if "time_slope" not in row:
        return "-", "-"
    return spread(row["time_slope"], ".2f"), f"{row['memory_slope']:.2f}"


def summary(record: dict) -> str:
    """How one dense block grows, in a few sentences."""
    block, limit = record["forward"]["dense"], record["settings"]["memory_limit"]
    stopped = [row["stopped"].split(":")[0] for row in record["forward"].values() if "stopped" in row]
    ends = f" ({' and '.join(sorted(stopped))}, at a limit of {limit:g} GiB)" if stopped else ""
    return (
        f"One dense block alone, from {place('tokens', FIT_FROM['tokens'])} up: time grows as the tokens to "
        f"the power {spread(block['time_slope'], '.2f')}, memory to the power {block['memory_slope']:.2f}; "
        f"with pairs stored both grow as the square, until memory ends{ends}."
        f"{largest_common(record['forward'])}"
    )


def largest_common(rows: dict) -> str:
    """Exact fusion beside stored pair tokens, at the largest number of tokens that both can do."""
    exact, stored = rows["dense"]["points"], rows.get("materialized", {}).get("points", {})
    common = [n for n, point in stored.items() if "seconds" in point and "seconds" in exact.get(n, {})]
    if not common:
        return ""
    tokens = max(common, key=int)
    (ms, mib), (stored_ms, stored_mib) = (point_cells(points[tokens]) for points in (exact, stored))
    return (
        f" At {tokens} + {tokens}, the most that stored pair tokens can do here, exact fusion takes {ms} ms "
        f"and {mib} MiB, and they take {stored_ms} ms and {stored_mib} MiB."
    )


def numbers(record: dict) -> dict[str, float]:
    """What budgets are about: how far the slopes of exact dense fusion are from 1."""
    values = {}
    for mode in MODES:
        dense = record.get(mode, {}).get("dense", {})
        if "time_slope" in dense:
            values[f"{mode} time"] = abs(dense["time_slope"]["median"] - 1)
            values[f"{mode} memory"] = abs(dense["memory_slope"] - 1)
    return values


if __name__ == "__main__":
    measure.run(main, Options)
