"""Compile every kernel variant for a GPU that need not be there, and print what it takes.

    python benchmarks/kernel_resources.py 80 90           # compute capability 8.0 (A100) and 9.0 (H100)
    python benchmarks/kernel_resources.py 100 120         # and 10.0 (B200) and 12.0 (RTX 50)
    python benchmarks/kernel_resources.py 80 90 --few     # a few of them, in a minute
    python benchmarks/kernel_resources.py 120 masks norm  # those with these words in the column of options

Kernels are launched as usual, on tensors without memory, at ViT-B's shapes; only, the launch stops once the
kernel is compiled. STACK above 0 means that registers were spilled to memory, UNEVEN above 0 that lanes which
add up one sum may round it differently, and leave different numbers in one place. Of norms, K is the width of
a token.
"""

import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from avfuse.kernels import biased_pair_attention, blocked_pair_attention, pair_attention, residual_norm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
DTYPES = (torch.bfloat16, torch.float32)
SIZES = (  # F, K, V
    (16, 16, 16), (32, 64, 64), (16, 64, 64), (32, 16, 16), (16, 16, 64), (32, 32, 32), (16, 32, 32),
)  # fmt: skip
BOTH = "image", "audio"
COLUMNS = "sm dtype B F K V options kernel REG STACK SHARED UNEVEN"


def compiled(capability: int, launch) -> list:
    """The kernels that `launch` launches, as (name, compiled kernel)."""
    run, kernels = JITFunction.run, []

    def stop_before_launch(kernel, *args, grid, warmup, **options):
        kernels.append((kernel.__name__, run(kernel, *args, grid=grid, warmup=True, **options)))

    driver = SimpleNamespace(  # in place of Triton's: says which GPU to compile for
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
    )
    triton.runtime.driver.set_active(driver)
    JITFunction.run = stop_before_launch
    try:
        launch()
    finally:
        JITFunction.run = run
    return kernels


