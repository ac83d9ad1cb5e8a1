"""Attention over all pairs alone: time of every implementation against the bytes and arithmetic it takes."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Literal

import measure
import torch
import torch.nn.functional as F
from tables import MISSING, spread, terminal
from torch import Tensor

from avfuse import pair_attention

SHAPES = {  # image and audio tokens
    "paper": (196, 96), "pretraining": (49, 19), "long": (4096, 4096), "video": (16 * 196, 400),
}  # fmt: skip
QUERIES = 4  # whose outputs are compared, of one head of one clip

Shape = Literal["paper", "pretraining", "long", "video"]
Variant = Literal["plain", "bias", "frames", "masks"]
Mode = Literal["forward", "backward", "both"]
RowName = Literal["avfuse", "reference", "sdpa", "xformers", "compiled"]


@dataclass(frozen=True)
class Options(measure.Options):
    """`avfuse.pair_attention` against other ways to compute it: forward, backward, and both.

    Rows: avfuse (the backend it picks here); reference (every pair stored); sdpa (two calls of
    scaled_dot_product_attention and their sum); xformers, where it is installed; compiled (torch.compile of
    sdpa). A pair bias joins the two softmaxes: only avfuse and the reference can do it. Every row is first
    compared with a float64 softmax over all pairs on the same inputs, output and gradients; one that
    disagrees gets no time.

    Times are wall time per call, launches included, and on a GPU also GPU time; each with a warm cache
    (inputs were just used) and a cold one (a buffer larger than the cache was written in between). The floor
    is what the bytes that must move, or the multiplications, take at the speeds of a large copy and a large
    matrix product measured in the same run.
    """

    rows: tuple[RowName, ...] = ("avfuse", "reference", "sdpa", "xformers", "compiled")
    shapes: tuple[Shape, ...] = ("paper", "pretraining", "long")
    """Image and audio tokens: the paper's 196 + 96, 49 + 19 left by its masks, 4096 + 4096, and 3136 + 400 of
    16 frames and 10 seconds."""
    variants: tuple[Variant, ...] = ("plain", "bias", "masks")
    """Without more; with a float32 pair bias (H, I, A) that all clips share, and its gradient; with one of
    frames, (H, S, A), S the largest number up to 16 that divides I; with masks that hide a quarter of
    the image and of the audio tokens."""
    modes: tuple[Mode, ...] = ("forward", "backward", "both")
    batch: int | None = None
    """Clips. Default: 64 on a GPU, 2 on a CPU."""
    heads: int = 12
    fusion_tokens: int = 16
    key_width: int = 16
    """K, per head; the paper's."""
    value_width: int = 16
    """V, per head; the paper's."""
    seconds: float = 15.0
    """How long each shape and variant is timed; five rounds at least."""
    memory_limit: float = 8.0
    """GiB that may be allocated: where the reference needs more, it says so."""


def main(options: Options) -> dict:
    options = options.on_device()
    options = replace(
        options,
        batch=options.batch or (64 if options.device == "cuda" else 2),
        out=options.out or measure.RESULTS / f"pair_attention-{options.device}.json",
    )
    record = measure.begin_record("pair_attention", asdict(options), options.note)
    measure.limit_memory(options.device, options.memory_limit)
    record["ceilings"] = measure.ceilings(options.device, measure.DTYPES[options.dtype])
    record["shapes"] = {}
    for name, shape, variant in cells(options.shapes, options.variants):
        record["shapes"][name] = measure_shape(options, shape, variant, record["ceilings"])
        written = measure.write_record(options.out, record)["shapes"][name]
        print(f"\n{name}: batch {options.batch}, {options.dtype}, microseconds (quartiles)")
        print(terminal([floor_line(written), *shape_parts(name, written)]))
    return record


def cells(shapes: Iterable[Shape], variants: Iterable[Variant]) -> Iterator[tuple[str, Shape, Variant]]:
    """What is measured, in this order, by the name that results have for it. No bias of 4096 x 4096 pairs:
    one call would take as long as all others.
    """
    for variant, shape in itertools.product(variants, shapes):
        if (shape, variant) == ("long", "bias"):
            continue
        yield shape if variant == "plain" else f"{shape}, {variant}", shape, variant


# --- the rows -----------------------------------------------------------------------------------------------


def sdpa(query, image_key, image_value, audio_key, audio_value, image_mask=None, audio_mask=None):
    """The identity in two calls: attention to image tokens, plus attention to audio tokens."""
    image_mask, audio_mask = for_scores(image_mask), for_scores(audio_mask)
    image = F.scaled_dot_product_attention(query, image_key, image_value, attn_mask=image_mask)
    return image + F.scaled_dot_product_attention(query, audio_key, audio_value, attn_mask=audio_mask)


