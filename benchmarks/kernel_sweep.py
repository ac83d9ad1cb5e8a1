"""The fastest settings of the kernels on this card, as a table that the kernels read (kernels/cards.py)."""

import functools
import itertools
import json
import math
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import kernel_check
import measure
import torch
import triton
from avfuse.kernels import biased_pair_attention, cards, pair_attention
from tables import terminal

MODULES = {"pair_attention": pair_attention, "biased_pair_attention": biased_pair_attention}
DEFAULTS = {name: module.settings for name, module in MODULES.items()}
SHAPES = {  # B, H, I, A: the paper's, what its masks leave, and long sequences of one clip, which are split
    "paper": (64, 12, 196, 96),
    "pretraining": (64, 12, 49, 19),
    "long": (1, 12, 4096, 4096),
    "tiny": (1, 1, 17, 9),
}
KINDS = (  # what has settings of its own, the most used first: kernel, dtype, queries, width
    ("pair_attention", "bfloat16", 16, 16),
    ("biased_pair_attention", "bfloat16", 16, 16),
    ("pair_attention", "bfloat16", 16, 64),
    ("pair_attention", "bfloat16", 32, 16),
    ("pair_attention", "float32", 16, 16),
    ("pair_attention", "bfloat16", 16, 32),
    ("biased_pair_attention", "float32", 16, 16),
    ("pair_attention", "float32", 16, 64),
    ("biased_pair_attention", "bfloat16", 16, 64),
)
GAIN = 0.95  # of the time of the defaults: what is not clearly faster is noise, and stays out


@dataclass(frozen=True)
class Options(measure.FileOptions):
    """Times every setting that a card may have of its own, forward and backward, in several shapes.

    Each is first compared with float64, output and gradients: one that is off, or does not launch, is out.
    The fastest over all shapes, if clearly faster than the defaults, comes into the table, settings-CARD.json
    beside the results; copied to kernels/settings/, the kernels launch with it on this card. A run that was
    interrupted goes on with the case in which it stopped.
    """

    small: bool = False
    """A rehearsal, also in Triton's interpreter: one tiny shape, two settings, float32."""


class Case(NamedTuple):
    kernel: str
    dtype: str
    queries: int
    width: int  # of keys and values
    backward: bool
    small: bool

    @property
    def name(self) -> str:
        return cards.name_of(self.kernel, self.backward, measure.DTYPES[self.dtype], self.queries, self.width)

    @property
    def shapes(self) -> list[str]:
        if self.small:
            return ["tiny"]
        split = ["long"] if self.kernel == "pair_attention" else []  # whose pairs would be too many
        return ["paper", "pretraining", *split]


def main(options: Options) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = options.out or measure.ROOT / f"runs/kernel_sweep-{device}.json"
    record = measure.begin_record("kernel_sweep", dict(device=device, small=options.small), options.note)
    record["cases"] = cases_of_before(out, record)
    kinds = [kind for kind in KINDS if kind[1:] == ("float32", 16, 16) or not options.small]
    for kind, backward in itertools.product(kinds, (False, True)):
        case = Case(*kind, backward, options.small)
        if case.name not in record["cases"]:
            found = measured(case, candidates(case))
            record["cases"][case.name] = dict(default=found[0], own=chosen(found), found=found)
            measure.write_record(out, record)
            write_table(out, record)
    print(terminal([rows(record)]))
    if wrong := [name for name, case in record["cases"].items() if "failed" in case["default"]]:
        raise ValueError(f"the defaults are wrong or do not launch: {', '.join(wrong)}")
    return record


def cases_of_before(out: Path, record: dict) -> dict:
    """What an interrupted run of the same commit on the same machine has measured."""
    if not out.exists() or not measure.is_certain(record["commit"]):
        return {}
    before = json.loads(out.read_text())
    same = all(before[name] == record[name] for name in ("commit", "machine", "versions", "settings"))
    return before["cases"] if same else {}


def candidates(case: Case) -> list[dict]:
    """The defaults, then everything else that a card may have."""
    sizes = 64, 12, case.queries, 196, 96, case.width, case.width
    dtype, default = measure.DTYPES[case.dtype], DEFAULTS[case.kernel]
    default = default(dtype, *sizes, backward=case.backward)
    default = {name: default[name] for name in cards.OWN}
    every = (dict(zip(cards.OWN, values, strict=True)) for values in itertools.product(*cards.OWN.values()))
    others = [own for own in every if cards.may_be_own(own) and own != default]
    if case.kernel == "biased_pair_attention":  # whose tiles are of pairs, and which loads nothing ahead
        others = [own for own in others if own["BLOCK_N"] <= 32 and own["num_stages"] == 1]
    return [default, *others[: 1 if case.small else None]]


# --- measuring ----------------------------------------------------------------------------------------------