def resources(kernel) -> tuple[int, int, int, int]:
    """Registers and stack of a thread, shared memory of a program in bytes, and what `uneven` counts."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout
            for what in ("-res-usage", "-sass")
        )
    registers, stack = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK"))
    return registers, stack, kernel.metadata.shared, uneven(code)


def uneven(code: str) -> int:
    """Products that are fused with what another lane has: of two lanes that add each other's product to their
    own, each rounds the other's alone.
    """
    count, others = 0, set()  # registers with what came from another lane
    for guard, operation, operands in re.findall(r"\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);", code):
        registers = [int(number) for number in re.findall(r"\bR(\d+)", operands)]
        if operation.startswith("FFMA") and re.search(r"\bR\d+(\.reuse)? *$", operands):
            count += registers[-1] in others
        if operation.startswith(("BRA", "BSYNC", "EXIT")):
            others.clear()
        elif registers and not guard and not re.match(r"ST|.?[A-Z]SETP|LDGSTS", operation):
            two, four = (re.search(what, operation) for what in (r"\.64|WIDE", r"\.128|HMMA|LDSM"))
            written = 4 if four else 2 if two else 1
            others -= set(range(registers[0], registers[0] + written))
        if operation.startswith("SHFL.BFLY"):
            others.add(registers[0])
    return count


def attend(dtype, B, F, N, K, V, masks=(), bias=None, blocks=None):
    """Forward and backward on tensors without memory, of the strides that projections produce, of which the
    modalities in `masks` have one. The bias is of so many clips, and of pairs of an audio token and an image
    token, or so many blocks of them.
    """

    def tokens(count, width):
        return torch.empty(B, count, 12, width, dtype=dtype, device="meta").transpose(1, 2)

    tensors = [tokens(*size) for size in ((F, K), (N, K), (N, V), (N // 2, K), (N // 2, V))]
    sizes = dict(image=N, audio=N // 2)
    of_one = {name: torch.empty(B, sizes[name], dtype=torch.bool, device="meta") for name in masks}
    inputs = *tensors, *map(of_one.get, sizes)
    if bias is None:
        pair_attention.forward(*inputs, 0.25)
        pair_attention.backward(tokens(F, V), *inputs, 0.25)
    else:
        kernels = biased_pair_attention if blocks is None else blocked_pair_attention
        bias = torch.empty(bias, 12, blocks or N, N // 2, device="meta")
        kernels.forward(*inputs, bias, 0.25)
        kernels.backward(tokens(F, V), *inputs, bias, 0.25, True)


def norm(dtype, B, F, N, K, sums=torch.float32):
    """Forward and backward of a sum and norm of this dtype, of tokens in the dtype of `sums`."""

    def tokens(count, dtype):
        return torch.empty(B, count, K, dtype=dtype, device="meta")

    total, context, update = tokens(N, sums), tokens(F, sums), tokens(N, dtype)
    weight = torch.empty(K, device="meta")
    residual_norm.forward(total, update, context, weight, weight, 1e-6, dtype)
    own_dtype = None if dtype == sums else dtype
    inputs = tokens(F + N, dtype), total, total, context, weight, 1e-6, own_dtype, True, 256
    residual_norm.backward(*inputs)


def variants(few):
    """(options, what to print of them): the paper's widths at B=64, long sequences at B=1, a pair bias (of
    which the paper knows nothing: in float32 at widths of 64 its backward spills 8 bytes on 9.0), and one of
    frames, whole or the kept quarter of them; and norms.
    """
    frames = dict(F=16, N=16 * 196, masks=BOTH, bias=1, blocks=16)
    kept = dict(F=16, N=8 * 49, bias=1, blocks=8)
    for dtype in DTYPES:
        for F, K, V in SIZES[: 2 if few else None]:
            yield dict(dtype=dtype, B=64, F=F, N=196, K=K, V=V, masks=BOTH), "masks"
        if few and dtype == torch.float32:  # whose kernels of a bias take longest to compile
            continue
        yield dict(dtype=dtype, B=1, F=16, N=4096, K=16, V=16), "split"
        for width in (16,) if few or dtype == torch.float32 else (16, 64):
            yield dict(dtype=dtype, B=64, F=16, N=196, K=width, V=width, masks=BOTH, bias=1), "bias+masks"
        if not few:
            yield dict(dtype=dtype, B=64, F=16, N=196, K=32, V=32), "-"
            yield dict(dtype=dtype, B=64, F=16, N=196, K=16, V=16), "-"
            yield dict(dtype=dtype, B=64, F=16, N=196, K=16, V=16, bias=1), "bias"
            yield dict(dtype=dtype, B=1, F=16, N=784, K=16, V=16, bias=1), "bias+split"
    for dtype in DTYPES[:1] if few else (*DTYPES, torch.float16):
        yield dict(dtype=dtype, B=2, K=16, V=16) | frames | dict(masks=("audio",)), "frames+mask"
        if not few:
            yield dict(dtype=dtype, B=2, K=16, V=16) | frames | dict(masks=("image",)), "frames+mask"
            yield dict(dtype=dtype, B=2, K=16, V=16) | frames, "frames+masks"
            yield dict(dtype=dtype, B=64, K=16, V=16) | kept, "frames"
            yield dict(dtype=dtype, B=64, K=16, V=16) | kept | dict(F=32), "frames"
            yield dict(dtype=dtype, B=64, K=64, V=64) | frames, "frames+masks"
            yield dict(dtype=dtype, B=2, K=64, V=64) | kept, "frames"
    for width in (768,) if few else (192, 384, 768, 1024, 1280):
        for dtype in DTYPES:
            yield dict(dtype=dtype, B=64, F=16, N=49, K=width), "norm"
        if not few:
            yield dict(dtype=torch.bfloat16, B=64, F=16, N=49, K=width, sums=torch.bfloat16), "norm"


def main():
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
        return
    few = "--few" in sys.argv
    words = {word for word in sys.argv[1:] if word != "--few" and not word.isdigit()}
    if unknown := words - {note for _, note in variants(few)}:
        sys.exit(f"no variant has these options: {', '.join(sorted(unknown))}")
    print(COLUMNS)
    for capability in [int(argument) for argument in sys.argv[1:] if argument.isdigit()] or (80, 90):
        for options, note in variants(few):
            if words and note not in words:
                continue
            call = partial(norm if note == "norm" else attend, **options)
            for name, kernel in compiled(capability, call):
                sizes = (str(options["dtype"])[6:], *(options.get(letter, "-") for letter in "BFKV"))
                print(capability, *sizes, note, name, *resources(kernel), flush=True)


if __name__ == "__main__":
    main()