def plain(query, image_key, image_value, audio_key, audio_value, image_mask=None, audio_mask=None):
    """The same from matrix products and softmaxes: with `sdpa`, it shows what error the dtype brings."""
    scale = query.shape[-1] ** -0.5
    image, audio = query @ image_key.mT * scale, query @ audio_key.mT * scale
    if image_mask is not None:
        image = image.masked_fill(~for_scores(image_mask), -torch.inf)
        audio = audio.masked_fill(~for_scores(audio_mask), -torch.inf)
    return image.softmax(-1) @ image_value + audio.softmax(-1) @ audio_value


def for_scores(mask: Tensor | None) -> Tensor | None:
    """(B, N) -> (B, 1, 1, N)"""
    return None if mask is None else mask[:, None, None]


def implementation(row: RowName, variant: Variant) -> Callable:
    if variant in ("bias", "frames") and row in ("sdpa", "compiled"):
        raise ValueError("a pair bias joins the two softmaxes, which two calls cannot do")
    if row == "sdpa":
        return sdpa
    if row == "compiled":
        torch._functorch.config.donated_buffer = False  # the backward alone is timed, again and again
        return torch.compile(sdpa, dynamic=False)
    return partial(pair_attention, backend=None if row == "avfuse" else row)


# --- whether a row computes what it should ------------------------------------------------------------------


def make_tensors(options: Options, shape: Shape, variant: Variant) -> tuple[dict[str, Tensor], Tensor]:
    """What pair_attention is called with, by argument, and the gradient of its output."""
    I, A = SHAPES[shape]
    B, H, dtype = options.batch, options.heads, measure.DTYPES[options.dtype]
    F_, K, V = options.fusion_tokens, options.key_width, options.value_width
    torch.manual_seed(0)

    def random(*size, dtype=dtype):
        return torch.randn(*size, device=options.device).to(dtype)

    tensors = dict(
        query=random(B, H, F_, K),
        image_key=random(B, H, I, K),
        image_value=random(B, H, I, V),
        audio_key=random(B, H, A, K),
        audio_value=random(B, H, A, V),
    )
    grad = random(B, H, F_, V)
    if rows := bias_rows(I, variant):
        tensors["pair_bias"] = random(H, rows, A, dtype=torch.float32)
    for tensor in tensors.values():
        tensor.requires_grad_()
    if variant == "masks":
        tensors |= {
            name: torch.rand(B, n, device=options.device) > 0.25
            for name, n in (("image_mask", I), ("audio_mask", A))
        }
    return tensors, grad


def bias_rows(I: int, variant: Variant) -> int:
    """Those of a pair bias: of image tokens, or of frames of them; 0 without one."""
    return {"bias": I, "frames": max(n for n in range(1, 17) if I % n == 0)}.get(variant, 0)


def learned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}


def head_of(name: str, tensor: Tensor) -> Tensor:
    """The part that belongs to the first head of the first clip."""
    return tensor[0] if name in ("pair_bias", "image_mask", "audio_mask") else tensor[0, 0]


