"""Every kernel against float64, results and all gradients, on a few shapes.

Short enough to run under compute-sanitizer; compiling is most of its time, so cases go to several processes.
What it finds is gross, as from a kernel that was miscompiled; how precise the kernels are, the tests judge.
"""

import itertools
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Literal, NamedTuple

import measure
import torch
from torch import Tensor

from avfuse import pair_attention
from avfuse.ops.residual_norm import residual_norm

SHAPES = {  # B, H, F, I, A, K, V
    "tiny": (1, 1, 5, 17, 9, 16, 16),
    "kept": (2, 2, 16, 49, 19, 16, 16),
    "odd": (1, 3, 5, 70, 33, 16, 64),
    "wide": (1, 1, 33, 17, 130, 64, 64),
    "split": (1, 2, 16, 600, 600, 16, 16),
}
WIDTHS = (40, 768)  # of tokens that are added and normed
ALLOWED = {"bfloat16": 2e-2, "float16": 3e-3, "float32": 1e-4}  # norm of an error over that of the truth


@dataclass(frozen=True)
class Options:
    """The self-check of the kernels: each shape and dtype, with and without masks, without a pair bias, with
    one of all pairs, and with one of frames, as blocks of image tokens, and audio tokens, where a mask is of
    audio tokens alone. And norms.

    Without a GPU it needs Triton's interpreter (TRITON_INTERPRET=1), whose bfloat16 is wrong.
    """

    shapes: tuple[Literal[*SHAPES], ...] = tuple(SHAPES)
    dtypes: tuple[Literal[*ALLOWED], ...] = tuple(ALLOWED)
    truth_on: Literal["cuda", "cpu"] = "cuda"
    """Where float64 is computed if there is a GPU; compute-sanitizer would watch all of its kernels, too."""


class Case(NamedTuple):
    shape: str
    dtype: str
    masked: bool
    bias: Literal["pairs", "frames"] | None


class Norm(NamedTuple):
    width: int
    dtype: str


def main(options: Options) -> None:
    ways = (False, True), (None, "pairs", "frames")
    cases = [Case(*case) for case in itertools.product(options.shapes, options.dtypes, *ways)]
    cases += [Norm(*case) for case in itertools.product(WIDTHS, options.dtypes)]
    workers = min(math.ceil(len(cases) / 4), len(os.sched_getaffinity(0)))  # fewer cases are not worth one
    worst, off = dict.fromkeys(options.dtypes, 0.0), 0
    spawn = multiprocessing.get_context("spawn")  # compute-sanitizer loses sight of what is forked
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        for case, future in [(case, pool.submit(errors_of_case, case, options.truth_on)) for case in cases]:
            try:
                errors = future.result()
            except Exception as error:  # whatever a broken kernel does to its process
                errors = {f"{type(error).__name__}: {error}": math.inf}
            worst[case.dtype] = max(worst[case.dtype], *errors.values())
            if not all(error <= ALLOWED[case.dtype] for error in errors.values()):
                print(f"OFF: {case}: {errors}", flush=True)
                off += 1
    print(f"{len(cases) - off} of {len(cases)} cases agree; largest errors: {worst}")
    if off:
        sys.exit(1)


def errors_of_case(case: Case | Norm, truth_on: str = "cuda") -> dict[str, float]:
    """Relative errors of the results and of every gradient, by name."""
    truth_on = truth_on if torch.cuda.is_available() else "cpu"
    if isinstance(case, Norm):
        return errors_of_norm(case.width, measure.DTYPES[case.dtype], truth_on)
    inputs, grad = make_inputs(*SHAPES[case.shape], measure.DTYPES[case.dtype], bias=case.bias)
    masks = {}
    if case.masked:
        for name in ("image_mask", "audio_mask")[case.bias == "frames" :]:
            B, _, N, _ = inputs[name.replace("mask", "key")].shape
            masks[name] = torch.rand(B, N, device=grad.device) > 0.3
            masks[name][:, 0] = True
    ours = run_with_gradients(inputs, grad, masks, "triton", grad.dtype, grad.device)
    return compared(ours, run_with_gradients(inputs, grad, masks, "reference", torch.float64, truth_on))


def make_inputs(
    B, H, F, I, A, K, V, dtype: torch.dtype, *, bias: Literal["pairs", "frames"] | None
) -> tuple[dict[str, Tensor], Tensor]:
    """What pair_attention is called with, by argument, and the gradient of its output."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    sizes = dict(query=(F, K), image_key=(I, K), image_value=(I, V), audio_key=(A, K), audio_value=(A, V))
    # (B, N, H, width) in memory, as projections leave it
    inputs = {name: torch.randn(B, n, H, width).transpose(1, 2) for name, (n, width) in sizes.items()}
    if bias:
        frames = max(n for n in range(1, 17) if I % n == 0)
        inputs["pair_bias"] = torch.randn(1, H, frames if bias == "frames" else I, A)
    inputs = {name: tensor.to(device, dtype) for name, tensor in inputs.items()}
    return inputs, torch.randn(B, H, F, V).to(device, dtype)


def compared(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: measure.relative_error(ours[name].to(true.device, true.dtype), true)
        for name, true in truth.items()
    }


def run_with_gradients(inputs, grad, masks, backend: str, dtype: torch.dtype, device) -> dict[str, Tensor]:
    leaves = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in inputs.items()}
    grad, masks = grad.to(device, dtype), {name: mask.to(device) for name, mask in masks.items()}
    output = pair_attention(**leaves, **masks, backend=backend)
    grads = torch.autograd.grad(output, list(leaves.values()), grad)
    return {"output": output.detach(), **dict(zip(leaves, grads, strict=True))}


def errors_of_norm(width: int, dtype: torch.dtype, truth_on: str) -> dict[str, float]:
    """As in training under autocast, where tokens are float32: relative errors by name."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    shapes = dict(tokens=(3, 19, width), update=(3, 19, width), context=(3, 5, width))
    shapes |= dict(weight=(width,), bias=(width,))
    inputs = {name: torch.randn(shape, device=device) for name, shape in shapes.items()}
    inputs["update"] = inputs["update"].to(dtype)
    grads = torch.randn(3, 19, width, device=device), torch.randn(3, 24, width, device=device).to(dtype)

    def run(backend, device, dtype=None):
        leaves = {name: x.to(device, dtype or x.dtype).requires_grad_() for name, x in inputs.items()}
        results = residual_norm(**leaves, eps=1e-6, backend=backend)
        gradients = torch.autograd.grad(
            results, list(leaves.values()), [x.to(device, dtype or x.dtype) for x in grads]
        )
        return dict(zip(("total", "norm", *leaves), (*results, *gradients), strict=True))

    with torch.autocast(device, dtype, enabled=dtype.itemsize == 2):
        ours = run("triton", device)
    return compared(ours, run("torch", truth_on, torch.float64))


if __name__ == "__main__":
    measure.run(main, Options)
