"""Attention over all pairs alone: time of every implementation against the bytes and arithmetic it takes."""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
import tyro
from measure import (
    DTYPES,
    RESULTS,
    GpuClock,
    WallClock,
    asked_for,
    begin_record,
    cache_flush,
    ceilings,
    device_and_dtype,
    limit_memory,
    print_table,
    quantiles,
    relative_error,
    time_rounds,
    write_record,
)
from torch import Tensor

from avfuse import pair_attention

SHAPES = {"paper": (196, 96), "pretraining": (49, 19), "long": (4096, 4096)}  # image and audio tokens
QUERIES = 4  # whose outputs are compared, of one head of one clip
NAMES = ("query", "image_key", "image_value", "audio_key", "audio_value")

Shape = Literal["paper", "pretraining", "long"]
Mode = Literal["forward", "backward", "both"]
RowName = Literal["avfuse", "reference", "sdpa", "xformers", "compiled"]


@dataclass(frozen=True)
class Options:
    """`avfuse.pair_attention` against other ways to compute it: forward, backward, and both.

    Rows: avfuse (the backend it picks here); reference (every pair stored); sdpa (two calls of
    scaled_dot_product_attention and their sum); xformers, where it is installed; compiled (torch.compile of
    sdpa). Every row is first compared with a float64 softmax over all pairs on the same inputs, output and
    gradients; one that disagrees gets no time.

    Times are wall time per call, launches included, and on a GPU also GPU time; each with a warm cache
    (inputs were just used) and a cold one (a buffer larger than the cache was written in between). The floor
    is what the bytes that must move, or the multiplications, take at the speeds of a large copy and a large
    matrix product measured in the same run.
    """

    rows: tuple[RowName, ...] = ("avfuse", "reference", "sdpa", "xformers", "compiled")
    shapes: tuple[Shape, ...] = ("paper", "pretraining", "long")
    """Image and audio tokens: the paper's 196 + 96, 49 + 19 left by its masks, and 4096 + 4096."""
    modes: tuple[Mode, ...] = ("forward", "backward", "both")
    batch: int | None = None
    """Clips. Default: 64 on a GPU, 2 on a CPU."""
    heads: int = 12
    fusion_tokens: int = 16
    key_width: int = 16
    """K, per head; the paper's."""
    value_width: int = 16
    """V, per head; the paper's."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Default: float32 on a CPU, bfloat16 on a GPU."""
    device: Literal["cpu", "cuda"] | None = None
    """Default: the GPU if there is one."""
    seconds: float = 15.0
    """How long each shape is timed; five rounds at least."""
    memory_limit: float = 8.0
    """GiB that may be allocated: where the reference needs more, it says so."""
    note: str = ""
    """Kept with the results, such as what else the machine was doing."""
    out: Path | None = None
    """File for the results. Default: benchmarks/results/pair_attention-DEVICE.json."""


def main(options: Options) -> dict:
    chosen = device_and_dtype(options.device, options.dtype)
    device = chosen["device"]
    options = replace(
        options,
        **chosen,
        batch=options.batch or (64 if device == "cuda" else 2),
        out=options.out or RESULTS / f"pair_attention-{device}.json",
    )
    record = begin_record("pair_attention", asdict(options), options.note)
    limit_memory(device, options.memory_limit)
    record["ceilings"] = ceilings(device, DTYPES[options.dtype])
    record["shapes"] = {shape: measure_shape(options, shape, record["ceilings"]) for shape in options.shapes}
    write_record(options.out, record)
    return record


# --- the rows -----------------------------------------------------------------------------------------------


def sdpa(query, image_key, image_value, audio_key, audio_value):
    """The identity in two calls: attention to image tokens, plus attention to audio tokens."""
    image = F.scaled_dot_product_attention(query, image_key, image_value)
    return image + F.scaled_dot_product_attention(query, audio_key, audio_value)


def plain(query, image_key, image_value, audio_key, audio_value):
    """The same from matrix products and softmaxes: with `sdpa`, it tells what error the dtype brings."""
    scale = query.shape[-1] ** -0.5
    image = (query @ image_key.mT * scale).softmax(-1) @ image_value
    return image + (query @ audio_key.mT * scale).softmax(-1) @ audio_value