def run_with_gradients(attend: Callable, tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    """The output for the compared queries, and all gradients of the head they belong to."""
    output, inputs = attend(**tensors), learned(tensors)
    grads = torch.autograd.grad(output, list(inputs.values()), grad)
    whole = {"output": output} | dict(zip(inputs, grads, strict=True))
    head = {name: head_of(name, tensor).double().cpu() for name, tensor in whole.items()}
    return head | {name: head[name][:QUERIES] for name in ("output", "query")}


def over_all_pairs(tensors: dict[str, Tensor], grad: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in another dtype, from one softmax over all I x A pairs for each of the compared queries."""
    head = {name: head_of(name, tensor).detach() for name, tensor in tensors.items()}
    inputs = {name: head[name].to(dtype).requires_grad_() for name in learned(tensors)}
    head |= inputs
    outputs, sums = [], {name: torch.zeros_like(tensor) for name, tensor in inputs.items()}
    for query, query_grad in zip(head["query"][:QUERIES], grad[0, 0].to(dtype), strict=False):
        query = query * query.shape[-1] ** -0.5
        logits = (head["image_key"] @ query)[:, None] + head["audio_key"] @ query  # (I, A)
        if "pair_bias" in head:
            logits = logits + head["pair_bias"].repeat_interleave(len(logits) // len(head["pair_bias"]), 0)
        if "image_mask" in head:
            logits = logits.masked_fill(~(head["image_mask"][:, None] & head["audio_mask"]), -torch.inf)
        weights = logits.flatten().softmax(0).view_as(logits)
        output = weights.sum(1) @ head["image_value"] + weights.sum(0) @ head["audio_value"]
        for name, part in zip(inputs, torch.autograd.grad(output, inputs.values(), query_grad), strict=True):
            sums[name] += part
        outputs.append(output.detach())
    compared = sums | dict(output=torch.stack(outputs), query=sums["query"][:QUERIES])
    return {name: tensor.double().cpu() for name, tensor in compared.items()}


# --- one shape ----------------------------------------------------------------------------------------------


def measure_shape(options: Options, shape: Shape, variant: Variant, ceiling: dict) -> dict:
    tensors, grad = make_tensors(options, shape, variant)
    few = torch.zeros_like(grad)
    few[0, 0, :QUERIES] = grad[0, 0, :QUERIES]
    truth, dtype = over_all_pairs(tensors, few, torch.float64), measure.DTYPES[options.dtype]
    if "pair_bias" in tensors:
        plains = [over_all_pairs(tensors, few, dtype)]
    else:
        plains = [run_with_gradients(attend, tensors, few) for attend in (plain, sdpa)]
    rows, clocks = {}, {}
    for row in options.rows:
        try:
            attend = implementation(row, variant)
            with measure.memory_errors():
                ours = run_with_gradients(attend, tensors, few)
        except (ValueError, MemoryError) as error:  # what this row cannot do, here or at all
            rows[row] = dict(failed=str(error))
            continue
        rows[row] = measure.agreement(ours, truth, plains, dtype)
        measure.print_agreement(row, rows[row])
        if rows[row]["agrees"]:
            clocks |= clocks_of(options, row, attend, tensors, grad)
    times = measure.time_rounds(clocks, seconds=options.seconds, rounds=(5, 50), title=f"{shape}, {variant}")
    for (row, mode, clock), seconds in times.items():
        rows[row].setdefault("seconds", {}).setdefault(mode, {})[clock] = measure.quantiles(seconds)
    moved, flop = (
        {mode: count(options, shape, variant, mode) for mode in options.modes}
        for count in (count_bytes, count_flop)
    )
    floors = {
        mode: max(moved[mode] / ceiling["copy_bytes_per_s"], flop[mode] / ceiling["matmul_flop_per_s"])
        for mode in options.modes
    }
    I, A = SHAPES[shape]
    return dict(image_tokens=I, audio_tokens=A, bytes=moved, flop=flop, floor_seconds=floors, rows=rows)


def clocks_of(options: Options, row: RowName, attend: Callable, tensors: dict, grad: Tensor) -> dict:
    """Clocks by (row, mode, what they measure)."""
    more_than_caches = 2**28 if options.device == "cuda" else 2**25
    flush = torch.empty(more_than_caches, dtype=torch.uint8, device=options.device).zero_
    clocks = {}
    for mode, call in calls_of(attend, tensors, grad).items():
        if mode not in options.modes:
            continue
        clocks[row, mode, "wall, warm"] = measure.WallClock(call, options.device, turn=0.02)
        if options.device == "cuda":
            clocks[row, mode, "GPU, warm"] = measure.GpuClock(call)
            clocks[row, mode, "GPU, cold"] = measure.GpuClock(call, before=flush)
        else:
            clocks[row, mode, "wall, cold"] = measure.WallClock(call, options.device, before=flush)
    return clocks


def calls_of(attend: Callable, tensors: dict, grad: Tensor) -> dict[Mode, Callable]:
    inputs = list(learned(tensors).values())

    def forward():
        with torch.no_grad():
            attend(**tensors)

    def both():
        torch.autograd.grad(attend(**tensors), inputs, grad)

    output = attend(**tensors)
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(output, inputs, grad, retain_graph=True),
        "both": both,
    }


# --- floors, counted by hand --------------------------------------------------------------------------------


def count_bytes(options: Options, shape: Shape, variant: Variant, mode: Mode) -> int:
    """Bytes that must move once. Forward: queries, keys and values are read, the output written. Backward:
    these and the output's gradient are read, their gradients written. A pair bias, float32 and shared by the
    clips, is read in both and its gradient written. Masks of one byte a token are read in both.
    """
    I, A = SHAPES[shape]
    F_, K, V = options.fusion_tokens, options.key_width, options.value_width
    heads, size = options.batch * options.heads, measure.DTYPES[options.dtype].itemsize
    inputs, output = heads * size * (F_ * K + (I + A) * (K + V)), heads * size * F_ * V
    bias = 4 * options.heads * bias_rows(I, variant) * A
    masks = options.batch * (I + A) if variant == "masks" else 0
    moved = {"forward": inputs + output + bias + masks, "backward": 2 * (inputs + bias) + output + masks}
    return sum(moved.values()) if mode == "both" else moved[mode]


def count_flop(options: Options, shape: Shape, variant: Variant, mode: Mode) -> int:
    """Floating-point operations, a multiply-add being 2. Forward: logits (K) and weighted values (V).
    Backward: logits again (K), gradients of weights and values (2 V), of queries and keys (2 K). With a pair
    bias, for every query and entry: forward the marginals of both modalities; backward these again, their
    gradients, and two products that add up the gradient of the bias. Hidden tokens are computed, too.
    """
    I, A = SHAPES[shape]
    K, V = options.key_width, options.value_width
    pairs = bias_rows(I, variant) * A
    forward, backward = (I + A) * (K + V) + 2 * pairs, (I + A) * (3 * K + 2 * V) + 6 * pairs
    products = {"forward": forward, "backward": backward, "both": forward + backward}
    return 2 * options.batch * options.heads * options.fusion_tokens * products[mode]


# --- tables -------------------------------------------------------------------------------------------------


def tables(record: dict) -> list:
    copy, matmul = record["ceilings"].values()
    settings = record["settings"]
    parts = [
        f"Batch {settings['batch']}, {settings['dtype']}, {settings['heads']} heads, "
        f"{settings['fusion_tokens']} queries, K = {settings['key_width']}, V = "
        f"{settings['value_width']}; this machine copies {copy / 1e9:.1f} GB/s and multiplies "
        f"{matmul / 1e9:.0f} GFLOP/s. Microseconds:"
    ]
    for name, *_ in cells(settings["shapes"], settings.get("variants", ["plain"])):
        shape = record["shapes"].get(name)
        parts += shape_parts(name, shape) if shape else [f"{name}: {MISSING}."]
    return parts


def shape_parts(name: str, shape: dict) -> list:
    """A row for each mode and implementation, with the time of every clock; and which have none, and why."""
    _, _, variant = name.partition(", ")
    title = {"": "", "bias": ", pair bias", "frames": ", bias of frames", "masks": ", masks"}[variant]
    timed = {row: result for row, result in shape["rows"].items() if "seconds" in result}
    modes = (mode for result in timed.values() for mode in result["seconds"].values())
    clocks = list(dict.fromkeys(clock for mode in modes for clock in mode))
    table = [(f"{shape['image_tokens']} + {shape['audio_tokens']}{title}", "", *clocks, "of the floor")]
    for mode, floor in shape["floor_seconds"].items():
        for row, result in timed.items():
            seconds = result["seconds"][mode]
            cells = (spread(seconds[clock], ",.0f", 1e6) for clock in clocks)
            coldest = seconds.get("GPU, cold") or seconds["wall, cold"]
            table.append((row, mode, *cells, f"{coldest['median'] / floor:.1f} x"))
    untimed = [
        f"{row}: {result.get('failed', 'disagrees')}."
        for row, result in shape["rows"].items()
        if row not in timed
    ]
    return [table, *(["Without a time: " + " ".join(untimed)] if untimed else [])]


def floor_line(shape: dict) -> str:
    """What the floors come from."""
    floors = []
    for mode, floor in shape["floor_seconds"].items():
        moved, flop = shape["bytes"][mode] / 1e6, shape["flop"][mode] / 1e6
        floors.append(f"{mode} {1e6 * floor:.1f} us ({moved:.1f} MB, {flop:.0f} MFLOP)")
    return f"floors: {', '.join(floors)}"


def numbers(record: dict) -> dict[str, float]:
    """What budgets are about, forward and backward together: the time over that of two calls of SDPA at the
    paper's shape (warm), as the host and as the GPU sees it, and the GPU's over the floor (cold) by shape.
    """
    values = {}
    for shape, result in record["shapes"].items():
        ours, theirs = (
            result["rows"].get(row, {}).get("seconds", {}).get("both", {}) for row in ("avfuse", "sdpa")
        )
        for clock in ours.keys() & theirs.keys():
            values[f"{shape} {clock} over SDPA"] = ours[clock]["median"] / theirs[clock]["median"]
        if "GPU, cold" in ours:
            values[f"{shape} over the floor"] = ours["GPU, cold"]["median"] / result["floor_seconds"]["both"]
    return values


if __name__ == "__main__":
    measure.run(main, Options)