def measured(case: Case, candidates: list[dict]) -> list[dict]:
    """Each with its error and times, or why it has none. All cores compile, then one process measures."""
    workers = len(os.sched_getaffinity(0))
    with suppress(BrokenProcessPool), ProcessPoolExecutor(workers, mp_context=measure.fork_server()) as pool:
        for own in candidates:  # what fails here fails again, and is told, where it is timed
            pool.submit(compile_for, case, own)
    try:
        return measure.in_fresh_process(measure_all, case, candidates)
    except MemoryError as error:  # the process is gone
        return [dict(own=own, failed=str(error)) for own in candidates]


def compile_for(case: Case, own: dict) -> None:
    for shape in case.shapes:
        call_of(case, shape, own)()


def measure_all(case: Case, candidates: list[dict]) -> list[dict]:
    return [measure_one(case, own) for own in candidates]


def measure_one(case: Case, own: dict) -> dict:
    result = dict(own=own, error=0.0, microseconds={})
    try:
        for shape in case.shapes:
            call = call_of(case, shape, own)
            pairs = zip(call(), truth_of(case, shape), strict=True)
            errors = [measure.relative_error(ours.double(), true) for ours, true in pairs]
            if not all(error <= kernel_check.ALLOWED[case.dtype] for error in errors):
                return dict(own=own, failed=f"off: {errors}")
            result["error"] = max(result["error"], *errors)
            result["microseconds"][shape] = round(1e6 * seconds_of(call), 2)
    except Exception as error:  # of Triton or CUDA, such as too little shared memory
        return dict(own=own, failed=f"{type(error).__name__}: {error}"[:200])
    return result


@functools.cache
def inputs_of(case: Case, shape: str) -> tuple[dict, torch.Tensor]:
    (B, H, I, A), width = SHAPES[shape], case.width
    sizes, bias = (
        (B, H, case.queries, I, A, width, width),
        "pairs" if case.kernel.startswith("biased") else None,
    )
    return kernel_check.make_inputs(*sizes, measure.DTYPES[case.dtype], bias=bias)


@functools.cache
def truth_of(case: Case, shape: str) -> list[torch.Tensor]:
    inputs, grad = inputs_of(case, shape)
    truth = kernel_check.run_with_gradients(inputs, grad, {}, "torch", torch.float64, grad.device)
    return list(truth.values())[1:] if case.backward else list(truth.values())[:1]


def call_of(case: Case, shape: str, own: dict) -> Callable:
    """What launches the kernels of one direction with these settings, and returns a list."""
    inputs, grad = inputs_of(case, shape)
    module, default, (*tensors,) = MODULES[case.kernel], DEFAULTS[case.kernel], inputs.values()
    tensors[5:5] = None, None  # no masks
    arguments, with_bias = (*tensors, case.width**-0.5), [True] * ("pair_bias" in inputs)
    module.settings = lambda *sizes, device, **way: default(*sizes, **way) | own
    if case.backward:
        return lambda: module.backward(grad, *arguments, *with_bias)
    return lambda: [module.forward(*arguments)]


def seconds_of(call: Callable) -> float:
    """In a CUDA graph, where no launch costs anything."""
    if not torch.cuda.is_available():
        return measure.WallClock(call, "cpu")()
    return triton.testing.do_bench_cudagraph(call, rep=5, return_mode="median") / 1e3


# --- the choice ---------------------------------------------------------------------------------------------


def chosen(found: list[dict]) -> dict | None:
    """The fastest, where it is clearly faster than the defaults, which come first."""
    default, *others = found
    right = [result for result in others if "failed" not in result]
    if not right or "failed" in default:
        return None
    best = min(right, key=lambda result: time_over(default, result))
    return best if time_over(default, best) < GAIN else None


def time_over(default: dict, result: dict) -> float:
    """The geometric mean over the shapes."""
    ratios = [time / default["microseconds"][shape] for shape, time in result["microseconds"].items()]
    return math.prod(ratios) ** (1 / len(ratios))


def write_table(out: Path, record: dict) -> None:
    card = record["machine"].get("gpu", "cpu")
    table = dict(card=card, triton=triton.__version__, commit=record["commit"], date=record["date"])
    own = {name: case["own"]["own"] for name, case in record["cases"].items() if case["own"]}
    path = out.with_name(f"settings-{card.lower().replace(' ', '-')}.json")
    measure.write_json(path, table | dict(settings=own))


def rows(record: dict) -> list[tuple]:
    table = [("microseconds", *cards.OWN, *SHAPES)]
    for name, case in record["cases"].items():
        for label, result in (name, case["default"]), ("  instead", case["own"]):
            if result:
                times = (result.get("microseconds", {}).get(shape, "-") for shape in SHAPES)
                table.append((label, *result["own"].values(), *times))
    return table


if __name__ == "__main__":
    measure.run(main, Options)