def implementation(row: RowName) -> Callable:
    if row == "sdpa":
        return sdpa
    if row == "compiled":
        torch._functorch.config.donated_buffer = False  # the backward alone is timed, again and again
        return torch.compile(sdpa, dynamic=False)
    return partial(pair_attention, backend=None if row == "avfuse" else row)


# --- whether a row computes what it should ------------------------------------------------------------------


def run_with_gradients(attend: Callable, inputs: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The output for the compared queries, and all gradients of the head they belong to."""
    output = attend(*inputs)
    grads = torch.autograd.grad(output, inputs, grad)
    seen = dict(zip(("output", *NAMES), (output, *grads), strict=True))
    return {
        name: tensor[0, 0, :QUERIES].double().cpu()
        if name in ("output", "query")
        else tensor[0, 0].double().cpu()
        for name, tensor in seen.items()
    }


def truth(inputs: list[Tensor], grad: Tensor) -> dict[str, Tensor]:
    """One softmax over all I x A pairs in float64 for each of the compared queries."""
    head = [tensor.detach()[0, 0].double().cpu().requires_grad_() for tensor in inputs]
    queries, image_key, image_value, audio_key, audio_value = head
    outputs, sums = [], [torch.zeros_like(tensor) for tensor in head]
    for query, query_grad in zip(range(QUERIES), grad[0, 0, :QUERIES].double().cpu(), strict=True):
        q = queries[query] * queries.shape[-1] ** -0.5
        logits = (image_key @ q)[:, None] + audio_key @ q  # (I, A)
        weights = logits.flatten().softmax(0).view_as(logits)
        output = weights.sum(1) @ image_value + weights.sum(0) @ audio_value
        for total, part in zip(sums, torch.autograd.grad(output, head, query_grad), strict=True):
            total += part
        outputs.append(output.detach())
    return dict(zip(("output", *NAMES), (torch.stack(outputs), sums[0][:QUERIES], *sums[1:]), strict=True))


def compare(ours: dict, theirs: list[dict], true: dict, dtype: torch.dtype) -> dict:
    """Errors, and whether every tensor is within twice the error of plain PyTorch in this dtype, and a
    rounding.
    """
    errors = {name: relative_error(ours[name], tensor) for name, tensor in true.items()}
    allowed = {
        name: 2 * max(relative_error(found[name], tensor) for found in theirs) + torch.finfo(dtype).eps
        for name, tensor in true.items()
    }
    return dict(agrees=all(errors[name] <= allowed[name] for name in true), errors=errors, allowed=allowed)


# --- one shape ----------------------------------------------------------------------------------------------


def measure_shape(options: Options, shape: Shape, ceiling: dict) -> dict:
    I, A = SHAPES[shape]
    B, H, F_, K, V = (
        options.batch,
        options.heads,
        options.fusion_tokens,
        options.key_width,
        options.value_width,
    )
    dtype = DTYPES[options.dtype]
    torch.manual_seed(0)
    sizes = ((F_, K), (I, K), (I, V), (A, K), (A, V))
    inputs = [torch.randn(B, H, *size, device=options.device).to(dtype).requires_grad_() for size in sizes]
    grad = torch.randn(B, H, F_, V, device=options.device).to(dtype)
    few = torch.zeros_like(grad)
    few[0, 0, :QUERIES] = grad[0, 0, :QUERIES]
    true, theirs = truth(inputs, few), [run_with_gradients(attend, inputs, few) for attend in (plain, sdpa)]

    rows, clocks = {}, {}
    for row in options.rows:
        attend = implementation(row)
        try:
            rows[row] = compare(run_with_gradients(attend, inputs, few), theirs, true, dtype)
        except ValueError as error:  # a backend that is not here
            rows[row] = dict(failed=str(error))
            continue
        except RuntimeError as error:
            if (asked := asked_for(error)) is None:
                raise
            rows[row] = dict(failed=asked)
            continue
        if rows[row]["agrees"]:
            clocks |= clocks_of(options, row, attend, inputs, grad)
    times = time_rounds(clocks, seconds=options.seconds, rounds=(5, 50), title=shape)
    work = {mode: count_work(options, shape, mode) for mode in options.modes}
    floors = {
        mode: max(moved / ceiling["copy_bytes_per_s"], flops / ceiling["matmul_flop_per_s"])
        for mode, (moved, flops) in work.items()
    }
    for (row, mode, clock), seconds in times.items():
        rows[row].setdefault("seconds", {}).setdefault(mode, {})[clock] = quantiles(seconds)
    result = dict(
        image_tokens=I,
        audio_tokens=A,
        bytes={mode: moved for mode, (moved, _) in work.items()},
        flop={mode: flops for mode, (_, flops) in work.items()},
        floor_seconds=floors,
        rows=rows,
    )
    print_shape(options, shape, result)
    return result


def clocks_of(options: Options, row: RowName, attend: Callable, inputs: list, grad: Tensor) -> dict:
    """Clocks by (row, mode, what they measure)."""
    flush, clocks = cache_flush(options.device), {}
    for mode, call in calls_of(attend, inputs, grad).items():
        if mode not in options.modes:
            continue
        clocks[row, mode, "wall, warm"] = WallClock(call, options.device, turn=0.02)
        if options.device == "cuda":
            clocks[row, mode, "GPU, warm"] = GpuClock(call)
            clocks[row, mode, "GPU, cold"] = GpuClock(call, before=flush)
        else:
            clocks[row, mode, "wall, cold"] = WallClock(call, options.device, before=flush)
    return clocks


def calls_of(attend: Callable, inputs: list, grad: Tensor) -> dict[Mode, Callable]:
    def forward():
        with torch.no_grad():
            attend(*inputs)

    def both():
        torch.autograd.grad(attend(*inputs), inputs, grad)

    output = attend(*inputs)
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True),
        "both": both,
    }


def count_work(options: Options, shape: Shape, mode: Mode) -> tuple[int, int]:
    """Bytes that must move once, and floating-point operations (a multiply-add is 2), by hand.

    Forward: queries, keys and values are read, the output written; logits (K) and weighted values (V).
    Backward: the inputs and the output's gradient are read, the inputs' gradients written; logits again (K),
    gradients of weights and values (2 V), of queries and keys (2 K).
    """
    I, A = SHAPES[shape]
    F_, K, V = options.fusion_tokens, options.key_width, options.value_width
    heads, size = options.batch * options.heads, DTYPES[options.dtype].itemsize
    inputs, output = F_ * K + (I + A) * (K + V), F_ * V
    moved = {"forward": inputs + output, "backward": 2 * inputs + output}
    flops = {"forward": 2 * F_ * (I + A) * (K + V), "backward": 2 * F_ * (I + A) * (3 * K + 2 * V)}
    parts = ("forward", "backward") if mode == "both" else (mode,)
    return heads * size * sum(moved[part] for part in parts), heads * sum(flops[part] for part in parts)


def print_shape(options: Options, shape: Shape, result: dict) -> None:
    I, A = SHAPES[shape]
    print(f"\n{shape}: {I} + {A} tokens, batch {options.batch}, {options.dtype}, microseconds (quartiles)")
    names = {
        name: None
        for row in result["rows"].values()
        for mode in row.get("seconds", {}).values()
        for name in mode
    }
    table = [("", *names, "of the floor")]
    for mode in options.modes:
        floor = result["floor_seconds"][mode]
        moved, flop = result["bytes"][mode] / 1e6, result["flop"][mode] / 1e6
        table.append(
            (f"{mode}: {moved:.1f} MB, {flop:.0f} MFLOP", *["" for _ in names], f"{1e6 * floor:.1f} us")
        )
        for label, row in result["rows"].items():
            if "seconds" not in row:
                why = row.get("failed") or f"disagrees, {row['errors']}"
                table.append(f"  {label}: {why}")
                continue
            found = row["seconds"][mode]
            cells = [
                f"{1e6 * q['median']:.0f} ({1e6 * q['q25']:.0f}-{1e6 * q['q75']:.0f})" for q in found.values()
            ]
            coldest = found.get("GPU, cold") or found["wall, cold"]
            table.append((f"  {label}", *cells, f"{coldest['median'] / floor:.1f} x"))
    print_table(table)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, prog="python benchmarks/pair_attention.py"))
    except ValueError as error:
        sys.exit(f"error: {error}")
